"""The answers to a list of samples, in two files that grow by one line per answer.

The next sample is the first without an answer, so that an interrupted session resumes there. After answers to three
of five samples, the second of them skipped:

    sample          0  1  2  3  4
    rankings.jsonl  0  .  2              in the order of the samples, without their numbers
    skipped.jsonl   .  1  .              {"index": 1}
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from jaxllm.config import InputError
from jaxllm.ranking.records import now, read_lines, read_rankings
from jaxllm.runtime.console import console
from jaxllm.runtime.files import json_line, write_whole
from jaxllm.runtime.store.working import make_durable


class Answers:
    """The answers so far. Whoever asks calls `rank`, `skip` or `undo`; each is on disk when it returns."""

    samples: list[dict[str, Any]]
    """What is to be ranked: messages, responses and split of each (`records.read_samples`)."""
    count: int
    """Samples answered, ranked or skipped; also the index of the next one."""
    skipped: list[int]
    """Indices of the samples skipped."""

    def __init__(self, directory: epath.PathLike, samples: list[dict[str, Any]]):
        """Read the answers in `directory`, or create its two files.

        Raises:
          InputError: a line is damaged, or the rankings there are of other samples.
        """
        self.samples = samples
        self._rankings = Path(directory) / "rankings.jsonl"
        self._skipped = Path(directory) / "skipped.jsonl"
        _drop_partial_line(self._rankings)
        _drop_partial_line(self._skipped)
        self.skipped = [_skipped_index(line, where) for line, where in read_lines(self._skipped)]
        rankings = read_rankings(self._rankings)
        # Every answer is one line in one of the two files.
        self.count = len(rankings) + len(self.skipped)
        # Compared by content, since rankings.jsonl has no sample numbers.
        expected = [
            sample for i, sample in enumerate(samples[: self.count]) if i not in self.skipped
        ]
        ranked = [
            {name: ranking[name] for name in ("messages", "responses", "split")}
            for ranking in rankings
        ]
        if ranked != expected:
            raise InputError(
                f"{directory}: holds rankings of other samples; remove that directory to rank again"
            )

    def rank(self, ranks: Sequence[int], annotator: str, simulated: bool) -> None:
        """Record the ranks of the next sample, in the order of its responses: 1 is best, equal is a tie."""
        sample = self.samples[self.count]
        line = {
            "messages": sample["messages"],
            "responses": sample["responses"],
            "ranks": list(ranks),
            "annotator": annotator,
            "simulated": simulated,
            "time": now(),
            "split": sample["split"],
        }
        self._append(self._rankings, line)

    def skip(self) -> None:
        """Leave the next sample without ranks."""
        index = self.count
        self._append(self._skipped, {"index": index})  # increments count
        self.skipped.append(index)

    def undo(self) -> None:
        """Forget the answer to the previous sample, which must exist."""
        self.count -= 1
        path = self._rankings
        if self.count in self.skipped:
            self.skipped.remove(self.count)
            path = self._skipped
        # The newest answer is the last line of its file. Bytes, since str.splitlines also cuts at U+2028.
        lines = path.read_bytes().splitlines(keepends=True)
        write_whole(path, b"".join(lines[:-1]))
        make_durable(path)

    def _append(self, path: Path, line: Mapping[str, Any]) -> None:
        # errors: a lone surrogate, which JSON may hold and UTF-8 may not, becomes "?".
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(json_line(line))
            file.flush()
            os.fsync(file.fileno())  # a person's work must survive a power cut
        # And the loss of this machine, where the run directory is in a store.
        if not line.get("simulated"):
            make_durable(path)
        self.count += 1


def count_skipped(directory: epath.PathLike) -> int:
    """The number of samples skipped in a directory of answers."""
    path = epath.Path(directory) / "skipped.jsonl"
    return len(read_lines(path)) if path.exists() else 0


def _skipped_index(line: Mapping[str, Any], where: str) -> int:
    # Not isinstance(index, int), which holds for a bool as well.
    index = line.get("index")
    if type(index) is not int:
        raise InputError(
            f"{where}: index: must be the number of a prompt that was skipped; remove the line"
        )
    return index


def _drop_partial_line(path: Path) -> None:
    """Drop a last line that was cut while it was written: it has no newline. Create the file if it does not exist."""
    data = path.read_bytes() if path.exists() else b""
    # A line is complete when its newline is there: it is written last.
    complete = data[: data.rfind(b"\n") + 1]
    if complete != data:
        console.print(
            f"rank: {path}: the last line was cut in the middle and is dropped", soft_wrap=True
        )
    if complete != data or not path.exists():
        write_whole(path, complete)
