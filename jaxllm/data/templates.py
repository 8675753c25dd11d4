"""Templates: texts in which {field} is replaced by the value of a record's field; other braces stay."""

import re

from jaxllm.config import InputError
from jaxllm.data.records import Record, spelled

_FIELD = re.compile(r"\{(\w+)\}")


def fill(template: str, record: Record) -> str:
    """The template with the record's values; "" if it has fields and all of them are empty.

    A field that is null is empty; numbers, lists and objects are written as JSON.

    Raises:
        InputError: the record does not have a field of the template.
    """
    values = {name: _value(name, record) for name in _FIELD.findall(template)}
    # So a template "Context: {context}" gives no message for a record without context.
    if values and not any(values.values()):
        return ""
    return _FIELD.sub(lambda match: values[match[1]], template)


def _value(name: str, record: Record) -> str:
    if name in record.fields:
        return spelled(record.fields[name], record.origin)
    if name in record.empty:
        return ""
    # Names of fields can hold anything, line breaks included.
    known = " ".join(", ".join([*record.fields, *sorted(record.empty)]).split())[:200]
    raise InputError(f"{record.origin}: the template's {{{name}}} is not a field; known: {known}")
