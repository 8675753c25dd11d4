"""The examples of one split, each content once. Splits and sources without examples are refused or reported."""

import functools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from jaxllm.config import InputError
from jaxllm.data.config import DataConfig
from jaxllm.data.format import Example, assign_splits
from jaxllm.data.sources import digest, dropped, excluded_digests, raw_records, read_records

_MARKED = 'marked "split": "held_out"'


def examples(data: DataConfig, kind: str, split: str) -> Iterator[Example]:
    """The examples of one split ("train" or "held_out"), without exact duplicates.

    This is the pipeline for data that fits in memory, prompts and rankings. `deduplication` follows the same rules on
    disk, and a test compares the two.

    Raises:
        InputError: no sources; a malformed record, with its line; a split without examples; and, at the end, a source
            without examples in the training split.
    """
    if not data.sources:
        raise InputError(
            f"data.sources: is empty, and {kind} examples are needed; name at least one source"
        )
    # Reasons are looked for at the end only: that reads a source again.
    counts = [0] * len(data.sources)
    for example in _distinct(data, kind, split):
        counts[example.source] += 1
        yield example
    if not any(counts):
        raise nothing_there(data, kind, split)
    require_examples(data, kind, split, counts)


def _distinct(data: DataConfig, kind: str, split: str) -> Iterator[Example]:
    held_out = set()
    if split == "train":
        # Two texts in different splits can give the same conversation: it stays held out. So does a ranked prompt.
        for example, side in _all_examples(data, kind):
            if side == "held_out":
                held_out.add(_leak_key(example, kind))
    # 16 bytes of hash for each example, not its text.
    seen: set[bytes] = set()
    for example, side in _all_examples(data, kind):
        if side != split or _leak_key(example, kind) in held_out:
            continue
        key = example.digest()
        if key not in seen:
            seen.add(key)
            yield example


def _all_examples(data: DataConfig, kind: str) -> Iterator[tuple[Example, str | None]]:
    for index, source in enumerate(data.sources):
        yield from assign_splits(data, kind, index, read_records(source))


def _leak_key(example: Example, kind: str) -> bytes:
    """What must not be in both splits: the prompt of a ranking, whatever the responses, or else the whole content."""
    return digest(example.question() if kind == "ranked" else example.content())


def shuffled(stream: Iterable[Example]) -> list[Example]:
    """Examples in the order of their contents' hashes: a fixed shuffle, so the first n are a random sample."""
    # Hashes order prompts alike on every machine, whatever order the files have.
    return sorted(stream, key=Example.digest)


def nothing_there(data: DataConfig, kind: str, split: str) -> InputError:
    """The error for a split without examples; its reasons are those of the first source."""
    paths = ", ".join(source.path for source in data.sources)
    nothing = f"not a single {kind} example in the {split} split"
    if split == "held_out":
        return InputError(f"{paths}: {nothing}; raise data.held_out_fraction or give more text")
    # Texts have no templates or schema that could drop them.
    if kind == "text":
        return InputError(f"{paths}: {nothing}; give text that is not held out")
    reasons = _reasons(data, kind, 0)
    return InputError(f"{paths}: {nothing} ({reasons}); fix the source or give more text")


def require_examples(
    data: DataConfig, kind: str, split: str, counts: Sequence[int], word: str = ""
) -> None:
    """Checks that each source gives examples to a split.

    A source without held-out examples is reported in a line, and so is one whose records all say "held_out".

    Args:
        counts: number of examples, source by source.
        word: what the examples are called in messages, if not by their kind.

    Raises:
        InputError: another source gives no example to the training split; the error counts the reasons.
    """
    nothing = f"not a single {word or kind} example in the {split} split"
    for index, source in enumerate(data.sources):
        if counts[index]:
            continue
        # Whoever marks all records of a source as held out means it.
        if split == "train" and set(_destinations(data, kind, index)) != {_MARKED}:
            reasons = _reasons(data, kind, index)
            raise InputError(f"{source.path}: {nothing} ({reasons}); fix the source or remove it")
        _report(f"data: {source.path}: {nothing}")


def require_room(
    data: DataConfig, kind: str, split: str, found: Iterable[int], kept: Iterable[int], size: int
) -> None:
    """Checks that each source with examples has some of at most `size` tokens; reports it in the held-out split.

    Args:
        found: the source of each example; repetitions do not matter.
        kept: the source of each example that is not too long.

    Raises:
        InputError: all training examples of a source are too long.
    """
    for index in sorted(set(found) - set(kept)):
        path = data.sources[index].path
        long = f"every {kind} example of the {split} split is longer than {size} tokens"
        # In training a source would silently have no part; in evaluation it only makes the sample smaller.
        if split == "train":
            raise InputError(f"{path}: {long}; raise the length or remove the source")
        _report(f"data: {path}: {long}")


def _reasons(data: DataConfig, kind: str, index: int) -> str:
    """Why the records of a source give no training example, with counts; the source is read again."""
    source = data.sources[index]
    excluded = excluded_digests(source)
    counts = Counter[str]()
    for record in raw_records(source):
        reason = dropped(source, record, excluded)
        if reason:
            counts[reason] += 1
    counts += _destinations(data, kind, index)
    if not counts:
        return "it has no records"
    return "records: " + ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def _destinations(data: DataConfig, kind: str, index: int) -> Counter[str]:
    """Counts of where the records of a source that are not dropped went instead of into training."""
    counts = Counter[str]()
    for record in read_records(data.sources[index]):
        # One record at a time, to have its own "split" next to the example's.
        ((_, side),) = assign_splits(data, kind, index, [record])
        counts[_destination(record.fields.get("split"), side)] += 1
    return counts


def _destination(given: str | None, side: str | None) -> str:
    if given == "held_out":
        return _MARKED
    if side == "held_out":
        return "held out by the hash of their content"
    # A record in the training split is here only if an equal one of another source came first.
    return "in another source too" if side else "with a prompt that is held out"


@functools.cache  # several stages read a split, in one process
def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
