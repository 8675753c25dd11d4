"""Normalization of activations, with a gradient written by hand."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxllm.models.config import ModelConfig
from jaxllm.models.parameters import constant, expand_like
from jaxllm.models.scaling import Place, Scale, of_vector
from jaxllm.runtime.cpu import computed_once


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019, eq. 4) or LayerNorm (Ba et al. 2016, eq. 3), in float32.

    It normalizes the last dimension, or all dimensions that `axes` names (OLMo 2 normalizes all heads at once).
    """

    def __init__(
        self,
        config: ModelConfig,
        axes: Mapping[str, int] | None = None,
        place: Place = "inside",
        scale: Scale | None = None,
    ):
        """place: in a residual branch; scale: of a norm outside of them."""
        axes = axes or {"norm": config.embed_dim}
        scale = scale or of_vector(config, axes, place)
        self.eps = config.norm_eps
        self.centers = config.norm == "layernorm"
        self.rank = len(axes)
        # Gemma stores scale - 1, so that a scale of 0 leaves the activations unchanged.
        self.offset = float(config.norm_offset)
        self.scale = constant(1.0 - self.offset, scale, **axes)
        if self.centers:
            self.bias = constant(0.0, scale, **axes)

    def __call__(self, x: Array) -> Array:
        """Normalizes x [..., *axes]; returns the same shape and dtype."""
        scale = self.offset + self.scale[...]
        bias = self.bias[...] if self.centers else None
        return _normalize(x, scale, bias, self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(x: Array, scale: Array, bias: Array | None, eps: float) -> Array:
    """x [..., *S] normalized over the dimensions of scale and bias float32[*S]; centered if there is a bias."""
    return _forward(x, scale, bias, eps)[0]


def _forward(x: Array, scale: Array, bias: Array | None, eps: float) -> tuple[Array, Any]:
    unit, _ = _unit(x, scale.ndim, bias is not None, eps)
    y = unit * expand_like(scale, unit)
    if bias is not None:
        y = y + expand_like(bias, y)
    return y.astype(x.dtype), (x, scale, bias)


def _unit(x: Array, rank: int, center: bool, eps: float) -> tuple[Array, Array]:
    """x with mean square 1 over its last `rank` dimensions, and 1 / deviation [..., 1], both float32."""
    # In bfloat16 the mean of squares would lose most of its digits.
    y = x.astype(jnp.float32)
    dims = tuple(range(-rank, 0))
    if center:
        y = y - y.mean(dims, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(y).mean(dims, keepdims=True) + eps)
    return y * inverse, inverse


def _backward(eps: float, residuals: Any, dy: Array) -> tuple[Array, Array, Array | None]:
    """With u = x / deviation and y = scale u: dx = (du - u mean(u du)) / deviation, du = scale dy, dscale = sum of u dy.

    If x is centered first, du loses its mean, too.
    """
    x, scale, bias = residuals
    # XLA would write the scale out, once for each token, for the forward and the backward pass together.
    scale = computed_once(scale)
    unit, inverse = _unit(x, scale.ndim, bias is not None, eps)
    dims = tuple(range(-scale.ndim, 0))
    tokens = tuple(range(x.ndim - scale.ndim))
    dy = dy.astype(jnp.float32)
    du = dy * expand_like(scale, dy)
    dx = du - unit * (du * unit).mean(dims, keepdims=True)
    if bias is not None:
        dx = dx - du.mean(dims, keepdims=True)
    d_scale = (dy * unit).sum(tokens)
    d_bias = None if bias is None else dy.sum(tokens)
    return (dx * inverse).astype(x.dtype), d_scale, d_bias


_normalize.defvjp(_forward, _backward)
