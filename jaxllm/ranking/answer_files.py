"""rankings.jsonl and skipped.jsonl: one line for each answer, in the order in which the answers came.

A line of rankings.jsonl holds its sample, and not the sample's number:

    rankings.jsonl   {"messages": [...], "responses": [...], "ranks": [...], "annotator": "Lee", ...}
    skipped.jsonl    {"index": 1, "annotator": "Lee", "after": 1}

"after" is how many rankings that annotator had given before. Both files together then tell which of an annotator's
answers is the newest, which is the one that an undo takes back.

Lines of older versions have only the index. One person at a time answered then, sample by sample: such a line is of
the person who ranked the sample before it, or after it if it is the first. Where nobody has ranked anything, it is an
answer of a person named "", which anybody may take back.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from jaxllm.config import InputError
from jaxllm.ranking.records import read_lines, read_rankings
from jaxllm.runtime.console import console
from jaxllm.runtime.files import json_line, write_whole


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one annotator has said of one sample."""

    index: int
    """The sample's number."""
    annotator: str
    """Who."""
    ranks: tuple[int, ...] = ()
    """int[K], 1 is best, equal is a tie, in the order of the sample's responses; empty: skipped."""
    note: str = ""
    """A remark."""


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a line to a file that exists, all of it or nothing; it is on the disk when this returns."""
    size = path.stat().st_size
    try:
        # errors: a lone surrogate, which JSON may hold and UTF-8 may not, becomes "?".
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(json_line(line))
            file.flush()
            os.fsync(file.fileno())  # a person's work must survive a power cut
    except BaseException:
        # A part of a line, as a full disk leaves it, would damage the next one.
        os.truncate(path, size)
        raise


class AnswerFile:
    """A file with one line for each answer."""

    path: Path
    """Where it is."""
    answers: list[Answer]
    """The answers of its lines."""

    def __init__(self, path: Path):
        """Opens the file, which is made if it is missing; a last line cut in the middle is dropped."""
        self.path = path
        self.answers = []
        _drop_partial_line(path)

    def append(self, answer: Answer, line: Mapping[str, Any]) -> None:
        """Adds a line, which is on the disk when this returns."""
        append_line(self.path, line)
        self.answers.append(answer)

    def remove(self, answer: Answer) -> None:
        """Takes an answer's line out."""
        position = self.answers.index(answer)
        # Bytes, since str.splitlines also cuts at U+2028. The reader passes over empty lines.
        lines = [line for line in self.path.read_bytes().split(b"\n") if line.strip()]
        del lines[position]
        write_whole(self.path, b"".join(line + b"\n" for line in lines))
        del self.answers[position]


@dataclasses.dataclass(frozen=True)
class _Skip:
    """A line of skipped.jsonl."""

    index: int
    annotator: str | None
    """None: an older version wrote the line."""
    after: int
    """How many rankings the annotator had given before."""


def read_answers(
    rankings: AnswerFile,
    skipped: AnswerFile,
    samples: Sequence[Mapping[str, Any]],
    needed: Sequence[int],
) -> dict[str, list[Answer]]:
    """Fills the files' answers from their lines.

    Args:
      rankings: of rankings.jsonl.
      skipped: of skipped.jsonl.
      samples: what is ranked.
      needed: how many answers each sample needs.

    Returns:
      each annotator's answers, oldest first.

    Raises:
      InputError: a line is damaged, or the answers are of other samples.
    """
    skips = [_read_skip(line, where) for line, where in read_lines(skipped.path)]
    matching = _Matching(rankings.path.parent, samples, needed)
    for skip in skips:
        matching.skip(skip)
    for line in read_rankings(rankings.path):
        index = matching.match(line)
        answer = Answer(index, line["annotator"], tuple(line["ranks"]), line.get("note", ""))
        rankings.answers.append(answer)
    owned = [_with_owner(skip, rankings.answers) for skip in skips]
    skipped.answers += [Answer(index, owner) for index, owner, _ in owned]
    return _histories(rankings.answers, skipped.answers, [after for _, _, after in owned])


