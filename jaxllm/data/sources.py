"""Sources of text: files of lines and records, here, on object stores, or shipped inside installed packages."""

import contextlib
import dataclasses
import functools
import glob
import gzip
import hashlib
import heapq
import importlib.util
import io
import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec

from jaxllm.config import InputError, require, resolve_function
from jaxllm.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ProportionBelowOne, Threads


@dataclasses.dataclass(frozen=True)
class Source:
    """Where records come from, and how a plain text becomes fields, a conversation or a prompt."""

    path: str = ""
    """File or glob, here or on an object store (gs://, s3://), pkg://PACKAGE/path/in/package, or py://module:function."""
    weight: NonNegativeFloat = 0.0
    """Share of the rows in a mixture, relative to the other sources; 0 for all of them: by their sizes."""
    epochs: PositiveFloat = 1.0
    """Passes over this source in one over the mixture, where weights go by size."""
    record: Literal["line", "paragraph", "file"] = "line"
    """What one record of a plain text file is; paragraphs are separated by blank lines."""
    text_field: str = "text"
    """Field of JSONL, Parquet and ArrayRecord records that holds the text."""
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
    min_chars: NonNegativeInt = 1
    """Shorter texts are dropped."""
    max_chars: NonNegativeInt = 0
    """Longer texts are dropped; 0: none."""
    max_records: NonNegativeInt = 0
    """Take a sample of this many texts, those with the smallest hashes; 0: all."""

    def __post_init__(self) -> None:
        require(not self.weight or self.epochs == 1, "epochs: must be 1 where a weight is given")
        for name, pattern, replacement in [("match", self.match, ""), *(("replace", *pair) for pair in self.replace)]:
            try:
                re.compile(pattern).sub(replacement, "")  # refuses references to groups that are not there
            except (re.error, IndexError) as error:
                raise ValueError(f"{name}: {pattern!r} -> {replacement!r}: {error}") from None
        named = set(re.compile(self.match).groupindex)
        require("text" not in named, "match: a group cannot be called text, the whole text that decides the split")
        for name in ("system", "prompt", "response"):
            for field in re.findall(r"\{(\w+)\}", getattr(self, name)) if self.match else ():
                known = sorted({"text", *named})
                require(field in known, f"{name}: {{{field}}} is not a group of `match`; known: {', '.join(known)}")
        require(bool(self.prompt or not self.response), "prompt: a response template needs a prompt template")


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


class Record(NamedTuple):
    """One record: its fields, and the place it came from, for error messages."""

    fields: dict[str, Any]
    origin: str  # "path:line"


class Part(NamedTuple):
    """What can be read of a file by itself: bytes of its lines, row groups or records [start, stop); stop 0: all."""

    path: str
    start: int = 0
    stop: int = 0
    line: int = 1  # the number of its first record


PART_BYTES = 1 << 25


def read_records(source: Source, parts: Sequence[Part] | None = None) -> Iterator[Record]:
    """The records of a source (or of some parts of it), in the order of its files; texts after `replace`, filtered.

    Text becomes the field "text"; others stay. Raises InputError where something cannot be read, with its line.
    """
    excluded = _excluded(source) if source.exclude else frozenset()
    kept = (r for r in _raw_records(source, parts) if _keep(source, r, excluded))
    if not source.max_records:
        return kept
    return iter(heapq.nsmallest(source.max_records, kept, key=lambda r: _digest(canonical(r.fields))))


def canonical(fields: dict[str, Any]) -> str:
    """One spelling of a record's fields, for hashing."""
    return json.dumps(fields, sort_keys=True, default=str)


def files(source: Source) -> list[str]:
    """The files a source reads, sorted; none for a py:// source."""
    return [] if source.path.startswith("py://") else _resolve(source.path)


def format_of(path: str) -> str:
    """What is in a file, by its name: "parquet", "array_record", "jsonl", "json" or "text", compressed or not."""
    suffix = path.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    return suffix if suffix in ("parquet", "array_record", "jsonl", "json") else "text"


