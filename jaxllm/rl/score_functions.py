"""Calling functions that score responses over a batch, and checking every score."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxllm.config import InputError

# (prompt, response) -> score.
Annotator = Callable[[str, str], float]

# The updates are computed in float32, where a larger score would be infinite.
_LARGEST = float(np.finfo(np.float32).max)
# An error is one line; a score or a response may be a page.
_LONGEST_SHOWN = 60


def score_all(function: Annotator, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """Scores float64[N] of N (prompt, response) pairs.

    A function with an attribute `batch` is called once, as function.batch(prompts, responses): a model scores a batch
    faster than its rows.

    Raises:
        InputError: a score is not a finite number.
    """
    batch = getattr(function, "batch", None)
    if batch:
        scores = batch(prompts, responses)
    else:
        pairs = zip(prompts, responses, strict=True)
        scores = [function(prompt, response) for prompt, response in pairs]
    # An object that can be called has no name.
    name = getattr(function, "__name__", repr(function))
    return check_scores(scores, responses, f"annotator {name}")


def check_scores(
    scores: Any, responses: Sequence[str], name: str, noun: str = "response"
) -> np.ndarray:
    """The scores of N responses as float64[N]; name: the function, noun: what a response is, for errors.

    Raises:
        InputError: they are not N finite numbers.
    """
    # A user's function may return anything, one number for the whole batch included.
    try:
        values = list(scores)
    except TypeError:
        returned = f"returned {_shown(scores)} instead of {len(responses)} scores"
        raise InputError(f"{name}: {returned}; return one number for each {noun}") from None
    if len(values) != len(responses):
        returned = f"returned {len(values)} scores for {len(responses)} {noun}s"
        raise InputError(f"{name}: {returned}; return one number for each {noun}")
    checked = np.zeros(len(values), np.float64)
    for i, response in enumerate(responses):
        checked[i] = _score(values[i], response, name, noun)
    return checked


def _score(score: Any, response: str, name: str, noun: str) -> float:
    """One score as a float; a bool, a NumPy or JAX number and an array of one number are accepted."""
    try:
        # float() would read a number from a text.
        value = float("nan") if isinstance(score, str | bytes | None) else float(score)
    except (TypeError, ValueError, OverflowError):
        value = float("nan")
    # False for NaN as well.
    if abs(value) <= _LARGEST:
        return value
    scored = f"scored {_shown(score)} for the {noun} {response[:_LONGEST_SHOWN]!r}"
    raise InputError(f"{name}: {scored}; a score must be a finite number")


def _shown(value: Any) -> str:
    """A value for an error: an object only by its type, since its text may be long or have several lines."""
    if not isinstance(value, str | int | float | complex | None):
        return type(value).__name__
    text = repr(value)
    return text if len(text) < _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
