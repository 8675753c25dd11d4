"""Functions that score responses: called over a batch, and every score checked."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxllm.config import InputError

Annotator = Callable[[str, str], float]


def score_all(function: Annotator, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """Scores float64[N] of N (prompt, response) pairs, in one call where the function has a `batch` attribute.

    Raises InputError where a score is not a finite number.
    """
    batch = getattr(function, "batch", None)
    pairs = zip(prompts, responses, strict=True)
    scores = batch(prompts, responses) if batch else [function(p, r) for p, r in pairs]
    return check_scores(
        scores, responses, f"annotator {getattr(function, '__name__', repr(function))}"
    )


def check_scores(scores: Any, responses: Sequence[str], name: str) -> np.ndarray:
    """The scores as float64[N]. Raises InputError, naming the function, where they are not N finite numbers."""
    try:
        given = [*scores]
    except TypeError:
        raise InputError(
            f"{name}: gave {_shown(scores)} in place of {len(responses)} scores; return one number for each response"
        ) from None
    if len(given) != len(responses):
        raise InputError(f"{name}: gave {len(given)} scores for {len(responses)} responses")
    return np.array(
        [_score(*pair, name) for pair in zip(given, responses, strict=True)], np.float64
    )


_LARGEST = float(np.finfo(np.float32).max)  # the updates are computed in float32


def _score(score: Any, response: str, name: str) -> float:
    """One score as a float; a bool, a NumPy or JAX number or an array of one number will do."""
    try:
        value = float("nan") if isinstance(score, str | bytes | None) else float(score)
    except (TypeError, ValueError, OverflowError):
        value = float("nan")
    if abs(value) <= _LARGEST:
        return value
    raise InputError(
        f"{name}: scored {_shown(score)} for the response {response[:60]!r}; a score must be a finite number"
    )


def _shown(value: Any) -> str:
    text = (
        f"{value!r}"
        if isinstance(value, str | int | float | complex | None)
        else type(value).__name__
    )
    return text if len(text) < 60 else f"{text[:60]}..."
