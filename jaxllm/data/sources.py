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
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from jaxllm.config import InputError, require
from jaxllm.config.functions import FunctionName, resolve_function
from jaxllm.config.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ProportionBelowOne,
    Threads,
)
from jaxllm.data.file_formats import Format
from jaxllm.data.files import resolve
from jaxllm.data.readers import FilePart, read_part
from jaxllm.data.records import Record, check_unicode, present


@dataclasses.dataclass(frozen=True)
class Source:
    """Where records come from, and how a plain text becomes fields, a conversation or a prompt."""

    path: FunctionName = ""
    """File or glob, on this machine (~ is the home folder) or on an object store (gs://, s3://); pkg://PACKAGE/path/in/package;
    or py://module:function."""
    weight: NonNegativeFloat = 0.0
    """Share of the rows in a mixture, relative to the other sources; 0 (then for every source): weight sources by size."""
    epochs: PositiveFloat = 1.0
    """Passes over this source in one pass over the mixture, if sources are weighted by size."""
    format: Format = "auto"
    """Format of the files, compressed (.gz, .zst, .bz2, .xz) or not. auto: by their suffixes, in any case. .jsonl, .ndjson:
    one object per line; .json: a list of objects; .csv, .tsv: a table whose first line names the columns; .parquet;
    .array_record; everything else is text, but JSON or a table under an unknown suffix is refused."""
    record: Literal["line", "paragraph", "file"] = "line"
    """What one record of a plain text file is; paragraphs are separated by blank lines."""
    text_field: str = "text"
    """Field of the records that holds the text, if the files are not plain text."""
    replace: tuple[tuple[str, str], ...] = ()
    """Regular expressions and their replacements, applied to the text in order."""
    match: str = ""
    """Regular expression: texts without a match are dropped, and its named groups become fields for the templates."""
    system: str = ""
    """Template of the system message, with {field} placeholders; {text} is the whole text, and a field that is null is empty."""
    prompt: str = ""
    """Template of the user's message."""
    response: str = ""
    """Template of the assistant's message."""
    exclude: tuple[str, ...] = ()
    """Files whose texts are dropped from this source."""
    min_chars: NonNegativeInt = 1
    """Shorter texts are dropped."""
    max_chars: NonNegativeInt = 0
    """Longer texts are dropped; 0: no limit."""
    max_records: NonNegativeInt = 0
    """Take a sample of this many texts, those with the smallest hashes; 0: take all."""

    def __post_init__(self) -> None:
        # Epochs say how often rows are used when weights follow from sizes; a weight says it directly.
        require(not self.weight or self.epochs == 1, "epochs: must be 1 if a weight is given")
        _check_pattern("match", self.match, "")
        for pattern, replacement in self.replace:
            _check_pattern("replace", pattern, replacement)
        # With `match`, the fields of a template are known before any file is read.
        groups = re.compile(self.match).groupindex
        require(
            "text" not in groups,
            "match: a group cannot be called text, the whole text that decides the split",
        )
        if self.match:
            for name in ("system", "prompt", "response"):
                _check_template(name, getattr(self, name), {"text", *groups})
        require(
            bool(self.prompt or not self.response),
            "prompt: a response template needs a prompt template",
        )


def _check_pattern(field: str, pattern: str, replacement: str) -> None:
    try:
        # Applied once, which refuses references to groups that do not exist.
        re.compile(pattern).sub(replacement, "")
    except (re.error, IndexError) as error:
        raise ValueError(f"{field}: {pattern!r} -> {replacement!r}: {error}") from None


def _check_template(field: str, template: str, known: set[str]) -> None:
    for name in re.findall(r"\{(\w+)\}", template):
        names = ", ".join(sorted(known))
        require(name in known, f"{field}: {{{name}}} is not a group of `match`; known: {names}")


@dataclasses.dataclass(frozen=True)
class Phase:
    """Other weights from some step on."""

    step: PositiveInt = 1
    """The first step that uses these weights."""
    weights: tuple[NonNegativeFloat, ...] = ()
    """One for each source, in their order; 0 leaves a source out."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources, the held-out share, and what happens to examples that do not fit."""

    sources: tuple[Source, ...] = ()
    """Where the records come from."""
    curriculum: tuple[Phase, ...] = ()
    """Changes of the weights during training; each source continues at the row where it was."""
    workers: Threads = 1
    """Threads that prepare batches ahead of the step; 0: none, so that the loop waits for each batch."""
    held_out_fraction: ProportionBelowOne = 0.05
    """Share of the contents that is held out, chosen by their hashes."""
    split_salt: str = ""
    """Another salt gives another split; stages that share texts need the same one."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What to do with a conversation or prompt that is too long (documents are split)."""

    def __post_init__(self) -> None:
        # A weight of 0 would be read as "by size" next to weights that are shares.
        weighted = {source.weight > 0 for source in self.sources}
        require(len(weighted) <= 1, "sources: give every source a weight, or none")
        # From 0, where the weights of the sources themselves apply.
        steps = [0, *(phase.step for phase in self.curriculum)]
        require(steps == sorted(set(steps)), "curriculum: steps must be positive and rise")
        for phase in self.curriculum:
            require(
                len(phase.weights) == len(self.sources) and any(phase.weights),
                f"curriculum: step {phase.step} needs a weight for each of {len(self.sources)} "
                "sources, one above 0",
            )


def read_records(source: Source, parts: Sequence[FilePart] | None = None) -> Iterator[Record]:
    """The records of a source (or of some parts of it), in the order of its files, after `replace` and the filters.

    The text becomes the field "text"; other fields stay, except those that are null.

    Raises:
        InputError: something cannot be read, with its line.
    """
    # Read once for all parts of a source.
    excluded = excluded_digests(source)
    kept = (
        record for record in raw_records(source, parts) if not dropped(source, record, excluded)
    )
    if not source.max_records:
        return kept
    # The smallest hashes are a random sample that does not depend on the order of the records.
    by_hash = lambda record: digest(canonical(record.fields))
    return iter(heapq.nsmallest(source.max_records, kept, key=by_hash))


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
