"""Measures of a model: pure functions of numbers and texts, and the loop that sums a loss over held-out batches.

Those of rankings have shapes B prompts, K responses to each. `losses.ranking_metrics` has the same formulas in JAX, for
one training batch at a time. The ones here stay in NumPy: they take the scores of a whole held-out split, gathered on the
host, keep pairs of varying number (which jit cannot), and average in float64.
"""

import itertools
import lzma
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from jaxllm.losses import Metrics
from jaxllm.metrics import reduce
from jaxllm.runtime.transfer import fetch

# xz needs about ten times the dictionary's size in memory, and accepts no dictionary above 1.5 GiB.
_SMALLEST_DICTIONARY = 8 << 20
_LARGEST_DICTIONARY = 1536 << 20


def run(
    measure: Callable[[Any, Any], Metrics], params: Any, batches: Iterable[Any]
) -> dict[str, float]:
    """Sum measure(params, batch) -> {name: (sum, weight)} over batches, then divide once.

    measure is jitted. Averaging the batches' means instead would weigh a short last batch like a full one.
    """
    return reduce([fetch(measure(params, batch)) for batch in batches])


def bits_per_byte(nats_per_token: float, num_tokens: int, num_bytes: int) -> float:
    """Held-out loss in bits per UTF-8 byte of text: comparable between tokenizers."""
    return nats_per_token * num_tokens / num_bytes / math.log(2)


def xz_bits_per_byte(train: Iterable[str], held_out: Iterable[str]) -> float:
    """Bits per byte that `xz -9` needs for the held-out text once it has compressed the training text.

    The dictionary is as large as the text, so that the held-out text can refer to all of the training text.
    """
    # The line break keeps the last training text apart from the first held-out one.
    prefix = "\n".join(train).encode()
    text = "\n".join(held_out).encode()
    size = min(max(len(prefix) + len(text), _SMALLEST_DICTIONARY), _LARGEST_DICTIONARY)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": size}]

    def compressed_size(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))

    # xz has no way to continue a compressed text, so the training text is compressed twice.
    extra = compressed_size(prefix + b"\n" + text) - compressed_size(prefix)
    return 8.0 * extra / len(text)


