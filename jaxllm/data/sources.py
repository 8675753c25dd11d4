"""Sources of text: which files and functions records come from, and which of their records stay."""

import dataclasses
import functools
import hashlib
import heapq
import itertools
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxllm.config import InputError
from jaxllm.config.functions import resolve_function
from jaxllm.data.config import Source
from jaxllm.data.files import resolve
from jaxllm.data.readers import FilePart, read_part
from jaxllm.data.records import Record, check_unicode, present


def read_records(source: Source, parts: Sequence[FilePart] | None = None) -> Iterator[Record]:
    """The records of a source (or of some parts of it), in the order of its files, after `replace` and the filters.

    The text becomes the field "text"; other fields stay, except those that are null.

    Raises:
        InputError: something cannot be read, with its line.
    """
    kept = keep(source, raw_records(source, parts))
    if not source.max_records:
        return kept
    # The smallest hashes are a random sample that does not depend on the order of the records.
    by_hash = lambda record: digest(canonical(record.fields))
    return iter(heapq.nsmallest(source.max_records, kept, key=by_hash))


def keep(source: Source, records: Iterable[Record]) -> Iterator[Record]:
    """The records that the filters of a source do not drop."""
    # Read once for all parts of a source.
    excluded = excluded_digests(source)
    return (record for record in records if not dropped(source, record, excluded))


def canonical(fields: dict[str, Any]) -> str:
    """One spelling of a record's fields, for hashing."""
    return json.dumps(fields, sort_keys=True, default=str)


def files(source: Source) -> list[str]:
    """The files a source reads, sorted; none for a py:// source."""
    return [] if source.path.startswith("py://") else resolve(source.path)


def digest(text: str) -> bytes:
    """16 bytes of a text's sha256."""
    # 16 bytes: among 10^12 texts two equal digests have a probability of 10^-15.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def excluded_digests(source: Source) -> frozenset[bytes]:
    """The digests of the texts in the files that a source excludes."""
    if not source.exclude:
        return frozenset()
    others = []
    stamps = []
    for path in source.exclude:
        other = dataclasses.replace(source, path=path, exclude=(), match="", max_records=0)
        others.append(other)
        # Of a remote file nothing tells cheaply whether it has changed: 0.
        stamps += [os.stat(f).st_ctime_ns if os.path.exists(f) else 0 for f in files(other)]
    # A function has no files: the time makes the key of each call different.
    return _digests(tuple(others), tuple(stamps) or time.time_ns())


@functools.lru_cache(maxsize=4)  # the parts of a source share it
def _digests(sources: Sequence[Source], _stamps: Any) -> frozenset[bytes]:
    digests = set()
    for source in sources:
        for record in raw_records(source):
            text = record.fields.get("text")
            if not isinstance(text, str):
                raise InputError(
                    f"{record.origin}: `exclude` compares texts, and this record has none; exclude "
                    "files of texts"
                )
            digests.add(digest(text))
    return frozenset(digests)


def dropped(source: Source, record: Record, excluded: frozenset[bytes]) -> str:
    """Why a record is dropped; "" if it stays, with the groups of `match` added to its fields."""
    text = record.fields.get("text")
    if not isinstance(text, str):
        return ""
    # Cheap tests first: most texts that are dropped are empty lines.
    if len(text.strip()) < source.min_chars:
        return f"shorter than min_chars {source.min_chars}"
    if source.max_chars and len(text) > source.max_chars:
        return f"longer than max_chars {source.max_chars}"
    if excluded and digest(text) in excluded:
        return "in a file of `exclude`"
    if source.match:
        match = re.search(source.match, text)
        if not match:
            return "without a match"
        groups = match.groupdict()
        # A group that took no part in the match gives no field.
        record.fields.update({name: groups[name] for name in groups if groups[name] is not None})
    return ""


def raw_records(source: Source, parts: Sequence[FilePart] | None = None) -> Iterator[Record]:
    """All records of a source, before any is dropped."""
    if source.path.startswith("py://"):
        records = _function_records(source.path)
    else:
        if parts is None:
            parts = list(map(FilePart, resolve(source.path)))
        read = lambda part: read_part(part, source.format, source.record)
        records = itertools.chain.from_iterable(map(read, parts))
    return with_text(source, records)


def with_text(source: Source, records: Iterable[Record]) -> Iterator[Record]:
    """The records with their text in the field "text", after the replacements of the source."""
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in source.replace]
    for record in records:
        text = record.fields.get(source.text_field)
        if isinstance(text, str):
            # In the order of the config: a later pattern sees what an earlier one wrote.
            for pattern, replacement in patterns:
                text = pattern.sub(replacement, text)
            record.fields["text"] = text
        elif source.text_field != "text":
            # Another field was asked for, so the one called "text" is not the text.
            record.fields.pop("text", None)
            if source.text_field in record.empty:
                record = record._replace(empty=record.empty | {"text"})
        yield record


def _function_records(path: str) -> Iterator[Record]:
    """The records that a function yields, checked like those of a file."""
    function = resolve_function(path.removeprefix("py://"), "data.sources: path py://")
    for number, fields in enumerate(function(), start=1):
        origin = f"{path}:{number}"
        if not isinstance(fields, dict):
            raise InputError(
                f"{origin}: the function must yield dicts, not {type(fields).__name__}"
            )
        try:
            text = json.dumps(fields, ensure_ascii=False, sort_keys=True, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(
                f"{origin}: has no spelling in JSON ({reason}); yield texts, numbers and lists"
            ) from None
        # The spelling is only for these checks; the record keeps its values.
        check_unicode(text, origin)
        yield present(dict(fields), origin)
