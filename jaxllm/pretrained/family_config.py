"""config.json of the published families to our `ModelConfig` and back.

Fields that translate one to one are in the tables of family_table.py. Here is the rest: what a family
has besides, what only several fields together say, and what is not supported.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jaxllm.config import InputError
from jaxllm.models.config import ModelConfig
from jaxllm.models.parts_config import MLAConfig, MoEConfig
from jaxllm.pretrained.family_fields import Fields
from jaxllm.pretrained.family_rope import read_rope, write_rope
from jaxllm.pretrained.family_table import DEFAULTS, FAMILIES, FIELDS

# Our fields that no config.json holds: an exported model is read again without them.
_OURS_ONLY = (
    "preset",
    "dial",
    "tokens_per_parameter",
    "scaling",
    "dtype",
    "remat",
    "scan_unroll",
    "init_std",
)
_OURS_ONLY_MOE = ("capacity_factor", "aux_coef", "bias_rate")


def from_hf(config: Mapping[str, Any], where: str) -> tuple[ModelConfig, str]:
    """(our config, family) of a config.json.

    Raises:
        InputError: an unknown family, field value or combination; names `where` and the field.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f"{where}: model_type {family!r:.60} is not known; known: {known}")
    fields = Fields(config, family)
    try:
        special = _gpt2(fields) if family == "gpt2" else _decoder(fields)
        model = _build(fields.ours() | special)
        _check_layer_types(fields, model)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    return model, family


def _build(values: Mapping[str, Any]) -> ModelConfig:
    """The config of {field: value}; "moe.num_experts" is a field of its `MoEConfig`."""
    sections: dict[str, dict[str, Any]] = {"": {}, "moe": {}, "mla": {}}
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        sections[section][name] = value
    moe = MoEConfig(**sections["moe"])
    mla = MLAConfig(**sections["mla"])
    return ModelConfig(moe=moe, mla=mla, **sections[""])


def _check_layer_types(fields: Fields, model: ModelConfig) -> None:
    # Newer files list the kind of each layer, which has to agree with the fields that were read:
    #   window 512, global_every 3    sliding sliding full sliding sliding
    kinds = fields.items("layer_types")
    count = model.num_layers
    if kinds and len(kinds) != count:
        raise ValueError(f"layer_types names {len(kinds)} layers of {count}; fix one of them")
    for number, kind in enumerate(kinds):
        if (kind == "sliding_attention") != model.windowed(number):
            layer = f"layer {number} is {kind!r:.40}"
            raise ValueError(f"layer_types mixes windows in a way that is not known ({layer})")


