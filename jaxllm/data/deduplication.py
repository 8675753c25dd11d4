"""Joins units into a store: decides for each content which of its examples stays, and in which split.

Of examples with equal content the first held-out one stays, and if none is held out the first one. So a content that
is held out anywhere is in no training batch. Five examples of two units (letters: contents; t: train, h: held out):

    content    A B A | C A        sides    t t t | t h        stays    . t . | t h

Memory does not grow with the corpus: hashes are compared range by range, about RUN of them at a time.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data import units as unit_files
from jaxllm.data.cache import ArrayFile
from jaxllm.data.units import EXAMPLE, KEY, SPLITS, Unit

# Systems limit the number of open files.
MAX_OPEN_FILES = 256
_TRAIN = 1 + SPLITS.index("train")
Opener = Callable[[Path, np.dtype], ArrayFile]


class _Run(NamedTuple):
    """Keys [begin, begin + size) of a unit's file, which are sorted by hash."""

    unit: int
    path: Path
    begin: int
    size: int
    first: int  # number of its first example among those of all units


def join_units(
    folder: Path, units: Sequence[Unit], first_tokens: np.ndarray, kind: str
) -> dict[str, Any]:
    """Writes into a folder, for each split and source, the EXAMPLE table of what stays, in the order of the units.

    Args:
        first_tokens: int64[units]: number of each unit's first token among the tokens of all units.

    Returns:
        {"counts": {"SPLIT-SOURCE": [tokens, bytes of the targets]}}
    """
    opened: Opener = functools.lru_cache(maxsize=MAX_OPEN_FILES)(ArrayFile)
    runs = _all_runs(units, opened)
    # Number of each unit's first file part among the parts of all units.
    first_parts = np.cumsum([0, *(len(unit.parts) for unit in units)])
    counts = {f"{split}-{unit.source}": [0, 0] for unit in units for split in SPLITS}
    with contextlib.ExitStack() as stack:
        stays = stack.enter_context(open(folder / "stays", "w+b"))
        _write_stays(stays.fileno(), runs, opened)
        files = {}
        for name in counts:
            files[name] = stack.enter_context(open(folder / name, "wb"))
        # Runs are in the order of the examples, so the tables are too.
        for run in runs:
            unit = units[run.unit]
            table = opened(unit.folder / "examples", EXAMPLE[kind])
            # Numbers within the unit become numbers within the store.
            examples = table.read(run.begin, run.begin + run.size).copy()
            examples["start"] += int(first_tokens[run.unit])
            if kind == "chat":
                examples["part"] += int(first_parts[run.unit])
            sides = _read_stays(stays.fileno(), run, opened)
            for side, split in enumerate(SPLITS, start=1):
                name = f"{split}-{unit.source}"
                kept = examples[sides == side]
                files[name].write(kept.tobytes())
                counts[name][0] += int(kept["size"].sum(dtype=np.int64))
                counts[name][1] += int(kept["bytes"].sum(dtype=np.int64))
    # One byte for each example of the corpus: on disk only while it is needed.
    os.remove(folder / "stays")
    return {"counts": counts}


def _all_runs(units: Sequence[Unit], opened: Opener) -> list[_Run]:
    runs = []
    first = 0
    for number, unit in enumerate(units):
        path = unit.folder / "keys"
        num_keys = len(opened(path, KEY))
        for begin in range(0, num_keys, unit_files.RUN):
            size = min(unit_files.RUN, num_keys - begin)
            runs.append(_Run(number, path, begin, size, first))
            first += size
    return runs


def _write_stays(stays: int, runs: Sequence[_Run], opened: Opener) -> None:
    """Writes into the file `stays` (a descriptor) one byte per key of all runs, in their order: its side, or 0 to drop.

    The hashes are cut into ranges of equal width. Hashes are uniform, so a range holds about RUN keys; and equal
    contents have equal hashes, so each range is decided by itself:

        run 0   01 17 | 40 7f | 9a c3          range 0: 01 17 05
        run 1   05    | 40 52 | 88             range 1: 40 7f 40 52, one 40 is dropped
    """
    total = sum(run.size for run in runs)
    num_ranges = max(1, total // unit_files.RUN)
    limits = np.array([2**64 * i // num_ranges for i in range(1, num_ranges)], np.uint64)
    # int64[runs, ranges + 1]: where each run is cut.
    cuts = np.zeros((len(runs), num_ranges + 1), np.int64)
    for row, run in zip(cuts, runs, strict=True):
        hashes = _read_keys(run, 0, run.size, opened)["high"]
        row[1:-1] = np.searchsorted(hashes, limits)
        row[-1] = run.size
    for begins, ends in itertools.pairwise(cuts.T if runs else ()):
        keys = []
        numbers = []
        for run, begin, end in zip(runs, begins, ends, strict=True):
            keys.append(_read_keys(run, begin, end, opened))
            # int64: `index` is uint32, which the examples of all units can exceed.
            numbers.append(np.int64(run.first) + keys[-1]["index"])
        sides = _decide(np.concatenate(keys), np.concatenate(numbers))
        parts = np.split(sides, np.cumsum(ends - begins)[:-1])
        for run, begin, part in zip(runs, begins, parts, strict=True):
            os.pwrite(stays, part.tobytes(), run.first + int(begin))


def _decide(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """uint8[keys]: the side of the examples that stay, and 0 for those that are dropped.

    Args:
        keys: KEY[keys], all of some contents.
        numbers: int64[keys]: the numbers of their examples; of equal ones the lowest wins.
    """
    # The last key of lexsort is the most significant: by content, then held-out ones first, then by number.
    order = np.lexsort((numbers, keys["side"] == _TRAIN, keys["low"], keys["high"]))
    contents = keys[["high", "low"]][order]
    is_first = np.ones(len(keys), bool)
    is_first[1:] = contents[1:] != contents[:-1]
    winners = order[is_first]
    sides = np.zeros(len(keys), np.uint8)
    sides[winners] = keys["side"][winners]
    return sides


def _read_stays(stays: int, run: _Run, opened: Opener) -> np.ndarray:
    """uint8[run.size]: what `_write_stays` wrote for a run, in the order of its examples."""
    index = _read_keys(run, 0, run.size, opened)["index"]
    sides = np.zeros(run.size, np.uint8)
    # Written in the order of the sorted keys; `index` is each key's place before sorting.
    sides[index] = np.frombuffer(os.pread(stays, run.size, run.first), np.uint8)
    return sides


def _read_keys(run: _Run, begin: int, end: int, opened: Opener) -> np.ndarray:
    return opened(run.path, KEY).read(run.begin + int(begin), run.begin + int(end))
