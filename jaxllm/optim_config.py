"""Settings of the optimizer and of its learning-rate schedule."""

import dataclasses
from typing import Literal

from jaxllm.config import require
from jaxllm.config.ranges import (
    Epsilon,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    PositiveProportion,
    Proportion,
    ProportionBelowOne,
)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    kind: Literal["adamw", "muon", "soap", "adafactor", "lion", "sgd", "schedule_free"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019), Muon (Jordan et al. 2024), SOAP (Vyas et al. 2024), Adafactor (Shazeer and Stern
    2018), Lion (Chen et al. 2023), SGD with momentum, or schedule-free AdamW (Defazio et al. 2024). muon and soap are for
    matrices: AdamW trains embeddings, head, norms and biases."""
    learning_rate: NonNegativeFloat = 1e-3
    """Peak learning rate."""
    rest_learning_rate: NonNegativeFloat = 0.0
    """muon, soap: peak learning rate of what AdamW trains; 0: learning_rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After warm-up: constant, linear or cosine decay, or warm-up-stable-decay (Hu et al. 2024)."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from 0."""
    final_fraction: Proportion = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    decay_fraction: PositiveProportion = 0.2
    """wsd: the fraction of all steps spent decaying."""
    b1: ProportionBelowOne = 0.9
    """Decay of the gradient's running mean. schedule_free: the share of the average where the gradient is taken."""
    b2: ProportionBelowOne = 0.95
    """Decay of the squared gradient's running mean; of lion's running mean, in which b1 only weighs the new gradient."""
    eps: Epsilon = 1e-8
    """Added to the root of the second moment."""
    momentum: ProportionBelowOne = 0.95
    """muon, sgd: decay of the momentum."""
    muon_scaling: Literal["rms", "width"] = "rms"
    """muon: an orthogonal update times 0.2 * sqrt(max(rows, columns)), about as large as one of AdamW (Liu et al. 2025),
    so that learning rate and decay of AdamW fit; or times sqrt(max(1, columns / rows)) (Jordan et al. 2024)."""
    basis_every: PositiveInt = 10
    """soap: updates between two steps of the iteration that follows the eigenvectors."""
    longest_basis: PositiveInt = 10_000
    """soap: the longest side of a matrix that has a basis of eigenvectors; its two arrays have the side squared elements."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which moments are stored; they are updated in float32 (bfloat16: DeepSeek-V3, section 3.3.2). adamw, muon,
    lion, sgd."""
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
        require(
            not self.rest_learning_rate or self.kind in ("muon", "soap"),
            f"rest_learning_rate: {self.kind} has one learning rate for all parameters; set kind to muon or soap",
        )
        require(
            self.kind != "schedule_free" or self.schedule == "constant",
            f"schedule: schedule_free averages instead of decaying; set it to constant, not {self.schedule}",
        )
        self._check_state_dtype()

    def check_scaling(self, where: str, scaled: bool) -> None:
        """Raises ValueError if the model follows a base model and this kind of optimizer has no rules for that."""
        # SGD's moves are as large as gradients are, and SOAP's depend on the rank of the gradient.
        require(
            not scaled or self.kind not in ("sgd", "soap"),
            f"{where}.kind: {self.kind} has no rules for model.scaling; set it to adamw, muon, lion, adafactor or schedule_free",
        )

    def _check_state_dtype(self) -> None:
        if self.state_dtype == "float32":
            return
        # Adafactor's decay rises to 1, an eigenbasis has to stay orthogonal, and z is a copy of the parameters.
        require(
            self.kind not in ("adafactor", "soap", "schedule_free"),
            f"state_dtype: the state of {self.kind} does not survive rounding to bfloat16; set it to float32",
        )
        # At 0.999 a step changes the second moment by less than bfloat16 resolves: it would never fall.
        decays = {
            "adamw": ("b1", "b2"),
            "muon": ("momentum", "b1", "b2"),
            "lion": ("b2",),
            "sgd": ("momentum",),
        }[self.kind]
        require(
            all(getattr(self, name) <= 0.99 for name in decays),
            f"state_dtype: bfloat16 needs {' and '.join(decays)} of at most 0.99",
        )
