"""Packing plans: which examples stand in which row. Pure NumPy, and in memory that does not grow with documents."""

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]  # name -> np.ndarray


def concat_and_split(sizes: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Where each row begins, int64[rows, 2] of (document, offset in it), from chunks of the documents' sizes (>= 2).

    Rows of `length` tokens are filled one after the other, and documents split where a row ends. The pieces of a
    document overlap by one token, which is context only the second time: every token after a document's first is
    predicted exactly once, and the loss in nats adds up to that of the documents. Documents of 5 and 3 tokens in
    rows of 4 (lower case: not a target):

        a B C D | d E f G | g H .        rows  [a B C D] [d E f G] [g H . .]        begin  (0, 0) (0, 3) (1, 1)

    So a row that begins at place A of all the tokens is followed by one at A + length if a document begins there,
    and else at A + length - 1. Raises ValueError on rows of fewer than 2 tokens: they hold no target.
    """
    if length < 2:
        raise ValueError(f"rows of {length} tokens hold no target; at least 2 are needed")
    place, total, document = -length, 0, 0
    for chunk in sizes:
        starts = total + np.cumsum(chunk, dtype=np.int64) - chunk
        total, begin, places = total + int(chunk.sum()), set(starts.tolist()), []
        while place + length < total:
            place += length if place + length in begin else length - 1
            places.append(place)
        row = np.array(places, np.int64)
        index = np.searchsorted(starts, row, "right") - 1
        yield np.stack([document + index, row - starts[index]], axis=1)
        document += len(chunk)


def best_fit(lengths: Sequence[int], length: int) -> np.ndarray:
    """Put whole examples into rows, each into the fullest row it still fits: int64[examples, 2] of (row, example).

    The longest come first, and ties go to the lower index, so that the plan depends on the lengths alone. Raises
    ValueError on an example longer than a row. Lengths 3 2 4 1 in rows of 5:  [0 0 0 1 1] [2 2 2 2 3].
    """
    rows_with_free: list[collections.deque[int]] = [collections.deque() for _ in range(length + 1)]
    there = 0  # bit f: some row has f free tokens
    plan, rows = [], 0
    for example in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = lengths[example]
        if size > length:
            raise ValueError(f"example {example} has {size} tokens, a row {length}")
        if fitting := there >> size:
            free = size + (fitting & -fitting).bit_length() - 1  # the lowest bit
            row = rows_with_free[free].popleft()
            there ^= (not rows_with_free[free]) << free
        else:
            row, free, rows = rows, length, rows + 1
        rows_with_free[free - size].append(row)
        there |= 1 << (free - size)
        plan.append((row, example))
    return np.array(sorted(plan), np.int64).reshape(-1, 2)


def materialise(
    tokens: np.ndarray, mask: np.ndarray | None, sizes: np.ndarray, length: int, pad_id: int
) -> Row:
    """One row from its segments' tokens, one after the other: {tokens, segment_ids, positions int32[T], loss_mask}.

    mask bool[n]: which of the tokens are targets; None: all. segment_ids count from 1 and are 0 in the padding,
    positions restart in each segment, and no first token of a segment is a target. Segments of 3 and 2 tokens in a
    row of 6:

        segment_ids  1 1 1 2 2 0      positions  0 1 2 0 1 0      loss_mask  . x x . x .
    """
    used, starts = len(tokens), np.cumsum(sizes) - sizes
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "segment_ids", "positions")}
    row |= {"loss_mask": np.zeros(length, bool)}
    row["tokens"][:used], row["tokens"][used:] = tokens, pad_id
    row["segment_ids"][:used] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    row["positions"][:used] = np.arange(used) - np.repeat(starts, sizes)
    row["loss_mask"][:used] = True if mask is None else mask
    row["loss_mask"][starts] = False
    return row
