"""Simulated annotators: bounded, ordered as a reader would, and clear about what is missing."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import InputError
from jaxllm.config.functions import resolve_function
from jaxllm.demo import annotators
from jaxllm.rl.score_functions import score_all

BUILT_IN = ["keyword_sentiment", "snownlp_sentiment", "vader_sentiment"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_any_text_scores_between_0_and_1_and_empty_is_neutral(name):
    function = resolve_function(f"jaxllm.demo.annotators:{name}", "annotator")

    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=40))
    def check(text):
        assert 0.0 <= function("prompt", text) <= 1.0
        assert function("prompt", text) == function("another prompt", text)

    check()
    assert function("p", "") == function("p", " \n") == 0.5


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("keyword_sentiment", "What a wonderful day, I love it", "an awful, boring film"),
        ("keyword_sentiment", "a good meal", "not a good meal"),
        ("keyword_sentiment", "It isn't bad", "it is bad"),
        ("keyword_sentiment", "I don’t hate it", "I hate it"),
        ("keyword_sentiment", "这家酒店很好,我喜欢", "房间不太好,很失望"),
        ("keyword_sentiment", "这家店真不错", "这家店真错"),
        ("keyword_sentiment", "good good good", "good"),
        ("snownlp_sentiment", "这部电影很好看,非常喜欢", "太差了,服务态度恶劣"),
        ("vader_sentiment", "I love this, it is great!", "I hate this, it is terrible."),
    ],
)
def test_order_is_that_of_a_reader(name, better, worse):
    function = getattr(annotators, name)
    assert function("p", better) > 0.5
    assert function("p", better) > function("p", worse)
    if worse != "good":
        assert function("p", worse) < 0.5


def test_no_word_is_both_positive_and_negative():
    assert not annotators.POSITIVE & annotators.NEGATIVE


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("keyword_sentiment", "module:function"),
        ("no_such_package_here:f", "PYTHONPATH"),
        ("jaxllm.demo.annotators:missing", "keyword_sentiment"),
        ("jaxllm.demo.annotators:POSITIVE", "no function"),
    ],
)
def test_resolve_says_how_to_fix(spec, word):
    with pytest.raises(InputError, match=word) as caught:
        resolve_function(spec, "annotator")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package"), [("snownlp_sentiment", "snownlp"), ("vader_sentiment", "vaderSentiment")]
)
def test_missing_package_names_the_extra(monkeypatch, name, package):
    for module in (package, f"{package}.{package}"):
        monkeypatch.setitem(sys.modules, module, None)
    annotators._snownlp.cache_clear()
    annotators._vader.cache_clear()
    with pytest.raises(InputError, match=r"jaxllm\[demo\]"):
        getattr(annotators, name)("p", "text")
    annotators._vader.cache_clear()


def test_score_all_uses_batch_where_there_is_one():
    def one(prompt, response):
        return len(response)

    scores = score_all(one, ["p", "p"], ["a", "bbb"])
    assert scores.dtype == np.float64
    assert scores.tolist() == [1.0, 3.0]
    calls = []
    one.batch = lambda prompts, responses: calls.append(prompts) or [7.0] * len(responses)
    assert score_all(one, ["p", "q"], ["a", "b"]).tolist() == [7.0, 7.0]
    assert calls == [["p", "q"]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(InputError, match="finite"):
        score_all(lambda prompt, response: bad, ["p"], ["r"])


def test_batch_of_another_length_is_refused():
    def one(prompt, response):
        return 0.0

    one.batch = lambda prompts, responses: [0.0]
    with pytest.raises(InputError, match="returned 1 scores for 2 responses"):
        score_all(one, ["p", "p"], ["a", "b"])
