"""Sources of text: which files and functions records come from, and which of their records stay."""

import dataclasses
import functools
import hashlib
import heapq
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
from jaxllm.data.readers import Part, read_part
from jaxllm.data.records import Record, check_unicode, present


@dataclasses.dataclass(frozen=True)
class Source:
    """Where records come from, and how a plain text becomes fields, a conversation or a prompt."""

    path: FunctionName = ""
    """File or glob, here (~ is the home folder) or on an object store (gs://, s3://), pkg://PACKAGE/path/in/package, or py://module:function."""
    weight: NonNegativeFloat = 0.0
    """Share of the rows in a mixture, relative to the other sources; 0 (then for every source): weight sources by size."""
    epochs: PositiveFloat = 1.0
    """Passes over this source in one over the mixture, where weights go by size."""
    format: Format = "auto"
    """What the files hold, compressed (.gz, .zst, .bz2, .xz) or not; auto: by their names in any case. .jsonl, .ndjson:
    an object a line; .json: a list of objects; .csv, .tsv: a table whose first line names the columns; .parquet;
    .array_record; everything else is text, but JSON or a table under a suffix that is not known is refused."""
    record: Literal["line", "paragraph", "file"] = "line"
    """What one record of a plain text file is; paragraphs are separated by blank lines."""
    text_field: str = "text"
    """Field of the records that holds the text, where the files are no plain text."""
    replace: tuple[tuple[str, str], ...] = ()
    """Regular expressions and their replacements, applied to the text in order."""
    match: str = ""
    """Regular expression: texts without a match are dropped, its named groups become fields for the templates."""
    system: str = ""
    """Template of the system message, with {field} placeholders; {text} is the whole text, a field that is null is empty."""
    prompt: str = ""
    """Template of the user's message."""
    response: str = ""
    """Template of the assistant's message."""
    exclude: tuple[str, ...] = ()
    """Files whose texts are dropped from this source."""
    min_chars: NonNegativeInt = 1
    """Shorter texts are dropped."""
    max_chars: NonNegativeInt = 0
    """Longer texts are dropped; 0: none."""
    max_records: NonNegativeInt = 0
    """Take a sample of this many texts, those with the smallest hashes; 0: all."""

    def __post_init__(self) -> None:
        require(not self.weight or self.epochs == 1, "epochs: must be 1 where a weight is given")
        for name, pattern, replacement in [
            ("match", self.match, ""),
            *(("replace", *pair) for pair in self.replace),
        ]:
            try:
                re.compile(pattern).sub(
                    replacement, ""
                )  # refuses references to groups that are not there
            except (re.error, IndexError) as error:
                raise ValueError(f"{name}: {pattern!r} -> {replacement!r}: {error}") from None
        named = set(re.compile(self.match).groupindex)
        require(
            "text" not in named,
            "match: a group cannot be called text, the whole text that decides the split",
        )
        for name in ("system", "prompt", "response"):
            for field in re.findall(r"\{(\w+)\}", getattr(self, name)) if self.match else ():
                known = sorted({"text", *named})
                require(
                    field in known,
                    f"{name}: {{{field}}} is not a group of `match`; known: {', '.join(known)}",
                )
        require(
            bool(self.prompt or not self.response),
            "prompt: a response template needs a prompt template",
        )


@dataclasses.dataclass(frozen=True)
class Phase:
    """Other weights from a step on."""

    step: PositiveInt = 1
    """The first step that draws by them."""
    weights: tuple[NonNegativeFloat, ...] = ()
    """One for each source, in their order; 0 rests a source."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources, the held-out share, and what happens to examples that do not fit."""

    sources: tuple[Source, ...] = ()
    """Where the records come from."""
    curriculum: tuple[Phase, ...] = ()
    """Changes of the weights during training; each source goes on where it was."""
    workers: Threads = 1
    """Threads that prepare batches ahead of the step; 0: none, the loop waits for each batch."""
    held_out_fraction: ProportionBelowOne = 0.05
    """Share of the contents held out, chosen by their hash."""
    split_salt: str = ""
    """Another salt is another split; stages that share texts need the same."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What happens to a conversation or prompt longer than fits (documents are split)."""

    def __post_init__(self) -> None:
        weighted = {source.weight > 0 for source in self.sources}
        require(len(weighted) <= 1, "sources: give every source a weight, or none")
        steps = [0, *(phase.step for phase in self.curriculum)]
        require(steps == sorted(set(steps)), "curriculum: steps must be positive and rise")
        for phase in self.curriculum:
            fit = len(phase.weights) == len(self.sources) and any(phase.weights)
            require(
                fit,
                f"curriculum: step {phase.step} needs a weight for each of {len(self.sources)} sources, one above 0",
            )


