"""Pipeline stages: groups of devices that each hold some of the layers and pass rows on (GPipe, Huang et al. 2019)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.sharding import batch_shards, constrain, mesh_size

# Microbatches per stage, if there are enough rows: with M microbatches and S stages a stage idles (S - 1) / (M + S - 1)
# of the time.
MICRO = 4

# (stacked layers, x, positions, segment_ids) -> (x, the stacked `moe.Load` of the layers)
Layers = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def staged(
    run: Layers, layers: Any, x: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, Any]:
    """run(layers, x, positions, segment_ids); on a mesh with a pipeline axis stage by stage, in microbatches.

    At every step each stage takes the microbatch that the stage before it finished in the last step, and the first stage
    takes a new one. Two stages and three microbatches a, b, c, where - is padding, whose results are ignored:

        step       0 1 2 3
        stage 0    a b c -
        stage 1    - a b c

    Args:
      run: computes consecutive layers.
      layers: a tree of arrays [L, ...].
      x: [B, T, D].
      positions: int32[B, T].
      segment_ids: int32[B, T].

    Returns:
      ([B, T, D], the layers' `moe.Load` of arrays [L, ...] or {}).
    """
    stages = mesh_size("pipeline")
    rows = x.shape[0]
    if stages == 1:
        return run(layers, x, positions, segment_ids)
    count = num_micro(rows, stages)

    def split(a: jax.Array) -> jax.Array:
        """[B, ...] -> [count + stages - 1, B / count, ...]: the microbatches, then padding until the last is through.

        Rows i, i + count, ... make microbatch i, so that each stays on the device that has it.
        """
        micro = a.reshape(rows // count, count, *a.shape[1:]).swapaxes(0, 1)
        return jnp.pad(micro, [(0, stages - 1), *[(0, 0)] * (micro.ndim - 1)])

    def pin(a: jax.Array) -> jax.Array:
        return constrain(a, "stages", "batch", "seq", *[None] * (a.ndim - 3))

    def shift(held: jax.Array, new: jax.Array) -> jax.Array:
        """Hands every stage's array [stages, ...] to the next stage, and a new one to the first."""
        return pin(jnp.roll(held, 1, 0).at[0].set(new))

    arriving = jax.tree.map(split, (x, positions, segment_ids))
    stage_layers = jax.tree.map(lambda w: w.reshape(stages, -1, *w.shape[1:]), layers)
    run_stages = jax.vmap(run, spmd_axis_name="pipeline")

    def step(held: Any, new: Any) -> tuple[Any, Any]:
        x, positions, segment_ids = jax.tree.map(shift, held, new)
        y, load = run_stages(stage_layers, x, positions, segment_ids)
        return (pin(y), positions, segment_ids), (y[-1], load)

    padding = jax.tree.map(lambda a: jnp.zeros((stages, *a.shape[1:]), a.dtype), arriving)
    _, (y, loads) = jax.lax.scan(step, padding, arriving)
    # [steps, stages, L / stages, ...] -> [L, ...]; padding tokens count nothing.
    load = jax.tree.map(lambda a: a.sum(0).reshape(-1, *a.shape[3:]), loads)
    # The last stage gives the first microbatch after stages - 1 steps.
    return y[stages - 1 :].swapaxes(0, 1).reshape(x.shape), load


def num_micro(rows: int, stages: int) -> int:
    """Number of microbatches: as many as the rows of a device allow, at most MICRO per stage."""
    rows_per_device = max(rows // batch_shards(jax.sharding.get_abstract_mesh()), 1)
    counts = range(MICRO * stages, 0, -1)
    return next(n for n in counts if rows_per_device % n == 0)
