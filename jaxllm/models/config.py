"""The shape of a decoder, and presets of published models (presets.yaml)."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from annotated_types import Ge, Le

from jaxllm.config import InputError, build, merge
from jaxllm.config.ranges import (
    NOT_BOOL,
    Epsilon,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from jaxllm.models import dial
from jaxllm.models.parts_config import MLAConfig, MoEConfig, RopeScaling, ScalingConfig

if TYPE_CHECKING:
    import jax.numpy as jnp

# Fields of each preset, by its name.
PRESETS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8")
)["presets"]

LARGEST_DIAL = 512  # a width of 32,768
Dial = Annotated[int, NOT_BOOL, Ge(0), Le(LARGEST_DIAL)]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer; GPT-3 and Llama 3 are values of these fields."""

    preset: str = ""
    """Name of a published model (models/presets.yaml) whose shape is the default of the other fields."""
    dial: Dial = 0
    """One number for a whole model, its depth: sets the shape and the scaling here, and in pretrain the tokens, batch, steps
    and optimizer, where the config does not (models/README.md); 0: sets nothing."""
    tokens_per_parameter: PositiveFloat = 20.0
    """With dial: tokens to pre-train on for each parameter of the layers' matrices (Hoffmann et al. 2022)."""
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
    """Key and value heads (grouped-query attention); 0: num_heads."""
    head_dim: NonNegativeInt = 0
    """Size of a head; 0: embed_dim / num_heads."""
    mlp_dim: PositiveInt = 512
    """Hidden size of the MLP."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of normalization."""
    norm_eps: Epsilon = 1e-5
    """Added to the variance in the normalization."""
    norm_place: Literal["before", "after", "both"] = "before"
    """Normalize before attention and MLP, after them (OLMo 2), or both (Gemma 2)."""
    norm_offset: bool = False
    """Store scales of norms less 1 (Gemma)."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """Normalize queries and keys: each head (Qwen3, Gemma 3), or all heads at once (OLMo 2)."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary positions, or a learned table of max_length rows."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies."""
    local_rope_theta: NonNegativeFloat = 0.0
    """Base in layers with a window (Gemma 3), without rope_scaling; 0: rope_theta, as in the other layers."""
    rope_scaling: RopeScaling = RopeScaling()
    """Stretching of the rotary frequencies over a longer context."""
    window: NonNegativeInt = 0
    """Positions that a token sees, its own included (Mistral); 0: all before it."""
    global_every: NonNegativeInt = 0
    """With a window: every n-th layer has none (2 in Gemma 2, 6 in Gemma 3); 0: all layers have it."""
    attention_scale: NonNegativeFloat = 0.0
    """Factor of the attention scores; 0: 1 / sqrt(head_dim)."""
    attention_softcap: NonNegativeFloat = 0.0
    """Bound of the attention scores, by tanh (Gemma 2); 0: none."""
    logit_softcap: NonNegativeFloat = 0.0
    """Bound of the logits, by tanh (Gemma 2); 0: none."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(embed_dim) (Gemma)."""
    mla: MLAConfig = MLAConfig()
    """Latent attention instead of grouped-query attention."""
    mlp: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    """Gated SiLU or gated GELU (three matrices), or tanh-approximated GELU (two)."""
    moe: MoEConfig = MoEConfig()
    """Experts instead of the MLP."""
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
    scaling: ScalingConfig = ScalingConfig()
    """Rules by which learning rates and initial scales of a base model serve this one."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and matrix products; parameters stay float32."""
    remat: Literal["none", "dots", "offload_dots", "attention", "full", "offload"] = "none"
    """What the backward pass recomputes. none: nothing; dots: all but matrix products; offload_dots: the same, with the
    products in host memory; attention: all but the output of attention; full: whole blocks; offload: whole blocks, with
    their inputs in host memory."""
    scan_unroll: PositiveInt = 1
    """Blocks per iteration of the scan over layers; more compiles longer and may run faster."""

    def __post_init__(self) -> None:
        # Zeros that mean "as another field" are replaced, so that equal models have equal configs.
        self._set("num_kv_heads", self.num_kv_heads or self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads}"
            )
        if not self.head_dim and self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads: {self.num_heads} does not divide embed_dim {self.embed_dim}"
            )
        self._set("head_dim", self.head_dim or self.embed_dim // self.num_heads)
        # Rotary positions rotate pairs.
        rotated = self.mla.rope_dim if self.mla.kv_rank else self.head_dim
        if self.position == "rope" and rotated % 2:
            raise ValueError(f"head_dim: rotary positions need an even size, not {rotated}")
        # Combinations that `layers` does not implement.
        if self.moe.num_experts and (self.bias or self.mlp != "swiglu"):
            raise ValueError(
                "moe: experts are SwiGLU without biases; set mlp to swiglu and bias to false"
            )
        if self.moe.num_experts and not 0 <= self.moe.first_dense < self.num_layers:
            raise ValueError("moe.first_dense: must be less than num_layers")
        ordinary = self.bias or self.qkv_bias or self.qk_norm != "none"
        if self.mla.kv_rank and (self.position != "rope" or ordinary):
            raise ValueError(
                "mla: latent attention has rotary positions and neither biases nor qk_norm"
            )
        if self.mtp_modules and self.position == "learned":
            raise ValueError("mtp_modules: positions must be rotary")
        if self.scaling != ScalingConfig():
            self._check_scaling()

    def _check_scaling(self) -> None:
        if self.mtp_modules:
            raise ValueError("scaling: there are no rules for mtp_modules; set them to 0")
        if self.norm_offset:
            # A scale of 1/8 stored as -7/8 would be off by 2% after rounding to bfloat16.
            raise ValueError(
                "scaling: makes scales of norms small, which norm_offset stores less 1"
            )

    def _set(self, name: str, value: Any) -> None:
        """Replaces a field of this frozen dataclass while it is initialized."""
        object.__setattr__(self, name, value)

    @staticmethod
    def expand(tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds the fields of the dial and of the preset that `tree` names, where `tree` does not set them."""
        # `config.build` calls this with the raw tree, before any field is checked: a name may be anything.
        name = tree.get("preset") or ""
        if not isinstance(name, str) or (name and name not in PRESETS):
            raise ValueError(f"preset: {name!r} is unknown; known: {', '.join(PRESETS)}")
        # Nested sections merge field by field: `moe: {aux_coef: 0.01}` keeps the preset's experts.
        base = PRESETS.get(name, {})
        position = tree.get("dial")
        if isinstance(position, float) and position.is_integer():
            position = int(position)  # as the field is read
        # Anything else is left to the check of the field.
        if type(position) is int and 0 < position <= LARGEST_DIAL:
            base = merge(base, dial.shape(position, merge(base, tree).get("mlp", "")))
        return merge(base, tree)

    def windowed(self, layer: int) -> bool:
        """Whether the attention of a layer has the window. With global_every 3: yes yes no yes yes no ..."""
        if not self.window:
            return False
        return self.global_every == 0 or (layer + 1) % self.global_every != 0

    def row_length(self, length: int, field: str, spelled: str = "") -> int:
        """The number of tokens in a row: `length`, or the whole context if that is 0.

        Args:
          length: in tokens.
          field: config field it comes from, for the error.
          spelled: how the error names the length; by default "{length} tokens".

        Raises:
          InputError: the row is longer than the context. The model is not trained on positions beyond it, and a
            learned table has no rows for them.
        """
        if length > self.max_length:
            what = spelled or f"{length} tokens"
            raise InputError(
                f"{field}: {what} exceed model.max_length {self.max_length}; lower the one or raise the other"
            )
        return length or self.max_length

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the tables of the vocabulary, those of the output included, and of learned positions."""
        rows = self.vocab_size if self.tie_embeddings else 2 * self.vocab_size
        if self.position == "learned":
            rows += self.max_length
        return rows * self.embed_dim

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass recomputes whole blocks, possibly except for attention."""
        return self.remat in ("attention", "full", "offload")

    @property
    def score_scale(self) -> float:
        """Factor of the attention scores."""
        # The size of a key: in latent attention that of both of its parts.
        size = self.mla.nope_dim + self.mla.rope_dim if self.mla.kv_rank else self.head_dim
        return (self.attention_scale or size**-0.5) * self.rope_scaling.score_scale

    @property
    def residual_init_std(self) -> float:
        """Standard deviation of the initial weights of projections into the residual stream (GPT-2)."""
        # 2 L sublayers add to the residual stream; together they add the variance of one. With a base model L is the base's:
        # the rest is a rule of `scaling`.
        return self.init_std / math.sqrt(2 * (self.scaling.base_depth or self.num_layers))

    @property
    def width_growth(self) -> float:
        """How many times as wide the model is as its base; 1 without one."""
        return self.embed_dim / (self.scaling.base_width or self.embed_dim)

    @property
    def depth_growth(self) -> float:
        """How many times as deep the model is as its base; 1 without one."""
        return self.num_layers / (self.scaling.base_depth or self.num_layers)

    @property
    def compute_dtype(self) -> "jnp.dtype":
        """Type of activations."""
        import jax.numpy as jnp  # not above: `--help` reads configs without JAX

        return jnp.dtype(self.dtype)


def preset(name: str, **fields: Any) -> ModelConfig:
    """A ModelConfig from a preset, `fields` taking precedence."""
    # Through `build`, so that fields are checked as those of a file.
    return build(ModelConfig, {"preset": name, **fields})
