"""config.json of the families as published, to and from ours. What is special about a family stands in `_special`."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jaxllm.config import InputError
from jaxllm.models.config import MLAConfig, ModelConfig
from jaxllm.models.moe import MoEConfig
from jaxllm.models.rope import RopeScaling
from jaxllm.pretrained.family_fields import Fields, positive

# model_type -> class in `transformers`, without ForCausalLM
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

_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}


def from_hf(config: Mapping[str, Any], where: str) -> tuple[ModelConfig, str]:
    """(our config, family) of a config.json. Raises InputError, naming file and field, on what is not known."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"{where}: model_type {family!r:.60} is not known; known: {', '.join(FAMILIES)}"
        )
    fields = Fields(config, family)
    try:
        model = ModelConfig(
            **(_gpt2(fields) if family == "gpt2" else _common(fields) | _special(fields))
        )
        _check_layer_types(fields, model)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    return model, family


def _check_layer_types(fields: Fields, model: ModelConfig) -> None:
    kinds = fields.items("layer_types")
    if kinds and len(kinds) != model.num_layers:
        raise ValueError(
            f"layer_types names {len(kinds)} layers of {model.num_layers}; mend one of them"
        )
    for number, kind in enumerate(kinds):
        if (kind == "sliding_attention") != model.windowed(number):
            raise ValueError(
                f"layer_types mixes windows in a way that is not known (layer {number} is {kind!r:.40})"
            )


