"""Rotary positions, and ways to stretch them over longer contexts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models.parts_config import RopeScaling
from jaxllm.runtime.cpu import computed_once


def frequencies(size: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Radians per position for each pair of a head of `size`: float32[size / 2], highest frequency first.

    Pair i turns by theta^(-2 i / size) (Su et al. 2021, section 3.2.2); `scaling` divides the low frequencies, those with
    long wavelengths, by its factor and keeps the high ones.
    """
    # In float64 on the host; float32 would lose digits of the low frequencies.
    plain = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    if scaling.kind == "none":
        return plain.astype(np.float32)
    # To divide positions by the factor is to divide frequencies by it.
    if scaling.kind == "linear":
        return (plain / scaling.factor).astype(np.float32)
    if scaling.kind == "llama3":
        keep = _llama3_keep(plain, scaling)
    else:
        keep = _yarn_keep(size, theta, scaling)
    # keep = 1: as trained; keep = 0: positions are interpolated, as by "linear".
    scaled = keep * plain + (1 - keep) * plain / scaling.factor
    return scaled.astype(np.float32)


def _llama3_keep(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """How much of each frequency is kept, float64[size / 2]: 0 for long wavelengths, 1 for short ones."""
    # How often a pair turns in the original context: the ratio of its length and the wavelength.
    turns = scaling.original_length * plain / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    return np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)


def _yarn_keep(size: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """How much of each frequency is kept, float64[size / 2]: a ramp over the indices of the pairs.

    It falls from 1 at the pair that turns beta_fast times in original_length to 0 at the one that turns beta_slow times
    (Peng et al. 2023, eq. 17 to 19, with both indices rounded as in the published code).
    """

    def pair(turns: float) -> float:
        """Index of the pair that turns so many times in original_length."""
        log_wavelength = math.log(scaling.original_length / (turns * 2 * math.pi))
        return size * log_wavelength / (2 * math.log(theta))

    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = min(math.ceil(pair(scaling.beta_slow)), size - 1)
    # 0.001 avoids a division by 0, as in the published code.
    ramp = (np.arange(size // 2) - low) / max(high - low, 0.001)
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def rope(
    x: jax.Array, positions: jax.Array, frequency: jax.Array | np.ndarray, amplitude: float = 1.0
) -> jax.Array:
    """Rotary positions (Su et al. 2021, eq. 34).

    Element i of a head is rotated together with element i + H / 2, as in GPT-NeoX and Hugging Face's models; the paper
    pairs neighbors.

    Args:
      x: [B, T, N, H] queries or keys.
      positions: int32[B, T].
      frequency: float32[H / 2], radians per position.
      amplitude: factor of sine and cosine.

    Returns:
      [B, T, N, H] in x's dtype; computed in float32.
    """
    return _rotate(x, positions, jnp.asarray(frequency), amplitude)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotate(
    x: jax.Array, positions: jax.Array, frequency: jax.Array, amplitude: float
) -> jax.Array:
    """Each pair (a, b) of a head becomes (a cos - b sin, b cos + a sin); arguments as in `rope`."""
    # Angles in float32: bfloat16 cannot tell neighboring positions apart beyond 256.
    steps = positions.astype(jnp.float32)[:, :, None, None]
    angle = steps * frequency[None, None, None, :]
    cos, sin = computed_once((amplitude * jnp.cos(angle), amplitude * jnp.sin(angle)))
    half = x.shape[-1] // 2
    a = x[..., :half].astype(jnp.float32)
    b = x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _forward(
    x: jax.Array, positions: jax.Array, frequency: jax.Array, amplitude: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rotate(x, positions, frequency, amplitude), (positions, frequency)


def _backward(
    amplitude: float, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, None, None]:
    """The gradient is rotated back. Positions and frequencies are no parameters and have none."""
    positions, frequency = residuals
    return _rotate(dy, positions, -frequency, amplitude), None, None


_rotate.defvjp(_forward, _backward)
