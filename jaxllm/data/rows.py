"""Rows: the examples of one source, packed. The plan, which examples are in which row, is made once and cached."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxllm.config import InputError
from jaxllm.data.cache import ArrayFile, get_or_build, key_of
from jaxllm.data.config import DataConfig
from jaxllm.data.packing import Row, best_fit, build_row, concat_and_split
from jaxllm.data.soft_targets import KeptTargets
from jaxllm.data.store import Examples, Tokens
from jaxllm.data.units import EXAMPLE
from jaxllm.tokenizers.trained import Tokenizer

# Where a row begins: its first example's index in the table, and the offset of its first token in that example.
_BEGIN = np.dtype([("example", "<i8"), ("offset", "<i8")])
# Conversations whose tokens are in memory at once.
_CHUNK = 4096


class Rows(NamedTuple):
    """The packed rows of one source; everything that grows with their number is on disk."""

    tokens: Tokens
    table: ArrayFile  # EXAMPLE[kind], in the order of the rows
    begins: ArrayFile  # _BEGIN[rows]
    length: int  # tokens of a row
    pad_id: int
    num_examples: int
    num_dropped: int  # examples longer than a row
    num_tokens: int  # tokens that are targets
    num_bytes: int  # UTF-8 bytes that the targets stand for
    fingerprint: str  # of the contents, the tokenizer, the split and the length
    epochs: float = 1.0  # passes over these rows in one pass over the mixture
    phases: tuple[tuple[int, float], ...] = ()  # (step, weight from that step on)
    kept: KeptTargets | None = None  # of a teacher

    @property
    def num_rows(self) -> int:
        """Rows in one pass over the source."""
        return len(self.begins)

    def row(self, index: int) -> Row:
        """Reads row `index`: {tokens, segment_ids, positions: int32[T], loss_mask: bool[T]} (see `packing`).

        With a teacher also {teacher_ids, teacher_logprobs}, [T, K] each (see `soft_targets`).

        Documents of 5 and 3 tokens in rows of 4; row 1 begins with example 0 at offset 3:

            begins  (0, 0) (0, 3) (1, 1)        row 1  [d e | f g]
        """
        begin, *following = self.begins.read(index, min(index + 2, self.num_rows)).tolist()
        first, offset = begin
        stop = len(self.table)
        if following:
            next_first, next_offset = following[0]
            # An example that is split belongs to both rows.
            stop = next_first + (next_offset > 0)
        table = self.table.read(first, stop)
        starts = table["start"].astype(np.int64)
        sizes = table["size"].astype(np.int64)
        starts[0] += offset
        sizes[0] -= offset
        # What does not fit of the last document is in the next row.
        sizes[-1] -= max(0, sizes.sum() - self.length)
        tokens, mask = self.tokens.read(starts, sizes)
        row = build_row(tokens, mask, sizes, self.length, self.pad_id)
        return row | self.kept.row(index, row["loss_mask"]) if self.kept else row


def pack_rows(
    data: DataConfig,
    kind: str,
    examples: Examples,
    length: int,
    tokenizer: Tokenizer,
    folder: Path,
) -> Rows:
    """The rows of one source; their plan is read from the cache, or made and stored there.

    Raises:
        InputError: a conversation is too long (data.too_long: error) or has no target.
    """
    key = key_of(examples.key, length, data.too_long if kind == "chat" else "")
    plan = folder / f"rows-{key}"
    if kind == "chat":
        make = functools.partial(
            _plan_chats, examples=examples, data=data, length=length, tokenizer=tokenizer
        )
    else:
        make = functools.partial(_plan_documents, examples=examples, length=length)
    meta = get_or_build(plan, make)
    return Rows(
        tokens=examples.tokens,
        table=ArrayFile(plan / "table", EXAMPLE[kind]) if kind == "chat" else examples.table,
        begins=ArrayFile(plan / "begins", _BEGIN),
        length=length,
        pad_id=tokenizer.pad_id,
        num_examples=meta["num_examples"],
        num_dropped=meta["num_dropped"],
        num_tokens=meta["num_tokens"],
        num_bytes=meta["num_bytes"],
        fingerprint=key,
        epochs=examples.source.epochs,
    )


def _plan_documents(to: Path, examples: Examples, length: int) -> dict[str, int]:
    """Writes where the rows of documents begin; their table is that of the store."""
    sizes = (chunk["size"].astype(np.int64) for chunk in examples.table.chunks())
    with open(to / "begins", "wb") as file:
        for begins in concat_and_split(sizes, length):
            file.write(begins.astype("<i8").tobytes())
    num_examples = len(examples.table)
    return {
        "num_examples": num_examples,
        "num_dropped": 0,
        # All but the first token of a document.
        "num_tokens": examples.num_tokens - num_examples,
        "num_bytes": examples.num_bytes,
    }


def _plan_chats(
    to: Path, examples: Examples, data: DataConfig, length: int, tokenizer: Tokenizer
) -> dict[str, int]:
    """Writes a table of the conversations row by row, in which the long ones are dropped or truncated."""
    table = examples.table.read(0, len(examples.table)).copy()
    is_long = table["size"] > length
    if is_long.any() and data.too_long == "error":
        worst = table[np.argmax(is_long)]
        takes = f"this conversation takes {worst['size']} tokens and a row holds {length}"
        raise InputError(
            f"{examples.origin(worst)}: {takes}; raise the length, or set data.too_long to drop or "
            "truncate"
        )
    num_dropped = 0
    if data.too_long == "drop":
        num_dropped = int(is_long.sum())
        table = table[~is_long]
    is_cut = table["size"] > length
    table["size"] = np.minimum(table["size"], length)
    num_targets = 0
    for chunk in _index_chunks(len(table)):
        # Slices of the table: their bytes are corrected in place.
        num_targets += _count_targets(table[chunk], is_cut[chunk], examples, length, tokenizer)
    plan = best_fit(table["size"].tolist(), length)
    (to / "table").write_bytes(table[plan[:, 1]].tobytes())
    # plan[:, 0] is 0 0 1 1 1 2: a row begins where the number first occurs.
    begins = np.zeros(len(np.unique(plan[:, 0])), _BEGIN)
    begins["example"] = np.searchsorted(plan[:, 0], np.arange(len(begins)))
    (to / "begins").write_bytes(begins.tobytes())
    return {
        "num_examples": len(table),
        "num_dropped": num_dropped,
        "num_tokens": num_targets,
        "num_bytes": int(table["bytes"].sum(dtype=np.int64)),
    }


def _index_chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, _CHUNK):
        yield slice(start, start + _CHUNK)


def _count_targets(
    table: np.ndarray, is_cut: np.ndarray, examples: Examples, length: int, tokenizer: Tokenizer
) -> int:
    """The number of targets of some conversations; of those that are cut, "bytes" becomes that of what is left.

    Raises:
        InputError: a conversation without a target: no reply fits in a row.
    """
    sizes = table["size"].astype(np.int64)
    ids, mask = examples.tokens.read(table["start"], sizes)
    assert mask is not None  # conversations have a mask of targets
    firsts = np.cumsum(sizes) - sizes
    assert mask is not None  # conversations have masks
    # Nothing predicts a first token.
    mask[firsts] = False
    counts = np.add.reduceat(mask, firsts, dtype=np.int64)
    if not counts.all():
        origin = examples.origin(table[np.argmin(counts)])
        raise InputError(
            f"{origin}: not one token of this example is a target (no reply in {length} tokens); "
            "raise the length, or set data.too_long to drop"
        )
    for number in np.flatnonzero(is_cut):
        piece = slice(firsts[number], firsts[number] + sizes[number])
        targets = ids[piece][mask[piece]].tolist()
        table["bytes"][number] = sum(map(len, map(tokenizer.token_bytes, targets)))
    return int(counts.sum())