def read_records(source: Source, parts: Sequence[Part] | None = None) -> Iterator[Record]:
    """The records of a source (or of some parts of it), in the order of its files; texts after `replace`, filtered.

    Text becomes the field "text"; others stay, but those that are null. Raises InputError where something cannot be
    read, with its line.
    """
    excluded = excluded_digests(source)
    kept = (
        record for record in raw_records(source, parts) if not dropped(source, record, excluded)
    )
    if not source.max_records:
        return kept
    return iter(
        heapq.nsmallest(source.max_records, kept, key=lambda r: digest(canonical(r.fields)))
    )


def canonical(fields: dict[str, Any]) -> str:
    """One spelling of a record's fields, for hashing."""
    return json.dumps(fields, sort_keys=True, default=str)


def files(source: Source) -> list[str]:
    """The files a source reads, sorted; none for a py:// source."""
    return [] if source.path.startswith("py://") else resolve(source.path)


def digest(text: str) -> bytes:
    """16 bytes of a text's sha256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def excluded_digests(source: Source) -> frozenset[bytes]:
    """Those of the texts in the files that a source excludes."""
    if not source.exclude:
        return frozenset()
    others = [
        dataclasses.replace(source, path=p, exclude=(), match="", max_records=0)
        for p in source.exclude
    ]
    stamps = [
        os.stat(f).st_ctime_ns if os.path.exists(f) else 0 for other in others for f in files(other)
    ]
    return _digests(tuple(others), tuple(stamps) or time.time_ns())


@functools.lru_cache(maxsize=4)  # the parts of a source share it
def _digests(sources: Sequence[Source], _stamps: Any) -> frozenset[bytes]:
    found = set()
    for record in (record for source in sources for record in raw_records(source)):
        text = record.fields.get("text")
        if not isinstance(text, str):
            raise InputError(
                f"{record.origin}: `exclude` compares texts, and this has none; exclude files of texts"
            )
        found.add(digest(text))
    return frozenset(found)


def dropped(source: Source, record: Record, excluded: frozenset[bytes]) -> str:
    """Why a record is dropped; "" where it stays, with the groups of `match` among its fields."""
    text = record.fields.get("text")
    if not isinstance(text, str):
        return ""
    if len(text.strip()) < source.min_chars:
        return f"shorter than min_chars {source.min_chars}"
    if source.max_chars and len(text) > source.max_chars:
        return f"longer than max_chars {source.max_chars}"
    if excluded and digest(text) in excluded:
        return "in a file of `exclude`"
    if source.match:
        if not (found := re.search(source.match, text)):
            return "without a match"
        record.fields.update({k: v for k, v in found.groupdict().items() if v is not None})
    return ""


def raw_records(source: Source, parts: Sequence[Part] | None = None) -> Iterator[Record]:
    """All records of a source, before any is dropped."""
    if source.path.startswith("py://"):
        records = _of_function(source.path)
    else:
        parts = [Part(file) for file in resolve(source.path)] if parts is None else parts
        records = (
            record for part in parts for record in read_part(part, source.format, source.record)
        )
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in source.replace]
    for record in records:
        text = record.fields.get(source.text_field)
        if isinstance(text, str):
            for pattern, replacement in patterns:
                text = pattern.sub(replacement, text)
            record.fields["text"] = text
        elif source.text_field != "text":
            record.fields.pop("text", None)  # another field was asked for
            if source.text_field in record.empty:
                record = record._replace(empty=record.empty | {"text"})
        yield record


def _of_function(path: str) -> Iterator[Record]:
    """The records that a function yields, checked as those of a file are."""
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
        check_unicode(text, origin)
        yield present(dict(fields), origin)
