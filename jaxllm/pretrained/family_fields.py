"""The checked reader of a published config.json, which knows what each family means by leaving a field out."""

import sys
from collections.abc import Mapping
from typing import Any

from jaxllm.pretrained.checked_values import CheckedValues, wrong_value
from jaxllm.pretrained.family_table import ALIASES, DEFAULTS, FIELDS, NULLABLE

FIX = "fix it"


class Fields(CheckedValues):
    """A family's config.json by field; one that is left out has the family's default.

    Every method raises ValueError naming the field if a model of the family cannot have its value.
    """

    def __init__(self, given: Mapping[str, Any], family: str):
        # After this, every method and message uses the field's main name.
        aliases = ALIASES.get(family, {})
        super().__init__({aliases.get(name, name): value for name, value in given.items()}, FIX)
        self.family = family

    def value(self, name: str) -> Any:
        """The value unchecked; the family's default if it is left out."""
        default = DEFAULTS[self.family].get(name)
        value = self.values.get(name, default)
        nullable = default is None or self.family in NULLABLE.get(name, ())
        if value is None and not nullable:
            family = self.family
            raise ValueError(
                f"{name} is null, which a {family} model cannot have; give a value or leave it out"
            )
        return value

    def ours(self) -> dict[str, Any]:
        """{our field: value} of every field that FIELDS reads directly."""
        values: dict[str, Any] = {}
        for name in DEFAULTS[self.family]:
            if name in FIELDS and FIELDS[name].kind:
                values[FIELDS[name].ours] = self._read(name)
        return values

    def _read(self, name: str) -> Any:
        match FIELDS[name].kind:
            case "count":
                return self.count(name)
            # `ModelConfig` has 0 for null.
            case "count or null":
                return self.integer(name, 0, least=1)
            case "count from 0":
                return self.integer(name, 0)
            case "number":
                return self.positive(name)
            case "number or null":
                return 0.0 if self.value(name) is None else self.positive(name)
            case _:
                return self.flag(name)

    def count(self, name: str) -> int:
        """A whole number of at least 1, which the family needs."""
        value = self.integer(name, least=1)
        if value is None:
            raise ValueError(f"has no {name!r}, which a {self.family} model needs; add it")
        return value

    def positive(self, name: str) -> float:
        """A finite number above 0."""
        return positive(name, self.value(name))

    def one_of(self, name: str, *known: Any) -> Any:
        """One of the known values."""
        value = self.value(name)
        for choice in known:
            # 1 == 1.0 == True to Python; the class tells them apart.
            if type(value) is type(choice) and value == choice:
                return value
        choices = ", ".join(map(str, known))
        raise ValueError(
            f"{name} {value!r:.60} is not known in a {self.family} model; known: {choices}"
        )


def positive(name: str, value: Any) -> float:
    """The value of the field `name` as a float. Raises ValueError unless it is finite and above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max:
        raise wrong_value(name, value, "a finite number above 0", FIX)
    return float(value)
