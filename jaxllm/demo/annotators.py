"""Simulated annotators: functions (prompt, response) -> score that stand in for a person who ranks.

Any importable function named "module:function" can be used; those below serve the demos. A function may have an
attribute `batch`, itself a function (prompts, responses) -> scores, to score many responses in one call.
"""

import functools
import re
from typing import Any

from jaxllm.config import InputError

_POSITIVE_WORDS = """
good great excellent wonderful amazing lovely love loved best better nice fine happy glad enjoy enjoyed perfect
beautiful delicious friendly helpful fast clean comfortable recommend thanks bright fun funny kind warm
好 很棒 喜欢 满意 不错 优秀 漂亮 美丽 开心 高兴 快乐 舒服 舒适 推荐 完美 精彩 干净 热情 值得 方便 感谢 爱 美味 好吃
"""
_NEGATIVE_WORDS = """
bad terrible awful horrible worst worse poor sad boring hate hated ugly slow dirty rude broken disappointing
disappointed useless annoying angry wrong cold expensive fail failed waste noisy pain painful
差 坏 糟 糟糕 讨厌 失望 难看 难吃 难受 垃圾 后悔 脏 吵 慢 贵 生气 无聊 麻烦 痛苦 伤心 恶心 破 错
"""
_NEGATION_WORDS = "not no never without hardly cannot isn't wasn't don't doesn't didn't won't can't"
POSITIVE = frozenset(_POSITIVE_WORDS.split())
NEGATIVE = frozenset(_NEGATIVE_WORDS.split())
NEGATIONS = frozenset(_NEGATION_WORDS.split())
# Chinese has no spaces between words. The longest come first: 好吃 is one word, not 好.
_CHINESE = [word for word in POSITIVE | NEGATIVE if not word.isascii()]
_CHINESE.sort(key=lambda word: (-len(word), word))
_WORDS = re.compile("|".join(["[a-z']+", *_CHINESE]))
# The characters before a word, at most one other between them: 不太好 is "not very good".
_CHINESE_NEGATION = re.compile("[不没未别非].?$|没有.?$")


def snownlp_sentiment(prompt: str, response: str) -> float:
    """SnowNLP's probability, 0..1, that a Chinese response is positive. An empty response is neutral: 0.5.

    It is a naive Bayes model of shop reviews, so long texts come close to 0 or 1. Needs the snownlp package.
    """
    del prompt
    return _snownlp(response.strip())


def vader_sentiment(prompt: str, response: str) -> float:
    """VADER's compound score of an English response (Hutto & Gilbert 2014), mapped to 0..1; empty: 0.5.

    Needs the vaderSentiment package.
    """
    del prompt
    # The compound score is in -1..1.
    return (_vader().polarity_scores(response)["compound"] + 1.0) / 2.0


def keyword_sentiment(prompt: str, response: str) -> float:
    """(1 + (p - n) / (p + n + 1)) / 2 for p positive and n negative words, English and Chinese; in (0, 1).

    A word counts for the other side if one of the two words (in Chinese: characters) before it negates it.
    """
    del prompt
    # Typographic apostrophes, as in don’t.
    text = response.lower().replace("’", "'")
    positive = 0
    negative = 0
    words_before: list[str] = []
    for match in _WORDS.finditer(text):
        word = match[0]
        if word.isascii():
            negated = not NEGATIONS.isdisjoint(words_before[-2:])
        else:
            # Three characters hold 没有 and one other.
            characters_before = text[max(0, match.start() - 3) : match.start()]
            negated = bool(_CHINESE_NEGATION.search(characters_before))
        words_before.append(word)
        if word in (NEGATIVE if negated else POSITIVE):
            positive += 1
        elif word in (POSITIVE if negated else NEGATIVE):
            negative += 1
    return (1.0 + (positive - negative) / (positive + negative + 1)) / 2.0


@functools.lru_cache(maxsize=1 << 16)  # the same short replies come again and again
def _snownlp(text: str) -> float:
    try:
        from snownlp import SnowNLP  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        raise InputError(
            "snownlp_sentiment: needs the snownlp package; pip install 'jaxllm[demo]'"
        ) from None
    # A text without words has no score.
    return float(SnowNLP(text).sentiments) if text else 0.5


@functools.cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "vader_sentiment: needs the vaderSentiment package; pip install 'jaxllm[demo]'"
        ) from None
    return SentimentIntensityAnalyzer()
