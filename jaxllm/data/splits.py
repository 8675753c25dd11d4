"""The examples of one split, each content once; a split or a source without a single one is refused or named."""

import functools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from jaxllm.config import InputError
from jaxllm.data.format import Example, assign_splits
from jaxllm.data.sources import (
    DataConfig,
    digest,
    dropped,
    excluded_digests,
    raw_records,
    read_records,
)

_MARKED = 'marked "split": "held_out"'


def examples(data: DataConfig, kind: str, split: str) -> Iterator[Example]:
    """The examples of one split ("train" or "held_out"), exact duplicates removed.

    Raises InputError: no sources, a malformed record with its place, a split without a single example, and, at the
    end, a source without one in the training split.
    """
    if not data.sources:
        raise InputError(
            f"data.sources: none given, and {kind} examples are needed; name at least one source"
        )
    counts = [0] * len(data.sources)
    for example in _stream(data, kind, split):
        counts[example.source] += 1
        yield example
    if not any(counts):
        raise nothing_there(data, kind, split)
    require_examples(data, kind, split, counts)


def _stream(data: DataConfig, kind: str, split: str) -> Iterator[Example]:
    # Two texts on different sides may give the same conversation: it stays held out. So does a ranked prompt.
    every = lambda: (
        pair
        for i, s in enumerate(data.sources)
        for pair in assign_splits(data, kind, i, read_records(s))
    )
    held_out = (
        {_leak(e, kind) for e, side in every() if side == "held_out"} if split == "train" else set()
    )
    seen: set[bytes] = set()
    for example, side in every():
        if (
            side == split
            and _leak(example, kind) not in held_out
            and (key := example.digest()) not in seen
        ):
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
    return InputError(
        f"{where}: {nothing} ({_reasons(data, kind, 0)}); mend the source or give more text"
    )


def require_examples(
    data: DataConfig, kind: str, split: str, counts: Sequence[int], word: str = ""
) -> None:
    """Check that each source gives examples to a split; counts: how many, source by source.

    Raises InputError with the reasons where one gives none to train on, unless its records themselves say "held_out".
    Such a source, and one without held-out examples, is named in a line. word: what the examples are called there.
    """
    nothing = f"not a single {word or kind} example in the {split} split"
    for index, source in enumerate(data.sources):
        if counts[index]:
            continue
        if split == "train" and {*_sides(data, kind, index)} != {_MARKED}:
            why = _reasons(data, kind, index)
            raise InputError(f"{source.path}: {nothing} ({why}); mend the source or leave it out")
        _say(f"data: {source.path}: {nothing}")


def require_room(
    data: DataConfig, kind: str, split: str, found: Iterable[int], kept: Iterable[int], size: int
) -> None:
    """Check that each source has examples of at most `size` tokens; found, kept: the sources of all and of those.

    Raises InputError where one has none of them to train on; in the held-out split it is named in a line.
    """
    for index in sorted({*found} - {*kept}):
        long = f"every {kind} example of the {split} split is longer than {size} tokens"
        if split == "train":
            raise InputError(
                f"{data.sources[index].path}: {long}; raise the length or leave the source out"
            )
        _say(f"data: {data.sources[index].path}: {long}")


def _reasons(data: DataConfig, kind: str, index: int) -> str:
    """Why the records of a source, which are read again, give no example to train on, with their numbers."""
    source = data.sources[index]
    excluded = excluded_digests(source)
    why = Counter(
        filter(None, (dropped(source, record, excluded) for record in raw_records(source)))
    )
    numbers = ", ".join(
        f"{count:,} {reason}" for reason, count in (why + _sides(data, kind, index)).items()
    )
    return f"records: {numbers}" if numbers else "it has no records"


def _sides(data: DataConfig, kind: str, index: int) -> Counter[str]:
    """Where the records of a source that are not dropped went instead of into training."""
    found = Counter[str]()
    for record in read_records(data.sources[index]):
        ((_, side),) = assign_splits(data, kind, index, [record])
        found[_reason(record.fields.get("split"), side)] += 1
    return found


def _reason(given: str | None, side: str | None) -> str:
    if given == "held_out":
        return _MARKED
    if side == "held_out":
        return "held out by the hash of their content"
    return "in another source too" if side else "with a prompt that is held out"


@functools.cache
def _say(line: str) -> None:
    """Once in a process: a split is read by several stages."""
    print(line, file=sys.stderr, flush=True)
