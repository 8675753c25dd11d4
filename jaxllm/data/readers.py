"""Files -> records, one reader for each format; and the parts of large files that can be read separately."""

import contextlib
import csv
import itertools
import json
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxllm.config import InputError
from jaxllm.data.config import Format
from jaxllm.data.file_formats import check_head, check_is_text, format_of
from jaxllm.data.files import compression_of, extra, filesystem, opened, readable
from jaxllm.data.records import Record, decoded, parse, parse_object, present

# A part of a file has about as many bytes: 32 MB.
PART_BYTES = 1 << 25
_BOM = b"\xef\xbb\xbf"
# Lines are read in blocks of about as many bytes.
_BLOCK_BYTES = 1 << 20
# Rows, and records of an ArrayRecord file, that are read at once.
_BATCH_ROWS = 1024
_BATCH_RECORDS = 256


class FilePart(NamedTuple):
    """[start, stop) of a file: bytes of its lines, its row groups or its records; stop 0: to the end."""

    path: str
    start: int = 0
    stop: int = 0
    line: int = 1  # the number of its first record


def split_file(
    path: str, given: Format, unit: str, size: int, lines: Sequence[int]
) -> list[FilePart]:
    """The parts of about PART_BYTES of a file.

    Args:
        given: the source's format.
        unit: what one record of a plain text is: "line", "paragraph" or "file".
        size: of the file, in bytes.
        lines: newlines before each multiple of PART_BYTES.
    """
    kind = format_of(path, given)
    if kind == "parquet":
        return _row_groups(path)
    if kind == "array_record":
        return _record_ranges(path, size)
    # Only where each line is a record can a file be cut between lines.
    if not is_by_line(path, given, unit) or len(lines) < 2 or compression_of(path):
        return [FilePart(path)]
    return [
        FilePart(path, i * PART_BYTES, (i + 1) * PART_BYTES, 1 + n) for i, n in enumerate(lines)
    ]


def is_by_line(path: str, given: Format, unit: str) -> bool:
    """Whether each line of a file is a record; a quoted cell of a table can hold a newline."""
    kind = format_of(path, given)
    return kind == "jsonl" or (kind == "text" and unit == "line")


def read_part(part: FilePart, given: Format, unit: str) -> Iterator[Record]:
    """The records of a part of a file. Raises InputError, with the line, if something cannot be read."""
    kind = format_of(part.path, given)
    with _checked(part, given):
        yield from _read_text(part, unit) if kind == "text" else _READERS[kind](part)


def read_blocks(part: FilePart, given: Format) -> Iterator["Block"]:
    """The lines of a part of a file whose lines are records, in blocks. Raises InputError if it cannot be read."""
    with _checked(part, given):
        yield from _blocks(part)


@contextlib.contextmanager
def _checked(part: FilePart, given: Format) -> Iterator[None]:
    # Once for each file, in its first part.
    if format_of(part.path, given) == "text" and given == "auto" and not part.start:
        check_is_text(part.path)
    # Errors while records are read, not only while the file is opened: decompression fails late.
    with readable(part.path):
        yield


class Block(NamedTuple):
    """Some lines of a file, as bytes."""

    lines: list[bytes]
    path: str
    number: int  # of the first line

    def decoded(self) -> Iterator[tuple[str, str]]:
        """("path:number", line) of each line. Raises InputError if one is not UTF-8."""
        for number, line in enumerate(self.lines, self.number):
            origin = f"{self.path}:{number}"
            yield origin, decoded(line, origin)

    def records(self, given: Format) -> Iterator[Record]:
        """The records, if each line is one. Raises InputError if one is malformed."""
        is_text = format_of(self.path, given) == "text"
        return _text_records(self.decoded()) if is_text else _json_records(self.decoded())


def _blocks(part: FilePart) -> Generator[Block]:
    """The lines that begin in a part; a byte order mark is not part of the first.

    A line belongs to the part in which it begins. Three lines, cut at byte 6 ("|"):

        aaa\\n bb|b\\n cc\\n        first part: aaa, bbb        second part: cc
    """
    with opened(part.path) as file:
        number = part.line
        offset = part.start
        if part.start:
            # From one byte before: if that is a newline, a line begins exactly at the start of the part.
            file.seek(part.start - 1)
            rest = file.readline()
            if rest != b"\n":
                number += 1
            offset = part.start - 1 + len(rest)
        lines: list[bytes] = []
        size = 0
        for line in file:
            if part.stop and offset >= part.stop:
                break
            text = line
            # Only at the beginning of the file: elsewhere U+FEFF is a character of the text.
            if not offset:
                check_head(line, part.path)
                text = line.removeprefix(_BOM)
            offset += len(line)
            size += len(line)
            lines.append(text)
            if size >= _BLOCK_BYTES:
                yield Block(lines, part.path, number)
                number += len(lines)
                lines = []
                size = 0
        if lines:
            yield Block(lines, part.path, number)


def _lines(part: FilePart) -> Generator[tuple[str, str]]:
    """("path:number", line) of the lines that begin in a part."""
    for block in _blocks(part):
        yield from block.decoded()


def _texts(part: FilePart) -> Generator[str]:
    for _, line in _lines(part):
        yield line


