"""The config.json of a GGUF file's metadata."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.models.parts_config import RopeScaling
from jaxllm.models.rope import frequencies
from jaxllm.pretrained.checked_values import CheckedValues

# general.architecture -> model_type
_ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "olmo2": "olmo2",
}
# Field of config.json -> key in the metadata, behind the architecture's name; every model has them.
_SIZES = {
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}
_EPSILON = "attention.layer_norm_rms_epsilon"
# The scaling of Llama 3.1 and later; files hold its factor only.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_config(metadata: CheckedValues, held: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that says the same as the metadata.

    Args:
        held: the file's tensors by name.

    Raises:
        ValueError: names the key that is missing, of a wrong type or not supported.
    """
    arch = metadata.text("general.architecture") or ""
    if arch not in _ARCHITECTURES:
        raise ValueError(f"architecture {arch!r} is not known; known: {', '.join(_ARCHITECTURES)}")
    if "token_embd.weight" not in held:
        raise ValueError("has no token_embd.weight, which every model needs; fetch it again")
    config = _required_fields(metadata, arch)
    # from_hf fills in the family's defaults, so everything that the metadata says is written out.
    num_heads = config["num_attention_heads"]
    config["model_type"] = _model_type(metadata, arch)
    config["num_key_value_heads"] = metadata.integer(f"{arch}.attention.head_count_kv") or num_heads
    config["head_dim"] = (
        metadata.integer(f"{arch}.attention.key_length")
        or metadata.integer(f"{arch}.rope.dimension_count")
        or config["hidden_size"] // num_heads
    )
    config["rope_theta"] = metadata.number(f"{arch}.rope.freq_base", 10_000.0)
    config["vocab_size"] = int(held["token_embd.weight"].shape[-1])
    # Tensors are dequantized to float32.
    config["dtype"] = "float32"
    config["tie_word_embeddings"] = "output.weight" not in held
    config["attention_bias"] = False
    window = f"{arch}.attention.sliding_window"
    # Without the key Gemma 2 has its family's default; every other family has no window.
    if arch != "gemma2" or window in metadata.values:
        config["sliding_window"] = metadata.integer(window) or None
    if metadata.integer(f"{arch}.expert_count"):
        config |= _experts(metadata, arch)
    if arch.startswith("gemma"):
        config |= _gemma(metadata, arch, config)
    scaling = _rope_scaling(metadata, arch, held, config)
    if scaling:
        config["rope_scaling"] = scaling
    return config


def _required_fields(metadata: CheckedValues, arch: str) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name, key in _SIZES.items():
        config[name] = metadata.integer(f"{arch}.{key}")
    config["rms_norm_eps"] = metadata.number(f"{arch}.{_EPSILON}")
    for name, key in (*_SIZES.items(), ("rms_norm_eps", _EPSILON)):
        if not config[name]:
            raise ValueError(f"has no {arch}.{key}, which a {arch} model needs; fetch it again")
    return config


def _model_type(metadata: CheckedValues, arch: str) -> str:
    """The model_type; files of Mistral and Mixtral name the architecture llama."""
    # llama.cpp runs all three with the same code.
    if arch == "llama" and metadata.integer("llama.expert_count"):
        return "mixtral"
    if arch == "llama" and metadata.integer("llama.attention.sliding_window"):
        return "mistral"
    return _ARCHITECTURES[arch]


def _experts(metadata: CheckedValues, arch: str) -> dict[str, Any]:
    per_token = metadata.integer(f"{arch}.expert_used_count")
    if not per_token:
        raise ValueError(
            f"has no {arch}.expert_used_count, which a model of experts needs; fetch it again"
        )
    experts: dict[str, Any] = {
        "num_local_experts": metadata.integer(f"{arch}.expert_count"),
        "num_experts_per_tok": per_token,
        # llama.cpp normalizes for both architectures, so their files do not say it.
        "norm_topk_prob": True,
    }
    width = metadata.integer(f"{arch}.expert_feed_forward_length")
    if width:
        experts["moe_intermediate_size"] = width
    return experts


def _gemma(metadata: CheckedValues, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    # The largest models of both families do not scale scores by the size of a head; the file does not say so.
    is_largest = (arch, config["num_hidden_layers"]) in (("gemma2", 46), ("gemma3", 62))
    scalar = config["head_dim"]
    if is_largest:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    gemma: dict[str, Any] = {
        "query_pre_attn_scalar": scalar,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = metadata.number(f"{arch}.{name}")
        if cap is not None:  # if the key is missing, the family's default applies
            gemma[name] = cap
    return gemma


def _rope_scaling(
    metadata: CheckedValues, arch: str, held: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The "rope_scaling" of config.json, empty for none."""
    prefix = f"{arch}.rope.scaling"
    kind = metadata.text(f"{prefix}.type")
    if kind not in (None, "none"):
        scaling = {"rope_type": kind, "factor": metadata.number(f"{prefix}.factor")}
        length = metadata.integer(f"{prefix}.original_context_length")
        if length:
            scaling["original_max_position_embeddings"] = length
        return scaling
    # Llama 3's scaling is not in the metadata but a tensor, checked here against the known formula.
    if "rope_freqs.weight" not in held:
        return {}
    # What frequencies are divided by: from 1 for the fastest to the scaling's factor for the slowest.
    #   factor 8    1 1 1 ... 8 8 8    mixed in between
    factors = np.asarray(held["rope_freqs.weight"].data)
    factor = float(factors.max())
    llama3 = RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=_LLAMA3_ROPE["low_freq_factor"],
        high_freq_factor=_LLAMA3_ROPE["high_freq_factor"],
        original_length=int(_LLAMA3_ROPE["original_max_position_embeddings"]),
    )
    plain = frequencies(config["head_dim"], config["rope_theta"], RopeScaling())
    scaled = frequencies(config["head_dim"], config["rope_theta"], llama3)
    if factors.shape != plain.shape or not np.allclose(plain / factors, scaled, rtol=1e-3):
        raise ValueError(
            f"its rope_freqs are not Llama 3's (factor {factor:g}), and others are not known"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}
