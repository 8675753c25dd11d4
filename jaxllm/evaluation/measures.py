"""Measures of a model: pure functions of numbers and texts, and the runner that sums a loss over held-out batches."""

import itertools
import lzma
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxllm.losses import Metrics
from jaxllm.metrics import reduce
from jaxllm.runtime.transfer import fetch


def run(
    measure: Callable[[Any, Any], Metrics], params: Any, batches: Iterable[Any]
) -> dict[str, float]:
    """Sum measure(params, batch) -> {name: (sum, weight)} over batches and divide once. `measure` is jitted."""
    return reduce([fetch(measure(params, batch)) for batch in batches])


def bits_per_byte(nats_per_token: float, num_tokens: int, num_bytes: int) -> float:
    """Held-out loss in bits per UTF-8 byte of text: comparable between tokenizers."""
    return nats_per_token * num_tokens / num_bytes / math.log(2)


def xz_bits_per_byte(train: Iterable[str], held_out: Iterable[str]) -> float:
    """What `xz -9` pays for the held-out text when the training text stands before it, in bits per byte.

    The dictionary is made as large as the text, so that all of the training text can be referred to.
    """
    prefix, text = "\n".join(train).encode(), "\n".join(held_out).encode()
    size = min(max(len(prefix) + len(text), 1 << 23), 1536 << 20)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": size}]
    compressed = lambda data: len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))
    return 8.0 * (compressed(prefix + b"\n" + text) - compressed(prefix)) / len(text)


def accuracy(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Share of exact matches, and that of always answering the most common label."""
    right = sum(p.strip() == label.strip() for p, label in zip(predictions, labels, strict=True))
    majority = Counter(label.strip() for label in labels).most_common(1)[0][1]
    return {
        "accuracy": right / len(labels),
        "majority": majority / len(labels),
        "examples": float(len(labels)),
    }


def distinct(responses: Iterable[Sequence[Any]], n: int = 2) -> float:
    """Different n-grams over all n-grams (Li et al. 2016): low where a model repeats itself."""
    grams = Counter(tuple(r[i : i + n]) for r in responses for i in range(len(r) - n + 1))
    return len(grams) / max(grams.total(), 1)


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and its standard error."""
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array))) if len(
        array
    ) > 1 else 0.0


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of prompts on which ours scores higher; a tie counts half."""
    return float(((ours > theirs) + 0.5 * (ours == theirs)).mean())


def pair_margins(scores: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """r_better - r_worse of every pair that is not tied: scores float[B, K], ranks int[B, K] (0 = absent)."""
    return (scores[:, :, None] - scores[:, None, :])[_better(ranks)]


def accuracy_by(scores: np.ndarray, ranks: np.ndarray, what: str) -> dict[str, float]:
    """Pairwise accuracy for each K ("k": responses of the prompt) or difference in rank ("distance")."""
    better = _better(ranks)
    by_k = np.broadcast_to((ranks > 0).sum(1)[:, None, None], better.shape)
    key = (by_k if what == "k" else ranks[:, None, :] - ranks[:, :, None])[better]
    margins = pair_margins(scores, ranks)
    right = (margins > 0) + 0.5 * (margins == 0)
    return {str(value): float(right[key == value].mean()) for value in np.unique(key)}


def annotator_agreement(examples: Iterable[Any]) -> tuple[float, int] | None:
    """(share, pairs): how often two annotators of the same responses, in any order, order a pair alike; no ties.

    examples: things with rows, ranks and annotator. The ceiling of a reward model's accuracy; None where no prompt
    was ranked by two.
    """
    by_rows: dict[str, list[np.ndarray]] = {}
    for example in examples:
        order = sorted(range(len(example.rows)), key=lambda k, rows=example.rows: str(rows[k]))
        by_rows.setdefault(str([example.rows[k] for k in order]), []).append(
            np.asarray(example.ranks)[order]
        )
    alike = total = 0
    for ranks in by_rows.values():
        for one, other in itertools.combinations(ranks, 2):
            first, second = (np.sign(r[:, None] - r[None, :]) for r in (one, other))
            both = np.triu((first != 0) & (second != 0))
            alike, total = alike + int((both & (first == second)).sum()), total + int(both.sum())
    return (alike / total, total) if total else None


def calibration_error(margins: np.ndarray, num_bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3) of sigmoid(|margin|) as the chance to be right.

    margins: r_better - r_worse of each pair; the prediction is right where it is positive.
    """
    bins = reliability(margins, num_bins)
    return sum(abs(right - confidence) * count for confidence, right, count in bins) / max(
        len(margins), 1
    )


def reliability(margins: np.ndarray, num_bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean confidence, share right, pairs) of each bin of confidence from 0.5 to 1 that holds a pair."""
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margins.astype(np.float64))))
    right = (margins > 0) + 0.5 * (margins == 0)
    bins = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    parts = ((confidence[bins == b], right[bins == b]) for b in range(num_bins))
    return [(float(c.mean()), float(r.mean()), len(c)) for c, r in parts if len(c)]


def _better(ranks: np.ndarray) -> np.ndarray:
    """bool[B, K, K]: i is ranked strictly better than j, and both exist."""
    exists = (ranks[:, :, None] > 0) & (ranks[:, None, :] > 0)
    return exists & (ranks[:, :, None] < ranks[:, None, :])
