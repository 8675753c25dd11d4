"""Sources of text: files of lines, JSON and Parquet records, and data shipped inside installed packages."""

import dataclasses
import functools
import glob
import hashlib
import heapq
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxllm.config import InputError, resolve_function


@dataclasses.dataclass(frozen=True)
class Source:
    """Where records come from, and how a plain text becomes fields, a conversation or a prompt."""

    path: str = ""
    """File, glob, pkg://PACKAGE/path/in/package, or py://module:function (a function yielding records)."""
    weight: float = 0.0
    """Share of the rows in a mixture, relative to the other sources; 0 for all of them: by their sizes."""
    record: Literal["line", "paragraph", "file"] = "line"
    """What one record of a plain text file is; paragraphs are separated by blank lines."""
    text_field: str = "text"
    """Field of JSONL and Parquet records that holds the text."""
    replace: tuple[tuple[str, str], ...] = ()
    """Regular expressions and their replacements, applied to the text in order."""
    match: str = ""
    """Regular expression: texts without a match are dropped, its named groups become fields for the templates."""
    system: str = ""
    """Template of the system message, with {field} placeholders; {text} is the whole text."""
    prompt: str = ""
    """Template of the user's message."""
    response: str = ""
    """Template of the assistant's message."""
    exclude: tuple[str, ...] = ()
    """Files whose texts are dropped from this source."""
    min_chars: int = 1
    """Shorter texts are dropped."""
    max_chars: int = 0
    """Longer texts are dropped; 0: none."""
    max_records: int = 0
    """Take a sample of this many texts, those with the smallest hashes; 0: all."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError("weight: must not be negative")
        groups: set[str] = {"text"}
        for name, pattern, replacement in [("match", self.match, ""), *(("replace", p, r) for p, r in self.replace)]:
            try:
                compiled = re.compile(pattern)
                compiled.sub(replacement, "")  # refuses references to groups that are not there
            except (re.error, IndexError) as error:
                wrong = f"{pattern!r} with replacement {replacement!r}" if name == "replace" else repr(pattern)
                raise ValueError(f"{name}: {wrong} is not a valid regular expression: {error}") from None
            if name == "match" and "text" in compiled.groupindex:
                raise ValueError("match: a group cannot be called text, the whole text that decides the split")
            groups |= set(compiled.groupindex) if name == "match" else set()
        for name in ("system", "prompt", "response"):
            wanted = {field for field in re.findall(r"\{(\w+)\}", getattr(self, name))}
            if self.match and (unknown := wanted - groups):
                raise ValueError(
                    f"{name}: {{{unknown.pop()}}} is not a group of `match`; known: {', '.join(sorted(groups))}"
                )
        if self.response and not self.prompt:
            raise ValueError("prompt: a response template needs a prompt template")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources, the held-out share, and what happens to examples that do not fit."""

    sources: tuple[Source, ...] = ()
    """Where the records come from."""
    held_out_fraction: float = 0.05
    """Share of the contents held out, chosen by their hash."""
    split_salt: str = ""
    """Another salt is another split; stages that share texts need the same."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What happens to a conversation or prompt longer than fits (documents are split)."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError("held_out_fraction: must be at least 0 and below 1")
        if len({source.weight > 0 for source in self.sources}) > 1:
            raise ValueError("sources: give every source a weight, or none")


class Record(NamedTuple):
    """One record: its fields, and the place it came from, for error messages."""

    fields: dict[str, Any]
    origin: str  # "path:line"


def read_records(source: Source) -> Iterator[Record]:
    """The records of a source, in the order of its files; texts after `replace`, filters applied.

    A text record has the field "text"; JSON records keep all their fields. Raises InputError: nothing at the
    path, an unreadable or malformed record (with its line), a function that is not there.
    """
    excluded = {_digest(text) for path in source.exclude for text in _excluded(source, path)}
    kept = (r for r in _raw_records(source) if _keep(source, r, excluded))
    if not source.max_records:
        return kept
    return iter(heapq.nsmallest(source.max_records, kept, key=lambda r: _digest(canonical(r.fields))))


def canonical(fields: dict[str, Any]) -> str:
    """One spelling of a record's fields, for hashing; Parquet values that JSON lacks are spelled by str."""
    return json.dumps(fields, sort_keys=True, default=str)


def files(source: Source) -> list[str]:
    """The files a source reads, sorted; none for a py:// source."""
    return [] if source.path.startswith("py://") else _resolve(source.path)


def _excluded(source: Source, path: str) -> Iterator[str]:
    for record in _raw_records(dataclasses.replace(source, path=path, exclude=(), match="", max_records=0)):
        text = record.fields.get("text")
        if not isinstance(text, str):
            raise InputError(f"{record.origin}: `exclude` compares texts, and this has none; exclude files of texts")
        yield text


