"""Soft targets of packed rows, on disk: the tokens that a teacher finds most likely at every target.

They are in parts of some rows each, which are written completely or not at all (`cache`), so that a pass over all rows that
is cut goes on where it was:

    cache/teacher-KEY-00000/     the first rows
        begins                   int64[rows + 1], the number of targets before each row of the part
        kept                     [targets, K] of (id, log-probability)
    cache/teacher-KEY-00001/     the next ones

Ids take as few bytes as the vocabulary allows. Log-probabilities are float32. In float16 each would be off by up to 2^-11 of
itself; the probability of all other tokens is 1 minus their sum, and where a teacher is sure it is smaller than that error.
"""

import functools
from pathlib import Path

import numpy as np

from jaxllm.data.cache import ArrayFile, get_or_build, open_valid
from jaxllm.data.deduplication import MAX_OPEN_FILES
from jaxllm.data.packing import Row

# Of a part, if every token of its rows is a target.
_PART_BYTES = 1 << 28
_BEGIN = np.dtype("<i8")


class KeptTargets:
    """The soft targets of the rows of one source.

    folder: the cache; key: names rows, teacher and top_k; num_rows, length: of the rows, in tokens; top_k: tokens kept of
    every target; vocab_size: of the teacher.
    """

    def __init__(
        self, folder: Path, key: str, num_rows: int, length: int, top_k: int, vocab_size: int
    ):
        self.key = key
        self.num_rows = num_rows
        self.top_k = top_k
        smallest = np.min_scalar_type(vocab_size - 1).newbyteorder("<")
        self.dtype = np.dtype([("id", smallest), ("logprob", "<f4")])
        self.rows_per_part = max(1, _PART_BYTES // (length * top_k * self.dtype.itemsize))
        self._folder = folder
        # Parts are read in any order and by several threads; the cache closes files that are not in use.
        self._opened = functools.lru_cache(maxsize=MAX_OPEN_FILES)(ArrayFile)

    @property
    def num_parts(self) -> int:
        return -(-self.num_rows // self.rows_per_part)

    def folder(self, part: int) -> Path:
        """The folder of a part."""
        return self._folder / f"teacher-{self.key}-{part:05}"

    def numbers(self, part: int) -> np.ndarray:
        """The numbers of the rows of a part."""
        first = part * self.rows_per_part
        return np.arange(first, min(first + self.rows_per_part, self.num_rows))

    def has(self, part: int) -> bool:
        """Whether a part is there; a damaged one is reported and removed."""
        return open_valid(self.folder(part)) is not None

    def records(self, ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """What is written of targets: [targets, K] of (id, log-probability)."""
        records = np.empty(ids.shape, self.dtype)
        records["id"] = ids
        records["logprob"] = logprobs
        return records

    def write(self, part: int, counts: np.ndarray, records: np.ndarray) -> None:
        """Write a part: the number of targets of each of its rows, and the `records` of all of them in order."""

        def make(to: Path) -> dict[str, int]:
            begins = np.cumsum([0, *counts.tolist()], dtype=_BEGIN)
            (to / "begins").write_bytes(begins.tobytes())
            (to / "kept").write_bytes(records.tobytes())
            return {"rows": len(counts), "targets": len(records)}

        get_or_build(self.folder(part), make)

    def row(self, index: int, loss_mask: np.ndarray) -> Row:
        """{teacher_ids: int32[T, K], teacher_logprobs: float32[T, K]} of row `index`.

        loss_mask: bool[T], which tokens of the row are targets. The arrays have what the teacher thinks of a token beside
        the token itself; zeros where it is no target.
        """
        part, number = divmod(index, self.rows_per_part)
        folder = self.folder(part)
        first, stop = self._opened(folder / "begins", _BEGIN).read(number, number + 2).tolist()
        kept = self._opened(folder / "kept", self.dtype)
        found = kept.read(first * self.top_k, stop * self.top_k).reshape(-1, self.top_k)
        ids = np.zeros((len(loss_mask), self.top_k), np.int32)
        logprobs = np.zeros(ids.shape, np.float32)
        ids[loss_mask] = found["id"]
        logprobs[loss_mask] = found["logprob"]
        return {"teacher_ids": ids, "teacher_logprobs": logprobs}
