"""Reads what finished runs say of size, tokens and loss, on a disk or in a store."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import InputError, build
from jaxllm.models.config import ModelConfig
from jaxllm.runtime.files import is_remote
from jaxllm.runtime.store.objects import Store
from jaxllm.scaling.law import Point

# Units that depend on the tokenizer.
_PER_TOKEN = ("loss", "train_loss")


class Run(NamedTuple):
    """A finished run."""

    directory: str
    """Its path, or its URL in a store."""
    point: Point


def read_runs(
    given: Sequence[str], stage: str, metric: str, counts_embeddings: bool = True
) -> list[Run]:
    """The runs below these directories, by size and tokens; of runs alike in both the best.

    counts_embeddings: whether their parameters count those of the embeddings.

    Raises:
        InputError: a directory has no finished run, or the losses of two runs cannot be compared.
    """
    directories = [run for directory in given for run in _find(directory, stage)]
    if metric in _PER_TOKEN:
        _check_tokenizers(directories, stage, metric)
    best: dict[tuple[float, float], Run] = {}
    for directory in dict.fromkeys(directories):
        run = Run(directory, _read(directory, stage, metric, counts_embeddings))
        kept = best.setdefault(run.point[:2], run)
        if run.point.loss < kept.point.loss:
            best[run.point[:2]] = run
    return sorted(best.values(), key=lambda run: run.point)


def read_result(directory: str, stage: str) -> dict[str, Any] | None:
    """The result of a run's stage; None as long as it has none. The directory may be in a store."""
    return _read_json(directory, f"{stage}/result.json")


def _read_json(directory: str, name: str) -> dict[str, Any] | None:
    """A file of a run; None if there is none."""
    if is_remote(directory):
        content = Store(directory).read(name)
    else:
        path = Path(directory) / name
        content = path.read_bytes() if path.is_file() else None
    return None if content is None else json.loads(content)


def _find(directory: str, stage: str) -> list[str]:
    """The run itself, or those one level below."""
    if read_result(directory, stage) is not None:
        return [directory]
    if is_remote(directory):
        names = _folders_in_store(Store(directory), stage)
    else:
        paths = Path(directory).glob(f"*/{stage}/result.json")
        names = [path.parent.parent.name for path in paths]
    if not names:
        raise InputError(
            f"{directory}: has no {stage}/result.json, and none of its folders has one; "
            "name run directories whose stage is finished, or the folder of a sweep"
        )
    return [f"{directory.rstrip('/')}/{name}" for name in sorted(names)]


def _folders_in_store(store: Store, stage: str) -> list[str]:
    """Folders of runs whose stage is finished."""
    ending = f"/{stage}/result.json"
    folders = [name.removesuffix(ending) for name in store.list() if name.endswith(ending)]
    return [folder for folder in folders if "/" not in folder]


def _read(directory: str, stage: str, metric: str, counts_embeddings: bool) -> Point:
    result = read_result(directory, stage) or {}
    numbers = []
    for name in ("parameters", "tokens", metric):
        value = result.get(name)
        if not isinstance(value, int | float) or not value > 0:
            place = f"{directory}/{stage}/result.json"
            known = ", ".join(key for key, each in result.items() if isinstance(each, int | float))
            raise InputError(f"{place}: {name} is {value}, not a positive number; it has {known}")
        numbers.append(float(value))
    point = Point(*numbers)
    if counts_embeddings:
        return point
    return point._replace(parameters=point.parameters - _embedding_parameters(directory, stage))


def _embedding_parameters(directory: str, stage: str) -> int:
    name = f"{stage}/model.json"
    record = _read_json(directory, name)
    if record is None:
        raise InputError(
            f"{directory}/{name}: is missing, and only it tells which parameters are embeddings; "
            "use --form chinchilla, which counts all"
        )
    return build(ModelConfig, record["model"], name=f"{directory}/{name}").embedding_parameters


def _check_tokenizers(directories: Sequence[str], stage: str, metric: str) -> None:
    """Raises InputError if two runs count tokens differently."""
    first: dict[str, str] = {}
    for directory in directories:
        first.setdefault(_digest(f"{directory}/{stage}/tokenizer"), directory)
    if len(first) > 1:
        one, other, *_ = first.values()
        raise InputError(
            f"{one} and {other}: have different tokenizers, so that their {metric} per token cannot be compared; "
            "use --metric bits_per_byte"
        )


def _digest(folder: str) -> str:
    """SHA-256 of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for name, content in sorted(_contents(folder).items()):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def _contents(folder: str) -> dict[str, bytes]:
    """Every file below a folder, by its name there."""
    if is_remote(folder):
        store = Store(folder)
        return {name: store.read(name) or b"" for name in store.list()}
    root = Path(folder)
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
