"""The shape of a decoder, and presets whose parameter counts are those published."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from jaxllm.config import InputError, build, merge
from jaxllm.config.ranges import (
    Epsilon,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from jaxllm.models.moe import MoEConfig
from jaxllm.models.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1); kv_rank 0: ordinary attention."""

    kv_rank: NonNegativeInt = 0
    """Size of the vector that keys and values are made of."""
    q_rank: NonNegativeInt = 0
    """Size of the vector that queries are made of; 0: made of the hidden state."""
    nope_dim: NonNegativeInt = 128
    """Part of a head without position."""
    rope_dim: PositiveInt = 64
    """Part of a head with rotary positions; its key is shared by all heads."""
    value_dim: PositiveInt = 128
    """Size of a head's value."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: GPT-3-style and Llama-3-style models are values of these fields."""

    preset: str = ""
    """Name in PRESETS whose fields are the defaults of the others."""
    vocab_size: NonNegativeInt = 0
    """Rows of the embedding; 0 takes the tokenizer's size."""
    max_length: PositiveInt = 256
    """Context length in tokens."""
    num_layers: PositiveInt = 4
    """Transformer blocks."""
    embed_dim: PositiveInt = 128
    """Width of the residual stream."""
    num_heads: PositiveInt = 4
    """Query heads."""
    num_kv_heads: NonNegativeInt = 0
    """Key and value heads (grouped-query attention); 0 means num_heads."""
    head_dim: NonNegativeInt = 0
    """Size of a head; 0 means embed_dim / num_heads."""
    mlp_dim: PositiveInt = 512
    """Hidden size of the MLP."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and at the end."""
    norm_eps: Epsilon = 1e-5
    """Added to the variance in the normalisation."""
    norm_place: Literal["before", "after", "both"] = "before"
    """Normalisation before attention and MLP, after them (OLMo 2), or both (Gemma 2)."""
    norm_offset: bool = False
    """Scales of normalisations are stored less 1 (Gemma)."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """Normalise queries and keys: each head (Qwen3, Gemma 3), or all heads at once (OLMo 2)."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary positions, or a learned table of max_length rows."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies."""
    local_rope_theta: NonNegativeFloat = 0.0
    """Base in layers with a window (Gemma 3); 0: rope_theta, stretched like the others."""
    rope_scaling: RopeScaling = RopeScaling()
    """Stretching of the rotary frequencies over a longer context."""
    window: NonNegativeInt = 0
    """Places a token sees, itself included (Mistral); 0: all."""
    global_every: NonNegativeInt = 0
    """With a window: every so many-th layer has none (2 in Gemma 2, 6 in Gemma 3); 0: all layers have it."""
    attention_scale: NonNegativeFloat = 0.0
    """Factor of the attention scores; 0: 1 / sqrt(head_dim)."""
    attention_softcap: NonNegativeFloat = 0.0
    """Bound of the attention scores, by tanh (Gemma 2); 0: none."""
    logit_softcap: NonNegativeFloat = 0.0
    """Bound of the logits, by tanh (Gemma 2); 0: none."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(embed_dim) (Gemma)."""
    mla: MLAConfig = MLAConfig()
    """Latent attention in place of grouped-query attention."""
    mlp: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    """Gated SiLU or gated GELU (three matrices), or tanh-approximated GELU (two)."""
    moe: MoEConfig = MoEConfig()
    """Experts in place of the MLP."""
    mtp_modules: NonNegativeInt = 0
    """Modules that each predict one token further, for training (DeepSeek-V3, section 2.2)."""
    bias: bool = False
    """Biases in every projection, as in GPT-2 and GPT-3."""
    qkv_bias: bool = False
    """Biases of queries, keys and values only, as in Qwen2."""
    tie_embeddings: bool = True
    """Use the embedding table as the output head."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of the initial weights; residual projections get it divided by sqrt(2 num_layers)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and matrix products; parameters stay float32."""
    remat: Literal["none", "dots", "offload_dots", "attention", "full", "offload"] = "none"
    """Recompute in the backward pass: nothing; all but matrix products (offload_dots: these wait in the host's memory); all
    but what attention returns; whole blocks; or whole blocks with what goes into them in the host's memory."""
    scan_unroll: PositiveInt = 1
    """Blocks per iteration of the scan over layers; more compiles longer and may run faster."""

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)
        set_("num_kv_heads", self.num_kv_heads or self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads}"
            )
        if not self.head_dim and self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads: {self.num_heads} does not divide embed_dim {self.embed_dim}"
            )
        set_("head_dim", self.head_dim or self.embed_dim // self.num_heads)
        rotated = self.mla.rope_dim if self.mla.kv_rank else self.head_dim
        if self.position == "rope" and rotated % 2:
            raise ValueError(f"head_dim: rotary positions need an even size, not {rotated}")
        if self.moe.num_experts and (self.bias or self.mlp != "swiglu"):
            raise ValueError(
                "moe: experts are SwiGLU without biases; set mlp to swiglu and bias to false"
            )
        if self.moe.num_experts and not 0 <= self.moe.first_dense < self.num_layers:
            raise ValueError("moe.first_dense: must be less than num_layers")
        if self.mla.kv_rank and (
            self.position != "rope" or self.bias or self.qkv_bias or self.qk_norm != "none"
        ):
            raise ValueError(
                "mla: latent attention has rotary positions and neither biases nor qk_norm"
            )
        if self.mtp_modules and self.position == "learned":
            raise ValueError("mtp_modules: positions must be rotary")

    @staticmethod
    def expand(tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Put a preset's fields under those given."""
        name = tree.get("preset") or ""
        if not isinstance(name, str) or (name and name not in PRESETS):
            raise ValueError(f"preset: {name!r} is unknown; known: {', '.join(PRESETS)}")
        return merge(PRESETS.get(name, {}), tree)

    def windowed(self, layer: int) -> bool:
        """Whether a layer's attention has the window."""
        return self.window > 0 and (self.global_every == 0 or (layer + 1) % self.global_every != 0)

    def row_length(self, length: int, field: str, spelled: str = "") -> int:
        """The tokens of a row: `length` (in an error as `spelled`), where that is 0 the whole context.

        Raises InputError, naming the field, where a row is longer than the context: positions beyond it are not the
        model's, and a learned table has no rows for them.
        """
        if length > self.max_length:
            what = spelled or f"{length} tokens"
            raise InputError(
                f"{field}: {what} exceed model.max_length {self.max_length}; lower the one or raise the other"
            )
        return length or self.max_length

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass recomputes whole blocks, but for attention perhaps."""
        return self.remat in ("attention", "full", "offload")

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        size = self.mla.nope_dim + self.mla.rope_dim if self.mla.kv_rank else self.head_dim
        return (self.attention_scale or size**-0.5) * self.rope_scaling.score_scale

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def preset(name: str, **fields: Any) -> ModelConfig:
    """A ModelConfig from a preset, `fields` taking precedence."""
    return build(ModelConfig, {"preset": name, **fields})


def _gpt(
    num_layers: int, embed_dim: int, num_heads: int, max_length: int = 1024, head_dim: int = 0
) -> dict:
    """GPT-2 (Radford et al. 2019) and GPT-3 (Brown et al. 2020, table 2.1) decoders."""
    return {
        **{
            "vocab_size": 50257,
            "max_length": max_length,
            "num_layers": num_layers,
            "embed_dim": embed_dim,
        },
        **{
            "num_heads": num_heads,
            "head_dim": head_dim,
            "mlp_dim": 4 * embed_dim,
            "norm": "layernorm",
        },
        **{"position": "learned", "mlp": "gelu", "bias": True, "tie_embeddings": True},
    }


def _llama(
    num_layers: int, embed_dim: int, num_heads: int, num_kv_heads: int, mlp_dim: int, **more
) -> dict:
    """Llama-style decoders: RMSNorm, rotary positions, SwiGLU, grouped-query attention (Grattafiori et al. 2024)."""
    return {
        **{
            "vocab_size": 128256,
            "max_length": 8192,
            "num_layers": num_layers,
            "embed_dim": embed_dim,
        },
        **{
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "mlp_dim": mlp_dim,
            "norm": "rmsnorm",
        },
        **{
            "position": "rope",
            "rope_theta": 500_000.0,
            "mlp": "swiglu",
            "tie_embeddings": False,
            **more,
        },
    }


_LLAMA2 = {"vocab_size": 32000, "max_length": 4096, "rope_theta": 10_000.0}
_SMOLLM = {"vocab_size": 49152, "rope_theta": 100_000.0, "tie_embeddings": True}
_LLAMA31 = {
    "max_length": 131_072,
    "rope_scaling": {"kind": "llama3", "factor": 8.0, "original_length": 8192},
}
_LLAMA32 = {
    "max_length": 131_072,
    "rope_scaling": {"kind": "llama3", "factor": 32.0, "original_length": 8192},
    "tie_embeddings": True,
}
_QWEN25 = {
    "vocab_size": 151_936,
    "max_length": 32_768,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "qkv_bias": True,
}
_QWEN3 = {
    **{
        "vocab_size": 151_936,
        "max_length": 40_960,
        "rope_theta": 1e6,
        "norm_eps": 1e-6,
        "qk_norm": "head",
    },
    "head_dim": 128,
}
_GEMMA = {
    **{
        "vocab_size": 256_000,
        "norm_eps": 1e-6,
        "norm_place": "both",
        "norm_offset": True,
        "mlp": "geglu",
    },
    **{
        "scale_embeddings": True,
        "tie_embeddings": True,
        "head_dim": 256,
        "attention_scale": 256**-0.5,
    },
}
_GEMMA2 = {
    **_GEMMA,
    **{
        "window": 4096,
        "global_every": 2,
        "attention_softcap": 50.0,
        "logit_softcap": 30.0,
        "rope_theta": 10_000.0,
    },
}
_GEMMA3 = {
    **_GEMMA,
    **{
        "vocab_size": 262_144,
        "max_length": 32_768,
        "window": 512,
        "global_every": 6,
        "qk_norm": "head",
    },
    **{"rope_theta": 1e6, "local_rope_theta": 10_000.0},
}
_OLMO2 = {
    **{
        "vocab_size": 100_352,
        "max_length": 4096,
        "norm_eps": 1e-6,
        "norm_place": "after",
        "qk_norm": "all",
    },
}


def _deepseek(
    num_layers: int, embed_dim: int, num_heads: int, mlp_dim: int, q_rank: int, moe: dict, **more
) -> dict:
    """DeepSeek-V2 (2024) and V3 (2024): latent attention, shared experts, rotary positions stretched by YaRN."""
    yarn = {
        "kind": "yarn",
        "factor": 40.0,
        "original_length": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    return {
        **_llama(
            num_layers, embed_dim, num_heads, num_heads, mlp_dim, norm_eps=1e-6, rope_theta=10_000.0
        ),
        **{
            "max_length": 163_840,
            "head_dim": 192,
            "rope_scaling": yarn,
            "mla": {"kv_rank": 512, "q_rank": q_rank},
        },
        **{"moe": moe, **more},
    }


_V2 = {"router": "softmax", "normalise": False, "first_dense": 1, "num_shared": 2, "per_token": 6}
_V2_YARN = {
    "kind": "yarn",
    "factor": 40.0,
    "original_length": 4096,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
# Sizes below any published model, for CPUs; the vocabulary is the tokenizer's.
_SMALL = {"vocab_size": 0, "max_length": 256, "rope_theta": 10_000.0, "tie_embeddings": True}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny-1m": _llama(4, 128, 4, 2, 384, **_SMALL),
    "small-5m": _llama(6, 256, 4, 2, 768, **_SMALL),
    "small-14m": _llama(6, 384, 6, 6, 1024, **_SMALL),
    "gpt2": _gpt(12, 768, 12),
    "gpt2-medium": _gpt(24, 1024, 16),
    "gpt2-large": _gpt(36, 1280, 20),
    "gpt2-xl": _gpt(48, 1600, 25),
    "gpt3-125m": _gpt(12, 768, 12, 2048),
    "gpt3-350m": _gpt(24, 1024, 16, 2048),
    "gpt3-760m": _gpt(24, 1536, 16, 2048),
    "gpt3-1.3b": _gpt(24, 2048, 16, 2048),
    "gpt3-2.7b": _gpt(32, 2560, 32, 2048),
    "gpt3-6.7b": _gpt(32, 4096, 32, 2048),
    "gpt3-13b": _gpt(40, 5120, 40, 2048),
    "smollm2-135m": _llama(30, 576, 9, 3, 1536, **_SMOLLM),
    "smollm2-360m": _llama(32, 960, 15, 5, 2560, **_SMOLLM),
    "smollm2-1.7b": _llama(24, 2048, 32, 32, 8192, **_SMOLLM),
    "llama2-7b": _llama(32, 4096, 32, 32, 11008, **_LLAMA2),
    "llama2-13b": _llama(40, 5120, 40, 40, 13824, **_LLAMA2),
    "llama2-70b": _llama(80, 8192, 64, 8, 28672, **_LLAMA2),
    "llama3-8b": _llama(32, 4096, 32, 8, 14336),
    "llama3-70b": _llama(80, 8192, 64, 8, 28672),
    "llama3.1-8b": _llama(32, 4096, 32, 8, 14336, **_LLAMA31),
    "llama3.1-70b": _llama(80, 8192, 64, 8, 28672, **_LLAMA31),
    "llama3.1-405b": _llama(126, 16384, 128, 8, 53248, **_LLAMA31),
    "llama3.2-1b": _llama(16, 2048, 32, 8, 8192, **_LLAMA32),
    "llama3.2-3b": _llama(28, 3072, 24, 8, 8192, **_LLAMA32),
    "mistral-7b": _llama(
        32, 4096, 32, 8, 14336, vocab_size=32000, max_length=32768, rope_theta=1e4, window=4096
    ),
    "qwen2.5-0.5b": _llama(24, 896, 14, 2, 4864, **{**_QWEN25, "tie_embeddings": True}),
    "qwen2.5-7b": _llama(28, 3584, 28, 4, 18944, **{**_QWEN25, "vocab_size": 152_064}),
    "qwen3-0.6b": _llama(28, 1024, 16, 8, 3072, **{**_QWEN3, "tie_embeddings": True}),
    "qwen3-8b": _llama(36, 4096, 32, 8, 12288, **_QWEN3),
    "qwen3-30b-a3b": _llama(
        48, 2048, 32, 4, 6144, **_QWEN3, moe={"num_experts": 128, "per_token": 8, "mlp_dim": 768}
    ),
    "gemma2-2b": _llama(26, 2304, 8, 4, 9216, **_GEMMA2),
    "gemma2-9b": _llama(42, 3584, 16, 8, 14336, **_GEMMA2),
    "gemma3-1b": _llama(26, 1152, 4, 1, 6912, **_GEMMA3),
    "olmo2-7b": _llama(32, 4096, 32, 32, 11008, **_OLMO2),
    "mixtral-8x7b": _llama(
        32,
        4096,
        32,
        8,
        14336,
        vocab_size=32000,
        max_length=32768,
        rope_theta=1e6,
        moe={"num_experts": 8, "per_token": 2},
    ),
    "deepseek-v2-lite": _deepseek(
        27,
        2048,
        16,
        10944,
        0,
        {**_V2, "num_experts": 64, "mlp_dim": 1408},
        vocab_size=102_400,
        rope_scaling=_V2_YARN,
    ),
    "deepseek-v2": _deepseek(
        60,
        5120,
        128,
        12288,
        1536,
        {
            **_V2,
            "num_experts": 160,
            "mlp_dim": 1536,
            "num_groups": 8,
            "groups_per_token": 3,
            "scale": 16.0,
        },
        vocab_size=102_400,
        rope_scaling=_V2_YARN,
    ),
    "deepseek-v3": _deepseek(
        61,
        7168,
        128,
        18432,
        1536,
        {
            "num_experts": 256,
            "per_token": 8,
            "mlp_dim": 2048,
            "num_shared": 1,
            "router": "sigmoid",
            "scale": 2.5,
            "num_groups": 8,
            "groups_per_token": 4,
            "first_dense": 3,
            "bias_rate": 0.001,
        },
        vocab_size=129_280,
    ),
}
