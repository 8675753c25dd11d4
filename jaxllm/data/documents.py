"""Documents from lines of text or of JSON, many at a time.

Tokenizing a short text takes a few microseconds. So would each Python object and call that accompany it: what is
done here to all lines of a block at once is what `read_records` and `assign_splits` do to one record after another.

A block in which anything is unusual (a line that is not UTF-8 or not an object, a record that names its split) goes
through those functions, which also say what is wrong with a line. So their rules are the only rules.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxllm.data.config import DataConfig, Source
from jaxllm.data.file_formats import format_of
from jaxllm.data.format import assign_splits, document_content, is_held_out
from jaxllm.data.readers import Block, is_by_line, read_blocks
from jaxllm.data.records import Record, parse_lines
from jaxllm.data.sources import digest, excluded_digests, keep, read_records, with_text
from jaxllm.data.units import SPLITS, Recent, Unit

# Documents of other files come one by one; so many of them are a batch.
_BATCH = 1024


class Documents(NamedTuple):
    """Some documents of a unit, in the order of its records."""

    texts: list[str]
    digests: list[bytes]
    """16 bytes of the hash of each content."""
    sides: list[int]
    """1 + the index of each one's split in SPLITS."""


def distinct_documents(unit: Unit) -> Iterator[Documents]:
    """The documents of a unit, without repetitions that are near each other (see `Recent`)."""
    recent = Recent()
    for batch in _all_documents(unit):
        texts: list[str] = []
        digests: list[bytes] = []
        sides: list[int] = []
        for text, content, side in zip(*batch, strict=True):
            if recent.is_new(content, side):
                texts.append(text)
                digests.append(content)
                sides.append(side)
        if texts:
            yield Documents(texts, digests, sides)


def _all_documents(unit: Unit) -> Iterator[Documents]:
    data = unit.data
    source = data.sources[unit.source]
    if not _is_simple(unit):
        yield from _one_by_one(unit, read_records(source, unit.parts))
        return
    excluded = excluded_digests(source)
    for part in unit.parts:
        for block in read_blocks(part, source.format):
            texts = _texts(block, source)
            if texts is None:
                records = with_text(source, block.records(source.format))
                yield from _one_by_one(unit, keep(source, records))
            else:
                texts = _kept(texts, source, excluded)
                yield Documents(texts, list(map(_content_digest, texts)), _sides(texts, data))


def _is_simple(unit: Unit) -> bool:
    """Whether lines of a unit are records that no setting needs as a whole: for their fields, or to choose among them."""
    source = unit.data.sources[unit.source]
    if source.path.startswith("py://") or source.match or source.max_records:
        return False
    return all(is_by_line(part.path, source.format, source.record) for part in unit.parts)


def _one_by_one(unit: Unit, records: Iterator[Record]) -> Iterator[Documents]:
    batch = Documents([], [], [])
    for example, split in assign_splits(unit.data, "document", unit.source, records):
        # A document is always in one of the splits; conversations may be in neither.
        assert split is not None
        batch.texts.append(example.text)
        batch.digests.append(_content_digest(example.text))
        batch.sides.append(1 + SPLITS.index(split))
        if len(batch.texts) == _BATCH:
            yield batch
            batch = Documents([], [], [])
    if batch.texts:
        yield batch


def _texts(block: Block, source: Source) -> list[str] | None:
    """The texts of the records in a block, one for each; None if one of them needs to be looked at."""
    joined = b"".join(block.lines)
    if 0 in joined:
        return None
    try:
        text = joined.decode()
    except UnicodeDecodeError:
        return None
    lines = text.removesuffix("\n").split("\n")
    if format_of(block.path, source.format) == "text":
        # Another field was asked for than the one that a line of text has.
        if source.text_field != "text":
            return None
        return [line.rstrip("\r") for line in lines] if "\r" in text else lines
    return _json_texts(lines, text, source)


def _json_texts(lines: list[str], text: str, source: Source) -> list[str] | None:
    objects = parse_lines(lines, text)
    if objects is None:
        return None
    texts = []
    for fields in objects:
        value = fields.get(source.text_field)
        # A record without a text is an error, and one with a split goes where it says.
        if type(value) is not str or "split" in fields:
            return None
        texts.append(value)
    return texts


def _kept(texts: list[str], source: Source, excluded: frozenset[bytes]) -> list[str]:
    """The texts after the replacements of the source, without those that it drops."""
    for pattern, replacement in source.replace:
        substitute = re.compile(pattern).sub
        texts = [substitute(replacement, text) for text in texts]
    texts = [text for text in texts if len(text.strip()) >= source.min_chars]
    if source.max_chars:
        texts = [text for text in texts if len(text) <= source.max_chars]
    if excluded:
        texts = [text for text in texts if digest(text) not in excluded]
    return texts


def _content_digest(text: str) -> bytes:
    return digest(document_content(text))


def _sides(texts: list[str], data: DataConfig) -> list[int]:
    """1 + the index in SPLITS of each text's split."""
    train = 1 + SPLITS.index("train")
    held_out = 1 + SPLITS.index("held_out")
    fraction = data.held_out_fraction
    salt = data.split_salt
    return [held_out if is_held_out(text, fraction, salt) else train for text in texts]