def accuracy(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Share of exact matches, and that of always answering the most common label; outer spaces do not count."""
    labels = list(map(str.strip, labels))
    right = 0
    for prediction, label in zip(predictions, labels, strict=True):
        right += prediction.strip() == label
    return {
        "accuracy": right / len(labels),
        "majority": majority(labels),
        "examples": float(len(labels)),
    }


def majority(labels: Sequence[Any]) -> float:
    """Share of the most common label: the accuracy of always giving that one."""
    return Counter(labels).most_common(1)[0][1] / len(labels)


def distinct(responses: Iterable[Sequence[Any]], n: int = 2) -> float:
    """Different n-grams over all n-grams (Li et al. 2016): low if a model repeats itself."""
    # Over all responses: a model that gives everyone the same answer repeats itself as well.
    grams: Counter[tuple[Any, ...]] = Counter()
    for response in responses:
        for start in range(len(response) - n + 1):
            grams[tuple(response[start : start + n])] += 1
    # No response may be long enough for an n-gram.
    return len(grams) / max(grams.total(), 1)


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is given as 0."""
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return mean, 0.0
    deviation = array.std(ddof=1)
    return mean, float(deviation / math.sqrt(len(array)))


def win_rate(scores: np.ndarray, baseline: np.ndarray) -> float:
    """Share of prompts on which `scores` are higher; a tie counts half. Both float64[N], in the same order."""
    wins = scores > baseline
    ties = scores == baseline
    return float((wins + 0.5 * ties).mean())


def share_above(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Share of pairs, one of each list, in which the first is larger; an equal pair counts half (area under the ROC)."""
    ordered = np.sort(lower)
    # Those below, and those below or equal: their mean counts an equal one half.
    below = np.searchsorted(ordered, higher, "left") + np.searchsorted(ordered, higher, "right")
    return float(below.mean() / (2 * len(ordered)))


def pair_margins(scores: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """r_better - r_worse of every pair that is not tied, [pairs], prompt by prompt.

    Args:
        scores: float[B, K].
        ranks: int[B, K], 1 = best, equal = tie, 0 = no such response.
    """
    return (scores[:, :, None] - scores[:, None, :])[_better(ranks)]


def accuracy_by(
    scores: np.ndarray, ranks: np.ndarray, what: Literal["k", "distance"]
) -> dict[str, float]:
    """Pairwise accuracy for each K ("k": responses to the prompt) or difference in rank ("distance").

    scores, ranks: as for `pair_margins`.
    """
    better = _better(ranks)
    if what == "k":
        num_responses = (ranks > 0).sum(1)[:, None, None]
        groups = np.broadcast_to(num_responses, better.shape)[better]
    else:
        groups = (ranks[:, None, :] - ranks[:, :, None])[better]
    right = _right(pair_margins(scores, ranks))
    accuracies = {}
    for group in np.unique(groups):
        accuracies[str(group)] = float(right[groups == group].mean())
    return accuracies


def annotator_agreement(examples: Iterable[Any]) -> tuple[float, int] | None:
    """(share, pairs): how often two annotators of the same responses order a pair alike, ties left out.

    It is the ceiling of a reward model's accuracy. None if no prompt was ranked by two annotators.

    examples: objects with rows (token ids of each response) and ranks; each annotator may have seen the responses in
    another order.
    """
    rankings: dict[str, list[np.ndarray]] = {}
    for example in examples:
        spelled = [str(row) for row in example.rows]
        # Sorting gives all rankings of the same responses one order:
        #
        #     rows  [3] [1] [2]     sorted  [1] [2] [3]
        #     ranks  3   1   2               1   2   3
        order = sorted(range(len(spelled)), key=spelled.__getitem__)
        responses = str([example.rows[k] for k in order])
        rankings.setdefault(responses, []).append(np.asarray(example.ranks)[order])
    alike = 0
    total = 0
    for same_responses in rankings.values():
        for first, second in itertools.combinations(same_responses, 2):
            # [K, K]: -1, 0 or 1 for each pair of responses.
            first_signs = np.sign(first[:, None] - first[None, :])
            second_signs = np.sign(second[:, None] - second[None, :])
            untied = (first_signs != 0) & (second_signs != 0)
            same = first_signs == second_signs
            # The upper triangle: each pair is counted once.
            untied = np.triu(untied)
            alike += int((untied & same).sum())
            total += int(untied.sum())
    return (alike / total, total) if total else None


def calibration_error(margins: np.ndarray, num_bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3) of sigmoid(|margin|) as the probability of being right.

    margins: float[pairs], r_better - r_worse of each pair; the prediction is right where it is positive.
    """
    gaps = []
    for confidence, right, count in reliability(margins, num_bins):
        gaps.append(abs(right - confidence) * count)
    return sum(gaps) / max(len(margins), 1)


def reliability(margins: np.ndarray, num_bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean confidence, share right, pairs) of each bin of confidence from 0.5 to 1 that holds a pair.

    margins: as for `calibration_error`. Confidence is never below 0.5: the sign of the margin is the prediction.
    """
    size = np.abs(margins.astype(np.float64))
    confidence = 1.0 / (1.0 + np.exp(-size))
    right = _right(margins)
    bins = ((confidence - 0.5) * 2 * num_bins).astype(int)
    # A confidence of exactly 1 belongs to the last bin.
    bins = np.minimum(bins, num_bins - 1)
    curve = []
    for number in np.unique(bins):
        inside = bins == number
        mean_confidence = float(confidence[inside].mean())
        share_right = float(right[inside].mean())
        curve.append((mean_confidence, share_right, int(inside.sum())))
    return curve


def _right(margins: np.ndarray) -> np.ndarray:
    """float64[pairs]: 1 where the margin is positive; equal scores are half right."""
    return (margins > 0) + 0.5 * (margins == 0)


def _better(ranks: np.ndarray) -> np.ndarray:
    """bool[B, K, K]: response i is ranked strictly better than j, and both exist.

    ranks 1 2 2 0 give two pairs, of the first response with the second and the third:

        i \\ j   0 1 2 3
          0     . 1 1 .
          1     . . . .
          2     . . . .
          3     . . . .
    """
    rank_i = ranks[:, :, None]
    rank_j = ranks[:, None, :]
    return (rank_i > 0) & (rank_j > 0) & (rank_i < rank_j)
