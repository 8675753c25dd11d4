"""Files -> records, format by format; and the parts of large files that can be read by themselves."""

import contextlib
import csv
import itertools
import json
import os
import tempfile
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

from jaxllm.config import InputError
from jaxllm.data.file_formats import Format, check_head, check_is_text, format_of
from jaxllm.data.files import compression_of, extra, filesystem, opened, readable
from jaxllm.data.records import Record, decoded, parse, parse_object, present

PART_BYTES = 1 << 25
_BOM = b"\xef\xbb\xbf"


class Part(NamedTuple):
    """What can be read of a file by itself: bytes of its lines, row groups or records [start, stop); stop 0: all."""

    path: str
    start: int = 0
    stop: int = 0
    line: int = 1  # the number of its first record


def split(path: str, given: Format, unit: str, size: int, lines: Sequence[int]) -> list[Part]:
    """The parts of about PART_BYTES of a file of `size` bytes; lines: newlines before each multiple of PART_BYTES.

    given: the format that the source says; unit: what one record of a plain text is. Only where each line is a record
    of its own can a file be cut between lines: not in quoted cells, nor in a list of objects.
    """
    kind = format_of(path, given)
    if kind == "parquet":
        return _row_groups(path)
    if kind == "array_record":
        with readable(path), _array_record(path) as reader:
            step = max(1, reader.num_records() * PART_BYTES // max(size, PART_BYTES))
            return [Part(path, i, i + step, i + 1) for i in range(0, reader.num_records(), step)]
    by_line = kind == "jsonl" or (kind == "text" and unit == "line")
    if not by_line or len(lines) < 2 or compression_of(path):
        return [Part(path)]
    return [Part(path, i * PART_BYTES, (i + 1) * PART_BYTES, 1 + n) for i, n in enumerate(lines)]


def read_part(part: Part, given: Format, unit: str) -> Iterator[Record]:
    """The records of a part of a file. Raises InputError where something cannot be read, with its line."""
    kind = format_of(part.path, given)
    if kind == "text" and given == "auto" and not part.start:
        check_is_text(part.path)
    with readable(part.path):
        yield from _read_text(part, unit) if kind == "text" else _READERS[kind](part)


def _lines(part: Part) -> Generator[tuple[str, str]]:
    """("path:number", line) of the lines that begin in a part; a byte order mark is no part of the first."""
    with opened(part.path) as file:
        number, place = part.line, part.start
        if part.start:
            file.seek(part.start - 1)
            head = file.readline()  # the end of a line that began before, or only its newline
            number, place = number + (head != b"\n"), part.start - 1 + len(head)
        for line in file:
            if part.stop and place >= part.stop:
                return
            text = line
            if not place:
                check_head(line, part.path)
                text = line.removeprefix(_BOM)
            place += len(line)
            origin = f"{part.path}:{number}"
            yield origin, decoded(text, origin)
            number += 1


def _read_text(part: Part, unit: str) -> Iterator[Record]:
    if unit == "line":
        yield from (Record({"text": text.rstrip("\r\n")}, origin) for origin, text in _lines(part))
        return
    for is_text, lines in itertools.groupby(
        _lines(part), lambda line: unit == "file" or bool(line[1].strip())
    ):
        if is_text:
            origins, texts = zip(*lines, strict=True)
            yield Record({"text": "".join(texts).strip("\r\n")}, origins[0])


def _read_jsonl(part: Part) -> Iterator[Record]:
    for origin, line in _lines(part):
        if line.strip():
            yield present(parse_object(line, origin), origin)


def _read_json(part: Part) -> Iterator[Record]:
    """A list of objects, each with its number; or one object a line, as some name .json what is JSONL."""
    if _is_jsonl(part):
        yield from _read_jsonl(part)
        return
    values = parse(
        "".join(text for _, text in _lines(part)),
        part.path,
        "write a list of objects, or one a line",
    )
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise InputError(f"{part.path}: must hold a list of objects, or one object a line")
    yield from (present(value, f"{part.path}:{n}") for n, value in enumerate(values, start=1))


def _is_jsonl(part: Part) -> bool:
    """Whether the first line that is not blank is a whole JSON object."""
    with contextlib.closing(_lines(part)) as lines:
        first = next((text for _, text in lines if text.strip()), "")
    try:
        return first.lstrip().startswith("{") and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(part: Part) -> Iterator[Record]:
    return _read_table(part, ",")


def _read_tsv(part: Part) -> Iterator[Record]:
    return _read_table(part, "\t")


def _read_table(part: Part, delimiter: str) -> Iterator[Record]:
    """Rows under the names of their columns, the first row; each stands in the line where it begins."""
    rows = _rows(part, delimiter)
    _, names = next(rows, (1, []))
    if not names:
        raise InputError(f"{part.path}: is empty; name the columns in the first line")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(
            f"{part.path}:1: the column {twice!r:.40} is named twice; give each a name of its own"
        )
    for number, row in rows:
        if len(row) != len(names):
            cells = f"{len(row)} cells under {len(names)} names of columns"
            raise InputError(
                f"{part.path}:{number}: has {cells}; mend the row, or quote what holds a {delimiter!r}"
            )
        yield Record(dict(zip(names, row, strict=True)), f"{part.path}:{number}")


def _rows(part: Part, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, cells) of each row that is not blank."""
    csv.field_size_limit(
        1 << 30
    )  # a text may be longer than the 128 kB that a cell may hold otherwise
    reader = csv.reader((text for _, text in _lines(part)), delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{part.path}:{number}: not a row of a table: {error}; mend its quotes"
            ) from None
        if row is None:
            return
        if row:
            yield number, row


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[Any]:
    parquet = extra("pyarrow.parquet", path)
    with opened(path) as file:
        yield parquet.ParquetFile(file)


def _row_groups(path: str) -> list[Part]:
    parts, row, start, size = [], 0, 0, 0
    with readable(path), _parquet(path) as table:
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
        yield from (present(row, f"{part.path}:{n}") for n, row in enumerate(rows, start=part.line))


@contextlib.contextmanager
def _array_record(path: str) -> Iterator[Any]:
    """A reader of an ArrayRecord file; one on an object store is copied, for the reader wants a local file."""
    module = extra("array_record.python.array_record_module", path)
    with tempfile.TemporaryDirectory() as folder:
        name = os.path.join(folder, "copy") if "://" in path else path
        if name != path:
            fs, there = filesystem(path)
            fs.get(there, name)
        with contextlib.closing(module.ArrayRecordReader(name)) as reader:
            yield reader


def _read_array_record(part: Part) -> Iterator[Record]:
    """Records that are JSON objects, or else UTF-8 texts."""
    with _array_record(part.path) as reader:
        stop = min(part.stop or reader.num_records(), reader.num_records())
        for start in range(part.start, stop, 256):
            for number, value in enumerate(
                reader.read(start, min(start + 256, stop)), start=start + 1
            ):
                origin = f"{part.path}:{number}"
                text = decoded(value, origin)
                fields = parse_object(text, origin) if text.startswith("{") else {"text": text}
                yield present(fields, origin)


_READERS = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "array_record": _read_array_record,
}
