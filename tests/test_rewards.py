"""Rewards that are functions: what they pay for, what they refuse, and the one line for a bad source."""

import numpy as np
import pytest

from jaxllm import rewards
from jaxllm.config import InputError
from jaxllm.rewards import RewardSource


@pytest.mark.parametrize(
    ("prompt", "response", "reward"),
    [
        ("12+34=", "46", 1.0),
        ("What is 12 + 34?", "12 + 34 = 46", 1.0),
        ("(2+3)*4", "The answer is 20.", 1.0),
        ("7/2", "3.5", 1.0),
        ("3-5", "-2", 1.0),
        ("12+34=", "47", 0.0),
        ("12+34=", "forty-six", 0.0),
        ("1/0", "0", 0.0),
        ("no expression", "5", 0.0),
        ("2**9", "512", 0.0),
    ],
)
def test_arithmetic_computes_the_answer_itself(prompt, response, reward):
    assert rewards.arithmetic(prompt, response, "") == reward


def test_exact_match_last_number_and_format():
    assert rewards.exact_match("", " 46 ", "46") == 1 and rewards.exact_match("", "46.", "46") == 0
    assert rewards.last_number("", "so 12+34 is 46.0", "46") == 1 and rewards.last_number("", "none", "46") == 0
    assert rewards.one_number("", " -3.5 ", "") == 1 and rewards.one_number("", "3 or 4", "") == 0


def half_right(prompt, response, answer):
    return 0.5 * (response == answer) + 0.25 * (prompt in response)


def two_parameters(prompt, response):
    return float(len(response))


def one_parameter(response):
    return 1.0


def not_a_number(prompt, response, answer):
    return float("nan")


def test_sources_give_fractions_and_know_their_rows():
    terms = rewards.resolve(RewardSource("tests.test_rewards:half_right"), "ppo.rewards")
    np.testing.assert_array_equal(terms(["a", "b"], ["xa", "y"], ["xa", "z"]), [0.75, 0.0])
    terms = rewards.resolve(RewardSource("tests.test_rewards:two_parameters"), "ppo.rewards")
    np.testing.assert_array_equal(terms(["a", "b"], ["xa", "y"], ["", ""]), [2.0, 1.0])
    terms = rewards.resolve(RewardSource("regex:[0-9]+"), "ppo.rewards")
    np.testing.assert_array_equal(terms(["", ""], ["123", "12a"], ["", ""]), [1.0, 0.0])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("regex:(", "not a regular expression"),
        ("tests.test_rewards:missing", "has no function"),
        ("tests.test_rewards:one_parameter", "takes 1 parameters"),
    ],
)
def test_a_bad_source_is_one_clear_line(source, message):
    with pytest.raises(InputError, match=message):
        rewards.resolve(RewardSource(source), "ppo.rewards")


def test_a_reward_that_is_not_finite_is_refused():
    terms = rewards.resolve(RewardSource("tests.test_rewards:not_a_number"), "ppo.rewards")
    with pytest.raises(InputError, match="must be finite"):
        terms(["a"], ["b"], ["c"])
