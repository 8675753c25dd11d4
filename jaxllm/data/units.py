"""Units: pieces of about 32 MB of a source, each tokenized into its own cache folder.

The folder is named by a key of everything its content depends on: file contents, the source's settings, the tokenizer,
and the split. So new text is all that is tokenized again. It holds, in the order of the records:

    tokens    uint16 or uint32[tokens]: the examples of both splits, one after the other
    mask      bool[tokens], of conversations only: which tokens are targets
    examples  EXAMPLE[kind][examples]
    keys      KEY[examples]: hash of the content and split, sorted by hash in runs of RUN
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data import readers, sources
from jaxllm.data.cache import fingerprint_file, key_of
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.file_formats import format_of
from jaxllm.data.files import compression_of, remote_info
from jaxllm.data.readers import FilePart
from jaxllm.data.sources import read_records
from jaxllm.tokenizers.trained import Tokenizer

# Part of every key: another number when the content of a unit's files changes its meaning.
_VERSION = "v3"
SPLITS = ("train", "held_out")
# Hashes that are sorted, and later compared, at once: bounds the memory.
RUN = 1 << 17

# First token in `tokens`, number of tokens, UTF-8 bytes that the targets stand for.
_DOCUMENT = [("start", "<i8"), ("size", "<u4"), ("bytes", "<u4")]
EXAMPLE = {
    "document": np.dtype(_DOCUMENT),
    # The record's file part and line, for error messages.
    "chat": np.dtype([*_DOCUMENT, ("part", "<u4"), ("line", "<u4")]),
}
# 16 bytes of a content's sha256; its example's index in the run; 1 + the index of its split in SPLITS.
KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("index", "<u4"), ("side", "u1")])


class Unit(NamedTuple):
    """A part of a source that one worker tokenizes."""

    folder: Path
    data: DataConfig
    kind: str
    source: int  # index into data.sources
    parts: tuple[FilePart, ...]
    size: int  # bytes


class Recent:
    """A bounded memory of the contents that were seen lately.

    Only the store compares all contents. Here a text that occurs a million times is dropped early, so that it is
    tokenized and sorted only a few times.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[bytes, int]] = set()

    def is_new(self, digest: bytes, side: int) -> bool:
        """Whether a content in a split was not seen lately; now it was."""
        key = (digest, side)
        if key in self._seen:
            return False
        if len(self._seen) >= RUN:
            self._seen.clear()
        self._seen.add(key)
        return True


class _Piece(NamedTuple):
    part: FilePart
    version: str  # changes with the content
    size: int  # bytes


def list_units(
    data: DataConfig, kind: str, tokenizer: Tokenizer | None, folder: Path
) -> list[Unit]:
    """The units of all sources in their order, which is the order of their examples."""
    units = []
    for index, source in enumerate(data.sources):
        settings = (
            _VERSION,
            kind,
            tokenizer and tokenizer.fingerprint,
            data.held_out_fraction,
            data.split_salt,
            _content_settings(source),
            _excluded_versions(source, folder),
        )
        for pieces in _grouped(source, folder):
            key = key_of(*settings, [_piece_key(piece, source) for piece in pieces])
            parts, _, sizes = zip(*pieces, strict=True)
            units.append(Unit(folder / f"unit-{key}", data, kind, index, parts, sum(sizes)))
    return units


def token_dtype(tokenizer: Tokenizer | None) -> np.dtype:
    """The type of token ids on disk."""
    is_small = tokenizer is None or tokenizer.vocab_size <= 1 << 16
    return np.dtype("<u2" if is_small else "<u4")


def _content_settings(source: Source) -> dict[str, Any]:
    """The settings that the examples of a source depend on, besides its files."""
    settings = dataclasses.asdict(source)
    # Files go by their content, and weights only change how often a row is used.
    settings |= {"path": "", "exclude": (), "weight": 0, "epochs": 1}
    # The format of each file is in the key of its piece. The excluded files are read by it too.
    if not source.exclude:
        settings["format"] = ""
    return settings


def _excluded_versions(source: Source, folder: Path) -> list[str]:
    versions = []
    for path in source.exclude:
        for pieces in _grouped(dataclasses.replace(source, path=path, exclude=()), folder):
            versions += [piece.version for piece in pieces]
    return versions


def _piece_key(piece: _Piece, source: Source) -> tuple[Any, ...]:
    part = piece.part
    kind = format_of(part.path, source.format)
    return piece.version, part.start, part.stop, kind, compression_of(part.path)


def _grouped(source: Source, folder: Path) -> Iterator[list[_Piece]]:
    """The pieces of each unit. A function, or a sample of a source, is one unit."""
    names = sources.files(source)
    if not names:
        yield [_Piece(FilePart(source.path), _function_version(source), 0)]
        return
    group: list[_Piece] = []
    for name in names:
        if "://" in name:
            info = remote_info(name)
        else:
            info = fingerprint_file(name, readers.PART_BYTES, folder)
        lines = info.get("lines", ())
        parts = readers.split_file(name, source.format, source.record, info["size"], lines)
        for part in parts:
            group.append(_Piece(part, info["version"], info["size"] // len(parts)))
            # A sample (max_records) is chosen among all records, so it cannot be cut.
            is_full = sum(piece.size for piece in group) >= readers.PART_BYTES // 2
            if is_full and not source.max_records:
                yield group
                group = []
    if group:
        yield group


def _function_version(source: Source) -> str:
    """The hash of all records that a function yields: only running it tells what it yields today."""
    digest = hashlib.sha256()
    plain = Source(source.path, text_field=source.text_field, replace=source.replace, min_chars=0)
    for record in read_records(plain):
        line = sources.canonical(record.fields)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
