"""Attention that never holds the scores, on GPUs: cuDNN's kernels, through `jax.nn.dot_product_attention`."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import SingleDeviceSharding

from jaxllm.models.attention_mask import WholeRows, visible
from jaxllm.sharding import ACT_RULES, shards, spec

# The GPU that cuDNN is asked about; None: one that is present.
_ASKED_ABOUT: ContextVar[Any] = ContextVar("asked_about", default=None)


@contextlib.contextmanager
def asked_about(device: Any) -> Iterator[None]:
    """Within, `supports` answers for this GPU, which need not be present: a program is only compiled for it."""
    token = _ASKED_ABOUT.set(device)
    try:
        yield
    finally:
        _ASKED_ABOUT.reset(token)


def supports(q: jax.Array, k: jax.Array, v: jax.Array, rows: WholeRows) -> bool:
    """Whether cuDNN takes these [B, T, N, H], [B, S, K, H] and [B, S, K, W] here, forward and backward.

    It needs scores without a soft cap, 16-bit numbers, an even number of tokens, and shapes that the mesh divides. Its
    other requirements depend on its version and the device, so it is asked.
    """
    # cuDNN sees the arrays of one device, so each of them must have the same part.
    batch, context, tensor = shards("batch"), shards("seq"), shards("heads")
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    computable = not rows.softcap and q.dtype.itemsize == 2 and v.shape[-1] <= H and N % K == 0
    divisible = B % batch == 0 and T % (2 * context) == 0 and K % tensor == 0
    if not (computable and divisible):
        return False
    queries = (B // batch, T // context, N // tensor, H)
    keys = (B // batch, S, K // tensor, H)
    window = rows.window if _in_order(rows) else None
    return _refusal(queries, keys, q.dtype, window, _ASKED_ABOUT.get()) is None


def _in_order(rows: WholeRows) -> bool:
    """Whether a device has its queries in the order of the keys: then the kernel itself can skip keys."""
    return rows.q_order is None and shards("seq") == 1


@functools.cache
def _refusal(
    queries: tuple[int, ...], keys: tuple[int, ...], dtype: Any, window: int | None, device: Any
) -> str | None:
    """Why cuDNN refuses arrays of these shapes on one device; None if it does not. Printed once per shape.

    The only way to ask is to compile the forward and the backward pass. Caught are

    - NotImplementedError (a RuntimeError): JAX's own checks of head size, length and GPU against cuDNN's documentation;
    - RuntimeError whose text names cuDNN ("cuDNN", "cudnn_frontend", "cuda_dnn.cc"): it is not installed, or, from XLA,
      its planner has no kernel for the shape.

    Any other error is not a refusal and is raised, such as the compiler running out of memory. So is ValueError, which
    JAX raises for arrays that do not fit together.
    """
    # XLA's compiler reports all its failures as RuntimeError; only the text tells them apart.
    try:
        # A thread of its own, since it is asked while the model is traced for a mesh of many devices.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_compile, queries, keys, dtype, window, device).result()
    except RuntimeError as error:
        if not isinstance(error, NotImplementedError) and "dnn" not in str(error).lower():
            raise
        reason = str(error).partition("\n")[0]
        print(
            f"attention: cuDNN does not support {queries}: {reason}; using XLA's, which holds all scores",
            file=sys.stderr,
        )
        return reason
    return None


def _compile(
    queries: tuple[int, ...], keys: tuple[int, ...], dtype: Any, window: int | None, device: Any
) -> None:
    """Compiles cuDNN's attention with a mask, and its gradient, for one device. Raises what JAX and XLA raise.

    device: a GPU, present or not; None: one that is present.
    """
    B, T = queries[:2]
    S = keys[1]

    def run(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        # As `gpu_attention` calls it: causal where the queries are all of the row, and not only a shard of it.
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            is_causal=T == S,
            local_window_size=_positions_before(window),
            implementation="cudnn",
        )
        return out.astype(jnp.float32).sum()  # a scalar, for the gradient

    where = SingleDeviceSharding(device) if device else None
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape in (queries, keys, keys)]
    mask = jax.ShapeDtypeStruct((B, 1, T, S), jnp.bool_, sharding=where)
    jax.jit(jax.grad(run, argnums=(0, 1, 2))).lower(*arrays, mask).compile()


def _positions_before(window: int | None) -> tuple[int, int] | None:
    """How many positions before and after its own a token sees, as JAX counts a window."""
    return None if window is None else (window - 1, 0)


def gpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: WholeRows,
    *,
    name: str | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`attention` of whole rows that cuDNN `supports`; each device takes its own rows, heads and queries.

    Segments become a mask of 2 bytes per query and key of a row, whatever the number of heads. Keys ahead of a query and
    those before its window are skipped where the queries of a device are in the order of the keys, else masked.

    Args:
      q: [B, T, N, H] queries.
      k: [B, T, K, H] keys.
      v: [B, T, K, W] values, W <= H.
      rows: segments, window and scale; without a soft cap.
      name: of the output, for `jax.checkpoint`.
      implementation: "xla" runs the same operations on any device, for tests.

    Returns:
      [B, T, N, W].
    """
    assert not rows.softcap
    in_order = _in_order(rows)

    def attend(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        q_segment_ids: jax.Array,
        kv_segment_ids: jax.Array,
        positions: jax.Array,
    ) -> jax.Array:
        # [B, 1, T, S]: the same for all heads.
        mask = visible(positions, q_segment_ids, kv_segment_ids, rows.window)[:, None]
        # The values of latent attention are narrower than its keys; cuDNN wants one size.
        wide = jnp.pad(v, [(0, 0)] * 3 + [(0, q.shape[-1] - v.shape[-1])])
        out = jax.nn.dot_product_attention(
            q,
            k,
            wide,
            mask=mask,
            scale=rows.scale,
            is_causal=in_order,
            local_window_size=_positions_before(rows.window) if in_order else None,
            implementation=implementation,
        )
        return out[..., : v.shape[-1]]

    positions = jnp.arange(q.shape[1]) if rows.q_order is None else jnp.array(rows.q_order)
    # cuDNN's call cannot be partitioned by XLA along queries, so each device calls it on its part.
    if not jax.sharding.get_abstract_mesh().empty:
        # Every device needs all keys of its rows, but only its own part of the queries.
        queries = spec(("batch", "seq", "heads", None), ACT_RULES)
        keys = spec(("batch", None, "kv_heads", None), ACT_RULES)
        q_ids = spec(("batch", "seq"), ACT_RULES)
        kv_ids = spec(("batch", None), ACT_RULES)
        order = spec(("seq",), ACT_RULES)
        attend = jax.shard_map(
            attend,
            in_specs=(queries, keys, keys, q_ids, kv_ids, order),
            out_specs=queries,
            check_vma=False,
        )
    out = attend(q, k, v, rows.q_segment_ids, rows.kv_segment_ids, positions)
    return checkpoint_name(out, name) if name else out
