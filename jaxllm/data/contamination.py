"""Contamination: how much of an evaluation set stands in the training data, by exact n-grams of tokens."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxllm.data.store import Examples

_CHUNK = 1 << 20  # tokens in memory at a time


def measure_contamination(
    texts: Sequence[Any], training: Iterable[Examples], n: int = 13
) -> dict[str, float]:
    """Shares of the n-grams and of the examples (any of whose n-grams) that are found in the training examples.

    texts: the token ids of each example, without special ones; those shorter than n tokens are only counted. The
    n-grams are compared by 64 bits of hash: the training tokens stream past a sorted array of the evaluation's.
    """
    hashes = [_ngrams(np.array(text, np.int64), n) for text in texts]
    wanted = np.unique(np.concatenate([*hashes, np.zeros(0, np.uint64)]))
    found = np.zeros(len(wanted), bool)
    sieve = np.zeros(
        1 << min(28, max(16, 4 + len(wanted).bit_length())), bool
    )  # most hashes stop here, in the cache
    last = np.uint64(len(sieve) - 1)
    sieve[wanted & last] = True
    for seen in (seen for each in training if len(wanted) for seen in _streamed(each, n)):
        seen = seen[sieve[seen & last]]
        place = np.minimum(np.searchsorted(wanted, seen), len(wanted) - 1)
        found[place[wanted[place] == seen]] = True
    hits = [found[np.searchsorted(wanted, each)] for each in hashes if len(each)]
    shares = (
        {"ngrams": np.concatenate(hits).mean(), "examples": np.mean([hit.any() for hit in hits])}
        if hits
        else {}
    )
    numbers = {name: float(share) for name, share in shares.items()}
    return numbers | {"counted": float(len(hits)), "shorter": float(len(texts) - len(hits))}


def some_documents(held_out: Sequence[Examples], limit: int, begin: int = 1) -> list[np.ndarray]:
    """The tokens of at most so many documents from everywhere in a split, without the `begin` special ones that begin
    them and the one that ends them."""
    share = min(1.0, limit / max(1, sum(len(each.table) for each in held_out)))
    picked = ((each, int(i)) for each in held_out for i in np.arange(0, len(each.table), 1 / share))
    read = lambda each, row: each.tokens.read(row["start"], row["size"].astype(np.int64))[0][
        begin:-1
    ]
    return [read(each, each.table.read(i, i + 1)) for each, i in picked]


def _streamed(each: Examples, n: int) -> Iterator[np.ndarray]:
    """The hashes of all n-grams of a source's examples, about a million at a time."""
    for table in each.table.chunks(1 << 12):
        ends = np.cumsum(table["size"], dtype=np.int64)
        for part in np.split(table, np.searchsorted(ends, np.arange(_CHUNK, ends[-1], _CHUNK))):
            if len(part):
                sizes = part["size"].astype(np.int64)
                tokens, _ = each.tokens.read(part["start"], sizes)
                last = np.repeat(np.cumsum(sizes), sizes)[: max(0, len(tokens) - n + 1)]
                yield _ngrams(tokens, n)[
                    np.arange(len(last)) + n <= last
                ]  # not across two examples


def _ngrams(tokens: np.ndarray, n: int) -> np.ndarray:
    """uint64[len(tokens) - n + 1]: a polynomial of scrambled tokens, modulo 2^64."""
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(
        0x9E3779B97F4A7C15
    )  # the golden ratio
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    total = np.zeros(max(0, len(mixed) - n + 1), np.uint64)
    for k in range(n if len(total) else 0):
        total = total * np.uint64(0xD6E8FEB86659FD93) + mixed[k : k + len(total)]
    return total ^ (total >> np.uint64(32))
