"""Measures against numbers worked out by hand."""

import math
import types

import numpy as np
import pytest

from jaxllm.evaluation import measures as e


def test_bits_per_byte():
    assert e.bits_per_byte(math.log(2) * 3, num_tokens=10, num_bytes=15) == pytest.approx(2.0)


def test_xz_pays_little_for_what_it_has_seen_and_much_for_noise():
    rng = np.random.default_rng(0)
    noise = "".join(chr(33 + c) for c in rng.integers(0, 90, 20_000))
    assert e.xz_bits_per_byte([noise], [noise[5000:15_000]]) < 0.2
    assert e.xz_bits_per_byte(["aaaa"], [noise]) > 6


def test_accuracy_needs_the_whole_answer_and_knows_the_majority():
    numbers = e.accuracy(["yes", " no ", "yes!", "no"], ["yes", "no", "yes", "yes"])
    assert numbers == {"accuracy": 0.5, "majority": 0.75, "examples": 4.0}


def test_share_above_counts_every_pair_and_equal_ones_half():
    rng = np.random.default_rng(0)
    higher, lower = rng.integers(0, 6, 40), rng.integers(0, 5, 30)
    pairs = [(x > y) + 0.5 * (x == y) for x in higher for y in lower]
    assert e.share_above(higher, lower) == pytest.approx(np.mean(pairs))
    assert e.share_above([1.0], [1.0, 0.0, 2.0, 3.0]) == (1 + 0.5) / 4


def test_distinct_counts_bigrams_over_all_responses():
    assert e.distinct([[1, 2, 3], [1, 2, 4], [5]]) == 3 / 4
    assert e.distinct([[7, 7, 7, 7]]) == 1 / 3
    assert e.distinct([[1]]) == 0.0


def test_mean_error_and_win_rate():
    mean, error = e.mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert e.win_rate(np.array([1.0, 2.0, 0.0]), np.array([0.0, 2.0, 1.0])) == 0.5


def test_pair_margins_leave_ties_and_absent_responses_out():
    scores, ranks = np.array([[3.0, 1.0, 2.0, 9.0]]), np.array([[1, 2, 2, 0]])
    assert sorted(e.pair_margins(scores, ranks)) == [1.0, 2.0]


def test_annotators_agree_on_pairs_whatever_order_the_responses_are_listed_in():
    def ranked(rows, ranks):
        return types.SimpleNamespace(rows=rows, ranks=np.array(ranks), annotator="")

    same = [ranked([[1], [2], [3]], [1, 2, 3]), ranked([[3], [1], [2]], [3, 1, 2])]
    assert e.annotator_agreement(same) == (1.0, 3)
    other = ranked(
        [[2], [1], [3]], [1, 2, 2]
    )  # 2 before 1: against; 1 and 3 tied: left out; 2 before 3: alike
    assert e.annotator_agreement([same[0], other]) == (0.5, 2)
    assert e.annotator_agreement([same[0], ranked([[1], [2]], [1, 2])]) is None


def test_calibration_error_is_zero_when_confidence_is_the_truth():
    rng = np.random.default_rng(0)
    size = rng.uniform(0, 4, 200_000)
    right = rng.random(200_000) < 1 / (1 + np.exp(-size))
    assert e.calibration_error(np.where(right, size, -size)) < 0.01
    assert e.calibration_error(np.where(rng.random(200_000) < 0.5, 4.0, -4.0)) == pytest.approx(
        0.482, abs=0.01
    )
