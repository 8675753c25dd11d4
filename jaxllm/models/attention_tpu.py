"""Attention that never holds the scores: Pallas kernels for TPUs (splash attention, which JAX ships)."""

from typing import Any

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jaxllm.sharding import ACT_RULES, shards, spec

_LANES = 128  # the kernels' tiles
_BLOCK = 512  # queries and keys per block, where the length has so many
_KEYS = 2048  # keys per block backward: each block writes gradients of all queries, which are summed afterwards


def fits(q: jax.Array, k: jax.Array) -> bool:
    """Whether the kernels take these [B, T, N, H] and [B, S, K, H]: whole rows, of whole tiles on each device."""
    tiles = _LANES * shards("seq")
    return q.shape[1] == k.shape[1] and q.shape[1] % tiles == 0 and q.shape[2] % k.shape[2] == 0


def tpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    window: int | None,
    scale: float,
    softcap: float,
    q_order: np.ndarray | None = None,
    name: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`models.attention.attention` of whole rows; each device takes its rows, heads and queries, and all keys of its rows.

    name: of what is kept for the backward pass, for `jax.checkpoint`. interpret: run the kernel's operations on any
    device, for tests.
    """
    mesh = jax.sharding.get_abstract_mesh()
    heads, queries = (
        spec(("batch", "heads", "seq", None), ACT_RULES),
        spec(("batch", "seq"), ACT_RULES),
    )
    keys, tokens = (
        spec(("batch", "kv_heads", None, None), ACT_RULES),
        spec(("batch", None), ACT_RULES),
    )
    kernel = _kernel(q.shape[2], q.shape[1], window, softcap, q_order, name, interpret)

    def local(
        kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, mine: jax.Array, theirs: jax.Array
    ) -> jax.Array:
        one = lambda q, k, v, mine, theirs: kernel(
            q, k, v, segment_ids=splash.SegmentIds(mine, theirs)
        )
        return jax.vmap(one)(q, k, v, mine, theirs)

    by_head = lambda x: x.swapaxes(1, 2)
    arguments = (
        kernel,
        by_head(q * np.asarray(scale, q.dtype)),
        by_head(k),
        by_head(v),
        q_segment_ids,
        kv_segment_ids,
    )
    if mesh.empty:
        return by_head(local(*arguments))
    of_kernel = kernel.manual_sharding_spec(
        jax.sharding.NamedSharding(mesh, jax.P(heads[1], heads[2]))
    )
    specs = (of_kernel, heads, keys, keys, queries, tokens)
    return by_head(
        jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(*arguments)
    )


def _kernel(
    num_heads: int,
    length: int,
    window: int | None,
    softcap: float,
    order: np.ndarray | None,
    name: str | None,
    interpret: bool,
) -> Any:
    shape = (length, length)
    # So many places back and none ahead: a local mask is causal by itself.
    near = (
        masks.LocalMask(shape, (window - 1, 0), 0)
        if window and window < length
        else masks.CausalMask(shape)
    )
    if order is not None:
        near.q_sequence = order
    mine = (
        length // shards("seq") // (1 if order is None else 2)
    )  # queries of a device that stand side by side
    block = next(size for size in (_BLOCK, 256, _LANES) if mine % size == 0)
    keys = next(size for size in (_KEYS, 1024, block) if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=keys,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([near] * num_heads),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap or None,
        head_shards=shards("heads"),
        q_seq_shards=shards("seq"),
        residual_checkpoint_name=name,
        interpret=interpret,
    )