def split(path: str, source: Source, size: int, lines: Sequence[int]) -> list[Part]:
    """The parts of about PART_BYTES of a file of `size` bytes; lines: newlines before each multiple of PART_BYTES."""
    kind = format_of(path)
    if kind == "parquet":
        return _row_groups(path)
    if kind == "array_record":
        with _readable(path), _array_record(path) as reader:
            step = max(1, reader.num_records() * PART_BYTES // max(size, PART_BYTES))
            return [Part(path, i, i + step, i + 1) for i in range(0, reader.num_records(), step)]
    by_line = kind == "jsonl" or (kind == "text" and source.record == "line")
    if not by_line or len(lines) < 2 or path.endswith((".gz", ".zst")):
        return [Part(path)]
    return [Part(path, i * PART_BYTES, (i + 1) * PART_BYTES, 1 + n) for i, n in enumerate(lines)]


def remote_info(path: str) -> dict[str, Any]:
    """What an object store says of an object: {"size": bytes, "version": what changes with the content}."""
    fs, name = _filesystem(path)
    info = fs.info(name)
    known = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "created")
    return {"size": info["size"], "version": next((str(info[k]) for k in known if info.get(k)), "")}


def _excluded(source: Source) -> frozenset[bytes]:
    others = [dataclasses.replace(source, path=p, exclude=(), match="", max_records=0) for p in source.exclude]
    stamps = [os.stat(f).st_ctime_ns if os.path.exists(f) else 0 for other in others for f in files(other)]
    return _digests(tuple(others), tuple(stamps) or time.time_ns())


@functools.lru_cache(maxsize=4)  # the parts of a source share it
def _digests(sources: Sequence[Source], _stamps: Any) -> frozenset[bytes]:
    found = set()
    for record in (record for source in sources for record in _raw_records(source)):
        text = record.fields.get("text")
        if not isinstance(text, str):
            raise InputError(f"{record.origin}: `exclude` compares texts, and this has none; exclude files of texts")
        found.add(_digest(text))
    return frozenset(found)


def _keep(source: Source, record: Record, excluded: frozenset[bytes]) -> bool:
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


def _raw_records(source: Source, parts: Sequence[Part] | None = None) -> Iterator[Record]:
    if source.path.startswith("py://"):
        function = resolve_function(source.path.removeprefix("py://"), "data.sources: path py://")
        records = (Record(value, f"{source.path}:{n}") for n, value in enumerate(function(), start=1))
    else:
        parts = [Part(file) for file in _resolve(source.path)] if parts is None else parts
        records = (record for part in parts for record in _read_file(part, source))
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in source.replace]
    for fields, origin in records:
        if not isinstance(fields, dict):  # of a function
            raise InputError(f"{origin}: the function must yield dicts, not {type(fields).__name__}")
        record = Record(dict(fields), origin)
        text = fields.get(source.text_field)
        if isinstance(text, str):
            for pattern, replacement in patterns:
                text = pattern.sub(replacement, text)
            record.fields["text"] = text
        elif source.text_field != "text":
            record.fields.pop("text", None)  # another field was asked for
        yield record


def _resolve(path: str) -> list[str]:
    if not path:
        raise InputError("data.sources: a source needs a path")
    if path.startswith("pkg://"):
        path = _package_path(path)
    if "://" in path:
        fs, name = _filesystem(path)
        with _readable(path):
            found = sorted(fs.glob(name)) if glob.has_magic(name) else [name] if fs.exists(name) else []
            found = [str(fs.unstrip_protocol(f)) for f in found if fs.isfile(f)]
    else:
        is_glob = glob.has_magic(path) and not Path(path).exists()
        found = sorted(glob.glob(path, recursive=True)) if is_glob else [path]
        found = [f for f in found if Path(f).is_file()]
    if not found:
        raise InputError(f"{path}: no such file; give an existing one or a glob that matches one")
    return found


def _package_path(path: str) -> str:
    """Find a package's folder without importing it: its code is not run to read its data."""
    package, _, inside = path.removeprefix("pkg://").partition("/")
    spec = None
    with contextlib.suppress(ModuleNotFoundError):  # of the package above it
        spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{path}: package {package} is not installed; pip install {package} (demos: 'jaxllm[demo]')")
    root = Path(spec.submodule_search_locations[0]).resolve()
    if not (root / inside).resolve().is_relative_to(root):
        raise InputError(f"{path}: leaves the package's folder; name a file inside it")
    return str(root / inside)


def _filesystem(path: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError:
        raise InputError(f"{path}: reading it needs another package; pip install 'jaxllm[data]'") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}; give a file, gs://, s3://, pkg:// or py://") from None


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """What can go wrong with a file becomes one line with its name."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each of the packages has errors of its own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read: {reason}") from error


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The bytes of a file, decompressed, here or on an object store."""
    with contextlib.ExitStack() as stack:
        fs, name = _filesystem(path) if "://" in path else (None, path)
        file = stack.enter_context((fs.open if fs else open)(name, "rb"))
        if path.endswith(".gz"):
            file = stack.enter_context(gzip.open(file))
        elif path.endswith(".zst"):
            reader = _extra("zstandard", path).ZstdDecompressor().stream_reader(file, read_across_frames=True)
            file = stack.enter_context(io.BufferedReader(reader, 1 << 20))
        yield file


