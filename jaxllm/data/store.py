"""The store: all examples of the sources, tokenized once and cached on disk, without duplicates.

Sources -> units, tokenized in parallel (`units`, `workers`, `tokenization`) -> the examples of each source and split
(`deduplication`). What is read afterwards is here.
"""

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import InputError
from jaxllm.data.cache import ArrayFile, clean, get_or_build, key_of
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.deduplication import MAX_OPEN_FILES, join_units
from jaxllm.data.documents import distinct_documents
from jaxllm.data.readers import FilePart
from jaxllm.data.sources import read_records
from jaxllm.data.splits import nothing_there, require_examples
from jaxllm.data.tokenization import distinct_items
from jaxllm.data.units import EXAMPLE, SPLITS, Unit, list_units, token_dtype
from jaxllm.data.workers import prepare
from jaxllm.tokenizers.trained import Tokenizer


class Tokens:
    """The tokens of all units, one unit after the other, and for conversations which tokens are targets.

    bases: int64[units + 1]: number of each unit's first token; the last is the total.
    """

    def __init__(
        self, folders: Sequence[Path], counts: Sequence[int], dtype: np.dtype, masked: bool
    ):
        self.bases = np.cumsum([0, *counts], dtype=np.int64)
        self._folders = folders
        self._dtype = dtype
        self._masked = masked
        # Units are read in any order and by several threads; the cache closes files that are not in use.
        self._opened = functools.lru_cache(maxsize=MAX_OPEN_FILES)(ArrayFile)

    def read(self, starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens [start, start + size) of each example, concatenated; no example spans two units.

        Args:
            starts: int64[examples]
            sizes: int64[examples]

        Returns:
            (tokens int32[n], target mask bool[n], or None for documents: all are targets)
        """
        tokens = []
        masks = []
        for unit, begin, end in self._pieces(starts, sizes):
            folder = self._folders[unit]
            tokens.append(self._opened(folder / "tokens", self._dtype).read(begin, end))
            if self._masked:
                masks.append(self._opened(folder / "mask", np.bool_).read(begin, end))
        mask = np.concatenate(masks) if self._masked else None
        return np.concatenate(tokens).astype(np.int32), mask

    def _pieces(self, starts: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(unit, begin, end) of each read; examples that are adjacent in a unit are read at once.

        starts 10 13 20, sizes 3 2 4, one unit from token 0:  (0, 10, 15) (0, 20, 24)
        """
        # "right" - 1: the last unit that begins at or before the token; units without tokens are skipped.
        units = np.searchsorted(self.bases, starts, "right") - 1
        is_apart = np.ones(len(starts), bool)
        is_apart[1:] = (starts[1:] != starts[:-1] + sizes[:-1]) | (units[1:] != units[:-1])
        firsts = np.flatnonzero(is_apart)
        counts = np.add.reduceat(sizes, firsts)
        begins = starts[firsts] - self.bases[units[firsts]]
        for unit, begin, count in zip(units[firsts], begins, counts, strict=True):
            yield int(unit), int(begin), int(begin + count)


class Examples(NamedTuple):
    """The examples of one source in one split, on disk."""

    source: Source
    tokens: Tokens
    table: ArrayFile  # EXAMPLE[kind]
    num_tokens: int
    num_bytes: int  # UTF-8 bytes that the targets stand for
    parts: Sequence[FilePart]
    key: str  # names the contents, the tokenizer and the split

    def origin(self, example: Any) -> str:
        """ "path:line" of a row of the table of conversations."""
        return f"{self.parts[example['part']].path}:{example['line']}"


def open_store(
    data: DataConfig,
    kind: str,
    tokenizer: Tokenizer | None,
    folder: Path,
    share: tuple[int, int] = (0, 1),
    exchange: Callable[[], None] | None = None,
) -> dict[str, list[Examples]]:
    """Returns {split: examples of each source}, after tokenizing what the cache does not have.

    Args:
        kind: "document" or "chat".
        tokenizer: None stores one dummy token per example: which examples stay, without their tokens.
        folder: the cache.
        share: (index of this process, number of processes) that prepare the same cache.
        exchange: see `workers.prepare`.

    Raises:
        InputError: no sources, or a malformed record.
    """
    if not data.sources:
        raise InputError(
            f"data.sources: is empty, and {kind} examples are needed; name at least one source"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # Before any work, so that a full disk gets space again.
    clean(folder)
    units = list_units(data, kind, tokenizer, folder)
    metas = prepare(units, tokenizer, share, exchange)
    folders = [unit.folder for unit in units]
    counts = [meta["tokens"] for meta in metas]
    tokens = Tokens(folders, counts, token_dtype(tokenizer), masked=kind == "chat")
    # The same unit may belong to two sources, whose examples are then duplicates of each other.
    key = key_of([(unit.source, unit.folder.name) for unit in units])
    store = folder / f"{kind}-{key}"
    meta = get_or_build(store, lambda to: join_units(to, units, tokens.bases[:-1], kind))
    parts = [part for unit in units for part in unit.parts]
    found: dict[str, list[Examples]] = {}
    for split, (index, source) in itertools.product(SPLITS, enumerate(data.sources)):
        name = f"{split}-{index}"
        num_tokens, num_bytes = meta["counts"][name]
        table = ArrayFile(store / name, EXAMPLE[kind])
        examples = Examples(source, tokens, table, num_tokens, num_bytes, parts, f"{key}-{name}")
        found.setdefault(split, []).append(examples)
    return found


def load_texts(data: DataConfig, split: str, cache_dir: Any = None) -> Iterator[str]:
    """The texts of one split, for the tokenizer and for xz; a conversation gives its messages, a line each.

    Raises:
        InputError: no sources, or no text in the split.
    """
    if not data.sources:
        raise InputError("data.sources: is empty, and texts are needed; name at least one source")
    by_kind: dict[str, list[Source]] = {"document": [], "chat": []}
    for source in data.sources:
        by_kind[_kind_of(source)].append(source)
    is_empty = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(cache_dir or temporary)
        for kind, sources in by_kind.items():
            if not sources:
                continue
            # A curriculum has a weight for each of all sources.
            some = dataclasses.replace(data, sources=tuple(sources), curriculum=())
            for text in _kept_texts(some, kind, split, folder):
                is_empty = False
                yield text
    if is_empty:
        raise nothing_there(data, "text", split)


def _kept_texts(data: DataConfig, kind: str, split: str, folder: Path) -> Iterator[str]:
    """The full texts of the examples that stay in a split.

    Texts are not cached. A store without a tokenizer says which examples stay: it gives each one dummy token, so an
    example's `start` is its number. A second pass over the records then picks them by number.
    """
    tables = [examples.table for examples in open_store(data, kind, None, folder)[split]]
    require_examples(data, kind, split, list(map(len, tables)), word="text")
    kept = _starts(tables)
    wanted = next(kept, None)
    # The same order as in `open_store`: units in the order of the sources, records in that of the files.
    number = 0
    for unit in list_units(data, kind, None, folder):
        for text in _full_texts(unit):
            if number == wanted:
                yield text
                wanted = next(kept, None)
            number += 1


def _full_texts(unit: Unit) -> Iterator[str]:
    if unit.kind == "document":
        for documents in distinct_documents(unit):
            yield from documents.texts
    else:
        for item in distinct_items(unit):
            yield item.example.full_text()


def _starts(tables: Sequence[ArrayFile]) -> Iterator[int]:
    for table in tables:
        for chunk in table.chunks():
            yield from chunk["start"].tolist()


def kind_of(data: DataConfig, field: str) -> str:
    """ "document" or "chat": what all sources give.

    field: names the data in the error.

    Raises:
        InputError: some give documents and others conversations.
    """
    kinds = {_kind_of(source) for source in data.sources}
    if len(kinds) > 1:
        raise InputError(
            f"{field}.sources: some give documents and others conversations; give one kind"
        )
    return kinds.pop() if kinds else "document"


def _kind_of(source: Source) -> str:
    """The kind of what a source gives; without templates its first record tells."""
    if source.prompt:
        return "chat"
    # One record decides: a source that mixes kinds is refused later, with the line.
    first = next(iter(read_records(source)), None)
    if first is None or "text" in first.fields:
        return "document"
    return "chat" if {"messages", "prompt"} & first.fields.keys() else "document"
