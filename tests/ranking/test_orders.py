"""Orders: as people type them, as ranks, and as they are shown."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.config import InputError
from jaxllm.ranking.orders import LABELS, parse_order, shown_order, unshuffle


def dense(values):
    levels = sorted(set(values))
    return [levels.index(value) + 1 for value in values]


RANKS = st.lists(st.integers(0, 5), min_size=1, max_size=26).map(dense)


def format_order(ranks):
    groups = [
        "=".join(label for label, other in zip(LABELS, ranks, strict=False) if other == rank)
        for rank in range(1, max(ranks) + 1)
    ]
    return ">".join(groups)


@given(RANKS)
def test_orders_round_trip(ranks):
    assert parse_order(format_order(ranks), len(ranks)) == ranks


@pytest.mark.parametrize("text", ["B>A=D>C", " b > a=d >c ", "Ｂ＞Ａ＝Ｄ＞Ｃ", "B>D=A>C"])
def test_orders_are_read_as_people_type_them(text):
    assert parse_order(text, 4) == [2, 1, 3, 2]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("A>B>C", "D is missing"),
        ("A>B>C>D>A", "A is given twice"),
        ("A>B>C>E", "'E' is not one of"),
        ("AB>C>D", "'AB'"),
        ("A>>B>C>D", "an empty label"),
        ("A>B>C>D=", "an empty label"),
        ("", "an empty label"),
        ("B A C D", "'BACD'"),
    ],
)
def test_bad_orders_get_one_clear_line(text, fault):
    with pytest.raises(InputError, match=fault) as caught:
        parse_order(text, 4)
    assert "\n" not in str(caught.value)


@given(st.integers(0, 2**32 - 1), st.integers(0, 1000), RANKS)
def test_ranks_as_shown_come_back_to_their_responses(seed, index, ranks):
    order = shown_order(seed, index, len(ranks))
    assert sorted(order) == list(range(len(ranks)))
    np.testing.assert_array_equal(order, shown_order(seed, index, len(ranks)))
    assert unshuffle([ranks[i] for i in order], order) == ranks
