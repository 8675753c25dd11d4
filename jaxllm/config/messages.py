"""One-line error messages: where a value was set, and what pydantic found wrong with it."""

from typing import Any, NamedTuple

import pydantic

from jaxllm.config.trees import KeyPath, Locations, dotted, flag_name

_INTEGER = "must be an integer"
_NUMBER = "must be a number"
# pydantic's type of error -> the message; {ge} and the like come from the error's context. Errors of
# other types keep pydantic's own message.
_COMPLAINTS = {
    "greater_than_equal": "must be at least {ge:.10g}",
    "greater_than": "must be above {gt:.10g}",
    "less_than_equal": "must be at most {le:.10g}",
    "less_than": "must be below {lt:.10g}",
    "finite_number": "must be a finite number",
    "int_type": _INTEGER,
    "int_parsing": _INTEGER,
    "int_parsing_size": _INTEGER,
    "int_from_float": _INTEGER,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
}


class Origin(NamedTuple):
    """Where the values of a tree come from."""

    locations: Locations
    """The location of each key, as far as it is known."""
    name: str
    """The name of the tree, used for keys without a location."""

    def describe(self, path: KeyPath) -> str:
        """Returns "file:line: dotted.path", with the line of the deepest key that has a location.

        A value that a flag set is described by the flag alone.
        """
        # A default, or a key that `expand` added, has no location: that of its section is close by.
        location = self.name
        for length in range(len(path), 0, -1):
            if path[:length] in self.locations:
                location = self.locations[path[:length]]
                break
        if not path or location == flag_name(path):
            return location
        return f"{location}: {dotted(path)}"


def describe_errors(error: pydantic.ValidationError, origin: Origin) -> str:
    """Returns the first error with its location, and the number of the others."""
    first, *others = error.errors()
    path = tuple(first["loc"])
    message = complaint(first)
    # A check of several fields names the one at fault in its message: "field: what is wrong".
    field, colon, what = message.partition(": ")
    if first["type"] == "value_error" and colon and " " not in field:
        path = (*path, *field.split("."))
        message = what
    count = f" (and {len(others)} more)" if others else ""
    return f"{origin.describe(path)}: {message}{count}"


def complaint(error: Any) -> str:
    """Returns what is wrong with a value, and the value. error: one of pydantic's error details."""
    template = _COMPLAINTS.get(error["type"])
    if template:
        message = template.format(**error.get("ctx", {}))
    else:
        message = error["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
    # Checks of several fields quote the values that matter; the input would be the whole section.
    if error["type"] in ("value_error", "missing"):
        return message
    return f"{message}, not {error['input']!r:.80}"
