"""What is in a file: by what its source says, else by its name, and by its first bytes where the name says nothing."""

import csv
import re
from collections.abc import Sequence
from typing import Literal

from jaxllm.config import InputError
from jaxllm.data.files import opened, readable, suffix_of

Format = Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "array_record"]
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
_TEXTS = (
    "txt",
    "text",
    "md",
    "markdown",
    "rst",
    "tex",
    "log",
    "py",
)  # taken for text whatever they hold
_HEAD = 1 << 16  # bytes that tell
_NO_TEXT = (  # first bytes, what they tell, and the mend
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
_OBJECT = re.compile(
    r'\s*\[?\s*\{\s*"(?:[^"\\]|\\.)*"\s*:'
)  # how records in JSON begin, and no prose does
_ROWS = 4  # lines that make a table, the names of its columns included


def format_of(path: str, given: Format = "auto") -> Format:
    """What is in a file, compressed or not: what is given, else by its name in any case; "text" where it is unknown."""
    return given if given != "auto" else _BY_SUFFIX.get(suffix_of(path), "text")


def check_is_text(path: str) -> None:
    """Raises InputError where a file whose suffix says nothing holds JSON or a table: it is no text to learn."""
    suffix = suffix_of(path)
    if suffix in _TEXTS:
        return
    with readable(path), opened(path) as file:
        head = file.read(_HEAD)
    if found := guess(head.decode("utf-8-sig", errors="ignore"), whole=len(head) < _HEAD):
        what = "JSON" if found == "jsonl" else "a table"
        unknown = f"and its suffix .{suffix} is not known" if suffix else "and has no suffix"
        mend = f'set the source\'s format to "{found}", or to "text" to take it as it is'
        raise InputError(f"{path}: seems to hold {what} {unknown}; {mend}")


def guess(head: str, whole: bool = True) -> Literal["jsonl", "csv", "tsv", ""]:
    """The format of records that a text begins with; "" for everything else, prose above all."""
    if _OBJECT.match(head):
        return "jsonl"
    lines = [line for line in re.split(r"\r?\n", head) if line]
    lines = lines if whole else lines[:-1]  # the last one is cut
    if _is_table(lines, "\t"):
        return "tsv"
    return "csv" if _is_table(lines, ",") else ""


def _is_table(lines: Sequence[str], delimiter: str) -> bool:
    """Whether all lines have the same number of cells, more than one, and commas do not part clauses or thousands."""
    try:
        rows = list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error:  # quotes that no table has
        return False
    if len(rows) < _ROWS or len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
        return False
    return delimiter == "\t" or (_are_names(rows[0]) and 2 * sum(map(_is_prose, rows)) <= len(rows))


def _are_names(cells: Sequence[str]) -> bool:
    return len(set(cells)) == len(cells) and all(
        0 < len(name) <= 64 and name[0].isalpha() for name in cells
    )


def _is_prose(row: Sequence[str]) -> bool:
    """A comma of prose has a space behind it, one that parts cells has none."""
    return any(cell.startswith(" ") for cell in row[1:])


def check_head(head: bytes, path: str) -> None:
    """Raises InputError where a file's first bytes are those of something else than UTF-8 text."""
    for pattern, what, mend in _NO_TEXT:
        if pattern.match(head):
            raise InputError(f"{path}: holds {what}, not UTF-8 text; {mend}")
