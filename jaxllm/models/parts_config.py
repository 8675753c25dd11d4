"""Settings of the parts that a model may have: experts, latent attention, stretched positions, adapters."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from jaxllm.config.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Experts instead of the MLP; num_experts 0: a dense MLP."""

    RENAMED: ClassVar[Mapping[str, str]] = {"normalise": "normalize"}

    num_experts: NonNegativeInt = 0
    """Routed experts of a layer."""
    per_token: PositiveInt = 2
    """Experts that a token goes to."""
    mlp_dim: NonNegativeInt = 0
    """Hidden size of an expert; 0: model.mlp_dim."""
    num_shared: NonNegativeInt = 0
    """Additional experts that every token goes to (computed as one MLP of num_shared times the size)."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """Scores of the experts: a softmax over all (Mixtral, Qwen3, DeepSeek-V2) or a sigmoid for each (DeepSeek-V3)."""
    normalize: bool = True
    """Divide the weights of a token's experts by their sum."""
    scale: PositiveFloat = 1.0
    """Factor of the weights."""
    num_groups: PositiveInt = 1
    """Groups of experts (DeepSeek): a token first chooses groups."""
    groups_per_token: PositiveInt = 1
    """Groups that a token chooses its experts from."""
    first_dense: NonNegativeInt = 0
    """How many of the first layers have a dense MLP instead."""
    capacity_factor: NonNegativeFloat = 0.0
    """Tokens that an expert takes, relative to perfect balance; further tokens are dropped. 0: dropless."""
    aux_coef: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss (Fedus et al. 2022, eq. 4)."""
    bias_rate: NonNegativeFloat = 0.0
    """Step of the bias that balances the load without a loss (Wang et al. 2024; DeepSeek-V3, section 2.1.2)."""

    def __post_init__(self) -> None:
        if not self.num_experts:
            return
        if self.per_token > self.num_experts:
            raise ValueError("per_token: must be at most num_experts")
        if self.num_experts % self.num_groups or self.groups_per_token > self.num_groups:
            raise ValueError(
                "num_groups: must divide num_experts, and be at least groups_per_token"
            )
        if self.per_token > self.groups_per_token * (self.num_experts // self.num_groups):
            raise ValueError(
                "groups_per_token: the groups chosen hold fewer experts than per_token"
            )
        if self.bias_rate and self.router != "sigmoid":
            raise ValueError("bias_rate: balancing by a bias needs router sigmoid; use aux_coef")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are changed for contexts longer than those of pretraining."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    """Divide positions by factor (Chen et al. 2023), Llama 3's scaling by wavelength, or YaRN (Peng et al. 2023)."""
    factor: PositiveFloat = 1.0
    """By how much the context becomes longer."""
    original_length: NonNegativeInt = 0
    """llama3, yarn: context length before stretching, in tokens."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: frequencies of wavelengths above original_length / this are divided by factor."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: frequencies of wavelengths below original_length / this are kept; in between both are mixed."""
    beta_fast: PositiveFloat = 32.0
    """yarn: frequencies that turn more often than this in original_length are kept."""
    beta_slow: PositiveFloat = 1.0
    """yarn: frequencies that turn less often than this are divided by factor; in between both are mixed."""
    mscale: NonNegativeFloat = 0.0
    """yarn as in DeepSeek: the rotated halves are scaled by m(mscale) / m(mscale_all_dim), m(x) = 0.1 x ln(factor) + 1."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """yarn as in DeepSeek: attention scores are scaled by m(mscale_all_dim)^2."""

    def __post_init__(self) -> None:
        if self.kind in ("llama3", "yarn") and self.original_length < 1:
            raise ValueError(
                f"original_length: {self.kind} needs the context length before stretching; set it"
            )

    def magnitude(self, mscale: float) -> float:
        """YaRN's m (Peng et al. 2023, section 3.4), with DeepSeek's coefficient `mscale`."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def amplitude(self) -> float:
        """Factor of sine and cosine."""
        if self.kind != "yarn":
            return 1.0
        # DeepSeek moves part of the factor from the rotation to the scores.
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    @property
    def score_scale(self) -> float:
        """Additional factor of the attention scores (DeepSeek-V2, section 3.1.4)."""
        if self.kind == "yarn" and self.mscale_all_dim:
            return self.magnitude(self.mscale_all_dim) ** 2
        return 1.0


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """The model that learning rates and initial scales were chosen for; those of this one follow from them."""

    base_width: NonNegativeInt = 0
    """Its embed_dim: muP (Yang et al. 2022); 0: the width changes nothing."""
    base_depth: NonNegativeInt = 0
    """Its num_layers: CompleteP (Dey et al. 2025); 0: the depth changes the initial scale of projections only."""


# Matrices that can have an adapter, by name; `Axes.num_inputs` says which of their dimensions are the input.
LORA_TARGETS = ("q", "k", "v", "out", "gate", "up", "down", "q_a", "q_b", "kv_a", "kv_b")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Adapters instead of full fine-tuning."""

    rank: NonNegativeInt = 0
    """Rank of an adapter; 0 trains all parameters."""
    alpha: PositiveFloat = 16.0
    """The adapter's product is scaled by alpha / rank."""
    targets: tuple[str, ...] = LORA_TARGETS
    """Matrices that have an adapter; by default all of attention and MLP. Routed experts have none."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.targets if name not in LORA_TARGETS]
        if unknown:
            raise ValueError(
                f"targets: {unknown[0]!r} has no adapter; known: {', '.join(LORA_TARGETS)}"
            )
        if not self.targets:
            raise ValueError("targets: name at least one matrix, or set rank to 0")


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1); kv_rank 0: ordinary attention."""

    kv_rank: NonNegativeInt = 0
    """Size of the latent vector that keys and values are computed from."""
    q_rank: NonNegativeInt = 0
    """Size of the latent vector that queries are computed from; 0: from the hidden state."""
    nope_dim: NonNegativeInt = 128
    """Size of the part of a head without positions."""
    rope_dim: PositiveInt = 64
    """Size of the part of a head with rotary positions; all heads share its key."""
    value_dim: PositiveInt = 128
    """Size of a head's value."""
