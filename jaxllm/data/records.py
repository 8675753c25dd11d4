"""Records: a JSON object or a row of a table; which of its fields are absent, and its values as text."""

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import InputError

# Levels of lists and objects inside one another. Python's own limit depends on the depth of its call stack.
_MAX_DEPTH = 200
# May be half of a surrogate pair.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# json.loads would look for its options at each call.
_decode = json.JSONDecoder().decode
_NO_FIELDS: frozenset[str] = frozenset()


class Record(NamedTuple):
    """The fields of a record that have a value; where it comes from; and its fields without a value."""

    fields: dict[str, Any]
    origin: str  # "path:line"
    empty: frozenset[str] = _NO_FIELDS


def present(fields: dict[str, Any], origin: str) -> Record:
    """The record of these fields, in which null is absent, also in messages and their calls.

    A table has no other way to leave a value out; pandas writes NaN for it in a column of numbers.
    """
    empty = frozenset(name for name, value in fields.items() if _is_null(value))
    if empty:
        fields = {name: value for name, value in fields.items() if name not in empty}
    # A Parquet file gives every message the fields that any of them has.
    messages = fields.get("messages")
    if isinstance(messages, list):
        fields = {**fields, "messages": list(map(_without_nulls, messages))}
    return Record(fields, origin, empty)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _without_nulls(message: Any) -> Any:
    """A message, a call in it, or its function, without nulls; the arguments of a call keep theirs."""
    if not isinstance(message, dict):
        return message
    kept = {name: value for name, value in message.items() if not _is_null(value)}
    calls = kept.get("tool_calls")
    if isinstance(calls, list):
        kept["tool_calls"] = list(map(_without_nulls, calls))
    if isinstance(kept.get("function"), dict):
        kept["function"] = _without_nulls(kept["function"])
    return kept


def spelled(value: Any, origin: str) -> str:
    """A field's value as text: a text unchanged; numbers, true, false, lists and objects as JSON spells them.

    Raises:
        InputError: bytes, and numbers for which JSON has no spelling.
    """
    # Functions may yield these; files cannot hold them.
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, str):
        return value
    if not isinstance(value, bool | int | float | list | tuple | dict | bytes):
        return str(value)  # dates and decimals of a table
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_text_of)
    except (TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(
            f"{origin}: {value!r:.40} has no spelling as text ({reason}); give text"
        ) from None


def _text_of(value: Any) -> str:
    if isinstance(value, bytes):
        raise TypeError("it is bytes")
    return str(value)


def parse(text: str, origin: str, fix: str = "write one object per line") -> Any:
    """The value of a JSON text.

    Raises:
        InputError: not JSON, nested too deeply, a number of thousands of digits, or invalid Unicode.
    """
    try:
        value = _decode(text)
    except RecursionError:
        raise _too_deep(origin) from None
    except json.JSONDecodeError as error:
        if text.startswith("\ufeff"):  # a file that was appended to another one
            fix = "remove the byte order mark at its start"
        raise InputError(f"{origin}: not valid JSON: {error}; {fix}") from None
    except ValueError:  # Python's limit for the digits of an integer
        raise InputError(
            f"{origin}: has a number of thousands of digits; write it as a text"
        ) from None
    # The brackets of a text bound its depth, and few texts have so many: most values are not walked.
    if text.count("[") + text.count("{") > _MAX_DEPTH and _depth(value) > _MAX_DEPTH:
        raise _too_deep(origin)
    if "\\" in text and _SURROGATE.search(text):
        check_unicode(json.dumps(value, ensure_ascii=False), origin)
    return value


def _too_deep(origin: str) -> InputError:
    return InputError(f"{origin}: nested more than {_MAX_DEPTH} deep; flatten it")


def check_unicode(text: str, origin: str) -> None:
    """Raises InputError if a text has half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise InputError(
            f"{origin}: not valid Unicode: {half} is half of a surrogate pair; write U+FFFD"
        ) from None


def parse_lines(lines: Iterable[str], text: str) -> list[dict[str, Any]] | None:
    """The JSON objects of lines, as `parse_object` returns them; None if one of them is not an object, or suspicious.

    text: the lines, joined.
    """
    if "\\" in text and _SURROGATE.search(text):
        return None
    if any(line.count("[") + line.count("{") > _MAX_DEPTH for line in lines):
        return None
    try:
        values = [_decode(line) for line in lines if line.strip()]
    except (ValueError, RecursionError):
        return None
    return values if all(type(value) is dict for value in values) else None


def parse_object(line: str, origin: str) -> dict[str, Any]:
    """The JSON object of a line. Raises InputError if it has none."""
    value = parse(line, origin)
    if not isinstance(value, dict):
        raise InputError(
            f'{origin}: must be a JSON object such as {{"text": ...}}, not {type(value).__name__}'
        )
    return value


def decoded(value: bytes, origin: str) -> str:
    """UTF-8 as text. Raises InputError if it is not UTF-8, or has a NUL byte, which a text never has."""
    if 0 in value:
        raise InputError(
            f"{origin}: holds a NUL byte, so it is not UTF-8 text; convert or repair the file"
        )
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{origin}: not UTF-8 ({error.reason} at byte {error.start}); convert the file"
        ) from None


def _depth(value: Any) -> int:
    """Levels of lists and objects inside one another, found level by level: recursion has a limit of its own."""
    depth = 0
    level = [value]
    while True:
        containers = [item for item in level if isinstance(item, list | dict)]
        if not containers:
            return depth
        depth += 1
        level = []
        for container in containers:
            level += container.values() if isinstance(container, dict) else container
