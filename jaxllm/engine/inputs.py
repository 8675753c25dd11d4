"""The scheduler's rows as the arrays that programs take.

Every shard of a batch has as many rows, chunks and blocks as the others; those of one shard are adjacent.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxllm.engine.programs import Chunks, Copies, Rows
from jaxllm.engine.row_sampling import History, row_rules
from jaxllm.engine.scheduler import Prefill, Row
from jaxllm.models.block_cache import PAIRS, Owners

# Programs have room for 16, 64, 256, ... blocks of a table, stop tokens and shared blocks.
_LEAST = PAIRS  # shared blocks are read so many at a time
_FACTOR = 4


def room_for(count: int, most: int | None = None, least: int = _LEAST) -> int:
    """A size that holds `count` things and is one of few, since programs are compiled for each."""
    size = least
    while size < count:
        size *= _FACTOR
    return size if most is None else min(size, most)


def rows_of(
    shards: Sequence[Sequence[Row]], size: int, width: int, vocab_size: int, longest: int = 0
) -> Rows:
    """`size` rows for each shard; width: blocks of a table; longest: tokens that histories have room for, in any case."""
    rows: list[Row | None] = []
    for shard in shards:
        rows += [*shard, *[None] * (size - len(shard))]
    most_stops = max((len(row.request.stop_ids) for row in rows if row), default=0)

    def column(value_of: Callable[[Row], Any], empty: Any = 0, dtype: type = np.int32) -> Any:
        return np.array([empty if row is None else value_of(row) for row in rows], dtype)

    stops = np.full((len(rows), room_for(most_stops)), -1, np.int32)
    tables = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        if row:
            stops[i, : len(row.request.stop_ids)] = row.request.stop_ids
            tables[i, : len(row.blocks)] = row.blocks
    return Rows(
        token=column(lambda row: row.drawn[-1] if row.drawn else 0),
        position=column(lambda row: row.cached, -1),
        number=column(lambda row: len(row.drawn)),
        remaining=column(lambda row: row.request.sampling.max_new_tokens - len(row.drawn)),
        keys=column(lambda row: row.request.key, (0, 0), np.uint32),
        stops=stops,
        rules=row_rules([row and row.request.sampling for row in rows], vocab_size),
        history=_history_of(rows, longest),
        tables=tables,
    )


def _history_of(rows: Sequence[Row | None], longest: int) -> History:
    """The tokens of rows; without columns if none of them penalizes any."""
    penalized = [row for row in rows if row and row.request.sampling.penalizes]
    width = max((row.longest + 1 for row in penalized), default=0)
    width = max(width, longest)
    tokens = np.full((len(rows), room_for(width) if width else 0), -1, np.int32)
    num_prompt = np.zeros(len(rows), np.int32)
    for i, row in enumerate(rows):
        if row and row.request.sampling.penalizes:
            so_far = [*row.prompt, *row.drawn]
            tokens[i, : len(so_far)] = so_far
            num_prompt[i] = len(row.prompt)
    return History(tokens, num_prompt)


def chunks_of(plans: Sequence[Prefill], size: int, num_rows: int, block: int, width: int) -> Chunks:
    """`size` chunks and `num_rows` rows that start, for each shard."""
    shape = (len(plans), size)
    tokens = np.zeros((*shape, block), np.int32)
    positions = np.full((*shape, block), -1, np.int32)
    tables = np.zeros((*shape, width), np.int32)
    source = np.full((len(plans), num_rows), -1, np.int32)
    for shard, plan in enumerate(plans):
        for i, chunk in enumerate(plan.chunks):
            length = chunk.end - chunk.begin
            tokens[shard, i, :length] = chunk.row.prompt[chunk.begin : chunk.end]
            positions[shard, i, :length] = range(chunk.begin, chunk.end)
            needed = chunk.begin // block + 1
            tables[shard, i, :needed] = chunk.row.blocks[:needed]
        for i, start in enumerate(plan.starts):
            chunk = plan.chunks[start.chunk]
            source[shard, i] = start.chunk * block + chunk.end - chunk.begin - 1
    return Chunks(*map(_flat, (tokens, positions, tables, source)))


def copies_of(plans: Sequence[Prefill], num_rows: int) -> Copies | None:
    """Blocks that rows begin as copies of; None: there are none."""
    if all(start.copied < 0 for plan in plans for start in plan.starts):
        return None
    source = np.full((len(plans), num_rows), -1, np.int32)
    target = np.zeros_like(source)
    for shard, plan in enumerate(plans):
        for i, start in enumerate(plan.starts):
            source[shard, i], target[shard, i] = start.copied, start.row.blocks[-1]
    return Copies(_flat(source), _flat(target))


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, *x.shape[2:])


def owners_of(
    shards: Sequence[Sequence[Row]], num_rows: int, num_blocks: int, most_shared: int = 0
) -> Owners:
    """Which row reads each block.

    Args:
      shards: the rows of each.
      num_rows: of a shard.
      num_blocks: of a shard's pool.
      most_shared: how often blocks may be read by further rows; 0: there is room for as often as they are.
    """
    found = [_first_and_others(rows, num_rows, num_blocks) for rows in shards]
    room = room_for(most_shared or max(len(others) for _, _, others in found))
    shared = np.full((len(shards), room, 3), (num_rows, 0, 0), np.int32)
    for shard, (_, _, others) in enumerate(found):
        if others:
            shared[shard, : len(others)] = others
    shared = shared.reshape(-1, 3)
    row = np.concatenate([row for row, _, _ in found])
    number = np.concatenate([number for _, number, _ in found])
    return Owners(row, number, shared[:, 0], shared[:, 1], shared[:, 2])


def _first_and_others(
    rows: Sequence[Row], num_rows: int, num_blocks: int
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int]]]:
    """(the first row of each block, its place in the row's table, (row, block, place) of further rows)."""
    owner = np.full(num_blocks, num_rows, np.int32)
    number = np.zeros(num_blocks, np.int32)
    others = []
    for i, row in enumerate(rows):
        for place, block in enumerate(row.blocks):
            if owner[block] == num_rows:
                owner[block], number[block] = i, place
            else:
                others.append((i, block, place))
    return owner, number, others