def present(model: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """The model without MTP modules if no tensor of these names is of one.

    The config.json of a tuned DeepSeek-V3 may still name modules that its files leave out.
    """
    if any(name.endswith("eh_proj.weight") for name in names):
        return model
    return dataclasses.replace(model, mtp_modules=0)


def _gpt2(fields: Fields) -> dict[str, Any]:
    # Two names of the approximation by tanh.
    fields.one_of("activation_function", "gelu_new", "gelu_pytorch_tanh")
    fields.one_of("scale_attn_by_inverse_layer_idx", False)
    fields.one_of("scale_attn_weights", True)
    return {
        "mlp_dim": fields.integer("n_inner", least=1) or 4 * fields.count("n_embd"),
        "norm": "layernorm",
        "position": "learned",
        "mlp": "gelu",
        "bias": True,
        "dtype": _compute_dtype(fields),
    }


def _compute_dtype(fields: Fields) -> str:
    # The dtype of the files; `transformers` 4 calls it torch_dtype. All but float32 is computed in bfloat16.
    stored = fields.text("dtype") or fields.text("torch_dtype")
    return "float32" if stored == "float32" else "bfloat16"


def _decoder(fields: Fields) -> dict[str, Any]:
    """What every family but GPT-2 has, and what this one has besides."""
    if fields.family.startswith("gemma"):
        fields.one_of("hidden_activation", "gelu_pytorch_tanh")
    else:
        fields.one_of("hidden_act", "silu")
    theta, scaling = read_rope(fields, "full_attention", "rope_theta")
    common = {
        "bias": _bias(fields),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "dtype": _compute_dtype(fields),
    }
    return common | _special(fields)


def _bias(fields: Fields) -> bool:
    """Whether all matrices have biases; only the fields that the family's class reads count."""
    # These three ignore attention_bias, so that their files may say anything.
    attention = False
    if fields.family not in ("mistral", "mixtral", "qwen2"):
        attention = fields.flag("attention_bias")
    mlp = fields.family in ("llama", "deepseek_v2") and fields.flag("mlp_bias")
    if attention != mlp:
        raise ValueError("attention_bias and mlp_bias differ, which is not known")
    return attention


def _special(fields: Fields) -> dict[str, Any]:
    match fields.family:
        case "mistral":
            return {"window": fields.integer("sliding_window", 0, least=1)}
        case "mixtral":
            return _mixtral(fields)
        case "qwen2":
            return {"window": _qwen_window(fields), "qkv_bias": True}
        case "qwen3":
            return {"window": _qwen_window(fields), "qk_norm": "head"}
        case "qwen3_moe":
            return _qwen3_moe(fields)
        case "olmo2":
            return {"norm_place": "after", "qk_norm": "all"}
        case "gemma2":
            return _gemma(fields) | {"global_every": 2}
        case "gemma3_text":
            return _gemma(fields) | _gemma3(fields)
        case "deepseek_v2":
            return _deepseek_v2(fields)
        case "deepseek_v3":
            return _deepseek_v3(fields)
    return {}


def _qwen_window(fields: Fields) -> int:
    """The window of all layers, 0 if they have none; layers before max_window_layers have none."""
    window = fields.integer("sliding_window", 0, least=1) or 0
    if not fields.flag("use_sliding_window") or not window:
        return 0
    first = 0
    # Qwen3-MoE's class does not read it.
    if fields.family != "qwen3_moe":
        first = fields.integer("max_window_layers", 0) or 0
    count = fields.count("num_hidden_layers")
    if 0 < first < count:
        raise ValueError("max_window_layers: windows in some of the layers are not known")
    return 0 if first >= count else window


def _gemma(fields: Fields) -> dict[str, Any]:
    if fields.flag("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention: attention to later tokens is not known")
    return {
        "norm_place": "both",
        "norm_offset": True,
        "mlp": "geglu",
        "scale_embeddings": True,
        "window": fields.count("sliding_window"),
        # Scores are divided by the root of this, and not of a head's size.
        "attention_scale": fields.positive("query_pre_attn_scalar") ** -0.5,
    }


def _gemma3(fields: Fields) -> dict[str, Any]:
    local_theta, scaling = read_rope(fields, "sliding_attention", "rope_local_base_freq")
    if scaling.kind != "none":
        raise ValueError(
            "rope_parameters.sliding_attention: scaling of the layers with windows is not known"
        )
    return {
        "global_every": fields.count("sliding_window_pattern"),
        "qk_norm": "head",
        "local_rope_theta": local_theta,
    }


def _mixtral(fields: Fields) -> dict[str, Any]:
    # The class adds the load-balancing loss only if it returns the router's logits.
    coef = fields.positive("router_aux_loss_coef") if fields.flag("output_router_logits") else 0.0
    return {"window": fields.integer("sliding_window", 0, least=1), "moe.aux_coef": coef}


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    if fields.items("mlp_only_layers") or fields.count("decoder_sparse_step") != 1:
        raise ValueError("mlp_only_layers: layers without experts between the others are not known")
    return {"window": _qwen_window(fields), "qk_norm": "head"}


def _deepseek_v2(fields: Fields) -> dict[str, Any]:
    method = fields.one_of("topk_method", "greedy", "group_limited_greedy")
    special = _deepseek(fields, grouped=method == "group_limited_greedy")
    special["moe.router"] = "softmax"
    special["moe.normalize"] = False  # the class does not read norm_topk_prob
    return special


def _deepseek_v3(fields: Fields) -> dict[str, Any]:
    special = _deepseek(fields, grouped=True)
    special["moe.router"] = "sigmoid"
    special["moe.bias_rate"] = 0.001  # as DeepSeek-V3 was trained (section 4.2); no file says it
    return special


def _deepseek(fields: Fields, grouped: bool) -> dict[str, Any]:
    # Every layer from first_k_dense_replace on has experts.
    fields.one_of("moe_layer_freq", 1)
    # families.py undoes the interleaving of rotary pairs.
    fields.one_of("rope_interleave", True)
    return {
        "moe.num_groups": fields.count("n_group") if grouped else 1,
        "moe.groups_per_token": fields.count("topk_group") if grouped else 1,
        # Latent attention has a key and a value per query head; head_dim in the file is the rotary part's.
        "num_kv_heads": fields.count("num_attention_heads"),
        "head_dim": fields.count("qk_nope_head_dim") + fields.count("qk_rope_head_dim"),
    }


def to_hf(model: ModelConfig) -> tuple[dict[str, Any], str]:
    """(config.json, family) of a model.

    Raises:
        InputError: no known family has this combination of parts.
    """
    family = family_of(model)
    config = _direct_fields(model, family)
    if family == "gpt2":
        config["activation_function"] = "gelu_new"
    else:
        config |= _decoder_fields(model, family)
    config["model_type"] = family
    config["architectures"] = [FAMILIES[family]]
    config["initializer_range"] = model.init_std
    _check_reads_back(model, config, family)
    return config, family


def _direct_fields(model: ModelConfig, family: str) -> dict[str, Any]:
    """The fields of config.json that are fields of ours."""
    config: dict[str, Any] = {}
    for name in DEFAULTS[family]:
        if name in FIELDS:
            value: Any = model
            for attribute in FIELDS[name].ours.split("."):
                value = getattr(value, attribute)
            is_null = FIELDS[name].kind.endswith("or null") and not value
            config[name] = None if is_null else value
    return config


def _decoder_fields(model: ModelConfig, family: str) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if model.rope_scaling.kind != "none":
        config["rope_scaling"] = write_rope(model.rope_scaling)
    if model.window:
        # Qwen applies the window only with the second field, and from the layer of the third on.
        config["sliding_window"] = model.window
        config["use_sliding_window"] = True
        config["max_window_layers"] = 0
    if model.window and model.global_every:
        kinds = []
        for number in range(model.num_layers):
            windowed = model.windowed(number)
            kinds.append("sliding_attention" if windowed else "full_attention")
        config["layer_types"] = kinds
    if model.mlp == "geglu":
        config |= _gemma_fields(model)
    else:
        config["hidden_act"] = "silu"
    if family == "qwen3_moe" or family.startswith("deepseek"):
        # 0 with us: as wide as a dense MLP.
        config["moe_intermediate_size"] = model.moe.mlp_dim or model.mlp_dim
    if family == "deepseek_v2":
        grouped = model.moe.num_groups > 1
        config["topk_method"] = "group_limited_greedy" if grouped else "greedy"
    if family.startswith("deepseek"):
        # With us the size of a whole head, in the file that of its rotary part.
        config["head_dim"] = model.mla.rope_dim
    return config


def _gemma_fields(model: ModelConfig) -> dict[str, Any]:
    scalar = 1 / model.attention_scale**2 if model.attention_scale else model.head_dim
    if math.isclose(scalar, round(scalar)):
        scalar = round(scalar)  # `transformers` accepts only an integer
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window_pattern": model.global_every,
        "rope_local_base_freq": model.local_rope_theta,
    }


def _check_reads_back(model: ModelConfig, config: Mapping[str, Any], family: str) -> None:
    """Raise InputError unless `from_hf` makes the same model of the config."""
    # A model may combine parts that no family has, such as Gemma's caps with Llama's norms: its
    # config.json would describe another model.
    again, _ = from_hf(config, "export")
    kept_moe = {name: getattr(model.moe, name) for name in _OURS_ONLY_MOE}
    kept = {name: getattr(model, name) for name in _OURS_ONLY}
    again = dataclasses.replace(again, moe=dataclasses.replace(again.moe, **kept_moe), **kept)
    different = []
    for field in dataclasses.fields(model):
        if getattr(again, field.name) != getattr(model, field.name):
            different.append(field.name)
    if different:
        names = ", ".join(different)
        raise InputError(f"export: a {family} model cannot have this {names}; no known family can")


def family_of(model: ModelConfig) -> str:
    """The family that has the parts of this model."""
    # The order counts: Gemma 3 also has the qk_norm that tells Qwen3.
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
    if model.qkv_bias:
        return "qwen2"
    return "mistral" if model.window else "llama"
