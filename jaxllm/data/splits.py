"""The examples of one split, each content once; a split or a source without a single one is refused or named."""

import functools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from jaxllm.config import InputError
from jaxllm.data.format import Example, sided
from jaxllm.data.sources import DataConfig, digest, dropped, excluded_digests, raw_records, read_records

_MARKED = 'marked "split": "held_out"'


def examples(data: DataConfig, kind: str, split: str) -> Iterator[Example]:
    """The examples of one split ("train" or "held_out"), exact duplicates removed.

    Raises InputError: no sources, a malformed record with its place, a split without a single example, and, at the
    end, a source without one in the training split.
    """
    if not data.sources:
        raise InputError(f"data.sources: none given, and {kind} examples are needed; name at least one source")
    counts = [0] * len(data.sources)
    for example in _stream(data, kind, split):
        counts[example.source] += 1
        yield example
    if not any(counts):
        raise nothing_there(data, kind, split)
    require_examples(data, kind, split, counts)


def _stream(data: DataConfig, kind: str, split: str) -> Iterator[Example]:
    # Two texts on different sides may give the same conversation: it stays held out. So does a ranked prompt.
    every = lambda: (pair for i, s in enumerate(data.sources) for pair in sided(data, kind, i, read_records(s)))
    held_out = {_leak(e, kind) for e, side in every() if side == "held_out"} if split == "train" else set()
    seen: set[bytes] = set()
    for example, side in every():
        if side == split and _leak(example, kind) not in held_out and (key := example.digest()) not in seen:
            seen.add(key)
            yield example


def _leak(example: Example, kind: str) -> bytes:
    """What must not be in both splits: of a ranking its prompt, whatever the responses; else the whole content."""
    return digest(example.question() if kind == "ranked" else example.content())


def shuffled(stream: Iterable[Example]) -> list[Example]:
    """Examples in the order of their contents' hashes: a fixed shuffle, so that the first n are a sample of all."""
    return sorted(stream, key=Example.digest)


def nothing_there(data: DataConfig, kind: str, split: str) -> InputError:
    """What is wrong where no source has an example; the reasons are those of the first."""
    where = ", ".join(source.path for source in data.sources)
    nothing = f"not a single {kind} example in the {split} split"
    if split == "held_out":
        return InputError(f"{where}: {nothing}; raise data.held_out_fraction or give more text")
    if kind == "text":
        return InputError(f"{where}: {nothing}; give text that is not held out")
    return InputError(f"{where}: {nothing} ({_spelled(_reasons(data, kind, 0))}); give text that is not empty")


def require_examples(data: DataConfig, kind: str, split: str, counts: Sequence[int], word: str = "") -> None:
    """Each source has examples (counts) in a split. Raises InputError with the reasons on one that gives none to train
    on; one that has none to hold out, or is held out by its own records' word, is named in a line.

    word: what the examples are called there, where not by their kind.
    """
    nothing = f"not a single {word or kind} example in the {split} split"
    for index, source in enumerate(data.sources):
        if counts[index]:
            continue
        if split == "train" and {*(reasons := _reasons(data, kind, index))} != {_MARKED}:
            raise InputError(f"{source.path}: {nothing} ({_spelled(reasons)}); mend the source or leave it out")
        _say(f"data: {source.path}: {nothing}")


def require_room(data: DataConfig, kind: str, split: str, found: Iterable[int], kept: Iterable[int], size: int) -> None:
    """Of each source that has examples some are not longer than `size` tokens; found, kept: the sources of examples
    before and after the longer ones are dropped. Raises InputError on one to train on; another one is named."""
    for index in sorted({*found} - {*kept}):
        long = f"every {kind} example of the {split} split is longer than {size} tokens"
        if split == "train":
            raise InputError(f"{data.sources[index].path}: {long}; raise the length or leave the source out")
        _say(f"data: {data.sources[index].path}: {long}")


def _reasons(data: DataConfig, kind: str, index: int) -> Counter[str]:
    """Why each record of a source gives no example to train on; they are read again."""
    source = data.sources[index]
    excluded = excluded_digests(source)
    found = Counter(filter(None, (dropped(source, record, excluded) for record in raw_records(source))))
    for record in read_records(source):
        ((_, side),) = sided(data, kind, index, [record])
        found[_reason(record.fields.get("split"), side)] += 1
    return found


def _reason(given: str | None, side: str | None) -> str:
    if given == "held_out":
        return _MARKED
    if side == "held_out":
        return "held out by the hash of their content"
    return "in another source too" if side else "with a prompt that is held out"


def _spelled(reasons: Counter[str]) -> str:
    numbers = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    return f"records: {numbers}" if numbers else "it has no records"


@functools.cache
def _say(line: str) -> None:
    """Once in a process: a split is read by several stages."""
    print(line, file=sys.stderr, flush=True)
