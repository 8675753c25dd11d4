"""Which keys a query sees, as a specification that kernels take: segments and a window, never a dense mask."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class WholeRows(NamedTuple):
    """How rows attend to themselves: what a kernel needs along with queries, keys and values."""

    q_segment_ids: jax.Array  # int32[B, T], in the order of the queries
    kv_segment_ids: jax.Array  # int32[B, T], in the order of the row
    window: int | None  # how many positions a query sees, its own included; None: all up to its own
    scale: float  # factor of the scores
    softcap: float = 0.0  # bound of the scores, by tanh; 0: none
    # int[T], the position of each query, where they are permuted (`sharding.zigzag_order`)
    q_order: np.ndarray | None = None


def visible(
    positions: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    window: jax.Array | int | None,
) -> jax.Array:
    """bool[B, T, S]: whether the query at positions[t] (int32[T]) sees the key at position s.

    A query sees a key of its own segment that is not after it and, with a window, less than `window` positions before it.
    With segments 1 1 1 2 2, a row per query:

        no window        window 2

        1 . . . .        1 . . . .
        1 1 . . .        1 1 . . .
        1 1 1 . .        . 1 1 . .
        . . . 1 .        . . . 1 .
        . . . 1 1        . . . 1 1
    """
    keys = jnp.arange(kv_segment_ids.shape[1])
    distance = positions[:, None] - keys[None, :]  # [T, S]; negative where the key is ahead
    near = distance >= 0
    if window is not None:
        near = near & (distance < window)
    same_segment = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    return near[None] & same_segment
