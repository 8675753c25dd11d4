"""The blocks, in Flax NNX. Every parameter names its logical axes where it is made (see sharding.PARAM_RULES)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.models.attention import Local, attention
from jaxllm.models.config import ModelConfig
from jaxllm.models.moe import moe
from jaxllm.models.rope import frequencies, rope
from jaxllm.sharding import constrain, constrain_residual, in_blocks, undo_zigzag

Order = np.ndarray | None  # permutation of positions, if not the identity


def normal(rngs: nnx.Rngs, std: float, **axes: int) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2); keyword order gives the dimensions: normal(rngs, .02, embed=8)."""
    names, shape = tuple(a.rstrip("_") for a in axes), tuple(axes.values())
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=names)


def constant(value: float, **axes: int) -> nnx.Param:
    return nnx.Param(jnp.full(tuple(axes.values()), value, jnp.float32), axes=tuple(axes))


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019, eq. 4) or LayerNorm (Ba et al. 2016, eq. 3), in float32.

    Over the last dimension, or over all that `axes` names (OLMo 2 normalises all heads at once).
    """

    def __init__(self, config: ModelConfig, **axes: int):
        axes = axes or {"norm": config.embed_dim}
        self.eps, self.centre, self.rank = config.norm_eps, config.norm == "layernorm", len(axes)
        self.offset = float(config.norm_offset)
        self.scale = constant(1.0 - self.offset, **axes)
        if self.centre:
            self.bias = constant(0.0, **axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        y, over = x.astype(jnp.float32), tuple(range(-self.rank, 0))
        if self.centre:
            y = y - y.mean(over, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(over, keepdims=True) + self.eps)
        y = y * (self.offset + _like(self.scale, y))
        return (y + _like(self.bias, y) if self.centre else y).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary or learned positions; windows, soft caps, norms of queries and keys."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c, self.config = config, config
        std, out_std = c.init_std, c.init_std / math.sqrt(2 * c.num_layers)
        self.q = normal(rngs, std, embed=c.embed_dim, heads=c.num_heads, head_dim=c.head_dim)
        self.k = normal(rngs, std, embed=c.embed_dim, kv_heads=c.num_kv_heads, head_dim=c.head_dim)
        self.v = normal(rngs, std, embed=c.embed_dim, kv_heads=c.num_kv_heads, head_dim=c.head_dim)
        self.out = normal(rngs, out_std, heads=c.num_heads, head_dim=c.head_dim, embed=c.embed_dim)
        if c.bias or c.qkv_bias:
            self.q_bias = constant(0.0, heads=c.num_heads, head_dim=c.head_dim)
            self.k_bias = constant(0.0, kv_heads=c.num_kv_heads, head_dim=c.head_dim)
            self.v_bias = constant(0.0, kv_heads=c.num_kv_heads, head_dim=c.head_dim)
        if c.bias:
            self.out_bias = constant(0.0, norm=c.embed_dim)
        if c.qk_norm == "head":
            self.q_norm, self.k_norm = (Norm(c, head_dim=c.head_dim) for _ in "qk")
        elif c.qk_norm == "all":
            self.q_norm = Norm(c, heads=c.num_heads, head_dim=c.head_dim)
            self.k_norm = Norm(c, kv_heads=c.num_kv_heads, head_dim=c.head_dim)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        local: Local,
        order: Order = None,
    ) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; order: that of the T places (`sharding.balanced_order`)."""
        q, k, v = self.qkv(x, positions, local)
        return self.project(_attend(self.config, q, k, v, segment_ids, local, order))

    def cached(
        self, x, positions, kv_segment_ids, k_cache, v_cache, at: tuple[Any, Any], local: Local
    ):
        """The same for T new tokens; at: (None, first place) of the caches [B, K, S, H], written in place, or (layer,
        first place) of [layers, B, K, S, H].

        kv_segment_ids: int32[B, S], 0 where a place holds no token. Returns (y, k_cache, v_cache).
        """
        q, k, v = self.qkv(x, positions, local)
        k_cache, keys = _write(k_cache, k.swapaxes(1, 2), at)
        v_cache, values = _write(v_cache, v.swapaxes(1, 2), at)
        settings = _cached_segments(kv_segment_ids, at[1], x.shape[1]) | form(self.config, local)
        mixed = attention(q, keys.swapaxes(1, 2), values.swapaxes(1, 2), **settings)
        return self.project(mixed), k_cache, v_cache

    def qkv(
        self, x: jax.Array, positions: jax.Array, local: Local
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> q [B, T, N, H], k, v [B, T, K, H], positions applied."""
        q, k, v = (
            jnp.einsum("btd,dnh->btnh", x, w[...].astype(x.dtype)) for w in (self.q, self.k, self.v)
        )
        if self.config.bias or self.config.qkv_bias:
            q, k, v = (
                q + _like(self.q_bias, q),
                k + _like(self.k_bias, k),
                v + _like(self.v_bias, v),
            )
        if self.config.qk_norm != "none":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.position == "rope":
            turn = functools.partial(rope, positions=positions, **_rotation(self.config, local))
            q, k = turn(q), turn(k)
        q = constrain(q, "batch", "seq", "heads", "head_dim")
        k, v = (constrain(y, "batch", None, "kv_heads", "head_dim") for y in (k, v))
        return q, k, v

    def project(self, y: jax.Array) -> jax.Array:
        """Heads [B, T, N, H] -> [B, T, D]."""
        weights = self.out[...].astype(y.dtype)
        y = y.reshape(*y.shape[:2], -1) @ weights.reshape(-1, weights.shape[-1])
        return y + _like(self.out_bias, y) if self.config.bias else y


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values come from one small vector of a token.

    Only that vector and one rotated key, shared by the heads, are cached.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c, m, self.config = config, config.mla, config
        std, out_std = c.init_std, c.init_std / math.sqrt(2 * c.num_layers)
        heads = {"heads": c.num_heads}
        if m.q_rank:
            self.q_a = normal(rngs, std, embed=c.embed_dim, latent=m.q_rank)
            self.q_a_norm = Norm(c, latent=m.q_rank)
            self.q_b = normal(rngs, std, rank=m.q_rank, **heads, head_dim=m.nope_dim + m.rope_dim)
        else:
            self.q = normal(rngs, std, embed=c.embed_dim, **heads, head_dim=m.nope_dim + m.rope_dim)
        self.kv_a = normal(rngs, std, embed=c.embed_dim, latent=m.kv_rank + m.rope_dim)
        self.kv_a_norm = Norm(c, latent=m.kv_rank)
        self.kv_b = normal(rngs, std, rank=m.kv_rank, **heads, head_dim=m.nope_dim + m.value_dim)
        self.out = normal(rngs, out_std, **heads, head_dim=m.value_dim, embed=c.embed_dim)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        local: Local,
        order: Order = None,
    ) -> jax.Array:
        q, latent, shared = self._parts(x, positions, local)
        m = self.config.mla
        kv = jnp.einsum("btr,rnh->btnh", latent, self.kv_b[...].astype(x.dtype))
        shared = jnp.broadcast_to(shared, (*kv.shape[:3], m.rope_dim))
        k, v = jnp.concatenate([kv[..., : m.nope_dim], shared], -1), kv[..., m.nope_dim :]
        q = constrain(q, "batch", "seq", "heads", "head_dim")
        k, v = (constrain(y, "batch", None, "heads", "head_dim") for y in (k, v))
        return self.project(_attend(self.config, q, k, v, segment_ids, local, order))

    def cached(
        self, x, positions, kv_segment_ids, k_cache, v_cache, at: tuple[Any, Any], local: Local
    ):
        """As `Attention.cached`; k_cache has one head of size kv_rank + rope_dim, v_cache is left alone.

        The matrix that makes keys of latents is applied to the query instead, and the one that makes values to what
        attention returns: every head then reads the latents themselves (DeepSeek-V2, end of section 2.1.2).
        """
        q, latent, shared = self._parts(x, positions, local)
        m, expand = self.config.mla, self.kv_b[...].astype(x.dtype)
        new = jnp.concatenate([latent[:, :, None], shared], -1).swapaxes(1, 2)
        k_cache, keys = _write(k_cache, new, at)
        q_latent = jnp.einsum("btnh,rnh->btnr", q[..., : m.nope_dim], expand[..., : m.nope_dim])
        q, keys = jnp.concatenate([q_latent, q[..., m.nope_dim :]], -1), keys.swapaxes(1, 2)
        settings = _cached_segments(kv_segment_ids, at[1], x.shape[1]) | form(self.config, local)
        mixed = attention(q, keys, keys[..., : m.kv_rank], **settings)
        mixed = jnp.einsum("btnr,rnh->btnh", mixed, expand[..., m.nope_dim :])
        return self.project(mixed), k_cache, v_cache

    def _parts(
        self, x: jax.Array, positions: jax.Array, local: Local
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, nope + rope], latents [B, T, kv_rank], the shared key [B, T, 1, rope]."""
        m, dtype = self.config.mla, x.dtype
        to_heads = lambda y, w: jnp.einsum("btr,rnh->btnh", y, w[...].astype(dtype))
        q = (
            to_heads(self.q_a_norm(x @ self.q_a[...].astype(dtype)), self.q_b)
            if m.q_rank
            else to_heads(x, self.q)
        )
        both = x @ self.kv_a[...].astype(dtype)
        turn = functools.partial(rope, positions=positions, **_rotation(self.config, local))
        q = jnp.concatenate([q[..., : m.nope_dim], turn(q[..., m.nope_dim :])], -1)
        return q, self.kv_a_norm(both[..., : m.kv_rank]), turn(both[..., None, m.kv_rank :])

    def project(self, y: jax.Array) -> jax.Array:
        weights = self.out[...].astype(y.dtype)
        return y.reshape(*y.shape[:2], -1) @ weights.reshape(-1, weights.shape[-1])


def _attend(
    config: ModelConfig, q: Any, k: Any, v: Any, segment_ids: jax.Array, local: Local, order: Order
) -> Any:
    """Attention of whole rows, whose queries may be permuted by `order`; keys are put back in their own order."""
    theirs = segment_ids
    if order is not None:
        k, v, theirs = undo_zigzag(k), undo_zigzag(v), undo_zigzag(segment_ids)
    segments = {"q_segment_ids": segment_ids, "kv_segment_ids": theirs, "q_order": order}
    return attention(q, k, v, **segments, **form(config, local))


def form(config: ModelConfig, local: Local) -> dict[str, Any]:
    """Window, scale and soft cap of a layer's attention scores."""
    return {
        "window": config.window or None,
        "local": local,
        "scale": config.score_scale,
        "softcap": config.attention_softcap,
    }


def _rotation(config: ModelConfig, local: Local) -> dict[str, Any]:
    """Frequency and amplitude for `rope`; windowed layers may have a base of their own, not stretched."""
    size, scaling = (
        config.mla.rope_dim if config.mla.kv_rank else config.head_dim,
        config.rope_scaling,
    )
    far: Any = frequencies(size, config.rope_theta, scaling)
    if config.local_rope_theta:
        near = frequencies(size, config.local_rope_theta, type(scaling)())
        far = (near if local else far) if isinstance(local, bool) else jnp.where(local, near, far)
    return {"frequency": far, "amplitude": scaling.amplitude}


def _write(cache: jax.Array, new: jax.Array, at: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    """(the cache with new [B, K, T, H] where `at` says, as `Attention.cached` does, its layer's [B, K, S, H])."""
    layer, place = at
    if layer is None:
        cache = jax.lax.dynamic_update_slice_in_dim(cache, new, place, axis=2)
        return cache, cache
    cache = jax.lax.dynamic_update_slice(cache, new[None], (layer, 0, 0, place, 0))
    return cache, cache[layer]


def _cached_segments(kv_segment_ids: jax.Array, offset: Any, T: int) -> dict[str, Any]:
    new = jax.lax.dynamic_slice_in_dim(kv_segment_ids, offset, T, axis=1)
    return {"q_segment_ids": new, "kv_segment_ids": kv_segment_ids, "q_offset": offset}


_MLP_BLOCK = 3072  # hidden units that are gone through at a time, at least, where whole blocks are recomputed


def _num_blocks(size: int) -> int:
    """Into how many blocks that many hidden units are cut: as many as leave each one enough, in whole tiles."""
    fits = lambda n: size % (n * min(128, _MLP_BLOCK)) == 0 and size // n >= _MLP_BLOCK
    return max((n for n in range(1, size // _MLP_BLOCK + 1) if fits(n)), default=1)


class MLP(nnx.Module):
    """SwiGLU or GeGLU (Shazeer 2020, eq. 6), or GELU with the tanh approximation (Hendrycks and Gimpel 2016)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, size: int = 0):
        c, self.config, size = config, config, size or config.mlp_dim
        self.gated = c.mlp != "gelu"
        if self.gated:
            self.gate = normal(rngs, c.init_std, embed=c.embed_dim, mlp=size)
        self.up = normal(rngs, c.init_std, embed=c.embed_dim, mlp=size)
        self.down = normal(
            rngs, c.init_std / math.sqrt(2 * c.num_layers), mlp=size, embed=c.embed_dim
        )
        if c.bias:
            self.up_bias = constant(0.0, mlp=size)
            self.down_bias = constant(0.0, norm=c.embed_dim)
            if self.gated:
                self.gate_bias = constant(0.0, mlp=size)

    def __call__(self, x: jax.Array) -> jax.Array:
        names = ("gate", "up") if self.gated else ("up",)
        into = [(getattr(self, name)[...], self._bias(name)) for name in names]
        count = _num_blocks(self.up[...].shape[1]) if self.config.recomputes else 1
        y = self._in_blocks(x, into, count) if count > 1 else self._through(x, into, self.down[...])
        return y + _last(self._bias("down"), y) if self.config.bias else y

    def _bias(self, name: str) -> jax.Array | None:
        return getattr(self, f"{name}_bias")[...] if self.config.bias else None

    def _through(self, x: jax.Array, into: Any, down: jax.Array) -> jax.Array:
        """x [B, T, D] through some of the hidden units, with (matrix, bias) of the gate, if there is one, and of up."""
        act = jax.nn.silu if self.config.mlp == "swiglu" else jax.nn.gelu
        linear = lambda w, b: (
            (y := jnp.einsum("btd,df->btf", x, w.astype(x.dtype)))
            + (0 if b is None else _last(b, y))
        )
        first, *up = (linear(*each) for each in into)
        hidden = act(first) * up[0] if up else act(first)
        return jnp.einsum(
            "btf,fd->btd", constrain(hidden, "batch", "seq", "mlp"), down.astype(x.dtype)
        )

    def _in_blocks(self, x: jax.Array, into: Any, count: int) -> jax.Array:
        """The hidden units in blocks, recomputed one by one backward: where the whole layer is, that costs nothing more.

        Only one block's hidden sizes and gathered weights are in memory. Both sums over blocks are in float32.
        """
        wide = x.astype(jnp.float32)
        cut = lambda leaf: in_blocks(leaf, leaf.ndim - 1, count)
        blocks = (jax.tree.map(cut, into), in_blocks(self.down[...], 0, count))
        one = jax.checkpoint(
            lambda block: self._through(wide.astype(x.dtype), *block), prevent_cse=False
        )
        add = lambda total, block: (
            constrain_residual(total + one(block).astype(jnp.float32)),
            None,
        )
        return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), blocks)[0].astype(x.dtype)


class Experts(nnx.Module):
    """The matrices of a layer's routed experts, and those that every token goes to."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c, e, self.config = config, config.moe, config
        size, down_std = e.mlp_dim or c.mlp_dim, c.init_std / math.sqrt(2 * c.num_layers)
        self.router = normal(rngs, c.init_std, embed=c.embed_dim, router=e.num_experts)
        if e.router == "sigmoid":
            self.router_bias = constant(0.0, router=e.num_experts)
        into = {"experts": e.num_experts, "expert_embed": c.embed_dim, "mlp": size}
        self.experts = nnx.Dict(
            gate=normal(rngs, c.init_std, **into),
            up=normal(rngs, c.init_std, **into),
            down=normal(rngs, down_std, experts=e.num_experts, mlp=size, expert_embed=c.embed_dim),
        )
        if e.num_shared:
            self.shared = MLP(c, rngs, e.num_shared * size)

    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
        weights = {
            "router": self.router[...]
        }  # float32: a choice of experts must not depend on rounding
        if self.config.moe.router == "sigmoid":
            weights["router_bias"] = jax.lax.stop_gradient(self.router_bias[...])
        weights["experts"] = {name: w[...].astype(x.dtype) for name, w in self.experts.items()}
        y, load = moe(x, mask, weights, self.config.moe, in_parts=self.config.recomputes)
        return y + self.shared(x) if self.config.moe.num_shared else y, load


class Block(nnx.Module):
    """Residual block: x + attention(norm(x)), then x + mlp(norm(x)); norms before, after (OLMo 2) or both (Gemma 2)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.attention = (LatentAttention if config.mla.kv_rank else Attention)(config, rngs)
        self.mlp = Experts(config, rngs) if config.moe.num_experts else MLP(config, rngs)
        if config.norm_place != "after":
            self.attention_norm, self.mlp_norm = Norm(config), Norm(config)
        if config.norm_place != "before":
            self.attention_post_norm, self.mlp_post_norm = Norm(config), Norm(config)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        local: Local,
        order: Order = None,
    ) -> tuple[jax.Array, Any]:
        """(x, the experts' load or {}) for x [B, T, D], positions and segment_ids int32[B, T], and the places' order."""
        y = self.attention(self._before(x, "attention"), positions, segment_ids, local, order)
        return self._mlp(self._add(x, y, "attention"), segment_ids > 0)

    def cached(
        self, x, positions, kv_segment_ids, k_cache, v_cache, at: tuple[Any, Any], local: Local
    ):
        """The same for T new tokens; returns (x, k_cache, v_cache). See `Attention.cached`."""
        caches = (kv_segment_ids, k_cache, v_cache, at, local)
        y, k_cache, v_cache = self.attention.cached(
            self._before(x, "attention"), positions, *caches
        )
        mask = jax.lax.dynamic_slice_in_dim(kv_segment_ids, at[1], x.shape[1], axis=1) > 0
        return self._mlp(self._add(x, y, "attention"), mask)[0], k_cache, v_cache

    def _mlp(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
        y = self._before(x, "mlp")
        y, load = self.mlp(y, mask) if isinstance(self.mlp, Experts) else (self.mlp(y), {})
        return self._add(x, y, "mlp"), load

    def _before(self, x: jax.Array, what: str) -> jax.Array:
        x = x if self.config.norm_place == "after" else getattr(self, f"{what}_norm")(x)
        return constrain(
            x, "batch", "seq", "embed"
        )  # gathered here: left to XLA, the weights would be

    def _add(self, x: jax.Array, y: jax.Array, what: str) -> jax.Array:
        y = y if self.config.norm_place == "before" else getattr(self, f"{what}_post_norm")(y)
        return constrain_residual(x + y)


class MTPModule(nnx.Module):
    """Predicts one token further from a hidden state and the next token (DeepSeek-V3, section 2.2, eq. 21 to 23)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.embed_norm, self.hidden_norm, self.norm = (Norm(config) for _ in range(3))
        self.project = normal(
            rngs, config.init_std, latent=2 * config.embed_dim, embed=config.embed_dim
        )
        self.block = Block(config, rngs)

    def __call__(
        self, hidden: jax.Array, embedded: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> tuple[jax.Array, Any]:
        """(normed hidden [B, T, D], the experts' load) from the model's, or the module's before, and embeddings."""
        both = jnp.concatenate([self.embed_norm(embedded), self.hidden_norm(hidden)], -1)
        x = constrain(both @ self.project[...].astype(both.dtype), "batch", "seq", "embed")
        x, load = self.block(x, positions, segment_ids, False)
        return self.norm(x), load


def _like(param: nnx.Param, x: jax.Array) -> jax.Array:
    return _last(param[...], x)


def _last(value: Any, x: jax.Array) -> jax.Array:
    """A parameter over the last dimensions, cast and broadcast to the rank of x."""
    return value.astype(x.dtype).reshape((1,) * (x.ndim - value.ndim) + value.shape)
