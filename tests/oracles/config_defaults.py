"""What `transformers` makes of a config.json that leaves a field out or gives null, for tests/pretrained/test_family_config.py.

    PYTHON tests/oracles/config_defaults.py        PYTHON: an interpreter with transformers (no torch is needed)

Writes tests/oracles/config_defaults.json: for each family a config that names every field we read, and what changes in
the class's own `to_dict` where one of them is left out, or null ("refused": the class takes no null there).
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
# No value is a class's default, and the sizes divide one another whichever of them is left out.
GPT2 = {
    "vocab_size": 640,
    "n_positions": 64,
    "n_embd": 1536,
    "n_layer": 5,
    "n_head": 8,
    "n_inner": 96,
    "activation_function": "gelu_pytorch_tanh",
    "layer_norm_epsilon": 1e-3,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.03,
}
COMMON = {
    "vocab_size": 640,
    "max_position_embeddings": 64,
    "num_hidden_layers": 5,
    "hidden_size": 1536,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-3,
    "rope_theta": 12345.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.03,
    "hidden_act": "silu",
    "attention_bias": False,
}
GEMMA = {
    **COMMON,
    "tie_word_embeddings": False,
    "head_dim": 40,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 8,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 20.0,
    "final_logit_softcapping": 10.0,
}
QWEN = {**COMMON, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
EXPERTS = {"num_experts_per_tok": 3}
LATENT = {
    **COMMON,
    "num_key_value_heads": 32,
    "kv_lora_rank": 24,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 10,
    "v_head_dim": 12,
    "moe_intermediate_size": 28,
    "n_routed_experts": 32,
    "num_experts_per_tok": 3,
    "n_shared_experts": 4,
    "first_k_dense_replace": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
BASES = {
    "gpt2": GPT2,
    "llama": {**COMMON, "head_dim": 40, "mlp_bias": False},
    "mistral": {**COMMON, "head_dim": 40, "sliding_window": 8},
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 40},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "rope_local_base_freq": 2345.0, "sliding_window_pattern": 3},
    "olmo2": COMMON,
    "mixtral": {**COMMON, **EXPERTS, "head_dim": 40, "sliding_window": 8, "num_local_experts": 4},
    "qwen3_moe": {
        **QWEN,
        **EXPERTS,
        "head_dim": 40,
        "num_experts": 12,
        "moe_intermediate_size": 28,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "deepseek_v2": {
        **LATENT,
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "mlp_bias": False,
    },
    "deepseek_v3": {
        **LATENT,
        "norm_topk_prob": False,
        "rope_interleave": True,
        "num_nextn_predict_layers": 2,
    },
}


def read(family: str, settings: dict) -> dict | str:
    """The class's reading of a config.json; "refused" where it raises."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        made = AutoConfig.for_model(family, **json.loads(json.dumps(settings))).to_dict()
    except (StrictDataclassError, TypeError, ValueError):
        return "refused"
    return json.loads(json.dumps(made))


def changes(base: dict, other: dict | str) -> dict | str:
    """The values that differ in `other`, and under "gone" the names that it lacks."""
    if isinstance(other, str):
        return other
    changed = {name: value for name, value in other.items() if base.get(name) != value}
    gone = [name for name in base if name not in other]
    return changed | ({"gone": gone} if gone else {})


def record(family: str, given: dict) -> dict:
    base = read(family, given)
    left_out = {}
    null = {}
    for name in given:
        rest = {key: value for key, value in given.items() if key != name}
        left_out[name] = changes(base, read(family, rest))
        null[name] = changes(base, read(family, {**given, name: None}))
    kept = {}
    for name, value in base.items():
        if value is not None and name != "transformers_version":
            kept[name] = value
    return {"given": given, "read": kept, "left_out": left_out, "null": null}


def main() -> None:
    import transformers

    found = {family: record(family, given) for family, given in BASES.items()}
    text = json.dumps({"transformers": transformers.__version__, "families": found}, indent=None)
    (HERE / "config_defaults.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
