"""Numbers as people and models write them, read exactly: the one reader of rewards and of scores.

It knows thousands separators (1,000), signs, decimals (0.5 and .5), leading zeros, powers of ten (1.5e3), simple fractions
(3/4), percent, currency signs, and full-width characters. Values are fractions, so a number of any size is exact.
"""

import collections
import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

_CURRENCY = "$€£¥₩₹"
# A hyphen behind a letter, a digit or a bracket joins or subtracts: COVID-19 holds 19, and 10-12 holds 10 and 12.
_SIGN = r"(?<![A-Za-z0-9)\]])[-+]"
# 3/4 is a fraction; 28/11/2026, 1/0 and and/or are not.
_FRACTION = r"(?<![\d/])(?P<above>\d+)/(?P<below>0*[1-9]\d*)(?![\d/]|[.,]\d)"
_WHOLE = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+"
# Four digits of exponent: more would take any amount of memory. What is longer is not part of the number.
_POWER = r"(?:[eE][-+]?\d{1,4}(?!\w|\.\d))?"
UNSIGNED = (
    rf"(?:(?:{_WHOLE})(?:\.\d+)?|(?<![\d.])\.\d+)"  # a pattern; `value_of` reads what it matches
)
_DECIMAL = rf"(?P<digits>{UNSIGNED}{_POWER})"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})?(?:[{_CURRENCY}]\s?(?P<inner>[-+])?)?(?:{_FRACTION}|{_DECIMAL})(?P<percent>\s?%)?"
)
# Full-width characters to ASCII, and the other signs of minus, times and divided by.
_PLAIN = {0xFF01 + i: 0x21 + i for i in range(94)} | str.maketrans("−–﹣×∙·÷￥", "---***/¥")


class Number(NamedTuple):
    """A number in a text."""

    value: Fraction
    """As written: 50% is 50."""
    percent: bool
    """Whether a percent sign follows it."""


def plain(text: str) -> str:
    """The text with ASCII digits, signs and operators where it has full-width or typographic ones; length is kept."""
    return text.translate(_PLAIN)


def read(text: str) -> Iterator[Number]:
    """The numbers in a text, in order.

    >>> [str(number.value) for number in read("from -$1,000.50 to ２％, then 3/4")]
    ['-2001/2', '2', '3/4']
    """
    return map(_number, _NUMBER.finditer(plain(text)))


def last(text: str) -> Number | None:
    """The last number in a text, None where there is none."""
    found = collections.deque(read(text), maxlen=1)
    return found[0] if found else None


def is_number(text: str) -> bool:
    """Whether the text is a number and nothing else, spaces around it aside."""
    return _NUMBER.fullmatch(plain(text).strip()) is not None


def equal(one: Number, other: Number) -> bool:
    """Whether two numbers are the same, exactly.

    Where only one of them has a percent sign, it may be written either way: 50% equals both 50 and 0.5.
    """
    if one.value == other.value:
        return True
    if one.percent == other.percent:
        return False
    share, whole = (one, other) if one.percent else (other, one)
    return share.value / 100 == whole.value


def value_of(digits: str) -> Fraction:
    """The value of unsigned digits, with separators perhaps. Decimal reads any length, which `int` refuses."""
    return Fraction(Decimal(digits.replace(",", "")))


def _number(found: re.Match[str]) -> Number:
    value = value_of(found["digits"] or found["above"])
    if found["below"]:
        value /= value_of(found["below"])
    negative = (found["sign"] == "-") != (found["inner"] == "-")
    return Number(-value if negative else value, bool(found["percent"]))
