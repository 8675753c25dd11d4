"""Rewards that are functions: what they pay for, what they refuse, and the one line for a bad source."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.config import InputError
from jaxllm.rl import numerals, rewards
from jaxllm.rl.config import PPOConfig
from jaxllm.rl.reward_config import RewardSource
from jaxllm.rl.score_functions import check_scores


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
        ("07+05=", "12", 1.0),
        ("1,000+5=", "1,005", 1.0),
        ("１２×３＝", "３６", 1.0),
        ("Question 3: 4+5=", "9", 1.0),
        ("Question 3: 4+5=", "3", 0.0),
        ("(What is 3+4)?", "7", 1.0),
        ("1/3=", "0.333333", 1.0),
        ("1/3=", "0.33", 0.0),
        ("1000000000/3=", "333333333", 0.0),
        ("123456789+1=", "123456789", 0.0),
        ("(" * 5000 + "1+1" + ")" * 5000, "2", 0.0),
    ],
)
def test_arithmetic_computes_the_answer_itself(prompt, response, reward):
    assert rewards.arithmetic(prompt, response, "") == reward


def test_exact_match_last_number_and_format():
    assert rewards.exact_match("", " 46 ", "46") == 1 and rewards.exact_match("", "46.", "46") == 0
    assert (
        rewards.last_number("", "so 12+34 is 46.0", "46") == 1
        and rewards.last_number("", "none", "46") == 0
    )
    assert rewards.one_number("", " -3.5 ", "") == 1 and rewards.one_number("", "3 or 4", "") == 0


@given(st.integers(-(10**500), 10**500), st.integers(-(10**500), 10**500), st.sampled_from("+-*"))
def test_arithmetic_is_exact_for_any_size(a, b, operator):
    value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    prompt = f"({a}){operator}({b})="
    assert rewards.arithmetic(prompt, f"It is {value}.", "") == 1
    assert rewards.arithmetic(prompt, f"It is {value:,}.", "") == 1
    assert rewards.arithmetic(prompt, f"It is {value + 1}.", "") == 0


SAME = [
    ("5,000", "5000"),
    ("-0012.50", "−12.5"),
    ("$1,000", "1000 dollars"),
    ("-$5", "$-5"),
    ("５０％", "50%"),
    ("50%", "0.5"),
    ("50%", "50"),
    ("1.5e3", "1,500"),
    ("3/4", "0.75"),
    ("答案是-7。", "-7"),
    (".5", "0.5"),
    ("#### 12", "12."),
]
OTHER = [
    ("5,000", "70,000"),
    ("1,000", "1"),
    ("5", "-5"),
    ("50%", "5"),
    ("1/4", "4"),
    ("5e3", "3"),
    ("10-12", "-12"),
]


@pytest.mark.parametrize(
    ("response", "answer", "reward"), [(*p, 1.0) for p in SAME] + [(*p, 0.0) for p in OTHER]
)
def test_last_number_reads_numbers_as_they_are_written(response, answer, reward):
    assert rewards.last_number("", f"the answer is {response}", answer) == reward
    assert rewards.last_number("", answer, f"the answer is {response}") == reward


@given(st.fractions().map(lambda x: x.limit_denominator(1000)), st.text(max_size=5))
def test_every_number_equals_itself_in_every_spelling(value, noise):
    whole = round(value * 10**6)
    spellings = [
        str(whole),
        f"{whole:,}",
        f"{whole}.000",
        f"{'-' if whole < 0 else ''}000{abs(whole)}",
        f"{whole}e0",
    ]
    numbers = [numerals.last(f"x {text}") for text in spellings]
    assert (
        all(numerals.equal(number, numbers[0]) for number in numbers) and numbers[0].value == whole
    )
    assert numerals.last(noise) is None or isinstance(numerals.last(noise).value, Fraction)


def test_long_digits_are_read_in_time():
    assert numerals.last("9" * 10_000).value == Fraction(10) ** 10_000 - 1
    assert [number.value for number in numerals.read("28/11/2026 and 1e999999")] == [
        28,
        11,
        2026,
        1,
        999999,
    ]
    numerals.last("1," * 50_000 + "$ " * 50_000 + "1/" * 50_000)


def half_right(prompt, response, answer):
    return 0.5 * (response == answer) + 0.25 * (prompt in response)


def two_parameters(prompt, response):
    return float(len(response))


def one_parameter(response):
    return 1.0


def test_sources_give_fractions_and_know_their_rows():
    terms = rewards.resolve(RewardSource("tests.rl.test_rewards:half_right"), "ppo.rewards")
    np.testing.assert_array_equal(terms(["a", "b"], ["xa", "y"], ["xa", "z"]), [0.75, 0.0])
    terms = rewards.resolve(RewardSource("tests.rl.test_rewards:two_parameters"), "ppo.rewards")
    np.testing.assert_array_equal(terms(["a", "b"], ["xa", "y"], ["", ""]), [2.0, 1.0])
    terms = rewards.resolve(RewardSource("regex:[0-9]+"), "ppo.rewards")
    np.testing.assert_array_equal(terms(["", ""], ["123", "12a"], ["", ""]), [1.0, 0.0])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("regex:(", "not a regular expression"),
        ("tests.rl.test_rewards:missing", "has no function"),
        ("tests.rl.test_rewards:one_parameter", "takes 1 parameters"),
    ],
)
def test_a_bad_source_is_one_clear_line(source, message):
    with pytest.raises(InputError, match=message):
        rewards.resolve(RewardSource(source), "ppo.rewards")


WRONG_SCORES = [float("nan"), "0.5", None, {"score": 1}, [1, 2], 10**400, 1e300, 1j, b"1", [[]]]


@pytest.mark.parametrize("wrong", WRONG_SCORES, ids=repr)
def test_a_reward_that_is_no_finite_number_is_refused_with_its_function(monkeypatch, wrong):
    for name, function in (
        ("three", lambda prompt, response, answer: wrong),
        ("two", lambda prompt, response: wrong),
    ):
        monkeypatch.setitem(globals(), name, function)
        terms = rewards.resolve(RewardSource(f"tests.rl.test_rewards:{name}"), "ppo.rewards")
        with pytest.raises(InputError, match=f"{name}|lambda.*must be a finite number") as error:
            terms(["a"], ["b"], ["c"])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong", [1.0, {"a": 1, "b": 2}, [1.0], [[1.0], [1.0, 2.0]], "ab", None], ids=repr
)
def test_a_batch_of_scores_must_have_a_number_for_each_response(wrong):
    with pytest.raises(InputError, match="annotator f") as error:
        check_scores(wrong, ["x", "y"], "annotator f")
    assert "\n" not in str(error.value)


def test_scores_of_any_number_type_will_do():
    scores = check_scores([True, np.float32(0.5), np.array(2), jnp.ones(())], ["x"] * 4, "f")
    np.testing.assert_array_equal(scores, [1.0, 0.5, 2.0, 1.0])


def test_terms_that_would_share_a_metric_get_names_of_their_own():
    sources = [
        RewardSource(s) for s in ("regex:a", "m:length", "length", "regex:b", "n:length", "model")
    ]
    assert rewards.metric_names(sources) == [
        "regex",
        "length",
        "length_2",
        "regex_2",
        "length_3",
        "model",
    ]


def test_a_function_that_gets_no_answer_is_named(capsys):
    sources = [
        RewardSource("jaxllm.rl.rewards:arithmetic"),
        RewardSource("tests.rl.test_rewards:two_parameters"),
    ]
    rewards.check_answers(sources, ["", ""], "ppo.rewards")
    assert "note" not in capsys.readouterr().err
    rewards.check_answers(
        [*sources, RewardSource("tests.rl.test_rewards:half_right")], ["", ""], "ppo.rewards"
    )
    assert (
        "no prompt has an answer; tests.rl.test_rewards:half_right gets an empty one"
        in capsys.readouterr().err
    )


def test_a_reward_that_compares_needs_answers():
    sources = [RewardSource("model"), RewardSource("jaxllm.rl.rewards:exact_match")]
    rewards.check_answers(sources, ["46", "12"], "ppo.rewards")
    rewards.check_answers(sources[:1], ["", ""], "ppo.rewards")
    with pytest.raises(
        InputError, match=r"ppo.rewards: .*exact_match compares .* 1 of 2 prompts have none"
    ):
        rewards.check_answers(sources, ["46", " "], "ppo.rewards")


@pytest.mark.parametrize("source", ["", "regex:", "module:", ":function", "module"])
def test_an_empty_source_is_refused(source):
    with pytest.raises(ValueError, match="source: give model, length"):
        RewardSource(source)


def test_ppo_refuses_terms_given_twice_and_empty_stop_strings():
    with pytest.raises(ValueError, match="rewards: length is given twice"):
        PPOConfig(rewards=(RewardSource("length"), RewardSource("length", 2.0)))
    with pytest.raises(ValueError, match="stop_strings: an empty string"):
        PPOConfig(stop_strings=("###", ""))
