"""Values by name from a file that somebody else wrote, each checked when it is read."""

import math
from collections.abc import Callable, Mapping
from typing import Any

_LARGEST = 2**31 - 1  # sizes become int32 on devices


class CheckedValues:
    """Values of a file by name; null counts as missing.

    Every method raises ValueError naming the value that has a wrong type or range.
    """

    def __init__(self, values: Mapping[str, Any], fix: str):
        """fix: what to do about a wrong value; every error ends in it."""
        self.values = values
        self.fix = fix

    def value(self, name: str) -> Any:
        """The value as the file has it, None if it has none."""
        return self.values.get(name)

    def integer(self, name: str, default: int | None = None, least: int = 0) -> int | None:
        """A whole number of at least `least` that fits into 32 bits."""
        # isinstance would accept true and false.
        fits = lambda value: type(value) is int and least <= value <= _LARGEST
        return self._checked(name, default, f"a whole number of at least {least}", fits)

    def number(self, name: str, default: float | None = None) -> float | None:
        """A finite number."""
        return self._checked(name, default, "a finite number", _is_finite)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        return self._checked(name, default, "true or false", lambda value: isinstance(value, bool))

    def text(self, name: str) -> str | None:
        """A string."""
        return self._checked(name, None, "a text", lambda value: isinstance(value, str))

    def table(self, name: str) -> Mapping[str, Any]:
        """An object, empty if it is missing."""
        return self._checked(name, {}, "an object", lambda value: isinstance(value, Mapping))

    def items(self, name: str, kind: type | None = None) -> list[Any]:
        """A list, empty if it is missing; `kind`: the type of every item, None for any."""

        def fits(value: Any) -> bool:
            if not isinstance(value, list):
                return False
            return kind is None or all(type(item) is kind for item in value)

        wanted = f"a list of {kind.__name__}" if kind else "a list"
        return self._checked(name, [], wanted, fits)

    def _checked(self, name: str, default: Any, wanted: str, fits: Callable[[Any], bool]) -> Any:
        value = self.value(name)
        if value is None:
            return default
        if not fits(value):
            raise wrong_value(name, value, wanted, self.fix)
        return value


def wrong_value(name: str, value: Any, wanted: str, fix: str) -> ValueError:
    """The error of a value that is not what it has to be."""
    return ValueError(f"{name} must be {wanted}, not {value!r:.60}; {fix}")


def _is_finite(value: Any) -> bool:
    # bool is an int to Python, and an int may be too large to be a float.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)
