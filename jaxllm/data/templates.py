"""Templates: texts in which {field} stands for the value of a record's field; other braces stay."""

import re

from jaxllm.config import InputError
from jaxllm.data.records import Record, spelled

_FIELD = re.compile(r"\{(\w+)\}")


def fill(template: str, record: Record) -> str:
    """The template with the record's values; "" where it has fields and all of them are empty.

    A field that is null is empty; numbers, lists and objects stand as JSON spells them. Raises InputError on a field
    that is not there at all.
    """
    values = {name: _value(name, record) for name in _FIELD.findall(template)}
    if values and not any(values.values()):
        return ""
    return _FIELD.sub(lambda found: values[found[1]], template)


def _value(name: str, record: Record) -> str:
    if name in record.fields:
        return spelled(record.fields[name], record.origin)
    if name in record.empty:
        return ""
    known = " ".join(", ".join([*record.fields, *sorted(record.empty)]).split())[:200]
    raise InputError(f"{record.origin}: the template's {{{name}}} is not a field; known: {known}")
