"""Attention of whole rows on CPUs: causal blocks of queries, with a gradient written by hand.

A block of queries sees no key beyond its own end, so the products with keys that the mask would hide are left out. Four
blocks of queries in a row, and the keys that each is multiplied with:

    queries 0    keys 0 . . .
    queries 1    keys 0 1 . .
    queries 2    keys 0 1 2 .
    queries 3    keys 0 1 2 3

Shapes: B rows, T positions, K key heads, G query heads for each of them, H head size, W size of a value.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxllm.models.attention_mask import WholeRows, visible
from jaxllm.runtime.products import batched
from jaxllm.sharding import mesh_size

_BLOCK = 128  # fewest queries in a block
_MOST_BLOCKS = 8  # each is compiled for itself


class _Kept(NamedTuple):
    """What the backward pass needs of a block of queries."""

    exponentials: (
        Array  # exp(scores - their maximum), [B, K, G * queries, keys] in the dtype of the values
    )
    total: Array  # their sum, float32[B, K, G * queries, 1]


def supports(rows: WholeRows) -> bool:
    """Whether `cpu_attention` can do this: no soft cap, and rows whose positions are in order on one device."""
    return not rows.softcap and rows.q_order is None and mesh_size("context") == 1


def cpu_attention(q: Array, k: Array, v: Array, *, rows: WholeRows, name: str) -> Array:
    """Attention of whole rows: queries [B, T, K * G, H], keys [B, T, K, H], values [B, T, K, W] -> [B, T, K * G, W].

    rows: what `supports` accepts; name: of the result, for `jax.checkpoint`. Scores and softmax are float32, and
    rounded to the dtype of the values where they enter a product.
    """
    B, T, N, H = q.shape
    K, W = v.shape[2:]
    # The positions of a head next to each other, as products read them.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k = k.swapaxes(1, 2)
    v = v.swapaxes(1, 2)
    mask = visible(jnp.arange(T), rows.q_segment_ids, rows.kv_segment_ids, rows.window)
    out = _attend(q, k, v, mask, rows.scale)
    return checkpoint_name(out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, W), name)


def _blocks(length: int) -> list[tuple[int, int]]:
    """(first position, end) of each block of queries."""
    size = max(_BLOCK, -(-length // _MOST_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _rows(x: Array, start: int, end: int) -> Array:
    """The queries of a block, of all heads that share a key: [B, K, G, T, H] -> [B, K, G * queries, H]."""
    B, K, G, _, H = x.shape
    return x[:, :, :, start:end].reshape(B, K, G * (end - start), H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    """q [B, K, G, T, H], k [B, K, T, H], v [B, K, T, W], mask bool[B, T, T] -> [B, K, G, T, W]."""
    return _forward(q, k, v, mask, scale)[0]


def _forward(q: Array, k: Array, v: Array, mask: Array, scale: float) -> tuple[Array, Any]:
    B, K, G, T, _ = q.shape
    outs = []
    kept = []
    for start, end in _blocks(T):
        scores = batched(_rows(q, start, end), k[:, :, :end], transpose_b=True, dtype=jnp.float32)
        shape = scores.shape
        scores = scores.reshape(B, K, G, end - start, end) * scale
        # A large finite number, as in `attention`.
        scores = jnp.where(mask[:, None, None, start:end, :end], scores, -1e30).reshape(shape)
        wide = jnp.exp(scores - scores.max(-1, keepdims=True))
        # The sum is of what is not rounded: XLA may leave a rounding out, depending on the shape of the program.
        total = wide.sum(-1, keepdims=True)
        exponentials = wide.astype(v.dtype)
        # Divided after the product, which is the smaller array.
        out = batched(exponentials, v[:, :, :end], dtype=jnp.float32)
        outs.append(
            (out.astype(jnp.float32) / total).astype(v.dtype).reshape(B, K, G, end - start, -1)
        )
        kept.append(_Kept(exponentials, total))
    return jnp.concatenate(outs, axis=3), (q, k, v, kept)


def _backward(scale: float, residuals: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    """With w = softmax(scores) and out = w v: dv = w^T dout, dw = dout v^T, dscores = w (dw - sum of w dw)."""
    q, k, v, kept = residuals
    B, K, G, T, H = q.shape
    dq = []
    dk = []
    dv = []
    for (start, end), (exponentials, total) in zip(_blocks(T), kept, strict=True):
        # w = exponentials / total; here too the smaller array is divided.
        d = (_rows(d_out, start, end).astype(jnp.float32) / total).astype(v.dtype)
        dv.append(batched(exponentials, d, transpose_a=True, float32_if_free=True))
        dw = batched(d, v[:, :, :end], transpose_b=True, dtype=jnp.float32)
        wide = exponentials.astype(jnp.float32)
        mean = (wide * dw).sum(-1, keepdims=True) / total
        d_scores = (wide * (dw - mean) * scale).astype(q.dtype)
        dq.append(batched(d_scores, k[:, :, :end]).reshape(B, K, G, end - start, H))
        dk.append(batched(d_scores, _rows(q, start, end), transpose_a=True, float32_if_free=True))
    dk = _sum_over_blocks(dk, T).astype(k.dtype)
    dv = _sum_over_blocks(dv, T).astype(v.dtype)
    return jnp.concatenate(dq, axis=3), dk, dv, None


def _sum_over_blocks(parts: list[Array], length: int) -> Array:
    """The sum, float32[B, K, T, H], of gradients [B, K, end, H] of the keys that each block of queries sees."""
    sums = []
    for start, end in _blocks(length):
        seen = [part[:, :, start:end] for part in parts if part.shape[2] >= end]
        sums.append(sum(part.astype(jnp.float32) for part in seen))
    return jnp.concatenate(sums, axis=2)


_attend.defvjp(_forward, _backward)
