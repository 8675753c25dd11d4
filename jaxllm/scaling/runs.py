"""Reads what finished runs say of size, tokens and loss."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxllm.config import InputError
from jaxllm.scaling.law import Point

# Units that depend on the tokenizer.
_PER_TOKEN = ("loss", "train_loss")


class Run(NamedTuple):
    """A finished run."""

    directory: Path
    point: Point


def read_runs(given: Sequence[str], stage: str, metric: str) -> list[Run]:
    """The runs below these directories, by size and tokens; of runs alike in both the best.

    Raises:
        InputError: a directory has no finished run, or the losses of two runs cannot be compared.
    """
    directories = [run for directory in given for run in _find(Path(directory), stage)]
    if metric in _PER_TOKEN:
        _check_tokenizers(directories, stage, metric)
    best: dict[tuple[float, float], Run] = {}
    for directory in dict.fromkeys(directories):
        run = Run(directory, _read(directory / stage / "result.json", metric))
        kept = best.setdefault(run.point[:2], run)
        if run.point.loss < kept.point.loss:
            best[run.point[:2]] = run
    return sorted(best.values(), key=lambda run: run.point)


def _find(directory: Path, stage: str) -> list[Path]:
    """The run itself, or those one level below."""
    if (directory / stage / "result.json").is_file():
        return [directory]
    found = sorted(path.parent.parent for path in directory.glob(f"*/{stage}/result.json"))
    if not found:
        raise InputError(
            f"{directory}: has no {stage}/result.json, and none of its folders has one; "
            "name run directories whose stage is finished, or the folder of a sweep"
        )
    return found


def _read(path: Path, metric: str) -> Point:
    result = json.loads(path.read_text())
    numbers = []
    for name in ("parameters", "tokens", metric):
        value = result.get(name)
        if not isinstance(value, int | float) or not value > 0:
            known = ", ".join(key for key, each in result.items() if isinstance(each, int | float))
            raise InputError(f"{path}: {name} is {value}, not a positive number; it has {known}")
        numbers.append(float(value))
    return Point(*numbers)


def _check_tokenizers(directories: Sequence[Path], stage: str, metric: str) -> None:
    """Raises InputError if two runs count tokens differently."""
    first: dict[str, Path] = {}
    for directory in directories:
        digest = _digest(directory / stage / "tokenizer")
        first.setdefault(digest, directory)
    if len(first) > 1:
        one, other, *_ = first.values()
        raise InputError(
            f"{one} and {other}: have different tokenizers, so that their {metric} per token cannot be compared; "
            "use --metric bits_per_byte"
        )


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
