"""Packing plans: which examples are in which row. Pure NumPy; memory does not grow with the number of documents."""

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]  # name -> np.ndarray


def concat_and_split(sizes: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Plans rows of documents, which are concatenated and split where a row ends.

    The pieces of a split document overlap by one token. The second time it is context only, so every token after a
    document's first is a target exactly once, and the loss in nats adds up to that of the documents. Documents of 5
    and 3 tokens in rows of 4 (lower case: not a target):

        a B C D | d E f G | g H .        rows  [a B C D] [d E f G] [g H . .]        begin  (0, 0) (0, 3) (1, 1)

    Args:
        sizes: chunks of the documents' sizes, int[documents], each at least 2.

    Yields:
        int64[rows, 2] of (document, offset in it): where each row begins, chunk by chunk.

    Raises:
        ValueError: rows of fewer than 2 tokens, which hold no target.
    """
    if length < 2:
        raise ValueError(f"rows of {length} tokens hold no target; at least 2 are needed")
    # A row that begins at token A of all documents is followed by one at A + length if a document begins there, and
    # if not at A + length - 1, which repeats the last token of the row.
    offset = -length
    total = 0
    document = 0
    for chunk in sizes:
        starts = total + np.cumsum(chunk, dtype=np.int64) - chunk
        # Membership is asked once a row; a search in the array would be slower.
        is_start = set(starts.tolist())
        total += int(chunk.sum())
        offsets = []
        while offset + length < total:
            offset += length if offset + length in is_start else length - 1
            offsets.append(offset)
        begins = np.array(offsets, np.int64)
        # The document that a row begins in: the last one that starts at or before it.
        index = np.searchsorted(starts, begins, "right") - 1
        yield np.stack([document + index, begins - starts[index]], axis=1)
        document += len(chunk)


def best_fit(lengths: Sequence[int], length: int) -> np.ndarray:
    """Plans rows of whole examples: each goes into the fullest row it still fits (best-fit decreasing).

    The longest come first, and of equal ones the lower index, so the plan depends on the lengths alone. Lengths
    3 2 4 1 in rows of 5:

        [2 2 2 2 3] [0 0 0 1 1]        (row, example)  (0, 2) (0, 3) (1, 0) (1, 1)

    Returns:
        int64[examples, 2] of (row, example), sorted.

    Raises:
        ValueError: an example is longer than a row.
    """
    # rows_with_free[f]: the rows with f free tokens, first in, first out.
    rows_with_free: list[collections.deque[int]] = [collections.deque() for _ in range(length + 1)]
    # Bit f is set if there is a row with f free tokens: finding the fullest row is one operation on an integer.
    free_bits = 0
    num_rows = 0
    plan = []
    for example in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = lengths[example]
        if size > length:
            raise ValueError(f"example {example} has {size} tokens, a row {length}")
        fitting = free_bits >> size
        if fitting:
            # Of the rows that fit, the one with the least free tokens.
            lowest_bit = (fitting & -fitting).bit_length() - 1
            free = size + lowest_bit
            row = rows_with_free[free].popleft()
            if not rows_with_free[free]:
                free_bits ^= 1 << free
        else:
            free = length
            row = num_rows
            num_rows += 1
        rows_with_free[free - size].append(row)
        free_bits |= 1 << (free - size)
        plan.append((row, example))
    return np.array(sorted(plan), np.int64).reshape(-1, 2)


def build_row(
    tokens: np.ndarray, mask: np.ndarray | None, sizes: np.ndarray, length: int, pad_id: int
) -> Row:
    """Builds one row from the tokens of its segments. Segments of 3 and 2 tokens in a row of 6:

        tokens       a b c d e .      segment_ids  1 1 1 2 2 0      (0: padding)
        positions    0 1 2 0 1 0      loss_mask    . x x . x .      (x: a target)

    A first token of a segment is never a target: the token before it belongs to another text.

    Args:
        tokens: int32[n], the segments' tokens, concatenated.
        mask: bool[n]: which tokens are targets; None: all.
        sizes: int64[segments], with sum n.

    Returns:
        {tokens, segment_ids, positions: int32[length], loss_mask: bool[length]}
    """
    used = len(tokens)
    starts = np.cumsum(sizes) - sizes
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "segment_ids", "positions")}
    row["loss_mask"] = np.zeros(length, bool)
    row["tokens"][:used] = tokens
    row["tokens"][used:] = pad_id
    row["segment_ids"][:used] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    row["positions"][:used] = np.arange(used) - np.repeat(starts, sizes)
    row["loss_mask"][:used] = True if mask is None else mask
    row["loss_mask"][starts] = False
    return row
