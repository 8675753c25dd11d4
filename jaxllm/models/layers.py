"""The blocks, in Flax NNX. Every parameter names its logical axes where it is made (see sharding.PARAM_RULES)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.attention import attention
from jaxllm.models.config import ModelConfig
from jaxllm.sharding import constrain


def normal(rngs: nnx.Rngs, std: float, **axes: int) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2); keyword order gives the dimensions: normal(rngs, .02, embed=8)."""
    names, shape = tuple(a.rstrip("_") for a in axes), tuple(axes.values())
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=names)


def constant(value: float, **axes: int) -> nnx.Param:
    return nnx.Param(jnp.full(tuple(axes.values()), value, jnp.float32), axes=tuple(axes))


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019, eq. 4) or LayerNorm (Ba et al. 2016, eq. 3); [..., D] in float32."""

    def __init__(self, config: ModelConfig):
        self.eps, self.centre = config.norm_eps, config.norm == "layernorm"
        self.scale = constant(1.0, norm=config.embed_dim)
        if self.centre:
            self.bias = constant(0.0, norm=config.embed_dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.centre:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        y = y * _like(self.scale, y)
        return (y + _like(self.bias, y) if self.centre else y).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary or no positions."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c, self.config = config, config
        std, out_std = c.init_std, c.init_std / math.sqrt(2 * c.num_layers)
        self.q = normal(rngs, std, embed=c.embed_dim, heads=c.num_heads, head_dim=c.head_dim)
        self.k = normal(rngs, std, embed=c.embed_dim, kv_heads=c.num_kv_heads, head_dim=c.head_dim)
        self.v = normal(rngs, std, embed=c.embed_dim, kv_heads=c.num_kv_heads, head_dim=c.head_dim)
        self.out = normal(rngs, out_std, heads=c.num_heads, head_dim=c.head_dim, embed=c.embed_dim)
        if c.bias:
            self.q_bias = constant(0.0, heads=c.num_heads, head_dim=c.head_dim)
            self.k_bias = constant(0.0, kv_heads=c.num_kv_heads, head_dim=c.head_dim)
            self.v_bias = constant(0.0, kv_heads=c.num_kv_heads, head_dim=c.head_dim)
            self.out_bias = constant(0.0, norm=c.embed_dim)

    def qkv(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> q [B, T, N, H], k, v [B, T, K, H], positions applied."""
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, w[...].astype(x.dtype)) for w in (self.q, self.k, self.v))
        if self.config.bias:
            q, k, v = q + _like(self.q_bias, q), k + _like(self.k_bias, k), v + _like(self.v_bias, v)
        if self.config.position == "rope":
            q, k = (rope(y, positions, self.config.rope_theta) for y in (q, k))
        q = constrain(q, "batch", "seq", "heads", "head_dim")
        k, v = (constrain(y, "batch", None, "kv_heads", "head_dim") for y in (k, v))
        return q, k, v

    def project(self, y: jax.Array) -> jax.Array:
        """Heads [B, T, N, H] -> [B, T, D]."""
        weights = self.out[...].astype(y.dtype)
        y = y.reshape(*y.shape[:2], -1) @ weights.reshape(-1, weights.shape[-1])
        return y + _like(self.out_bias, y) if self.config.bias else y


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, eq. 6) or GELU with the tanh approximation (Hendrycks and Gimpel 2016)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c, self.config = config, config
        if c.mlp == "swiglu":
            self.gate = normal(rngs, c.init_std, embed=c.embed_dim, mlp=c.mlp_dim)
        self.up = normal(rngs, c.init_std, embed=c.embed_dim, mlp=c.mlp_dim)
        self.down = normal(rngs, c.init_std / math.sqrt(2 * c.num_layers), mlp=c.mlp_dim, embed=c.embed_dim)
        if c.bias:
            self.up_bias = constant(0.0, mlp=c.mlp_dim)
            self.down_bias = constant(0.0, norm=c.embed_dim)
            if c.mlp == "swiglu":
                self.gate_bias = constant(0.0, mlp=c.mlp_dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        up = self._linear(x, "up")
        hidden = jax.nn.silu(self._linear(x, "gate")) * up if self.config.mlp == "swiglu" else jax.nn.gelu(up)
        return self._linear(constrain(hidden, "batch", "seq", "mlp"), "down")

    def _linear(self, x: jax.Array, name: str) -> jax.Array:
        y = jnp.einsum("bti,io->bto", x, getattr(self, name)[...].astype(x.dtype))
        return y + _like(getattr(self, f"{name}_bias"), y) if self.config.bias else y


class Block(nnx.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm, self.attention = Norm(config), Attention(config, rngs)
        self.mlp_norm, self.mlp = Norm(config), MLP(config, rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        q, k, v = self.attention.qkv(self.attention_norm(x), positions)
        mixed = attention(q, k, v, q_segment_ids=segment_ids, kv_segment_ids=segment_ids)
        return self._rest(x, mixed)

    def cached(self, x, positions, kv_segment_ids, k_cache, v_cache, offset):
        """The same for T new tokens at places offset.. of a cache k, v [B, K, S, H], written in place.

        kv_segment_ids: int32[B, S], 0 where a place holds no token. Returns (x, k_cache, v_cache).
        """
        q, k, v = self.attention.qkv(self.attention_norm(x), positions)
        k_cache = jax.lax.dynamic_update_slice_in_dim(k_cache, k.swapaxes(1, 2), offset, axis=2)
        v_cache = jax.lax.dynamic_update_slice_in_dim(v_cache, v.swapaxes(1, 2), offset, axis=2)
        T = x.shape[1]
        q_segment_ids = jax.lax.dynamic_slice_in_dim(kv_segment_ids, offset, T, axis=1)
        segments = {"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}
        mixed = attention(q, k_cache.swapaxes(1, 2), v_cache.swapaxes(1, 2), **segments, q_offset=offset)
        return self._rest(x, mixed), k_cache, v_cache

    def _rest(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        x = constrain(x + self.attention.project(mixed), "batch", "seq", "embed")
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch", "seq", "embed")


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary positions (Su et al. 2021, eq. 34), halves rotated: x [B, T, N, H], positions int32[B, T]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _like(param: nnx.Param, x: jax.Array) -> jax.Array:
    """A parameter over the last dimensions, cast and broadcast to the rank of x."""
    value = param[...].astype(x.dtype)
    return value.reshape((1,) * (x.ndim - value.ndim) + value.shape)
