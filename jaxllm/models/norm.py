"""Normalization of activations."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.config import ModelConfig
from jaxllm.models.parameters import constant, expand_like


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019, eq. 4) or LayerNorm (Ba et al. 2016, eq. 3), in float32.

    It normalizes the last dimension, or all dimensions that `axes` names (OLMo 2 normalizes all heads at once).
    """

    def __init__(self, config: ModelConfig, **axes: int):
        axes = axes or {"norm": config.embed_dim}
        self.eps = config.norm_eps
        self.centers = config.norm == "layernorm"
        self.rank = len(axes)
        # Gemma stores scale - 1, so that a scale of 0 leaves the activations unchanged.
        self.offset = float(config.norm_offset)
        self.scale = constant(1.0 - self.offset, **axes)
        if self.centers:
            self.bias = constant(0.0, **axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x [..., *axes]; returns the same shape and dtype."""
        # In bfloat16 the mean of squares would lose most of its digits.
        y = x.astype(jnp.float32)
        # The dimensions that the scale has.
        dims = tuple(range(-self.rank, 0))
        if self.centers:
            y = y - y.mean(dims, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(dims, keepdims=True) + self.eps)
        y = y * (self.offset + expand_like(self.scale[...], y))
        if self.centers:
            y = y + expand_like(self.bias[...], y)
        return y.astype(x.dtype)
