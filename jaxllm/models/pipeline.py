"""Layers in stages: groups of devices that each hold some of them, and pass rows on (GPipe, Huang et al. 2019)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.sharding import batch_shards, constrain, mesh_size

MICRO = 4  # microbatches per stage, where there are so many rows: stages idle (S - 1) / (M + S - 1) of the time

# (stacked layers, x, positions, segment_ids) -> (x, the loads of their experts, stacked)
Layers = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def staged(
    run: Layers, layers: Any, x: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, Any]:
    """run(layers, x, positions, segment_ids), on a mesh with a pipeline axis stage by stage.

    layers: a tree of arrays [L, ...]; x: [B, T, D]; positions and segment_ids: int32[B, T]. Rows go through in
    microbatches: at every step each stage takes what the one before it made at the last, and one more begins. Before its
    first and after its last microbatch a stage is given padding, which counts nowhere.
    """
    stages, rows = mesh_size("pipeline"), x.shape[0]
    if stages == 1:
        return run(layers, x, positions, segment_ids)
    count = num_micro(rows, stages)
    # Rows i, i + count, ... make microbatch i: each stays on the device that has it.
    cut = lambda a: a.reshape(rows // count, count, *a.shape[1:]).swapaxes(0, 1)
    later = lambda a: jnp.pad(a, [(0, stages - 1), *[(0, 0)] * (a.ndim - 1)])
    arrive = jax.tree.map(lambda a: later(cut(a)), (x, positions, segment_ids))
    mine = jax.tree.map(lambda w: w.reshape(stages, -1, *w.shape[1:]), layers)
    stage = jax.vmap(run, spmd_axis_name="pipeline")
    place = lambda a: constrain(a, "stages", "batch", "seq", *[None] * (a.ndim - 3))

    def step(held: Any, new: Any) -> tuple[Any, Any]:
        held = jax.tree.map(lambda h, n: place(jnp.roll(h, 1, 0).at[0].set(n)), held, new)
        made, load = stage(mine, *held)
        return (place(made), *held[1:]), (made[-1], load)

    nothing = jax.tree.map(lambda a: jnp.zeros((stages, *a.shape[1:]), a.dtype), arrive)
    _, (made, loads) = jax.lax.scan(step, nothing, arrive)
    whole = jax.tree.map(lambda a: a.sum(0).reshape(-1, *a.shape[3:]), loads)
    return made[stages - 1 :].swapaxes(0, 1).reshape(x.shape), whole


def num_micro(rows: int, stages: int) -> int:
    """Microbatches: as many as rows allow on the devices that share them, at most MICRO per stage."""
    each = max(rows // batch_shards(jax.sharding.get_abstract_mesh()), 1)
    return max(n for n in range(1, MICRO * stages + 1) if each % n == 0)
