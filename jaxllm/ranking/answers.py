"""The answers of several people to a list of samples: who gets which sample, and what each has answered.

A sample needs one answer; those that are shared among annotators (`overlap`) need more, of different people. A skip is
an answer too. After answers to three of five samples, the second of them skipped:

    sample          0  1  2  3  4        Lee's next sample is 3, the first without an answer: an interrupted session
    rankings.jsonl  0  .  2              resumes there
    skipped.jsonl   .  1  .

While a sample is shown to one annotator, it is not given to another who would answer it in vain. Such claims are in
memory only, and end after ten minutes.
"""

import collections
import hashlib
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from jaxllm.config import InputError
from jaxllm.ranking.answer_files import Answer, AnswerFile, read_answers
from jaxllm.ranking.records import now, pair_agreement
from jaxllm.runtime.store.working import make_durable

# Seconds for which a sample that is shown to somebody is not given to others.
CLAIM_SECONDS = 600
LONGEST_NAME = 40


class Refused(Exception):
    """An answer cannot be taken, since another one is there."""


class Answers:
    """The answers so far. Whoever asks calls `rank`, `skip` or `undo`; each is on disk when it returns.

    Threads may call all methods at the same time.
    """

    samples: list[dict[str, Any]]
    """What is to be ranked: messages, responses and split of each (`records.read_samples`)."""
    needed: int
    """Answers that all samples need together."""
    remaining: int
    """Answers that are still needed."""

    def __init__(
        self,
        directory: epath.PathLike,
        samples: list[dict[str, Any]],
        *,
        seed: int = 0,
        overlap: float = 0.0,
        overlap_annotators: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Reads the answers in `directory`, or creates its two files.

        Args:
          directory: of rankings.jsonl and skipped.jsonl.
          samples: what is to be ranked.
          seed: together with its index decides whether a sample is shared.
          overlap: the share of the samples that several people answer.
          overlap_annotators: how many people that are.
          clock: seconds, from which claims expire.

        Raises:
          InputError: a line is damaged, or the rankings there are of other samples.
        """
        self.samples = samples
        self._clock = clock
        self._lock = threading.Lock()
        self._needed = [
            overlap_annotators if _is_shared(seed, index, overlap) else 1
            for index in range(len(samples))
        ]
        self._rankings = AnswerFile(Path(directory) / "rankings.jsonl")
        self._skipped = AnswerFile(Path(directory) / "skipped.jsonl")
        # By annotator, oldest first.
        self._histories = collections.defaultdict(
            list, read_answers(self._rankings, self._skipped, samples, self._needed)
        )
        # By sample, then by annotator.
        self._by_sample: list[dict[str, Answer]] = [{} for _ in samples]
        for answer in (*self._rankings.answers, *self._skipped.answers):
            self._by_sample[answer.index][answer.annotator] = answer
        # annotator: (index, until when).
        self._claims: dict[str, tuple[int, float]] = {}
        # All samples before this one have the answers they need.
        self._first_open = 0
        self.needed = sum(self._needed)
        self.remaining = sum(map(self._missing, range(len(samples))))

    def next_for(self, annotator: str) -> int | None:
        """The sample to show to an annotator: the one that they see already, or the first that they may answer.

        None: there is nothing for them. All is answered, or others are at what is left, or it needs other people.
        """
        with self._lock:
            index = self._claim_of(annotator)
            if index is None:
                index = self._first_for(annotator)
            if index is None:
                self._claims.pop(annotator, None)
            else:
                self._claim(index, annotator)
            return index

    def rank(
        self,
        index: int,
        ranks: Sequence[int],
        annotator: str,
        *,
        simulated: bool = False,
        note: str = "",
    ) -> bool:
        """Records the ranks of a sample, in the order of its responses: 1 is best, equal is a tie.

        Returns:
          whether the answer is new; the same answer again changes nothing.

        Raises:
          Refused: the annotator has given another answer, or the sample needs no more.
        """
        sample = self.samples[index]
        line = {
            "messages": sample["messages"],
            "responses": sample["responses"],
            "ranks": list(ranks),
            "annotator": annotator,
            "simulated": simulated,
            "time": now(),
            "split": sample["split"],
        }
        with self._lock:
            answer = Answer(index, annotator, tuple(ranks), note)
            return self._add(answer, self._rankings, line, durable=not simulated)

    def skip(self, index: int, annotator: str, note: str = "") -> bool:
        """Leaves a sample without this annotator's ranks; returns and raises as `rank`."""
        with self._lock:
            history = self._histories[annotator]
            after = sum(bool(answer.ranks) for answer in history)
            line = {"index": index, "annotator": annotator, "after": after}
            return self._add(Answer(index, annotator, note=note), self._skipped, line, durable=True)

    def undo(self, index: int, annotator: str) -> None:
        """Forgets an annotator's newest answer if it is to this sample, which is then their next one.

        If they have no answer to it, an earlier call has done the work.

        Raises:
          Refused: they have answered other samples since.
        """
        with self._lock:
            newest = self._newest(annotator)
            if newest and newest.index == index:
                self._remove(newest)
            elif annotator in self._by_sample[index]:
                raise Refused(
                    f"prompt {index}: you have answered others since; undo those answers first"
                )
            if self._is_open(index, annotator):
                self._claim(index, annotator)

    def newest(self, annotator: str) -> int | None:
        """The index of the sample that an annotator answered last; None: there is nothing to undo."""
        with self._lock:
            answer = self._newest(annotator)
            return answer.index if answer else None

    def count(self, annotator: str) -> int:
        """How many answers an annotator has given."""
        with self._lock:
            return len(self._histories[annotator])

    @property
    def num_annotators(self) -> int:
        """How many people have given answers."""
        with self._lock:
            return sum(map(bool, self._histories.values()))

    def agreement(self) -> tuple[float, int] | None:
        """`records.pair_agreement` of the samples that several people have ranked."""
        with self._lock:
            groups = [
                [(answer.annotator, answer.ranks) for answer in answers.values() if answer.ranks]
                for answers in self._by_sample
                if len(answers) > 1
            ]
        return pair_agreement(groups)

    # What follows is called with the lock held.

    def _missing(self, index: int) -> int:
        """How many answers a sample still needs."""
        return max(0, self._needed[index] - len(self._by_sample[index]))

    def _is_open(self, index: int, annotator: str) -> bool:
        return self._missing(index) > 0 and annotator not in self._by_sample[index]

    def _claim(self, index: int, annotator: str) -> None:
        self._claims[annotator] = (index, self._clock() + CLAIM_SECONDS)

    def _claim_of(self, annotator: str) -> int | None:
        """The sample that an annotator sees now, if they may still answer it."""
        index, until = self._claims.get(annotator, (None, 0.0))
        if index is None or not self._is_open(index, annotator):
            return None
        if until > self._clock() or self._missing(index) > self._shown(annotator)[index]:
            return index
        return None

    def _shown(self, annotator: str) -> collections.Counter[int]:
        """To how many others each sample is shown now."""
        now = self._clock()
        return collections.Counter(
            index
            for other, (index, until) in self._claims.items()
            if other != annotator and until > now and self._is_open(index, other)
        )

    def _first_for(self, annotator: str) -> int | None:
        total = len(self.samples)
        while self._first_open < total and not self._missing(self._first_open):
            self._first_open += 1
        shown = self._shown(annotator)
        for index in range(self._first_open, total):
            if self._is_open(index, annotator) and self._missing(index) > shown[index]:
                return index
        return None

    def _newest(self, annotator: str) -> Answer | None:
        # What somebody without a name left is anybody's.
        history = self._histories[annotator] or self._histories[""]
        return history[-1] if history else None

    def _add(self, answer: Answer, file: AnswerFile, line: dict[str, Any], durable: bool) -> bool:
        given = self._by_sample[answer.index].get(answer.annotator)
        if given == answer:
            return False
        if given:
            raise Refused(f"prompt {answer.index}: you have answered it already, in another way")
        if not self._missing(answer.index):
            raise Refused(f"prompt {answer.index}: others have answered it meanwhile")
        file.append(answer, {**line, "note": answer.note} if answer.note else line)
        self._by_sample[answer.index][answer.annotator] = answer
        self._histories[answer.annotator].append(answer)
        self.remaining -= 1
        # A person's work must also survive the loss of this machine, where the run directory is in a store.
        if durable:
            make_durable(file.path)
        return True

    def _remove(self, answer: Answer) -> None:
        file = self._rankings if answer.ranks else self._skipped
        file.remove(answer)
        missing = self._missing(answer.index)
        del self._by_sample[answer.index][answer.annotator]
        self._histories[answer.annotator].pop()
        # An older run may have collected more answers than are needed now.
        self.remaining += self._missing(answer.index) - missing
        self._first_open = min(self._first_open, answer.index)
        make_durable(file.path)


def clean_name(name: str) -> str:
    """A person's name as it is recorded: in one spelling (NFC), without spaces around it.

    Raises:
      InputError: it is not 1 to 40 characters that can be seen.
    """
    name = unicodedata.normalize("NFC", name).strip()
    if not name.isprintable() or not 1 <= len(name) <= LONGEST_NAME:
        raise InputError(
            f"annotator: a name has 1 to {LONGEST_NAME} printable characters; not {name!r:.60}"
        )
    return name


def _is_shared(seed: int, index: int, overlap: float) -> bool:
    """Whether several people answer a sample: sha256(seed, index), as a number in [0, 1), is below `overlap`."""
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    # Python compares the integer with the float exactly.
    return int.from_bytes(digest[:8]) < overlap * 2**64
