"""Settings of the optimizer and of its learning-rate schedule."""

import dataclasses
from typing import Literal

from jaxllm.config import require
from jaxllm.config.ranges import (
    Epsilon,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveProportion,
    Proportion,
    ProportionBelowOne,
)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019) and its learning-rate schedule."""

    learning_rate: NonNegativeFloat = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After warm-up: constant, linear or cosine decay, or warm-up-stable-decay (Hu et al. 2024)."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from 0."""
    final_fraction: Proportion = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    decay_fraction: PositiveProportion = 0.2
    """wsd: the fraction of all steps spent decaying."""
    b1: ProportionBelowOne = 0.9
    """Decay of the gradient's running mean."""
    b2: ProportionBelowOne = 0.95
    """Decay of the squared gradient's running mean."""
    eps: Epsilon = 1e-8
    """Added to the root of the second moment."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which both moments are stored; they are updated in float32 (bfloat16: DeepSeek-V3, section 3.3.2)."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices and embeddings; norms and biases have none."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    spike_factor: NonNegativeFloat = 0.0
    """Skip an update whose gradient norm is more than this times its running mean; 0: skip only updates that are not
    finite."""

    def __post_init__(self) -> None:
        require(
            not self.spike_factor or self.spike_factor > 1,
            "spike_factor: must be above 1, or 0 for off",
        )
        # At 0.999 a step changes the second moment by less than bfloat16 resolves: it would never fall.
        narrow = self.state_dtype == "bfloat16"
        require(
            not narrow or max(self.b1, self.b2) <= 0.99,
            "state_dtype: bfloat16 needs b1 and b2 of at most 0.99",
        )
