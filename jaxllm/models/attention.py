"""Attention as a function of arrays: a reference for every device, and the choice of a kernel on GPUs and TPUs."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxllm.models import attention_cpu, attention_gpu
from jaxllm.models.attention_mask import WholeRows, visible
from jaxllm.sharding import platform

# The name under which `jax.checkpoint` policies know the output of attention.
ATTENDED = "attended"

# Whether a layer's attention has its window. Traced where layers with and without one are scanned together.
UseWindow = jax.Array | bool


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    q_order: np.ndarray | None = None,
    window: int | None = None,
    use_window: UseWindow = True,
    scale: float | None = None,
    softcap: float = 0.0,
) -> jax.Array:
    """Grouped-query attention, causal inside segments (Vaswani et al. 2017; Ainslie et al. 2023).

    A query sees a key that is not after it and has its segment. With segments 1 1 2 2 0 the five queries see

        1 . . . .      a token sees itself and what precedes it in its own segment;
        1 1 . . .      padding (segment 0) sees only padding, so that no row is empty and
        . . 1 . .      its softmax stays finite; the loss masks it.
        . . 1 1 .
        . . . . 1

    The kernel of the platform computes it, where it has one for the shape.

    Args:
      q: [B, T, N, H] queries.
      k: [B, S, K, H] keys, with N a multiple of K and S = T.
      v: [B, S, K, W] values.
      q_segment_ids: int32[B, T].
      kv_segment_ids: int32[B, S].
      q_order: int[T], the position of each query of whole rows, if they are permuted (`sharding.zigzag_order`).
      window: how many positions a token sees, its own included (Beltagy et al. 2020; Mistral); None: all.
      use_window: bool or bool[], whether the window applies to this layer.
      scale: factor of the scores; None: 1 / sqrt(H).
      softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, section 2); 0: unchanged.

    Returns:
      [B, T, N, W] in q's dtype. Scores and softmax are computed in float32.
    """
    scale = scale or 1 / math.sqrt(q.shape[-1])
    rows = WholeRows(q_segment_ids, kv_segment_ids, window, scale, softcap, q_order)
    kernel = _kernel(q, k, v, rows)
    if kernel is not None:
        return _run_kernel(kernel, q, k, v, rows, use_window)
    # Positions of the queries among the keys, int[T].
    positions = jnp.arange(q.shape[1]) if q_order is None else jnp.array(q_order)
    limit = _window_limit(window, use_window)
    allowed = visible(positions, q_segment_ids, kv_segment_ids, limit)
    return reference_attention(q, k, v, allowed, scale, softcap)


def reference_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    allowed: jax.Array,
    scale: float,
    softcap: float = 0.0,
) -> jax.Array:
    """Attention as it is defined, with which kernels are compared; arguments as in `attention`.

    allowed: bool[B, T, S], which keys a query sees.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    # N = K * group: the queries of a group share a key head.
    q = q.reshape(B, T, K, N // K, H)
    # [B, K, group, T, S]
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    # A large finite number instead of -inf: a row that sees nothing would otherwise be NaN.
    scores = jnp.where(allowed[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1)
    out = checkpoint_name(jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v), ATTENDED)
    return out.reshape(B, T, N, v.shape[-1])


def _window_limit(window: int | None, use_window: UseWindow) -> jax.Array | None:
    """The window as an array int32[], so large that it has no effect where a traced `use_window` is false."""
    if window is None or use_window is False:
        return None
    return jnp.where(use_window, window, jnp.iinfo(jnp.int32).max)


def _kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, rows: WholeRows
) -> Callable[..., jax.Array] | None:
    """The kernel for whole rows of this shape on the mesh's platform; None: the reference, compiled by XLA."""
    if platform() == "cpu":
        return attention_cpu.cpu_attention if attention_cpu.supports(rows) else None
    if platform() == "tpu":
        from jaxllm.models import attention_tpu

        return attention_tpu.tpu_attention if attention_tpu.supports(q, k, rows.q_order) else None
    if platform() == "gpu" and attention_gpu.supports(q, k, v, rows):
        return attention_gpu.gpu_attention
    return None


def _run_kernel(
    kernel: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: WholeRows,
    use_window: UseWindow,
) -> jax.Array:
    """Runs a kernel, whose window must be known when it is compiled: a traced `use_window` chooses between two."""
    local = functools.partial(kernel, rows=rows, name=ATTENDED)
    everywhere = functools.partial(kernel, rows=rows._replace(window=None), name=ATTENDED)
    if rows.window is None or use_window is True:
        return local(q, k, v)
    if use_window is False:
        return everywhere(q, k, v)
    return jax.lax.cond(use_window, local, everywhere, q, k, v)
