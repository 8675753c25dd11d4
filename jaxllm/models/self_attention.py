"""Self-attention layers in Flax NNX: grouped-query attention, and DeepSeek's latent attention."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.models.attention import UseWindow, attention
from jaxllm.models.block_cache import LayerBlocks, Rules, View, extend_and_attend
from jaxllm.models.config import ModelConfig
from jaxllm.models.linear import linear
from jaxllm.models.norm import Norm
from jaxllm.models.parameters import bias, expand_like, matrix
from jaxllm.models.rope import frequencies, rope
from jaxllm.sharding import constrain, undo_zigzag

# Permutation of the positions of a row, int[T], where context parallelism shards them; None: the identity.
SequenceOrder = np.ndarray | None


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary or learned positions; optionally windows, soft caps and query-key norms."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = self.config = config
        embed = {"embed": c.embed_dim}
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        kv_heads = {"kv_heads": c.num_kv_heads, "head_dim": c.head_dim}
        self.q = matrix(rngs, c, embed, heads)
        self.k = matrix(rngs, c, embed, kv_heads)
        self.v = matrix(rngs, c, embed, kv_heads)
        self.out = matrix(rngs, c, heads, embed, place="last")
        if c.bias or c.qkv_bias:
            self.q_bias = bias(c, heads)
            self.k_bias = bias(c, kv_heads)
            self.v_bias = bias(c, kv_heads)
        if c.bias:
            self.out_bias = bias(c, {"norm": c.embed_dim}, place="last")
        if c.qk_norm == "head":
            self.q_norm = Norm(c, {"head_dim": c.head_dim})
            self.k_norm = Norm(c, {"head_dim": c.head_dim})
        elif c.qk_norm == "all":
            self.q_norm = Norm(c, heads)
            self.k_norm = Norm(c, kv_heads)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        use_window: UseWindow,
        order: SequenceOrder = None,
    ) -> jax.Array:
        """x [B, T, D], positions and segment_ids int32[B, T] -> [B, T, D]; order: permutation of the T positions."""
        q, k, v = self._qkv(x, positions, use_window)
        return self._project(_attend(self.config, q, k, v, segment_ids, use_window, order))

    def in_blocks(
        self,
        x: jax.Array,
        view: View,
        cache: LayerBlocks,
        layer: jax.Array | None,
        use_window: UseWindow,
    ) -> tuple[jax.Array, LayerBlocks]:
        """Attention of new tokens to their rows' blocks, into which their keys and values are written first.

        Args:
          x: [R, T, D] hidden states of the new tokens.
          view: where they go, and what they see.
          cache: of this layer, or of all layers of a group.
          layer: index of the layer in a cache of several layers, int32[]; None: the cache of a single layer.
          use_window: whether this layer has the window.

        Returns:
          ([R, T, D], the cache with the new tokens).
        """
        q, k, v = self._qkv(x, view.positions, use_window)
        rules = _rules(self.config, use_window)
        mixed, cache = extend_and_attend(q, k, v, cache, view, rules, layer, v.shape[-1])
        return self._project(mixed), cache

    def _qkv(
        self, x: jax.Array, positions: jax.Array, use_window: UseWindow
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> q [B, T, N, H] and k, v [B, T, K, H], with positions applied."""
        # The order is that of all families: project, add biases, normalize, rotate.
        q = _to_heads(x, self.q)
        k = _to_heads(x, self.k)
        v = _to_heads(x, self.v)
        if self.config.bias or self.config.qkv_bias:
            q = q + expand_like(self.q_bias[...], q)
            k = k + expand_like(self.k_bias[...], k)
            v = v + expand_like(self.v_bias[...], v)
        if self.config.qk_norm != "none":
            q = self.q_norm(q)
            k = self.k_norm(k)
        if self.config.position == "rope":
            rotate = _rotation(self.config, positions, use_window)
            q = rotate(q)
            k = rotate(k)
        # Every device has its own queries but all keys of its rows: "seq" shards q only.
        q = constrain(q, "batch", "seq", "heads", "head_dim")
        k = constrain(k, "batch", None, "kv_heads", "head_dim")
        v = constrain(v, "batch", None, "kv_heads", "head_dim")
        return q, k, v

    def _project(self, y: jax.Array) -> jax.Array:
        """Heads [B, T, N, H] -> [B, T, D]."""
        y = _merge_heads(y, self.out)
        return y + expand_like(self.out_bias[...], y) if self.config.bias else y


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values come from one small vector per token.

    Only that vector and one rotated key, which all heads share, are cached.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = self.config = config
        m = config.mla
        embed = {"embed": c.embed_dim}
        q_heads = {"heads": c.num_heads, "head_dim": m.nope_dim + m.rope_dim}
        kv_heads = {"heads": c.num_heads, "head_dim": m.nope_dim + m.value_dim}
        value_heads = {"heads": c.num_heads, "head_dim": m.value_dim}
        # V2-Lite has no latent of its queries.
        if m.q_rank:
            self.q_a = matrix(rngs, c, embed, {"latent": m.q_rank})
            self.q_a_norm = Norm(c, {"latent": m.q_rank})
            self.q_b = matrix(rngs, c, {"rank": m.q_rank}, q_heads)
        else:
            self.q = matrix(rngs, c, embed, q_heads)
        self.kv_a = matrix(rngs, c, embed, {"latent": m.kv_rank + m.rope_dim})
        self.kv_a_norm = Norm(c, {"latent": m.kv_rank})
        self.kv_b = matrix(rngs, c, {"rank": m.kv_rank}, kv_heads)
        self.out = matrix(rngs, c, value_heads, embed, place="last")

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        use_window: UseWindow,
        order: SequenceOrder = None,
    ) -> jax.Array:
        """As `Attention.__call__`."""
        m = self.config.mla
        q, latent, shared = self._latents(x, positions, use_window)
        # [B, T, N, nope_dim + value_dim]
        kv = _to_heads(latent, self.kv_b)
        shared = jnp.broadcast_to(shared, (*kv.shape[:3], m.rope_dim))
        # A key has a part without position from the latent, and the rotated part that all heads share.
        k = jnp.concatenate([kv[..., : m.nope_dim], shared], -1)
        v = kv[..., m.nope_dim :]
        q = constrain(q, "batch", "seq", "heads", "head_dim")
        k = constrain(k, "batch", None, "heads", "head_dim")
        v = constrain(v, "batch", None, "heads", "head_dim")
        mixed = _attend(self.config, q, k, v, segment_ids, use_window, order)
        return _merge_heads(mixed, self.out)

    def in_blocks(
        self,
        x: jax.Array,
        view: View,
        cache: LayerBlocks,
        layer: jax.Array | None,
        use_window: UseWindow,
    ) -> tuple[jax.Array, LayerBlocks]:
        """As `Attention.in_blocks`; the cache has one head of size kv_rank + rope_dim, and no values.

        The matrix that expands latents to keys is applied to the query instead, and the one that expands them to values
        to the output of attention: every head then reads the latents themselves (DeepSeek-V2, end of section 2.1.2).
        """
        m = self.config.mla
        q, latent, shared = self._latents(x, view.positions, use_window)
        to_keys, to_values = self._expansions(x.dtype)
        # q . (W c) = (W^T q) . c for every latent c
        q_latent = jnp.einsum("btnh,rnh->btnr", q[..., : m.nope_dim], to_keys)
        q = jnp.concatenate([q_latent, q[..., m.nope_dim :]], -1)
        k = jnp.concatenate([latent[:, :, None], shared], -1)
        rules = _rules(self.config, use_window)
        mixed, cache = extend_and_attend(q, k, None, cache, view, rules, layer, m.kv_rank)
        mixed = jnp.einsum("btnr,rnh->btnh", mixed, to_values)
        return _merge_heads(mixed, self.out), cache

    def _expansions(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The matrices that expand latents to keys [kv_rank, N, nope_dim] and to values [kv_rank, N, value_dim]."""
        expand = self.kv_b[...].astype(dtype)
        return expand[..., : self.config.mla.nope_dim], expand[..., self.config.mla.nope_dim :]

    def _latents(
        self, x: jax.Array, positions: jax.Array, use_window: UseWindow
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, nope_dim + rope_dim], latents [B, T, kv_rank], the shared key [B, T, 1, rope_dim]."""
        m = self.config.mla
        if m.q_rank:
            q = _to_heads(self.q_a_norm(linear(x, self.q_a[...])), self.q_b)
        else:
            q = _to_heads(x, self.q)
        # The latent and the shared key come from one product.
        both = linear(x, self.kv_a[...])
        rotate = _rotation(self.config, positions, use_window)
        # Only the last rope_dim elements of a query are rotated.
        q = jnp.concatenate([q[..., : m.nope_dim], rotate(q[..., m.nope_dim :])], -1)
        latent = self.kv_a_norm(both[..., : m.kv_rank])
        return q, latent, rotate(both[..., None, m.kv_rank :])


def _to_heads(x: jax.Array, weights: nnx.Param) -> jax.Array:
    """x [B, T, D] times a matrix [D, N, H] -> [B, T, N, H], in x's dtype."""
    return linear(x, weights[...])


def _merge_heads(y: jax.Array, weights: nnx.Param) -> jax.Array:
    """y [B, T, N, H] times a matrix [N, H, D] -> [B, T, D], in y's dtype."""
    return linear(y.reshape(*y.shape[:2], -1), weights[...], 2)


def _attend(
    config: ModelConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    use_window: UseWindow,
    order: SequenceOrder,
) -> jax.Array:
    """Attention of whole rows, whose positions may be permuted by `order`; [B, T, N, W] in the order of the queries.

    Keys are put back into the row's own order, queries are not: each device keeps its own.
    """
    kv_segment_ids = segment_ids
    # Every device needs all keys of its rows anyway; in their own order, masks are simple.
    if order is not None:
        k = undo_zigzag(k)
        v = undo_zigzag(v)
        kv_segment_ids = undo_zigzag(segment_ids)
    return attention(
        q,
        k,
        v,
        q_segment_ids=segment_ids,
        kv_segment_ids=kv_segment_ids,
        q_order=order,
        window=config.window or None,
        use_window=use_window,
        scale=config.score_scale,
        softcap=config.attention_softcap,
    )


def _rules(config: ModelConfig, use_window: UseWindow) -> Rules:
    """How scores of a layer are computed."""
    return Rules(config.score_scale, config.attention_softcap, config.window, use_window)


def _rotation(
    config: ModelConfig, positions: jax.Array, use_window: UseWindow
) -> Callable[[jax.Array], jax.Array]:
    """Applies rotary positions to [B, T, N, H]. Layers with a window may have their own base, which is not stretched."""
    size = config.mla.rope_dim if config.mla.kv_rank else config.head_dim
    scaling = config.rope_scaling
    frequency: Any = frequencies(size, config.rope_theta, scaling)
    if config.local_rope_theta:
        local = frequencies(size, config.local_rope_theta, type(scaling)())
        # Traced where layers with and without a window are scanned together: then both are computed.
        if not isinstance(use_window, bool):
            frequency = jnp.where(use_window, local, frequency)
        elif use_window:
            frequency = local
    return functools.partial(
        rope, positions=positions, frequency=frequency, amplitude=scaling.amplitude
    )
