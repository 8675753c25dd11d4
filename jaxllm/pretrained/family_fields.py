"""The fields of a published config.json, checked, and what each family means by leaving one out.

Defaults are those of the families' classes in `transformers` 5.24, recorded in tests/oracles/config_defaults.json.
"""

import sys
from collections.abc import Mapping
from typing import Any

_LARGEST = 2**31 - 1  # sizes are indices of 32 bits

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
# The fields whose default is a value and in which null has a meaning of its own: none, or made of other fields.
_NULLS = {
    "sliding_window": {"mistral", "qwen2", "qwen3", "qwen3_moe"},
    "num_key_value_heads": {"qwen2", "qwen3", "deepseek_v3"},
    "attn_logit_softcapping": {"gemma2"},
    "final_logit_softcapping": {"gemma2"},
    "q_lora_rank": {"deepseek_v2", "deepseek_v3"},
    "norm_topk_prob": {"deepseek_v2", "deepseek_v3"},
    "num_nextn_predict_layers": {"deepseek_v3"},
}
# Other spellings that the classes take: {family: {spelling: field}}.
_ALIASES = {
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


class Fields:
    """A family's config.json by field: each is checked, and one that is left out is the family's default.

    Every method raises ValueError naming the field where its value is none that the family can have.
    """

    def __init__(self, given: Mapping[str, Any], family: str):
        aliases = _ALIASES.get(family, {})
        self.family = family
        self._values = {aliases.get(name, name): value for name, value in given.items()}

    def value(self, name: str) -> Any:
        """The value as it is written; the default where it is left out."""
        default = DEFAULTS[self.family].get(name)
        value = self._values.get(name, default)
        null = default is None or self.family in _NULLS.get(name, ())
        if value is None and not null:
            raise ValueError(
                f"{name} is null, which a {self.family} model does not know; give a value or leave it out"
            )
        return value

    def count(self, name: str) -> int:
        """A whole number of at least 1."""
        if (value := self.count_or_none(name)) is None:
            raise ValueError(f"has no {name!r}, which a {self.family} model needs; add it")
        return value

    def count_or_none(self, name: str, least: int = 1) -> int | None:
        """A whole number of at least `least`, or null."""
        value = self.value(name)
        if value is not None and not (type(value) is int and least <= value <= _LARGEST):
            raise _wrong(name, value, f"a whole number of at least {least}")
        return value

    def number(self, name: str) -> float:
        """A finite number above 0."""
        return positive(name, self.value(name))

    def number_or_none(self, name: str) -> float | None:
        """A finite number above 0, or null."""
        return None if self.value(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """true or false; null counts as false where the family takes it."""
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            raise _wrong(name, value, "true or false")
        return bool(value)

    def flag_or_none(self, name: str) -> bool:
        """true or false; false where it is left out or null."""
        return self._values.get(name) is not None and self.flag(name)

    def one_of(self, name: str, *known: Any) -> Any:
        """One of the values that are known."""
        value = self.value(name)
        if not any(type(value) is type(choice) and value == choice for choice in known):
            raise ValueError(
                f"{name} {value!r:.60} is not known in a {self.family} model; known: {_listed(known)}"
            )
        return value

    def table(self, name: str) -> Mapping[str, Any]:
        """An object, empty where it is left out or null."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise _wrong(name, value, "an object")
        return value or {}

    def items(self, name: str) -> list[Any]:
        """A list, empty where it is left out or null."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, list):
            raise _wrong(name, value, "a list")
        return value or []

    def text_or_none(self, name: str) -> str | None:
        """A text, or null."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, str):
            raise _wrong(name, value, "a text")
        return value


def positive(name: str, value: Any) -> float:
    """The value of a field that must be a finite number above 0."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value <= sys.float_info.max
    ):
        raise _wrong(name, value, "a finite number above 0")
    return float(value)


def _wrong(name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{name} must be {wanted}, not {value!r:.60}; mend it")


def _listed(known: tuple[Any, ...]) -> str:
    return ", ".join(map(str, known))
