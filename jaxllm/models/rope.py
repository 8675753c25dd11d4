"""Rotary positions and the ways to stretch them over longer contexts."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are changed for contexts longer than those of pre-training."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    """Positions divided by factor (Chen et al. 2023), Llama 3's by wavelength, or YaRN (Peng et al. 2023)."""
    factor: PositiveFloat = 1.0
    """How much longer the context becomes."""
    original_length: NonNegativeInt = 0
    """llama3, yarn: tokens of the context before."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths above original_length / this are divided by factor."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: wavelengths below original_length / this stay; in between they are mixed."""
    beta_fast: PositiveFloat = 32.0
    """yarn: frequencies that turn more often than this in original_length stay."""
    beta_slow: PositiveFloat = 1.0
    """yarn: those that turn less often are divided by factor; in between they are mixed."""
    mscale: NonNegativeFloat = 0.0
    """yarn as in DeepSeek: the rotated halves are scaled by m(mscale) / m(mscale_all_dim), m(x) = 0.1 x ln(factor) + 1."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """yarn as in DeepSeek: attention scores are scaled by m(mscale_all_dim)^2."""

    def __post_init__(self) -> None:
        if self.kind in ("llama3", "yarn") and self.original_length < 1:
            raise ValueError(f"original_length: {self.kind} needs the length of the context before")

    def magnitude(self, mscale: float) -> float:
        """YaRN's m: its section 3.4, with DeepSeek's coefficient."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def amplitude(self) -> float:
        """What sine and cosine are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by besides (DeepSeek-V2, section 3.1.4)."""
        return (
            self.magnitude(self.mscale_all_dim) ** 2
            if self.kind == "yarn" and self.mscale_all_dim
            else 1.0
        )


def frequencies(size: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Radians per position of each pair of a head of `size`: float32[size / 2]."""
    plain = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    if scaling.kind == "none":
        scaled = plain
    elif scaling.kind == "linear":
        scaled = plain / scaling.factor
    else:
        keep = (_llama3_keep if scaling.kind == "llama3" else _yarn_keep)(
            plain, size, theta, scaling
        )
        scaled = keep * plain + (1 - keep) * plain / scaling.factor
    return scaled.astype(np.float32)


def _llama3_keep(plain: np.ndarray, size: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Share of each frequency that stays: 0 for wavelengths above the low limit, 1 below the high one."""
    del size, theta
    turns = scaling.original_length * plain / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    return np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)


def _yarn_keep(plain: np.ndarray, size: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """A ramp over the pairs' numbers between those that turn beta_fast and beta_slow times (Peng et al. 2023, eq. 17
    to 19, in the whole numbers of the published code)."""
    pair = lambda turns: (
        size * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
    )
    low, high = (
        max(math.floor(pair(scaling.beta_fast)), 0),
        min(math.ceil(pair(scaling.beta_slow)), size - 1),
    )
    ramp = (np.arange(len(plain)) - low) / max(high - low, 0.001)
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def rope(
    x: jax.Array, positions: jax.Array, frequency: jax.Array | np.ndarray, amplitude: float = 1.0
) -> jax.Array:
    """Rotary positions (Su et al. 2021, eq. 34), halves rotated: x [B, T, N, H], positions int32[B, T],
    frequency float32[H / 2]."""
    half = x.shape[-1] // 2
    angle = (
        positions.astype(jnp.float32)[:, :, None, None]
        * jnp.asarray(frequency)[None, None, None, :]
    )
    cos, sin = amplitude * jnp.cos(angle), amplitude * jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
