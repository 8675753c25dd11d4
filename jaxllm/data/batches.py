"""Batches: global arrays on devices, of which each process builds only the rows of its own devices.

So batches do not depend on the number of processes or on the sharding.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.data.mixture import Order
from jaxllm.data.packing import Row

Batch = dict[str, Any]  # of global arrays
BatchAt = Callable[[int], Batch]


def make_batch_function(
    order: Order, row: Callable[[int, int, int], Row], batch_size: int, sharding: Any
) -> BatchAt:
    """step -> the batch of rows [step * batch_size, (step + 1) * batch_size) of an order.

    row: (position in the batch, source, row of the source) -> its arrays.
    """

    def batch_at(step: int) -> Batch:
        def build(position: int) -> Row:
            return row(position, *order(step * batch_size + position))

        return global_batch(build, batch_size, sharding)

    return batch_at


def epoch(
    numbers: np.ndarray, row: Callable[[int], Row], batch_size: int, sharding: Any
) -> Iterator[Batch]:
    """Batches of the rows with these numbers, in order; zeros fill the last batch. Five rows in batches of 2:

    [0 1] [2 3] [4 .]
    """
    for start in range(0, len(numbers), batch_size):
        part = numbers[start : start + batch_size].tolist()
        build = functools.partial(_row_or_zeros, part, row)
        yield global_batch(build, batch_size, sharding)


def _row_or_zeros(numbers: list[int], row: Callable[[int], Row], position: int) -> Row:
    if position < len(numbers):
        return row(numbers[position])
    # As many arrays, of the same shapes, as those of a row.
    return {name: np.zeros_like(value) for name, value in row(numbers[-1]).items()}


def global_batch(row: Callable[[int], Row], batch_size: int, sharding: Any) -> Batch:
    """Arrays [B, ...] from a function of the position in the batch.

    sharding: its spec names the axes of the arrays with the most dimensions; those with fewer take its beginning.
    """
    # Devices that shard other dimensions of a row ask for it again.
    row = functools.cache(row)

    def sharding_of(rank: int) -> NamedSharding:
        return NamedSharding(sharding.mesh, PartitionSpec(*tuple(sharding.spec)[:rank]))

    def array(name: str, shape: tuple[int, ...]) -> jax.Array:
        def piece(index: Any) -> np.ndarray:
            # One slice for each dimension: the rows, then what this device holds of each.
            rows, *rest = index
            values = np.stack([row(i)[name] for i in range(batch_size)[rows]])
            return values[(slice(None), *rest)]

        return jax.make_array_from_callback(shape, sharding_of(len(shape)), piece)

    # Any row tells names and shapes. It is the first of this process, so that no other process's row is built.
    local: Any = sharding_of(1).addressable_devices_indices_map((batch_size,)).values()
    first = row(min(index[0].start or 0 for index in local))
    return {name: array(name, (batch_size, *np.shape(value))) for name, value in first.items()}
