"""The seal of a checkpoint: the file that commits a step's folder, and by which damage is found.

seal.json is written last and atomically; a step without it does not exist. It holds

    {
      "record":  {"fingerprints": {...}, "metrics": {"eval/loss": 2.1}, ...},   what the training loop wants back
      "digests": {"params.embed.tokens": [word, word], ...},                    of every leaf, taken on the devices
      "files":   {"d/6baa8dbf": SHA-256, ...},                                  of every other file in the folder
      "time":    1764400000.0,                                                  when it was written, seconds
      "sha256":  of the JSON of what is above
    }

The hashes of files find damage on the disk; the digests of leaves also find what went wrong between the devices and
the files.
"""

import concurrent.futures
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from etils import epath

from jaxllm.config import InputError
from jaxllm.runtime.files import sha256_of, write_whole
from jaxllm.runtime.processes import any_process

SEAL = "seal.json"
_SEALS = (SEAL, f".{SEAL}.partial", f".{SEAL}")  # also one whose writing was interrupted
# What Orbax, TensorStore and the operating system raise on a full or read-only disk, a short file, bad JSON, ...
IO_ERRORS = (OSError, ValueError, RuntimeError)
READ_ERRORS = (*IO_ERRORS, KeyError, TypeError, AttributeError)


class Damaged(InputError):
    """A checkpoint that is not what was saved.

    Attributes:
        step_dir: its folder.
        what: what is wrong with it.
    """

    def __init__(self, step_dir: epath.Path, what: str):
        super().__init__(
            f"{step_dir}: this checkpoint is damaged or half-written ({what}); "
            "`jaxllm run` makes it again, from the newest good one"
        )
        self.step_dir = step_dir
        self.what = what


def committed_steps(directory: epath.Path) -> list[int]:
    """The steps with a seal in a checkpoints/ folder, in order."""
    steps = []
    for entry in directory.iterdir():
        # Orbax's temporary folders have names like 600.orbax-checkpoint-tmp.
        if entry.name.isdigit() and (entry / SEAL).exists():
            steps.append(int(entry.name))
    return sorted(steps)


def write_seal(step_dir: epath.Path, seal: dict[str, Any]) -> None:
    """Commit a step's folder. seal: {record, digests}, to which this adds the time and the files' hashes."""
    # Orbax has finished: nothing is added to the folder any more.
    seal["files"] = _hash_files(step_dir, _files(step_dir))
    seal["time"] = round(time.time(), 3)
    write_whole(step_dir / SEAL, seal_text(seal))


def seal_text(seal: dict[str, Any]) -> str:
    """The content of seal.json."""
    return json.dumps({**seal, "sha256": _hash_json(seal)})


def parse_seal(content: bytes) -> dict[str, Any]:
    """{record, digests, files, ...} from the content of seal.json. Raises ValueError if it is not what was written."""
    seal = json.loads(content)
    # Of the parsed JSON, not of the bytes: the hash is inside the file that it protects.
    if seal.pop("sha256") != _hash_json(seal):
        raise ValueError("it is not what was written")
    return seal


def read_seal(step_dir: epath.Path) -> dict[str, Any]:
    """{record, digests, files, ...}. Raises Damaged if there is no seal, or its content is not what was written."""
    try:
        return parse_seal((step_dir / SEAL).read_bytes())
    except READ_ERRORS as error:
        raise Damaged(step_dir, f"{SEAL}: {short_text(error)}") from None


def check_files(step_dir: epath.Path, seal: dict[str, Any]) -> None:
    """Raise Damaged, on all processes together, if a file is missing, is not in the seal, or has other bytes.

    Each process reads its share of the files.
    """
    # Seals that older versions wrote in a store have no hashes of files.
    fault = _find_fault(step_dir, seal["files"]) if seal["files"] else ""
    # A process that raised alone would leave the others waiting in the restore.
    if any_process(bool(fault)):
        raise Damaged(step_dir, fault or "found by another process")


def _find_fault(step_dir: epath.Path, wanted: dict[str, str]) -> str:
    """The first thing that is wrong with this process's share of the files; "" if all is well."""
    existing = _files(step_dir)
    for name in wanted:
        if name not in existing:
            return f"{name} is missing"
    for name in existing:
        if name not in wanted:
            return f"{name} does not belong to it"
    # Every n-th file of n processes.
    own_share = list(wanted)[jax.process_index() :: jax.process_count()]
    try:
        hashes = _hash_files(step_dir, own_share)
    except OSError as error:
        return short_text(error)
    for name in own_share:
        if hashes[name] != wanted[name]:
            return f"{name} is not what was written"
    return ""


def _files(step_dir: epath.Path) -> list[str]:
    """Paths below a step's folder, without the seal and a seal that was not finished."""
    root = Path(step_dir)
    names = []
    for path in root.rglob("*"):
        if path.is_file() and path.name not in _SEALS:
            names.append(str(path.relative_to(root)))
    return sorted(names)


def _hash_files(step_dir: epath.Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each file, by its name."""

    def hash_file(name: str) -> tuple[str, str]:
        return name, sha256_of(Path(step_dir) / name)

    # hashlib releases the interpreter's lock, so that threads hash in parallel.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(pool.map(hash_file, names))


def _hash_json(value: Any) -> str:
    # sort_keys: the order of keys is not part of the content.
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def short_text(error: BaseException) -> str:
    """Type and text of an exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