class _Matching:
    """Finds the samples of the lines, by their content."""

    def __init__(
        self, directory: Path, samples: Sequence[Mapping[str, Any]], needed: Sequence[int]
    ):
        self._directory = directory
        self._needed = needed
        # Who has answered each sample.
        self._annotators: list[set[str | None]] = [set() for _ in samples]
        # Several samples may be identical.
        self._places: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            self._places.setdefault(_content(sample), []).append(index)

    def skip(self, skip: _Skip) -> None:
        """Notes that a sample was skipped."""
        if not 0 <= skip.index < len(self._annotators):
            raise self._other_samples()
        if skip.annotator in self._annotators[skip.index]:
            raise InputError(
                f"{self._directory}/skipped.jsonl: names prompt {skip.index} twice; remove a line"
            )
        self._annotators[skip.index].add(skip.annotator)

    def match(self, line: Mapping[str, Any]) -> int:
        """The index of the sample that a ranking is of."""
        # An older line of skipped.jsonl is everybody's: the sample was not asked again.
        free = [
            index
            for index in self._places.get(_content(line), ())
            if not {line["annotator"], None} & self._annotators[index]
        ]
        if not free:
            raise self._other_samples()
        # The first of those that need most: no other answer of this annotator could go there.
        index = max(free, key=lambda i: self._needed[i] - len(self._annotators[i]))
        self._annotators[index].add(line["annotator"])
        return index

    def _other_samples(self) -> InputError:
        return InputError(
            f"{self._directory}: holds rankings of other samples; remove that directory to rank again"
        )


def _content(fields: Mapping[str, Any]) -> str:
    return json.dumps([fields[name] for name in ("messages", "responses", "split")], sort_keys=True)


def _read_skip(line: Mapping[str, Any], where: str) -> _Skip:
    # Not isinstance(index, int), which holds for a bool as well.
    index, annotator, after = line.get("index"), line.get("annotator"), line.get("after", 0)
    if type(index) is not int or type(after) is not int:
        raise InputError(
            f"{where}: index: must be the number of a prompt that was skipped; remove the line"
        )
    if annotator is not None and not isinstance(annotator, str):
        raise InputError(f"{where}: annotator: must be the name of who skipped; remove the line")
    return _Skip(index, annotator, after)


def _with_owner(skip: _Skip, rankings: Sequence[Answer]) -> tuple[int, str, int]:
    """(index, annotator, after) of a skip, also of one that an older version wrote."""
    if skip.annotator is not None or not rankings:
        return skip.index, skip.annotator or "", skip.after
    before = [answer for answer in rankings if answer.index < skip.index]
    if not before:
        return skip.index, min(rankings, key=lambda answer: answer.index).annotator, 0
    # Of several rankings of one sample the first: those of older versions come first in the file.
    neighbor = max(before, key=lambda answer: answer.index)
    until = rankings[: rankings.index(neighbor) + 1]
    after = sum(answer.annotator == neighbor.annotator for answer in until)
    return skip.index, neighbor.annotator, after


def _histories(
    rankings: Sequence[Answer], skipped: Sequence[Answer], after: Sequence[int]
) -> dict[str, list[Answer]]:
    """Each annotator's answers, oldest first: a skip comes after so many rankings of its annotator."""
    keyed: dict[str, list[tuple[tuple[int, int], Answer]]] = {}
    for answer in rankings:
        # Ranking number k comes after the skips that were given after k rankings.
        own = keyed.setdefault(answer.annotator, [])
        own.append(((len(own), 1), answer))
    for answer, count in zip(skipped, after, strict=True):
        keyed.setdefault(answer.annotator, []).append(((count, 0), answer))
    histories = {}
    for annotator, pairs in keyed.items():
        pairs.sort(key=lambda pair: pair[0])
        histories[annotator] = [answer for _, answer in pairs]
    return histories


def count_skipped(directory: epath.PathLike) -> int:
    """The number of answers in a directory that are skips."""
    path = epath.Path(directory) / "skipped.jsonl"
    return len(read_lines(path)) if path.exists() else 0


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
