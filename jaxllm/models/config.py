"""The shape of a decoder, and presets whose parameter counts are those published."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from jaxllm.models.moe import MoEConfig
from jaxllm.models.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1); kv_rank 0: ordinary attention."""

    kv_rank: int = 0
    """Size of the vector that keys and values are made of."""
    q_rank: int = 0
    """Size of the vector that queries are made of; 0: made of the hidden state."""
    nope_dim: int = 128
    """Part of a head without position."""
    rope_dim: int = 64
    """Part of a head with rotary positions; its key is shared by all heads."""
    value_dim: int = 128
    """Size of a head's value."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: GPT-3-style and Llama-3-style models are values of these fields."""

    preset: str = ""
    """Name in PRESETS whose fields are the defaults of the others."""
    vocab_size: int = 0
    """Rows of the embedding; 0 takes the tokenizer's size."""
    max_length: int = 256
    """Context length in tokens."""
    num_layers: int = 4
    """Transformer blocks."""
    embed_dim: int = 128
    """Width of the residual stream."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 0
    """Key and value heads (grouped-query attention); 0 means num_heads."""
    head_dim: int = 0
    """Size of a head; 0 means embed_dim / num_heads."""
    mlp_dim: int = 512
    """Hidden size of the MLP."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and at the end."""
    norm_eps: float = 1e-5
    """Added to the variance in the normalisation."""
    norm_place: Literal["before", "after", "both"] = "before"
    """Normalisation before attention and MLP, after them (OLMo 2), or both (Gemma 2)."""
    norm_offset: bool = False
    """Scales of normalisations are stored less 1 (Gemma)."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """Normalise queries and keys: each head (Qwen3, Gemma 3), or all heads at once (OLMo 2)."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary positions, or a learned table of max_length rows."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    local_rope_theta: float = 0.0
    """Base in layers with a window (Gemma 3); 0: rope_theta, stretched like the others."""
    rope_scaling: RopeScaling = RopeScaling()
    """Stretching of the rotary frequencies over a longer context."""
    window: int = 0
    """Places a token sees, itself included (Mistral); 0: all."""
    global_every: int = 0
    """With a window: every so many-th layer has none (2 in Gemma 2, 6 in Gemma 3); 0: all layers have it."""
    attention_scale: float = 0.0
    """Factor of the attention scores; 0: 1 / sqrt(head_dim)."""
    attention_softcap: float = 0.0
    """Bound of the attention scores, by tanh (Gemma 2); 0: none."""
    logit_softcap: float = 0.0
    """Bound of the logits, by tanh (Gemma 2); 0: none."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(embed_dim) (Gemma)."""
    mla: MLAConfig = MLAConfig()
    """Latent attention in place of grouped-query attention."""
    mlp: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    """Gated SiLU or gated GELU (three matrices), or tanh-approximated GELU (two)."""
    moe: MoEConfig = MoEConfig()
    """Experts in place of the MLP."""
    bias: bool = False
    """Biases in every projection, as in GPT-2 and GPT-3."""
    qkv_bias: bool = False
    """Biases of queries, keys and values only, as in Qwen2."""
    tie_embeddings: bool = True
    """Use the embedding table as the output head."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; residual projections get it divided by sqrt(2 num_layers)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and matrix products; parameters stay float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """Recompute in the backward pass: nothing, all but matrix products, or whole blocks."""
    scan_unroll: int = 1
    """Blocks per iteration of the scan over layers; more compiles longer and may run faster."""

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)
        for name in ("max_length", "num_layers", "embed_dim", "num_heads", "mlp_dim", "scan_unroll"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1")
        set_("num_kv_heads", self.num_kv_heads or self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if not self.head_dim and self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads: {self.num_heads} does not divide embed_dim {self.embed_dim}")
        set_("head_dim", self.head_dim or self.embed_dim // self.num_heads)
        rotated = self.mla.rope_dim if self.mla.kv_rank else self.head_dim
        if self.position == "rope" and rotated % 2:
            raise ValueError(f"head_dim: rotary positions need an even size, not {rotated}")
        if self.moe.num_experts and (self.bias or self.mlp != "swiglu"):
            raise ValueError("moe: experts are SwiGLU without biases; set mlp to swiglu and bias to false")
        if self.moe.num_experts and not 0 <= self.moe.first_dense < self.num_layers:
            raise ValueError("moe.first_dense: must be less than num_layers")
        if self.mla.kv_rank and (self.position != "rope" or self.bias or self.qkv_bias or self.qk_norm != "none"):
            raise ValueError("mla: latent attention has rotary positions and neither biases nor qk_norm")
        if min(self.window, self.global_every, self.attention_softcap, self.logit_softcap) < 0:
            raise ValueError("window: it, global_every and the soft caps must not be negative (0 is off)")

    @staticmethod
    def expand(tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Put a preset's fields under those given."""
        name = tree.get("preset") or ""
        if name and name not in PRESETS:
            raise ValueError(f"preset: {name!r} is unknown; known: {', '.join(PRESETS)}")
        return {**PRESETS.get(name, {}), **tree}

    def windowed(self, layer: int) -> bool:
        """Whether a layer's attention has the window."""
        return self.window > 0 and (self.global_every == 0 or (layer + 1) % self.global_every != 0)

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
    return ModelConfig(**ModelConfig.expand({"preset": name, **fields}))


def _gpt(num_layers: int, embed_dim: int, num_heads: int, max_length: int = 1024, head_dim: int = 0) -> dict:
    """GPT-2 (Radford et al. 2019) and GPT-3 (Brown et al. 2020, table 2.1) decoders."""
    return {
        **{"vocab_size": 50257, "max_length": max_length, "num_layers": num_layers, "embed_dim": embed_dim},
        **{"num_heads": num_heads, "head_dim": head_dim, "mlp_dim": 4 * embed_dim, "norm": "layernorm"},
        **{"position": "learned", "mlp": "gelu", "bias": True, "tie_embeddings": True},
    }


def _llama(num_layers: int, embed_dim: int, num_heads: int, num_kv_heads: int, mlp_dim: int, **more) -> dict:
    """Llama-style decoders: RMSNorm, rotary positions, SwiGLU, grouped-query attention (Grattafiori et al. 2024)."""
    return {
        **{"vocab_size": 128256, "max_length": 8192, "num_layers": num_layers, "embed_dim": embed_dim},
        **{"num_heads": num_heads, "num_kv_heads": num_kv_heads, "mlp_dim": mlp_dim, "norm": "rmsnorm"},
        **{"position": "rope", "rope_theta": 500_000.0, "mlp": "swiglu", "tie_embeddings": False, **more},
    }


_LLAMA2 = {"vocab_size": 32000, "max_length": 4096, "rope_theta": 10_000.0}
_SMOLLM = {"vocab_size": 49152, "rope_theta": 100_000.0, "tie_embeddings": True}
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
}
