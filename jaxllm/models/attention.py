"""Attention as a function of arrays. The mask is a specification (causal, segments, window), never a dense argument.

The reference, which any device takes, and cuDNN's kernels for GPUs; those for TPUs are in `flash`.
"""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxllm.sharding import ACT_RULES, platform, shards, spec

ATTENDED = "attended"  # the name of what attention returns, for `jax.checkpoint`
Local = (
    jax.Array | bool
)  # whether a layer's attention has its window; traced where layers are scanned


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    q_offset: jax.Array | int | None = None,
    q_order: np.ndarray | None = None,
    window: int | None = None,
    local: Local = True,
    scale: float | None = None,
    softcap: float = 0.0,
) -> jax.Array:
    """Grouped-query attention, causal inside segments (Vaswani et al. 2017; Ainslie et al. 2023).

    q: [B, T, N, H]; k: [B, S, K, H]; v: [B, S, K, W] with N a multiple of K; q_segment_ids: int32[B, T];
    kv_segment_ids: int32[B, S]. Query t stands at place q_offset + t of the S key places; None: whole rows, 0, or, where
    their queries do not come in order (`sharding.balanced_order`), q_order[t]. It sees key s when s is not after it and
    their segments are equal. With segments 1 1 2 2 0 the five rows see

        1 . . . .      a token sees itself and what came before it in its own segment;
        1 1 . . .      padding (segment 0) sees only padding, so that no row is empty and
        . . 1 . .      its softmax stays finite; the loss masks it.
        . . 1 1 .
        . . . . 1

    window: a token sees so many places, itself included (Beltagy et al. 2020; Mistral), where `local`. scale: of the scores,
    1 / sqrt(H) by default. softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, section 2); 0: as they are.
    Returns [B, T, N, W] in q's dtype. Scores and softmax are float32. Whole rows go to a kernel that never holds the
    scores: on a TPU those of a multiple of 128 tokens, on a GPU those that cuDNN takes (`cudnn_takes`).
    """
    scale = scale or 1 / math.sqrt(q.shape[-1])
    if q_offset is None and (kernel := _kernel(q, k, v, softcap)):
        settings = {"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}
        settings |= {"scale": scale, "softcap": softcap, "q_order": q_order, "name": ATTENDED}
        near, whole = (functools.partial(kernel, window=w, **settings) for w in (window, None))
        if window is None or isinstance(local, bool):
            return (near if local else whole)(q, k, v)
        return jax.lax.cond(local, near, whole, q, k, v)
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    places = (
        jnp.arange(T) + (0 if q_offset is None else q_offset)
        if q_order is None
        else jnp.array(q_order)
    )
    near = (
        None
        if window is None or local is False
        else jnp.where(local, window, jnp.iinfo(jnp.int32).max)
    )
    allowed = visible(places, q_segment_ids, kv_segment_ids, near)[:, None, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1)
    out = checkpoint_name(jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v), ATTENDED)
    return out.reshape(B, T, N, v.shape[-1])


def visible(
    places: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    window: jax.Array | int | None,
) -> jax.Array:
    """bool[B, T, S]: whether the query at places[t] sees key s."""
    back = (
        places[:, None] - jnp.arange(kv_segment_ids.shape[1])[None, :]
    )  # [T, S]: places from the key to the query
    near = back >= 0 if window is None else (back >= 0) & (back < window)
    return near[None] & (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])


def _kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, softcap: float
) -> Callable[..., jax.Array] | None:
    """What takes whole rows of this shape on the mesh's platform; None: XLA alone."""
    if platform() == "tpu":
        from jaxllm.models import attention_tpu

        return attention_tpu.tpu_attention if attention_tpu.fits(q, k) else None
    return gpu_attention if platform() == "gpu" and cudnn_takes(q, k, v, softcap) else None


def cudnn_takes(q: jax.Array, k: jax.Array, v: jax.Array, softcap: float) -> bool:
    """Whether cuDNN takes these [B, T, N, H], [B, S, K, H] and [B, S, K, W] on this GPU, forward and backward.

    No soft cap, 16-bit numbers, an even number of tokens, shapes that the mesh divides; what else it wants, it is asked.
    """
    rows, context, tensor = shards("batch"), shards("seq"), shards("heads")
    (B, T, N, H), K = q.shape, k.shape[2]
    if (
        softcap
        or q.dtype.itemsize != 2
        or v.shape[-1] > H
        or B % rows
        or T % (2 * context)
        or N % K
        or K % tensor
    ):
        return False
    return (
        _refusal(
            (B // rows, T // context, N // tensor, H),
            (B // rows, k.shape[1], K // tensor, H),
            q.dtype,
        )
        is None
    )


@functools.cache
def _refusal(queries: tuple[int, ...], keys: tuple[int, ...], dtype: Any) -> str | None:
    """Why cuDNN does not take arrays of one device, which is said once. It tells by raising, here or in the compiler."""
    (B, T, *_), S = queries, keys[1]
    settings = {"implementation": "cudnn", "is_causal": T == S}
    run = lambda q, k, v, mask: (
        jax.nn.dot_product_attention(q, k, v, mask=mask, **settings).astype(jnp.float32).sum()
    )
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in (queries, keys, keys)]
    try:
        mask = jax.ShapeDtypeStruct((B, 1, T, S), jnp.bool_)
        jax.jit(jax.grad(run, argnums=(0, 1, 2))).lower(*shapes, mask).compile()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        print(
            f"attention: XLA's, which holds all scores; cuDNN does not take {queries}: {why}",
            file=sys.stderr,
        )
        return why
    return None


def gpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    window: int | None,
    scale: float,
    softcap: float = 0.0,
    q_order: np.ndarray | None = None,
    name: str | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`attention` of whole rows that `cudnn_takes`; each device takes its rows, heads and queries.

    Segments and windows are a mask of 2 bytes for each query and key of a row, whatever the number of heads. `xla`: the
    same operations on any device, for tests.
    """
    assert not softcap
    in_order = q_order is None and shards("seq") == 1  # then the kernel leaves out what lies ahead

    def local(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mine: jax.Array,
        theirs: jax.Array,
        places: jax.Array,
    ) -> Any:
        mask = visible(places, mine, theirs, window)[:, None]
        wide = jnp.pad(
            v, [(0, 0)] * 3 + [(0, q.shape[-1] - v.shape[-1])]
        )  # latent attention has narrower values
        settings = {"scale": scale, "is_causal": in_order, "implementation": implementation}
        return jax.nn.dot_product_attention(q, k, wide, mask=mask, **settings)[..., : v.shape[-1]]

    places = jnp.arange(q.shape[1]) if q_order is None else jnp.array(q_order)
    arguments = (q, k, v, q_segment_ids, kv_segment_ids, places)
    if not jax.sharding.get_abstract_mesh().empty:
        queries, keys = (
            spec(("batch", at, heads, None), ACT_RULES)
            for at, heads in (("seq", "heads"), (None, "kv_heads"))
        )
        of_ids = (
            spec(("batch", "seq"), ACT_RULES),
            spec(("batch", None), ACT_RULES),
            spec(("seq",), ACT_RULES),
        )
        local = jax.shard_map(
            local, in_specs=(queries, keys, keys, *of_ids), out_specs=queries, check_vma=False
        )
    return checkpoint_name(local(*arguments), name) if name else local(*arguments)