def _keep(source: Source, record: Record, excluded: set[bytes]) -> bool:
    text = record.fields.get("text")
    if not isinstance(text, str):
        return True
    if len(text.strip()) < source.min_chars or (source.max_chars and len(text) > source.max_chars):
        return False
    if excluded and _digest(text) in excluded:
        return False
    if source.match:
        if not (found := re.search(source.match, text)):
            return False
        record.fields.update({k: v for k, v in found.groupdict().items() if v is not None})
    return True


def _raw_records(source: Source) -> Iterator[Record]:
    if source.path.startswith("py://"):
        function = resolve_function(source.path.removeprefix("py://"), "data.sources: path py://")
        _announce(source.path)
        records = (_function_record(r, f"{source.path}:{n}") for n, r in enumerate(function(), start=1))
    else:
        records = (record for file in _resolve(source.path) for record in _read_file(file, source))
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in source.replace]
    for record in records:
        text = record.fields.get(source.text_field)
        if isinstance(text, str):
            for pattern, replacement in patterns:
                text = pattern.sub(replacement, text)
            record.fields["text"] = text
        elif source.text_field != "text":
            record.fields.pop("text", None)  # another field was asked for
        yield record


@functools.cache
def _announce(path: str) -> None:
    """Say once that a config makes code run."""
    print(f"data: running {path} to read its records", file=sys.stderr, flush=True)


def _function_record(value: Any, origin: str) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{origin}: the function must yield dicts, not {type(value).__name__}")
    return Record(dict(value), origin)


def _resolve(path: str) -> list[str]:
    if not path:
        raise InputError("data.sources: a source needs a path")
    if path.startswith("pkg://"):
        path = _package_path(path)
    found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not Path(path).exists() else [path]
    found = [f for f in found if Path(f).is_file()]
    if not found:
        raise InputError(f"{path}: no such file; give an existing file or a glob that matches one")
    return found


def _package_path(path: str) -> str:
    """Find a package's folder without importing it: its code is not run to read its data."""
    package, _, inside = path.removeprefix("pkg://").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of the package above it
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{path}: package {package} is not installed; pip install {package} (demos: 'jaxllm[demo]')")
    root = Path(spec.submodule_search_locations[0]).resolve()
    if not (root / inside).resolve().is_relative_to(root):
        raise InputError(f"{path}: leaves the package's folder; name a file inside it")
    return str(root / inside)


def _read_file(file: str, source: Source) -> Iterator[Record]:
    try:
        if file.endswith(".parquet"):
            yield from _read_parquet(file)
        elif file.endswith(".jsonl"):
            yield from _read_jsonl(file)
        elif file.endswith(".json"):
            yield from _read_json(file)
        else:
            yield from _read_text(file, source.record)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None


def _lines(file: str) -> Iterator[tuple[int, str]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{file}:{number}: not UTF-8 ({error.reason} at byte {error.start}); convert the file"
                ) from None


def _read_text(file: str, unit: str) -> Iterator[Record]:
    if unit == "line":
        yield from (Record({"text": text.rstrip("\r\n")}, f"{file}:{n}") for n, text in _lines(file))
        return
    block: list[str] = []
    first = 1
    for number, text in _lines(file):
        if unit == "paragraph" and not text.strip():
            if block:
                yield Record({"text": "".join(block).strip("\r\n")}, f"{file}:{first}")
            block = []
            continue
        first = first if block else number
        block.append(text)
    if block:
        yield Record({"text": "".join(block).strip("\r\n")}, f"{file}:{first}")


def _read_jsonl(file: str) -> Iterator[Record]:
    for number, line in _lines(file):
        if line.strip():
            yield Record(_object(line, f"{file}:{number}"), f"{file}:{number}")


def _read_json(file: str) -> Iterator[Record]:
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
        raise InputError(f"{file}: must hold a list of objects; one object a line goes into a .jsonl file")
    yield from (Record(v, f"{file}:{n}") for n, v in enumerate(values, start=1))


def _object(line: str, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{origin}: not valid JSON: {error}; write one object per line") from None
    if not isinstance(value, dict):
        raise InputError(f'{origin}: must be a JSON object such as {{"text": ...}}, not {type(value).__name__}')
    return value


def _read_parquet(file: str) -> Iterator[Record]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"{file}: reading Parquet needs pyarrow; pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(file)
    except ValueError as error:
        raise InputError(f"{file}: not a Parquet file: {error}") from None
    number = 0
    for batch in table.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield Record(row, f"{file}:{number}")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]
