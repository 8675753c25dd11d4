"""The tables that translate config.json: each of its fields, our field, and each family's default.

Both directions use the same tables. A field without an entry in FIELDS, or whose entry is not read
directly, is translated by a line of family_config.py.
"""

from typing import Any, Literal, NamedTuple

# A field's row is its entries in two tables, here three fields of a Mixtral:
#
#   its config.json           FIELDS                       DEFAULTS["mixtral"]
#   "hidden_size"             ("embed_dim", "count")       4096
#   "num_local_experts"       ("moe.num_experts", "count") 8
#   "output_router_logits"    none                         False

# model_type -> class in `transformers`
FAMILIES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


class Field(NamedTuple):
    """What a field of config.json is in `ModelConfig`."""

    ours: str
    """Our field; "moe.num_experts" is a field of its `MoEConfig`."""
    kind: Literal["count", "count or null", "count from 0", "number", "number or null", "flag", ""]
    """How it is read; null is 0 with us. Empty: family_config.py reads it, and writing is direct."""


FIELDS = {
    "vocab_size": Field("vocab_size", "count"),
    "max_position_embeddings": Field("max_length", "count"),
    "num_hidden_layers": Field("num_layers", "count"),
    "hidden_size": Field("embed_dim", "count"),
    "num_attention_heads": Field("num_heads", "count"),
    # Null: as many as query heads, and hidden_size / num_attention_heads.
    "num_key_value_heads": Field("num_kv_heads", "count or null"),
    "head_dim": Field("head_dim", "count or null"),
    "intermediate_size": Field("mlp_dim", "count"),
    "rms_norm_eps": Field("norm_eps", "number"),
    "initializer_range": Field("init_std", "number"),
    # May be in another field as well (family_rope.py).
    "rope_theta": Field("rope_theta", ""),
    # Not every class reads both.
    "attention_bias": Field("bias", ""),
    "mlp_bias": Field("bias", ""),
    "tie_word_embeddings": Field("tie_embeddings", "flag"),
    # GPT-2 has its own names. n_inner null: 4 * n_embd.
    "n_positions": Field("max_length", "count"),
    "n_layer": Field("num_layers", "count"),
    "n_embd": Field("embed_dim", "count"),
    "n_head": Field("num_heads", "count"),
    "n_inner": Field("mlp_dim", "count or null"),
    "layer_norm_epsilon": Field("norm_eps", "number"),
    # Gemma; null: no cap.
    "attn_logit_softcapping": Field("attention_softcap", "number or null"),
    "final_logit_softcapping": Field("logit_softcap", "number or null"),
    # Mixtures of experts: three names for their number.
    "num_local_experts": Field("moe.num_experts", "count"),
    "num_experts": Field("moe.num_experts", "count"),
    "n_routed_experts": Field("moe.num_experts", "count"),
    "num_experts_per_tok": Field("moe.per_token", "count"),
    "moe_intermediate_size": Field("moe.mlp_dim", "count"),
    "norm_topk_prob": Field("moe.normalize", "flag"),
    "n_shared_experts": Field("moe.num_shared", "count from 0"),
    "routed_scaling_factor": Field("moe.scale", "number"),
    "first_k_dense_replace": Field("moe.first_dense", "count from 0"),
    # Read only if the router chooses groups first.
    "n_group": Field("moe.num_groups", ""),
    "topk_group": Field("moe.groups_per_token", ""),
    # DeepSeek's latent attention and its MTP modules. q_lora_rank null: queries are not compressed.
    "kv_lora_rank": Field("mla.kv_rank", "count"),
    "q_lora_rank": Field("mla.q_rank", "count or null"),
    "qk_nope_head_dim": Field("mla.nope_dim", "count"),
    "qk_rope_head_dim": Field("mla.rope_dim", "count"),
    "v_head_dim": Field("mla.value_dim", "count"),
    "num_nextn_predict_layers": Field("mtp_modules", "count from 0"),
}

# Defaults are those of the families' classes in `transformers` 5.24: a config.json may leave out
# what is its class's default. tests/oracles/config_defaults.json records them.
_LLAMA: dict[str, Any] = {
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 11_008,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
# Every other family but GPT-2 is described by its differences.
_MISTRAL = _LLAMA | {
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "sliding_window": 4096,
}
_MIXTRAL = _MISTRAL | {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
_QWEN2 = _LLAMA | {
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "intermediate_size": 22_016,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN3_MOE = _QWEN2 | {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
}
_GEMMA2 = _LLAMA | {
    "vocab_size": 256_000,
    "max_position_embeddings": 8192,
    "num_hidden_layers": 26,
    "hidden_size": 2304,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = _GEMMA2 | {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_DEEPSEEK_V2 = _LLAMA | {
    "vocab_size": 102_400,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": None,
    "moe_intermediate_size": 1407,
    "first_k_dense_replace": 0,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
_DEEPSEEK_V3 = _DEEPSEEK_V2 | {
    "vocab_size": 129_280,
    "max_position_embeddings": 4096,
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18_432,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 50_257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "olmo2": _LLAMA | {"vocab_size": 50_304, "rms_norm_eps": 1e-5},
    "mixtral": _MIXTRAL,
    "qwen3_moe": _QWEN3_MOE,
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
}
# Fields whose default is a value, and the families that give null its own meaning: no such part, or a
# value computed from other fields.
NULLABLE = {
    "sliding_window": {"mistral", "qwen2", "qwen3", "qwen3_moe"},
    "num_key_value_heads": {"qwen2", "qwen3", "deepseek_v3"},
    "attn_logit_softcapping": {"gemma2"},
    "final_logit_softcapping": {"gemma2"},
    "q_lora_rank": {"deepseek_v2", "deepseek_v3"},
    "norm_topk_prob": {"deepseek_v2", "deepseek_v3"},
    "num_nextn_predict_layers": {"deepseek_v3"},
}
# Other spellings that the classes accept: {family: {spelling: field}}.
ALIASES = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    "mixtral": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "deepseek_v2": {"num_experts": "n_routed_experts"},
    "deepseek_v3": {
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
    "gemma3_text": {"_sliding_window_pattern": "sliding_window_pattern"},
}