def _read_text(part: FilePart, unit: str) -> Iterator[Record]:
    if unit == "line":
        yield from _text_records(_lines(part))
        return
    # A file is one paragraph: blank lines do not end it.
    is_inside = lambda line: unit == "file" or bool(line[1].strip())
    for is_text, lines in itertools.groupby(_lines(part), is_inside):
        if is_text:
            origins, texts = zip(*lines, strict=True)
            yield Record({"text": "".join(texts).strip("\r\n")}, origins[0])


def _text_records(lines: Iterable[tuple[str, str]]) -> Iterator[Record]:
    for origin, line in lines:
        yield Record({"text": line.rstrip("\r\n")}, origin)


def _read_jsonl(part: FilePart) -> Iterator[Record]:
    return _json_records(_lines(part))


def _json_records(lines: Iterable[tuple[str, str]]) -> Iterator[Record]:
    for origin, line in lines:
        if line.strip():
            yield present(parse_object(line, origin), origin)


def _read_json(part: FilePart) -> Iterator[Record]:
    """A list of objects; or one object a line, since some name JSONL .json."""
    if _is_jsonl(part):
        yield from _read_jsonl(part)
        return
    # A list is parsed as a whole; the line of a record in it is not known, so its number is used.
    values = parse("".join(_texts(part)), part.path, "write a list of objects, or one a line")
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise InputError(f"{part.path}: must hold a list of objects, or one object a line")
    for number, value in enumerate(values, start=1):
        yield present(value, f"{part.path}:{number}")


def _is_jsonl(part: FilePart) -> bool:
    """Whether the first line that is not blank is a complete JSON object."""
    # Closed at once: the file is opened again to be read.
    with contextlib.closing(_texts(part)) as lines:
        first = next(filter(str.strip, lines), "")
    try:
        return first.lstrip().startswith("{") and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(part: FilePart) -> Iterator[Record]:
    return _read_table(part, ",")


def _read_tsv(part: FilePart) -> Iterator[Record]:
    return _read_table(part, "\t")


def _read_table(part: FilePart, delimiter: str) -> Iterator[Record]:
    """The rows, with the names of the columns from the first one. The line of a row is the one where it begins."""
    rows = _rows(part, delimiter)
    _, names = next(rows, (1, []))
    if not names:
        raise InputError(f"{part.path}: is empty; name the columns in the first line")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(
            f"{part.path}:1: the column {twice!r:.40} is named twice; give each its own name"
        )
    for number, row in rows:
        if len(row) != len(names):
            cells = f"{len(row)} cells under {len(names)} names of columns"
            fix = f"add or remove cells, or quote a cell with a {delimiter!r}"
            raise InputError(f"{part.path}:{number}: has {cells}; {fix}")
        yield Record(dict(zip(names, row, strict=True)), f"{part.path}:{number}")


def _rows(part: FilePart, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, cells) of each row that is not blank."""
    # By default a cell may hold 128 kB only; a text can be longer.
    csv.field_size_limit(1 << 30)
    reader = csv.reader(_texts(part), delimiter=delimiter, strict=True)
    while True:
        # A quoted cell can hold newlines, so a row may take several lines.
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{part.path}:{number}: not a row of a table: {error}; fix its quotes"
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


def _row_groups(path: str) -> list[FilePart]:
    """Parts of a Parquet file: as many row groups as have PART_BYTES together."""
    parts = []
    begin = 0  # the part's first group
    line = 1  # the number of its first row
    size = 0
    rows = 0
    with readable(path), _parquet(path) as table:
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            size += group.total_byte_size
            rows += group.num_rows
            if size >= PART_BYTES or number == table.num_row_groups - 1:
                parts.append(FilePart(path, begin, number + 1, line))
                begin = number + 1
                line += rows
                size = 0
                rows = 0
    return parts or [FilePart(path)]


def _read_parquet(part: FilePart) -> Iterator[Record]:
    number = part.line
    with _parquet(part.path) as table:
        groups = list(range(part.start, part.stop or table.num_row_groups))
        for batch in table.iter_batches(_BATCH_ROWS, groups):
            for row in batch.to_pylist():
                yield present(row, f"{part.path}:{number}")
                number += 1


@contextlib.contextmanager
def _array_record(path: str) -> Iterator[Any]:
    """A reader of an ArrayRecord file. It wants a local file, so one on an object store is copied."""
    module = extra("array_record.python.array_record_module", path)
    with tempfile.TemporaryDirectory() as folder:
        name = path
        if "://" in path:
            name = os.path.join(folder, "copy")
            fs, remote_name = filesystem(path)
            fs.get(remote_name, name)
        with contextlib.closing(module.ArrayRecordReader(name)) as reader:
            yield reader


def _record_ranges(path: str, size: int) -> list[FilePart]:
    """Parts of an ArrayRecord file, of equally many records."""
    with readable(path), _array_record(path) as reader:
        count = reader.num_records()
    step = max(1, count * PART_BYTES // max(size, PART_BYTES))
    return [FilePart(path, start, start + step, start + 1) for start in range(0, count, step)]


def _read_array_record(part: FilePart) -> Iterator[Record]:
    """Records that are JSON objects, or else UTF-8 texts."""
    with _array_record(part.path) as reader:
        count = reader.num_records()
        stop = min(part.stop or count, count)
        for start in range(part.start, stop, _BATCH_RECORDS):
            values = reader.read(start, min(start + _BATCH_RECORDS, stop))
            for number, value in enumerate(values, start=start + 1):
                origin = f"{part.path}:{number}"
                # The format holds bytes; what they are is for its users to agree on.
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
