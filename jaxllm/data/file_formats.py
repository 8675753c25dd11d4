"""The format of a file: as its source says, or by its name, or by its first bytes if the name does not tell."""

import csv
import re
from collections.abc import Sequence
from typing import Literal

from jaxllm.config import InputError
from jaxllm.data.config import Format
from jaxllm.data.files import opened, readable, suffix_of

_BY_SUFFIX: dict[str, Format] = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "jsonlines": "jsonl",
    "json": "json",
    "csv": "csv",
    "tsv": "tsv",
    "tab": "tsv",
    "parquet": "parquet",
    "array_record": "array_record",
    "arrayrecord": "array_record",
}
# Files of these suffixes are text, whatever they hold.
_TEXTS = ("txt", "text", "md", "markdown", "rst", "tex", "log", "py")
# Bytes at the beginning of a file that are inspected.
_HEAD = 1 << 16
# First bytes of files that are not text, what they are, and what to do.
_NOT_TEXT = (
    (
        re.compile(rb"PAR1[\0-\x1f]"),
        "Parquet",
        'name it .parquet, or set the source\'s format to "parquet"',
    ),
    (re.compile(rb"\x1f\x8b"), "data compressed by gzip", "end its name in .gz"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "data compressed by Zstandard", "end its name in .zst"),
    (re.compile(rb"BZh[1-9]1AY&SY"), "data compressed by bzip2", "end its name in .bz2"),
    (re.compile(rb"\xfd7zXZ\0"), "data compressed by xz", "end its name in .xz"),
    (re.compile(rb"PK\x03\x04"), "a zip archive", "unpack it"),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "UTF-16 text", "convert it to UTF-8"),
)
# How records in JSON begin, and prose does not: {"name":
_OBJECT = re.compile(r'\s*\[?\s*\{\s*"(?:[^"\\]|\\.)*"\s*:')
# Fewer lines, that of the column names included, are not taken for a table.
_MIN_ROWS = 4


def format_of(path: str, given: Format = "auto") -> Format:
    """The format that is given, or else that of the file's suffix, in any case; "text" if the suffix is unknown."""
    return given if given != "auto" else _BY_SUFFIX.get(suffix_of(path), "text")


def check_is_text(path: str) -> None:
    """Raises InputError if a file of an unknown suffix holds JSON or a table, which would be learned as text."""
    suffix = suffix_of(path)
    if suffix in _TEXTS:
        return
    with readable(path), opened(path) as file:
        head = file.read(_HEAD)
    kind = guess(head.decode("utf-8-sig", errors="ignore"), is_complete=len(head) < _HEAD)
    if kind:
        content = "JSON" if kind == "jsonl" else "a table"
        unknown = f"and its suffix .{suffix} is not known" if suffix else "and has no suffix"
        fix = f'set the source\'s format to "{kind}", or to "text" to read it unchanged'
        raise InputError(f"{path}: seems to hold {content} {unknown}; {fix}")


def guess(head: str, is_complete: bool = True) -> Literal["jsonl", "csv", "tsv", ""]:
    """The format of the records that a text begins with; "" for everything else, above all prose.

    is_complete: whether head is the whole text; if not, its last line is cut.
    """
    if _OBJECT.match(head):
        return "jsonl"
    lines = [line for line in re.split(r"\r?\n", head) if line]
    # A cut line has fewer cells than the others.
    if not is_complete:
        lines = lines[:-1]
    if _is_table(lines, "\t"):
        return "tsv"
    return "csv" if _is_table(lines, ",") else ""


def _is_table(lines: Sequence[str], delimiter: str) -> bool:
    """Whether all lines have the same number of cells, more than one, and commas do not separate clauses or thousands."""
    try:
        rows = list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error:  # quotes that a table cannot have
        return False
    if len(rows) < _MIN_ROWS or len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
        return False
    # Prose has no tabs in the same number on each line.
    if delimiter == "\t":
        return True
    num_prose = sum(map(_is_prose, rows))
    return _are_names(rows[0]) and 2 * num_prose <= len(rows)


def _are_names(cells: Sequence[str]) -> bool:
    if len(set(cells)) != len(cells):
        return False
    return all(0 < len(name) <= 64 and name[0].isalpha() for name in cells)


def _is_prose(row: Sequence[str]) -> bool:
    """Prose has a space after a comma; a table does not."""
    return any(cell.startswith(" ") for cell in row[1:])


def check_head(head: bytes, path: str) -> None:
    """Raises InputError if a file's first bytes are those of something other than UTF-8 text."""
    for pattern, content, fix in _NOT_TEXT:
        if pattern.match(head):
            raise InputError(f"{path}: holds {content}, not UTF-8 text; {fix}")