def present(model: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """The model less the modules that no file has: a tuned model's config may still name them."""
    found = any(name.endswith("eh_proj.weight") for name in names)
    return model if found else dataclasses.replace(model, mtp_modules=0)


def _gpt2(fields: Fields) -> dict[str, Any]:
    fields.one_of("activation_function", "gelu_new", "gelu_pytorch_tanh")
    fields.one_of("scale_attn_by_inverse_layer_idx", False)
    fields.one_of("scale_attn_weights", True)
    width = fields.count("n_embd")
    return {
        "vocab_size": fields.count("vocab_size"),
        "max_length": fields.count("n_positions"),
        "num_layers": fields.count("n_layer"),
        "embed_dim": width,
        "num_heads": fields.count("n_head"),
        "mlp_dim": fields.count_or_none("n_inner") or 4 * width,
        "norm": "layernorm",
        "norm_eps": fields.number("layer_norm_epsilon"),
        "position": "learned",
        "mlp": "gelu",
        "bias": True,
        "tie_embeddings": fields.flag("tie_word_embeddings"),
        "dtype": _compute(fields),
    }


def _compute(fields: Fields) -> str:
    stored = fields.text_or_none("dtype") or fields.text_or_none("torch_dtype")
    return "float32" if stored == "float32" else "bfloat16"


def _common(fields: Fields) -> dict[str, Any]:
    gemma = fields.family.startswith("gemma")
    if gemma:
        fields.one_of("hidden_activation", "gelu_pytorch_tanh")
    else:
        fields.one_of("hidden_act", "silu")
    theta, scaling = _rope(fields, "full_attention", "rope_theta")
    heads = fields.count("num_attention_heads")
    return {
        "vocab_size": fields.count("vocab_size"),
        "max_length": fields.count("max_position_embeddings"),
        "num_layers": fields.count("num_hidden_layers"),
        "embed_dim": fields.count("hidden_size"),
        "num_heads": heads,
        "num_kv_heads": fields.count_or_none("num_key_value_heads") or heads,
        "head_dim": fields.count_or_none("head_dim") or 0,
        "mlp_dim": fields.count("intermediate_size"),
        "norm_eps": fields.number("rms_norm_eps"),
        "bias": _bias(fields),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "init_std": fields.number("initializer_range"),
        "tie_embeddings": fields.flag("tie_word_embeddings"),
        "dtype": _compute(fields),
    }


def _bias(fields: Fields) -> bool:
    """Whether all matrices have biases; families that do not read a field are not asked for it."""
    attention = fields.family not in ("mistral", "mixtral", "qwen2") and fields.flag(
        "attention_bias"
    )
    mlp = fields.family in ("llama", "deepseek_v2") and fields.flag("mlp_bias")
    if attention != mlp:
        raise ValueError("attention_bias and mlp_bias differ, which is not known")
    return attention


def _rope(fields: Fields, kind: str, theta_name: str) -> tuple[float, RopeScaling]:
    """Base and stretching of layers of this kind, in the spelling of `transformers` 4 or 5."""
    given = _rope_given(fields, kind)
    theta = positive(theta_name, given.get("rope_theta", fields.value(theta_name)))
    name = given.get("rope_type") or given.get("type") or "default"
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor: heads that are turned in part are not known")
    if name == "default":
        return theta, RopeScaling()
    if not isinstance(name, str) or name not in _SCALINGS:
        raise ValueError(
            f"rope type {name!r:.40} is not known; known: default, {', '.join(_SCALINGS)}"
        )
    if given.get("attention_factor") or not given.get("truncate", True):
        raise ValueError("rope: attention_factor and truncate are not known")
    if given.get("factor") is None:
        raise ValueError(f"rope_scaling has no factor, which type {name} needs; add it")
    scaling = {
        field: positive(f"rope_scaling.{field}", given[field]) for field in _numbers_of(given)
    }
    length = {} if name == "linear" else {"original_length": _length_before(fields, given)}
    return theta, RopeScaling(kind=name, **scaling, **length)  # pyright: ignore[reportArgumentType]


def _rope_given(fields: Fields, kind: str) -> dict[str, Any]:
    """What the config says about the rotary positions of layers of this kind."""
    old, new = fields.table("rope_scaling"), fields.table("rope_parameters")
    chosen = new.get(kind, {} if fields.family == "gemma3_text" else new)
    chosen = {} if chosen is None else chosen
    if not isinstance(chosen, Mapping):
        raise ValueError(f"rope_parameters.{kind} must be an object, not {chosen!r:.40}; mend it")
    if fields.family == "gemma3_text":
        return {**chosen, **(old if kind == "full_attention" else {})}
    return dict(old or chosen)


def _numbers_of(given: Mapping[str, Any]) -> list[str]:
    """The numbers that are given; an mscale of 0 is none."""
    names = dict.fromkeys(name for names in _SCALINGS.values() for name in names)
    empty = lambda name: given.get(name) is None or (name.startswith("mscale") and given[name] == 0)
    return [name for name in names if not empty(name)]


def _length_before(fields: Fields, given: Mapping[str, Any]) -> int:
    """The context's length before it was stretched."""
    length = Fields(given, fields.family).count_or_none("original_max_position_embeddings")
    return length or fields.count("max_position_embeddings")


def _special(fields: Fields) -> dict[str, Any]:
    family = fields.family
    special: dict[str, Any] = {}
    if family in ("mistral", "mixtral"):
        special = {"window": fields.count_or_none("sliding_window") or 0}
    elif family.startswith("qwen"):
        special = {"window": _qwen_window(fields)}
        special |= {"qkv_bias": True} if family == "qwen2" else {"qk_norm": "head"}
    elif family == "olmo2":
        special = {"norm_place": "after", "qk_norm": "all"}
    elif family.startswith("gemma"):
        special = _gemma(fields)
    experts = {
        "mixtral": _mixtral,
        "qwen3_moe": _qwen3_moe,
        "deepseek_v2": _deepseek,
        "deepseek_v3": _deepseek,
    }
    return special | (experts[family](fields) if family in experts else {})


def _qwen_window(fields: Fields) -> int:
    """The window that all layers have, else 0; layers before max_window_layers have none."""
    window = fields.count_or_none("sliding_window") or 0
    if not fields.flag("use_sliding_window") or not window:
        return 0
    first = (
        0
        if fields.family == "qwen3_moe"
        else fields.count_or_none("max_window_layers", least=0) or 0
    )
    count = fields.count("num_hidden_layers")
    if 0 < first < count:
        raise ValueError("max_window_layers: windows in some of the layers are not known")
    return 0 if first >= count else window


def _gemma(fields: Fields) -> dict[str, Any]:
    third = fields.family == "gemma3_text"
    special = {
        "norm_place": "both",
        "norm_offset": True,
        "mlp": "geglu",
        "scale_embeddings": True,
        "window": fields.count("sliding_window"),
        "global_every": fields.count("sliding_window_pattern") if third else 2,
        "attention_scale": fields.number("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": fields.number_or_none("attn_logit_softcapping") or 0.0,
        "logit_softcap": fields.number_or_none("final_logit_softcapping") or 0.0,
    }
    if fields.flag_or_none("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention: attention to later tokens is not known")
    if third:
        local, scaling = _rope(fields, "sliding_attention", "rope_local_base_freq")
        if scaling.kind != "none":
            raise ValueError(
                "rope_parameters.sliding_attention: stretching of the layers with windows is not known"
            )
        special |= {"qk_norm": "head", "local_rope_theta": local}
    return special


def _mixtral(fields: Fields) -> dict[str, Any]:
    coef = fields.number("router_aux_loss_coef") if fields.flag("output_router_logits") else 0.0
    return {
        "moe": MoEConfig(
            fields.count("num_local_experts"), fields.count("num_experts_per_tok"), aux_coef=coef
        )
    }


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    if fields.items("mlp_only_layers") or fields.count("decoder_sparse_step") != 1:
        raise ValueError("mlp_only_layers: layers without experts between the others are not known")
    moe = MoEConfig(
        num_experts=fields.count("num_experts"),
        per_token=fields.count("num_experts_per_tok"),
        mlp_dim=fields.count("moe_intermediate_size"),
        normalise=fields.flag("norm_topk_prob"),
    )
    return {"moe": moe}


def _deepseek(fields: Fields) -> dict[str, Any]:
    third, heads = fields.family == "deepseek_v3", fields.count("num_attention_heads")
    fields.one_of("moe_layer_freq", 1)
    fields.one_of("rope_interleave", True)
    methods = ("greedy", "group_limited_greedy")
    grouped = third or fields.one_of("topk_method", *methods) == "group_limited_greedy"
    moe = MoEConfig(
        num_experts=fields.count("n_routed_experts"),
        per_token=fields.count("num_experts_per_tok"),
        mlp_dim=fields.count("moe_intermediate_size"),
        num_shared=fields.count_or_none("n_shared_experts", least=0) or 0,
        router="sigmoid" if third else "softmax",
        normalise=fields.flag("norm_topk_prob") and third,  # DeepSeek-V2's class does not read it
        scale=fields.number("routed_scaling_factor"),
        num_groups=fields.count("n_group") if grouped else 1,
        groups_per_token=fields.count("topk_group") if grouped else 1,
        first_dense=fields.count_or_none("first_k_dense_replace", least=0) or 0,
        bias_rate=0.001 if third else 0.0,
    )
    mla = MLAConfig(
        kv_rank=fields.count("kv_lora_rank"),
        q_rank=fields.count_or_none("q_lora_rank") or 0,
        nope_dim=fields.count("qk_nope_head_dim"),
        rope_dim=fields.count("qk_rope_head_dim"),
        value_dim=fields.count("v_head_dim"),
    )
    ahead = (fields.count_or_none("num_nextn_predict_layers", least=0) or 0) if third else 0
    head_dim = mla.nope_dim + mla.rope_dim
    return {
        "moe": moe,
        "mla": mla,
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "mtp_modules": ahead,
    }


def to_hf(model: ModelConfig) -> tuple[dict[str, Any], str]:
    """(config.json, family) of a model. Raises InputError where no known family has its parts together."""
    family = family_of(model)
    config = (
        _gpt2_config(model)
        if family == "gpt2"
        else _config_of(model) | _experts_config(model, family)
    )
    config |= {"vocab_size": model.vocab_size, "tie_word_embeddings": model.tie_embeddings}
    config |= {
        "model_type": family,
        "architectures": [FAMILIES[family]],
        "initializer_range": model.init_std,
    }
    again = from_hf(config, "export")[0]
    alike = ("preset", "dtype", "remat", "scan_unroll", "init_std")
    same = dataclasses.replace(again, **{name: getattr(model, name) for name in alike})
    balance = {
        name: getattr(model.moe, name) for name in ("capacity_factor", "aux_coef", "bias_rate")
    }
    same = dataclasses.replace(same, moe=dataclasses.replace(same.moe, **balance))
    if same != model:
        differ = [
            f.name
            for f in dataclasses.fields(model)
            if getattr(same, f.name) != getattr(model, f.name)
        ]
        raise InputError(
            f"export: a {family} model has no {', '.join(differ)} as this one has; no known family has"
        )
    return config, family


def family_of(model: ModelConfig) -> str:
    """The family that has the parts of this model."""
    if model.position == "learned":
        return "gpt2"
    if model.mla.kv_rank:
        return "deepseek_v3" if model.moe.router == "sigmoid" else "deepseek_v2"
    if model.moe.num_experts:
        return "qwen3_moe" if model.qk_norm == "head" else "mixtral"
    if model.norm_place == "both":
        return "gemma3_text" if model.qk_norm == "head" else "gemma2"
    if model.norm_place == "after":
        return "olmo2"
    if model.qk_norm == "head":
        return "qwen3"
    return "qwen2" if model.qkv_bias else "mistral" if model.window else "llama"


def _gpt2_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_positions": model.max_length,
        "n_embd": model.embed_dim,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.mlp_dim,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": "gelu_new",
    }


def _config_of(model: ModelConfig) -> dict[str, Any]:
    config: dict[str, Any] = {
        "max_position_embeddings": model.max_length,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.embed_dim,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.mlp_dim,
        "rms_norm_eps": model.norm_eps,
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "rope_theta": model.rope_theta,
    }
    if model.rope_scaling.kind != "none":
        config["rope_scaling"] = _rope_config(model.rope_scaling)
    if model.window:
        config |= {
            "sliding_window": model.window,
            "use_sliding_window": True,
            "max_window_layers": 0,
        }
    if model.window and model.global_every:
        kinds = ("full_attention", "sliding_attention")
        config["layer_types"] = [
            kinds[model.windowed(number)] for number in range(model.num_layers)
        ]
    return config | (_gemma_config(model) if model.mlp == "geglu" else {"hidden_act": "silu"})


def _rope_config(scaling: RopeScaling) -> dict[str, Any]:
    config = {name: getattr(scaling, name) for name in _SCALINGS[scaling.kind]}
    if scaling.original_length:
        config["original_max_position_embeddings"] = scaling.original_length
    return {"rope_type": scaling.kind, **config}


def _gemma_config(model: ModelConfig) -> dict[str, Any]:
    scalar = 1 / model.attention_scale**2 if model.attention_scale else model.head_dim
    whole = math.isclose(scalar, round(scalar))  # `transformers` takes nothing else
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scalar) if whole else scalar,
        "attn_logit_softcapping": model.attention_softcap or None,
        "final_logit_softcapping": model.logit_softcap or None,
        "sliding_window_pattern": model.global_every,
        "rope_local_base_freq": model.local_rope_theta,
    }


def _experts_config(model: ModelConfig, family: str) -> dict[str, Any]:
    experts = model.moe
    if not experts.num_experts:
        return {}
    config: dict[str, Any] = {"num_experts_per_tok": experts.per_token}
    if family == "mixtral":
        return config | {"num_local_experts": experts.num_experts}
    config |= {
        "moe_intermediate_size": experts.mlp_dim or model.mlp_dim,
        "norm_topk_prob": experts.normalise,
    }
    if family == "qwen3_moe":
        return config | {"num_experts": experts.num_experts}
    if family == "deepseek_v3":
        config["num_nextn_predict_layers"] = model.mtp_modules
    else:
        config["topk_method"] = "group_limited_greedy" if experts.num_groups > 1 else "greedy"
    return config | _deepseek_config(model)


def _deepseek_config(model: ModelConfig) -> dict[str, Any]:
    experts, latent = model.moe, model.mla
    return {
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": experts.num_shared,
        "routed_scaling_factor": experts.scale,
        "n_group": experts.num_groups,
        "topk_group": experts.groups_per_token,
        "first_k_dense_replace": experts.first_dense,
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.q_rank or None,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "head_dim": latent.rope_dim,
    }
