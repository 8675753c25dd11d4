"""Numbers as people and models write them, read exactly. Rewards and scores both use this reader.

It reads thousands separators (1,000), signs, decimals (0.5 and .5), leading zeros, powers of ten (1.5e3), simple fractions
(3/4), percent, currency signs and full-width characters. Values are fractions, so a number of any size is exact.
"""

import collections
import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

_CURRENCY = "$€£¥₩₹"
# A hyphen after a letter, a digit or a bracket joins or subtracts: COVID-19 holds 19, and 10-12 holds 10 and 12.
_SIGN = r"(?<![A-Za-z0-9)\]])[-+]"
# 3/4 is a fraction; 28/11/2026, 1/0 and and/or are not.
_FRACTION = r"(?<![\d/])(?P<above>\d+)/(?P<below>0*[1-9]\d*)(?![\d/]|[.,]\d)"
# Separators first, so that 1,000 does not match as 1. 1,0000 and 1,00 have no separator, so they hold two numbers.
_INTEGER = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+"
# Exponents have at most four digits: a longer one could take any amount of memory. It is then not part of the number.
_POWER = r"(?:[eE][-+]?\d{1,4}(?!\w|\.\d))?"
# The pattern of an unsigned number; `value_of` reads what it matches. 28.11.2026 holds 28.11 and 2026, not .2026.
UNSIGNED = rf"(?:(?:{_INTEGER})(?:\.\d+)?|(?<![\d.])\.\d+)"
_DECIMAL = rf"(?P<digits>{UNSIGNED}{_POWER})"
# The sign may be on either side of the currency: -$5 and $-5.
_PREFIX = rf"(?P<sign>{_SIGN})?(?:[{_CURRENCY}]\s?(?P<inner>[-+])?)?"
_NUMBER = re.compile(rf"{_PREFIX}(?:{_FRACTION}|{_DECIMAL})(?P<percent>\s?%)?")
# Unicode has the full-width forms of "!" to "~" in the order of ASCII.
_FULL_WIDTH = {ord("！") + i: ord("!") + i for i in range(94)}
_SIGNS = str.maketrans("−–﹣×∙·÷￥", "---***/¥")
_TO_PLAIN = _FULL_WIDTH | _SIGNS


class Number(NamedTuple):
    """A number in a text."""

    value: Fraction
    """As written: 50% is 50."""
    percent: bool
    """Whether a percent sign follows it."""


def plain(text: str) -> str:
    """The text with ASCII digits, signs and operators instead of full-width or typographic ones, of the same length."""
    return text.translate(_TO_PLAIN)


def read(text: str) -> Iterator[Number]:
    """The numbers in a text, in order.

    >>> [str(number.value) for number in read("from -$1,000.50 to ２％, then 3/4")]
    ['-2001/2', '2', '3/4']
    """
    return map(_number, _NUMBER.finditer(plain(text)))


def last(text: str) -> Number | None:
    """The last number in a text, None if it has no number."""
    # A deque of length 1, since a long response should not be held as a list of numbers.
    newest = collections.deque(read(text), maxlen=1)
    return newest[0] if newest else None


def is_number(text: str) -> bool:
    """Whether the text is a number and nothing else, outer spaces aside."""
    return _NUMBER.fullmatch(plain(text).strip()) is not None


def equal(first: Number, second: Number) -> bool:
    """Whether two numbers are the same, exactly.

    If only one of them has a percent sign, it may be written either way: 50% equals both 50 and 0.5.
    """
    if first.value == second.value:
        return True
    if first.percent == second.percent:
        return False
    percentage, other = (first, second) if first.percent else (second, first)
    return percentage.value / 100 == other.value


def value_of(digits: str) -> Fraction:
    """The value of unsigned digits, with or without separators."""
    # int() refuses more than 4,300 digits; Decimal reads any number of them.
    return Fraction(Decimal(digits.replace(",", "")))


def _number(match: re.Match[str]) -> Number:
    """The number that `_NUMBER` matched; only a fraction has a part below its line."""
    value = value_of(match["digits"] or match["above"])
    if match["below"]:
        value /= value_of(match["below"])
    # Two minus signs, as in -$-5, cancel.
    negative = (match["sign"] == "-") != (match["inner"] == "-")
    return Number(-value if negative else value, bool(match["percent"]))
