"""Packing plans: which tokens of which example stand in which row. Pure NumPy.

A plan is int64[pieces, 4]: (row, example, start, stop), sorted by row; it is computed once, ahead of training.
"""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]  # name -> np.ndarray


def concat_and_split(lengths: Sequence[int], length: int) -> np.ndarray:
    """Fill rows of `length` tokens one after the other, splitting documents where a row ends.

    The pieces of a document overlap by one token, which is context only the second time: every token after a
    document's first is predicted exactly once, and the loss in nats adds up to that of the documents. Documents
    of 5 and 3 tokens in rows of 4 (lower case: not a target):

        a B C D | d E f G | g H .        rows  [a B C D] [d E f G] [g H . .]

    Raises ValueError on rows of fewer than 2 tokens: they hold no target.
    """
    if length < 2:
        raise ValueError(f"rows of {length} tokens hold no target; at least 2 are needed")
    plan, row, used = [], 0, 0
    for example, total in enumerate(lengths):
        start = 0
        while start < total - 1:
            if length - used < 2:
                row, used = row + 1, 0
            stop = min(total, start + length - used)
            plan.append((row, example, start, stop))
            used += stop - start
            start = stop - 1
    return np.array(plan, np.int64).reshape(-1, 4)


def best_fit(lengths: Sequence[int], length: int) -> np.ndarray:
    """Put whole examples into rows, each into the fullest row it still fits (best-fit decreasing).

    Ties go to the lower index, so that the plan depends on the lengths alone. Raises ValueError on an example
    longer than a row. Lengths 3 2 4 1 in rows of 5:  [0 0 0 1 1] [2 2 2 2 3].
    """
    rows_with_free: list[collections.deque[int]] = [collections.deque() for _ in range(length + 1)]
    plan, rows = [], 0
    for example in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = lengths[example]
        if size > length:
            raise ValueError(f"example {example} has {size} tokens, a row {length}")
        free = next((f for f in range(size, length + 1) if rows_with_free[f]), None)
        if free is None:
            row, free, rows = rows, length, rows + 1
        else:
            row = rows_with_free[free].popleft()
        rows_with_free[free - size].append(row)
        plan.append((row, example, 0, size))
    return np.array(sorted(plan), np.int64).reshape(-1, 4)


def row_starts(plan: np.ndarray) -> np.ndarray:
    """Index of each row's first piece, and the number of pieces at the end."""
    rows = int(plan[-1, 0]) + 1 if len(plan) else 0
    return np.searchsorted(plan[:, 0], np.arange(rows + 1))


def materialise(
    pieces: np.ndarray, tokens: np.ndarray, mask: np.ndarray, offsets: np.ndarray, length: int, pad_id: int
) -> Row:
    """One row from its pieces: {tokens, segment_ids, positions int32[T], loss_mask bool[T]}.

    segment_ids count from 1 and are 0 in the padding, positions restart in each segment, and no first token of a
    segment is a target. Two pieces of 3 and 2 tokens in a row of 6:

        segment_ids  1 1 1 2 2 0      positions  0 1 2 0 1 0      loss_mask  . x x . x .
    """
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "segment_ids", "positions")}
    row |= {"loss_mask": np.zeros(length, bool)}
    row["tokens"][:] = pad_id
    place = 0
    for segment, (_, example, start, stop) in enumerate(pieces, start=1):
        size, first = stop - start, offsets[example] + start
        where = slice(place, place + size)
        row["tokens"][where] = tokens[first : first + size]
        row["segment_ids"][where] = segment
        row["positions"][where] = np.arange(size)
        row["loss_mask"][place + 1 : place + size] = mask[first + 1 : first + size]
        place += size
    return row
