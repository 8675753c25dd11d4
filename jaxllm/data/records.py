"""One record: a JSON object or a row of a table, what is absent in it, and how its values stand in a text."""

import json
import re
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import InputError

_DEEPEST = (
    200  # levels of lists and objects in one another; Python's own limit depends on where it reads
)
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # may be half of a surrogate pair


_decode = json.JSONDecoder().decode  # json.loads looks for its options each time
_NONE: frozenset[str] = frozenset()


class Record(NamedTuple):
    """One record: its fields, the place it came from, for error messages, and which fields are there without a value."""

    fields: dict[str, Any]
    origin: str  # "path:line"
    empty: frozenset[str] = _NONE


def present(fields: dict[str, Any], origin: str) -> Record:
    """The record of these fields, without those that are null: null is absent, in messages and their calls as well.

    A table has no other way to leave a value out; where a number was wanted pandas writes NaN for it.
    """
    empty = [
        name
        for name, value in fields.items()
        if value is None or (isinstance(value, float) and value != value)
    ]
    if empty:
        fields = {name: value for name, value in fields.items() if name not in empty}
    if isinstance(messages := fields.get("messages"), list):
        fields = {**fields, "messages": [_without_nulls(message) for message in messages]}
    return Record(fields, origin, frozenset(empty) if empty else _NONE)


def _without_nulls(message: Any) -> Any:
    """A message, a call in it or its function, without nulls; the arguments of a call keep theirs."""
    if not isinstance(message, dict):
        return message
    kept = {name: value for name, value in message.items() if value is not None and value == value}
    if isinstance(calls := kept.get("tool_calls"), list):
        kept["tool_calls"] = [_without_nulls(call) for call in calls]
    if isinstance(kept.get("function"), dict):
        kept["function"] = _without_nulls(kept["function"])
    return kept


def spelled(value: Any, origin: str) -> str:
    """A field's value as text: a text as it is, numbers, true, false, lists and objects as JSON spells them.

    Raises InputError on bytes and on numbers that JSON has no spelling for.
    """
    if isinstance(value, np.generic | np.ndarray):  # of a function
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


def parse(text: str, origin: str, mend: str = "write one object per line") -> Any:
    """The value of a JSON text. Raises InputError where it is none, is nested too deep, or is not valid Unicode."""
    try:
        value = _decode(text)
    except RecursionError:
        raise too_deep(origin) from None
    except json.JSONDecodeError as error:
        if text.startswith("\ufeff"):  # of a file that was put behind another one
            mend = "remove the byte order mark at its start"
        raise InputError(f"{origin}: not valid JSON: {error}; {mend}") from None
    except ValueError:  # Python's limit for the digits of a whole number
        raise InputError(
            f"{origin}: holds a number of thousands of digits; write it as a text"
        ) from None
    if text.count("[") + text.count("{") > _DEEPEST and _depth(value) > _DEEPEST:
        raise too_deep(origin)
    if "\\" in text and _HALF_PAIR.search(text):
        check_unicode(json.dumps(value, ensure_ascii=False), origin)
    return value


def too_deep(origin: str) -> InputError:
    return InputError(f"{origin}: nested more than {_DEEPEST} deep; flatten it")


def check_unicode(text: str, origin: str) -> None:
    """Raises InputError where a text holds half of a surrogate pair, which no UTF-8 text can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise InputError(
            f"{origin}: not valid Unicode: {half} is half of a surrogate pair; write U+FFFD"
        ) from None


def parse_object(line: str, origin: str) -> dict[str, Any]:
    """The JSON object of a line. Raises InputError where it holds none."""
    value = parse(line, origin)
    if not isinstance(value, dict):
        raise InputError(
            f'{origin}: must be a JSON object such as {{"text": ...}}, not {type(value).__name__}'
        )
    return value


def decoded(value: bytes, origin: str) -> str:
    """UTF-8 as text. Raises InputError where it is not, or holds a NUL byte, which no text does."""
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
    """Levels of lists and objects in one another."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, list | dict)]:
        level = [
            child for each in level for child in (each.values() if isinstance(each, dict) else each)
        ]
        depth += 1
    return depth
