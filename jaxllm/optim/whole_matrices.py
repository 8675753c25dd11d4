"""Work on whole matrices of sharded parameters, where each device takes its share of the matrices.

The shards of a stack are exchanged first, so that each device has some of its matrices as a whole, and exchanged back
afterwards. Two all-to-alls move a device's own shard and no more: it never holds more than its share of the stack.

    before                        between                 L = 4 matrices in two shards each, on two devices
    device 0: 0a 1a 2a 3a         device 0: 0a0b 1a1b
    device 1: 0b 1b 2b 3b         device 1: 2a2b 3a3b
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxllm.models.parameters import Axes
from jaxllm.sharding import PARAM_RULES, mesh_axes, mesh_size, on_each_device, spec

Arrays = dict[str, jax.Array]
Names = tuple[str | None, ...]


def on_whole_matrices(
    function: Callable[[Arrays], Arrays],
    arrays: Arrays,
    axes: Mapping[str, Names],
    num_stacked: int,
    results: Sequence[str],
) -> Arrays:
    """function(its arrays) for every matrix of a stack, on the device that has the matrix.

    Where the number of matrices does not divide over the devices, some devices get a matrix of zeros as well.

    Args:
      function: takes each array's part for one matrix, without the stacked dimensions, and returns the named results.
      arrays: each [*stack, ...], sharded by the rules for parameters.
      axes: the logical axes of each array.
      num_stacked: the number of stacked dimensions.
      results: names of the results. Each has the shape and the sharding of the array of its name.
    """
    specs = {name: spec(axes[name], PARAM_RULES) for name in arrays}
    splits = {name: _splits(specs[name][num_stacked:]) for name in arrays}
    ways = list(dict.fromkeys(axis for split in splits.values() for axis in split))

    def on_device(own: Arrays) -> Arrays:
        stack = own[results[0]].shape[:num_stacked]
        count = math.prod(stack)
        whole = {}
        for name, x in own.items():
            whole[name] = _exchange(x.reshape(count, *x.shape[num_stacked:]), splits[name], ways)
        # One after the other: the work on a matrix takes several times its memory.
        done = jax.lax.map(function, whole)
        back = {name: _exchange_back(done[name], splits[name], ways)[:count] for name in results}
        return {name: x.reshape(*stack, *x.shape[1:]) for name, x in back.items()}

    return on_each_device(on_device, (specs,), {name: specs[name] for name in results})(arrays)


def as_matrix(x: jax.Array, axes: Axes) -> jax.Array:
    """One matrix [*inputs, *outputs] with these axes as [I, O]."""
    return x.reshape(math.prod(x.shape[: axes.num_inputs]), -1)


def _splits(entries: Sequence[str | tuple[str, ...] | None]) -> dict[str, int]:
    """{mesh axis: the dimension that it splits}, of arrays [matrices, ...] with these entries after the first."""
    splits = {}
    for dim, entry in enumerate(entries, start=1):
        # Of two axes that split a dimension, the last one cuts the pieces of the first: it is undone first.
        for axis in reversed(mesh_axes(entry)):
            if mesh_size(axis) > 1:
                splits[axis] = dim
    return splits


def _exchange(x: jax.Array, split: Mapping[str, int], ways: Sequence[str]) -> jax.Array:
    """[N, ...] with the device's shard of each matrix -> [N / devices, ...], its share of whole matrices."""
    devices = math.prod(map(mesh_size, ways))
    x = jnp.pad(x, [(0, -len(x) % devices), *[(0, 0)] * (x.ndim - 1)])
    for axis in ways:
        if axis in split:
            x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=split[axis], tiled=True)
        else:
            # Not split by this axis, so the device has its share already.
            share = len(x) // mesh_size(axis)
            first = jax.lax.axis_index(axis) * share
            x = jax.lax.dynamic_slice_in_dim(x, first, share)
    return x


def _exchange_back(x: jax.Array, split: Mapping[str, int], ways: Sequence[str]) -> jax.Array:
    """The inverse of `_exchange`, up to the matrices of zeros at the end."""
    for axis in reversed(ways):
        if axis in split:
            x = jax.lax.all_to_all(x, axis, split_axis=split[axis], concat_axis=0, tiled=True)
        else:
            x = jax.lax.all_gather(x, axis, axis=0, tiled=True)
    return x
