"""Rotary settings of a config.json, in the spelling of `transformers` 4 and 5, to `RopeScaling` and back."""

from collections.abc import Mapping
from typing import Any

from jaxllm.models.parts_config import RopeScaling
from jaxllm.pretrained.checked_values import CheckedValues
from jaxllm.pretrained.family_fields import FIX, Fields, positive

# The two spellings, of which a file may have both:
#   4    "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}
#   5    "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
#        Gemma 3: "rope_parameters": {"full_attention": {...}, "sliding_attention": {...}}

# Kind of scaling -> its numbers, which have the same names in config.json and in RopeScaling.
_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}


def read_rope(fields: Fields, layers: str, theta_name: str) -> tuple[float, RopeScaling]:
    """(base, scaling) of the rotary frequencies of "full_attention" or "sliding_attention" layers.

    theta_name: the field of the base in the older spelling. Raises ValueError on unknown settings.
    """
    given = _settings(fields, layers)
    theta = positive(theta_name, given.get("rope_theta", fields.value(theta_name)))
    kind = given.get("rope_type") or given.get("type") or "default"
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor: heads that are rotated in part are not known")
    if kind == "default":
        return theta, RopeScaling()
    if not isinstance(kind, str) or kind not in _NUMBERS:
        known = ", ".join(("default", *_NUMBERS))
        raise ValueError(f"rope type {kind!r:.40} is not known; known: {known}")
    if given.get("attention_factor") or not given.get("truncate", True):
        raise ValueError("rope: attention_factor and truncate are not known")
    if given.get("factor") is None:
        raise ValueError(f"rope_scaling has no factor, which type {kind} needs; add it")
    numbers: dict[str, Any] = {}
    # A number of another kind is read as well: the class keeps it, and it changes nothing.
    for name in dict.fromkeys(name for names in _NUMBERS.values() for name in names):
        value = given.get(name)
        # DeepSeek writes an mscale of 0 for none.
        disabled = value is None or (name.startswith("mscale") and value == 0)
        if not disabled:
            numbers[name] = positive(f"rope_scaling.{name}", value)
    # Linear scaling is the same at every length.
    if kind != "linear":
        numbers["original_length"] = _original_length(fields, given)
    return theta, RopeScaling(kind=kind, **numbers)  # pyright: ignore[reportArgumentType]


def _settings(fields: Fields, layers: str) -> dict[str, Any]:
    """The config's rotary settings of these layers; where both spellings are given, as the class merges them."""
    old = fields.table("rope_scaling")
    new = fields.table("rope_parameters")
    by_layers = fields.family == "gemma3_text"
    chosen = new.get(layers, {} if by_layers else new)
    if chosen is None:
        chosen = {}
    if not isinstance(chosen, Mapping):
        raise ValueError(f"rope_parameters.{layers} must be an object, not {chosen!r:.40}; {FIX}")
    if by_layers:
        # The older spelling is about full attention only.
        return {**chosen, **old} if layers == "full_attention" else dict(chosen)
    return dict(old or chosen)


def _original_length(fields: Fields, given: Mapping[str, Any]) -> int:
    """The context length before it was extended."""
    length = CheckedValues(given, FIX).integer("original_max_position_embeddings", least=1)
    return length or fields.count("max_position_embeddings")


def write_rope(scaling: RopeScaling) -> dict[str, Any]:
    """The "rope_scaling" of a config.json."""
    config: dict[str, Any] = {"rope_type": scaling.kind}
    for name in _NUMBERS[scaling.kind]:
        config[name] = getattr(scaling, name)
    if scaling.original_length:
        config["original_max_position_embeddings"] = scaling.original_length
    return config