def _extra(name: str, path: str) -> Any:
    """A module of the extra [data], or an InputError that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise InputError(f"{path}: reading it needs {package}; pip install {package} or 'jaxllm[data]'") from None


def _read_file(part: Part, source: Source) -> Iterator[Record]:
    read = {"parquet": _read_parquet, "array_record": _read_array_record, "jsonl": _read_jsonl, "json": _read_json}
    with _readable(part.path):
        kind = format_of(part.path)
        yield from read[kind](part) if kind in read else _read_text(part, source.record)


def _lines(part: Part) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines that begin in a part."""
    with _opened(part.path) as file:
        number, place = part.line, part.start
        if part.start:
            file.seek(part.start - 1)
            head = file.readline()  # the end of a line that began before, or only its newline
            number, place = number + (head != b"\n"), part.start - 1 + len(head)
        for line in file:
            if part.stop and place >= part.stop:
                return
            place += len(line)
            yield number, _decoded(line, f"{part.path}:{number}")
            number += 1


def _read_text(part: Part, unit: str) -> Iterator[Record]:
    if unit == "line":
        yield from (Record({"text": text.rstrip("\r\n")}, f"{part.path}:{n}") for n, text in _lines(part))
        return
    for is_text, lines in itertools.groupby(_lines(part), lambda line: unit == "file" or bool(line[1].strip())):
        if is_text:
            numbers, texts = zip(*lines, strict=True)
            yield Record({"text": "".join(texts).strip("\r\n")}, f"{part.path}:{numbers[0]}")


def _read_jsonl(part: Part) -> Iterator[Record]:
    for number, line in _lines(part):
        if line.strip():
            yield Record(_object(line, f"{part.path}:{number}"), f"{part.path}:{number}")


def _read_json(part: Part) -> Iterator[Record]:
    with _opened(part.path) as file:
        values = json.load(file)
    if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
        raise InputError(f"{part.path}: must hold a list of objects; one object a line goes into a .jsonl file")
    yield from (Record(value, f"{part.path}:{n}") for n, value in enumerate(values, start=1))


def _decoded(value: bytes, origin: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{origin}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None


def _object(line: str, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{origin}: not valid JSON: {error}; write one object per line") from None
    if not isinstance(value, dict):
        raise InputError(f'{origin}: must be a JSON object such as {{"text": ...}}, not {type(value).__name__}')
    return value


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[Any]:
    parquet = _extra("pyarrow.parquet", path)
    with _opened(path) as file:
        yield parquet.ParquetFile(file)


def _row_groups(path: str) -> list[Part]:
    parts, row, start, size = [], 0, 0, 0
    with _readable(path), _parquet(path) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    for i, group in enumerate(groups):
        size += group.total_byte_size
        if size >= PART_BYTES or i == len(groups) - 1:
            parts.append(Part(path, start, i + 1, row + 1))
            row, start, size = row + sum(g.num_rows for g in groups[start : i + 1]), i + 1, 0
    return parts or [Part(path)]


def _read_parquet(part: Part) -> Iterator[Record]:
    with _parquet(part.path) as table:
        groups = range(part.start, part.stop or table.num_row_groups)
        rows = (row for batch in table.iter_batches(1024, [*groups]) for row in batch.to_pylist())
        yield from (Record(row, f"{part.path}:{n}") for n, row in enumerate(rows, start=part.line))


@contextlib.contextmanager
def _array_record(path: str) -> Iterator[Any]:
    """A reader of an ArrayRecord file; one on an object store is copied, for the reader wants a local file."""
    module = _extra("array_record.python.array_record_module", path)
    with tempfile.TemporaryDirectory() as folder:
        name = os.path.join(folder, "copy") if "://" in path else path
        if name != path:
            fs, there = _filesystem(path)
            fs.get(there, name)
        with contextlib.closing(module.ArrayRecordReader(name)) as reader:
            yield reader


def _read_array_record(part: Part) -> Iterator[Record]:
    """Records that are JSON objects, or else UTF-8 texts."""
    with _array_record(part.path) as reader:
        stop = min(part.stop or reader.num_records(), reader.num_records())
        for start in range(part.start, stop, 256):
            for number, value in enumerate(reader.read(start, min(start + 256, stop)), start=start + 1):
                origin = f"{part.path}:{number}"
                text = _decoded(value, origin)
                fields = _object(text, origin) if text.startswith("{") else {"text": text}
                yield Record(fields, origin)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]
