"""Orders of responses: typed by a person, such as "B>A=D>C", as ranks, and as shown on a screen."""

import string
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from jaxllm.config import InputError

# As many responses as a person can name with one letter.
LABELS = string.ascii_uppercase


def parse_order(text: str, num_responses: int) -> list[int]:
    """Ranks of responses A, B, ... (at most 26) from an order such as ``B>A=D>C``.

    The labels, best first, are joined by ``>`` (better than) or ``=`` (as good as, a tie). Case, spaces and full-width
    characters do not matter. Rank 1 is best, and ranks have no gaps.

    >>> parse_order("B>A=D>C", 4)
    [2, 1, 3, 2]
    >>> parse_order("ｃ ＞ a ＝ b", 3)
    [2, 2, 1]

    Raises:
      InputError: a label is missing, unknown or given twice.
    """
    labels = list(LABELS[:num_responses])
    ranks: dict[str, int] = {}
    # NFKC turns full-width letters and signs, which Chinese keyboards type, into ASCII.
    compact = "".join(unicodedata.normalize("NFKC", text).upper().split())
    for rank, group in enumerate(compact.split(">"), start=1):
        for label in group.split("="):
            fault = _label_fault(label, labels, ranks)
            if fault:
                raise InputError(f"order {text.strip()!r}: {fault}")
            ranks[label] = rank
    missing = [label for label in labels if label not in ranks]
    if missing:
        raise InputError(
            f"order {text.strip()!r}: {', '.join(missing)} is missing; name every response once"
        )
    return [ranks[label] for label in labels]


def _label_fault(label: str, labels: Sequence[str], ranks: Mapping[str, int]) -> str:
    """What is wrong with the next label of an order, and how to fix it; empty if nothing is."""
    if label not in labels:
        given = repr(label) if label else "an empty label"
        return f"{given} is not one of {', '.join(labels)}; write it as {'>'.join(labels)}"
    if label in ranks:
        return f"{label} is given twice; name every response once"
    return ""


def shown_order(seed: int, index: int, num_responses: int) -> np.ndarray:
    """The order int[K] in which the responses to sample `index` are shown: label j stands for response order[j].

    It is shuffled, so that the position of a response says nothing, and depends on the seed and the index only, so
    that a resumed session shows the same.
    """
    # One generator per sample, not one for all: the order must not depend on how many were shown before.
    return np.random.default_rng([seed, index]).permutation(num_responses)


def unshuffle(shown_ranks: Sequence[int], order: np.ndarray) -> list[int]:
    """Ranks of the responses as stored, from their ranks as shown in `order`.

        order          2 0 1      A is response 2, B is response 0, C is response 1
        ranks as shown 1 3 2
        ranks          3 2 1

    >>> unshuffle([1, 3, 2], np.array([2, 0, 1]))
    [3, 2, 1]
    """
    ranks = np.empty(len(order), int)
    # What is shown at position j is response order[j], so its rank goes there.
    ranks[order] = shown_ranks
    return ranks.tolist()
