"""Attention that never holds the scores, on TPUs: Pallas kernels (splash attention, which JAX ships)."""

from typing import Any

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jaxllm.models.attention_mask import WholeRows
from jaxllm.sharding import ACT_RULES, shards, spec

_LANES = 128  # the smallest tile of the kernels, in tokens
_BLOCKS = (
    512,
    256,
    _LANES,
)  # queries and keys per block: the first that divides a device's queries
# Keys per block of the backward pass. Large, since each block writes gradients of all queries, which are summed later.
_BACKWARD_KEYS = (2048, 1024)


def supports(q: jax.Array, k: jax.Array, q_order: np.ndarray | None) -> bool:
    """Whether the kernels take these [B, T, N, H] and [B, S, K, H]: whole rows, in whole tiles on each device."""
    T, N = q.shape[1:3]
    S, K = k.shape[1:3]
    return T == S and N % K == 0 and _contiguous_queries(T, q_order) % _LANES == 0


def _contiguous_queries(length: int, q_order: np.ndarray | None) -> float:
    """Consecutive queries of a row that a device has: the zigzag order gives it two chunks of them."""
    chunks = 1 if q_order is None else 2
    return length / (shards("seq") * chunks)


def tpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: WholeRows,
    *,
    name: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attention` of whole rows; each device takes its own rows, heads and queries, and all keys of its rows.

    Args:
      q: [B, T, N, H] queries.
      k: [B, T, K, H] keys.
      v: [B, T, K, W] values.
      rows: segments, window, scale and soft cap.
      name: of what is kept for the backward pass, for `jax.checkpoint`.
      interpret: run the kernel's operations on any device, for tests.

    Returns:
      [B, T, N, W].
    """
    kernel = _kernel(q.shape[2], q.shape[1], rows, name, interpret)

    def attend(
        kernel: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        q_segment_ids: jax.Array,
        kv_segment_ids: jax.Array,
    ) -> jax.Array:
        # The kernel takes one row: [N, T, H] and [K, S, H].
        def attend_row(q, k, v, q_ids, kv_ids):
            return kernel(q, k, v, segment_ids=splash.SegmentIds(q_ids, kv_ids))

        return jax.vmap(attend_row)(q, k, v, q_segment_ids, kv_segment_ids)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        queries = spec(("batch", "heads", "seq", None), ACT_RULES)
        keys = spec(("batch", "kv_heads", None, None), ACT_RULES)
        q_ids = spec(("batch", "seq"), ACT_RULES)
        kv_ids = spec(("batch", None), ACT_RULES)
        # The kernel holds its mask as arrays, which are sharded like the queries.
        heads_and_queries = jax.sharding.NamedSharding(mesh, jax.P(queries[1], queries[2]))
        of_kernel = kernel.manual_sharding_spec(heads_and_queries)
        attend = jax.shard_map(
            attend,
            in_specs=(of_kernel, queries, keys, keys, q_ids, kv_ids),
            out_specs=queries,
            check_vma=False,
        )
    # The kernel does not scale the scores, and wants heads before tokens.
    out = attend(
        kernel,
        _swap_heads(q * np.asarray(rows.scale, q.dtype)),
        _swap_heads(k),
        _swap_heads(v),
        rows.q_segment_ids,
        rows.kv_segment_ids,
    )
    return _swap_heads(out)


def _swap_heads(x: jax.Array) -> jax.Array:
    """[B, T, N, H] <-> [B, N, T, H]."""
    return x.swapaxes(1, 2)


def _kernel(num_heads: int, length: int, rows: WholeRows, name: str | None, interpret: bool) -> Any:
    """The splash kernel for rows of this length: its mask and its block sizes."""
    shape = (length, length)
    mask: Any = masks.CausalMask(shape)
    if rows.window and rows.window < length:
        # So many positions back and none ahead, which makes it causal.
        mask = masks.LocalMask(shape, (rows.window - 1, 0), 0)
    if rows.q_order is not None:
        mask.q_sequence = rows.q_order
    contiguous = _contiguous_queries(length, rows.q_order)
    block = next(size for size in _BLOCKS if contiguous % size == 0)
    keys = next(size for size in (*_BACKWARD_KEYS, block) if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=keys,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,  # gradients of q, k and v in one pass over the scores
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        attn_logits_soft_cap=rows.softcap or None,
        head_shards=shards("heads"),
        q_seq_shards=shards("seq"),  # of the mask, which differs between shards
        residual_checkpoint_name=name,
        interpret=interpret,
    )
