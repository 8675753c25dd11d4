"""Contamination: how much of an evaluation set is in the training data, by exact n-grams of tokens."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxllm.data.store import Examples

# Tokens in memory at a time, and rows of a table that are read at once.
_CHUNK = 1 << 20
_ROWS = 1 << 12


def measure_contamination(
    texts: Sequence[Any], training: Iterable[Examples], n: int = 13
) -> dict[str, float]:
    """Measures which n-grams of evaluation texts are in the training examples.

    N-grams are compared by a hash of 64 bits; the training tokens stream past a sorted array of the evaluation's.

    Args:
        texts: the token ids of each evaluation example, without special ones.

    Returns:
        "ngrams": share of the evaluation's n-grams that were found; "examples": share of its examples with any such
        n-gram; "counted" and "shorter": examples with at least n tokens, and with fewer, which are not in the shares.
    """
    hashes = [_ngrams(np.array(text, np.int64), n) for text in texts]
    wanted = np.unique(np.concatenate([*hashes, np.zeros(0, np.uint64)]))
    found = _find(wanted, training, n) if len(wanted) else np.zeros(0, bool)
    hits = [found[np.searchsorted(wanted, ngrams)] for ngrams in hashes if len(ngrams)]
    result = {}
    if hits:
        result["ngrams"] = float(np.concatenate(hits).mean())
        result["examples"] = float(np.mean(list(map(np.any, hits))))
    result["counted"] = float(len(hits))
    result["shorter"] = float(len(texts) - len(hits))
    return result


def _find(wanted: np.ndarray, training: Iterable[Examples], n: int) -> np.ndarray:
    """bool[wanted]: which of these hashes, uint64 and sorted, are among the n-grams of the training examples."""
    found = np.zeros(len(wanted), bool)
    # A table by the low bits, at least 16 entries for each hash and small enough for the CPU's cache: most n-grams
    # of the training data are dismissed here, without a binary search.
    sieve = np.zeros(1 << min(28, max(16, 4 + len(wanted).bit_length())), bool)
    low_bits = np.uint64(len(sieve) - 1)
    sieve[wanted & low_bits] = True
    for examples in training:
        for hashes in _streamed(examples, n):
            candidates = hashes[sieve[hashes & low_bits]]
            position = np.minimum(np.searchsorted(wanted, candidates), len(wanted) - 1)
            found[position[wanted[position] == candidates]] = True
    return found


def some_documents(held_out: Sequence[Examples], limit: int, begin: int = 1) -> list[np.ndarray]:
    """The tokens of at most `limit` documents, evenly spaced over a split.

    begin: number of special tokens that begin a document; they and the one that ends it are left out.
    """
    total = sum(len(examples.table) for examples in held_out)
    share = min(1.0, limit / max(1, total))
    documents = []
    for examples in held_out:
        for number in np.arange(0, len(examples.table), 1 / share).astype(int).tolist():
            row = examples.table.read(number, number + 1)
            tokens, _ = examples.tokens.read(row["start"], row["size"].astype(np.int64))
            documents.append(tokens[begin:-1])
    return documents


def _streamed(examples: Examples, n: int) -> Iterator[np.ndarray]:
    """The hashes of all n-grams of a source's examples, about _CHUNK at a time."""
    for table in examples.table.chunks(_ROWS):
        ends = np.cumsum(table["size"], dtype=np.int64)
        cuts = np.searchsorted(ends, np.arange(_CHUNK, ends[-1], _CHUNK))
        for part in np.split(table, cuts):
            if not len(part):
                continue
            sizes = part["size"].astype(np.int64)
            # Adjacent examples are one read.
            tokens, _ = examples.tokens.read(part["start"], sizes)
            # Where the example of each n-gram ends: an n-gram may not reach into the next example.
            ends_at = np.repeat(np.cumsum(sizes), sizes)[: max(0, len(tokens) - n + 1)]
            yield _ngrams(tokens, n)[np.arange(len(ends_at)) + n <= ends_at]


def _ngrams(tokens: np.ndarray, n: int) -> np.ndarray:
    """uint64[len(tokens) - n + 1]: hashes of the n-grams, a polynomial of scrambled tokens modulo 2^64."""
    # The constants of SplitMix64 (Steele et al. 2014); the first is 2^64 divided by the golden ratio.
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    num_ngrams = max(0, len(mixed) - n + 1)
    total = np.zeros(num_ngrams, np.uint64)
    if num_ngrams:
        for k in range(n):
            total = total * np.uint64(0xD6E8FEB86659FD93) + mixed[k : k + num_ngrams]
    return total ^ (total >> np.uint64(32))
