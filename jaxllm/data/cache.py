"""Folders that are written whole or not at all, by any number of processes, and checked when they are opened."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import InputError

_ALWAYS_READ = 1 << 20  # larger files are read again only if their times have changed
_SILENT = 600  # seconds after which a preparation elsewhere that writes nothing counts as dead
_HOST = socket.gethostname().replace("~", "-")
_LOCK = ".lock"


def build_once(folder: Path, make: Callable[[Path], dict[str, Any]]) -> bool:
    """Fill a folder by make(partial folder) -> what to remember; False: another process is at it, come back later."""
    if folder.exists():
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    if any(map(_is_alive, folder.parent.glob(f".partial~{folder.name}~*"))):
        return False
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new~"))
    partial = folder.parent / f".partial~{folder.name}~{_HOST}~{new.name.removeprefix('.new~')}"
    try:
        with open(new / _LOCK, "w") as lock:
            with contextlib.suppress(
                OSError
            ):  # file systems without locks: there the time of the last write tells
                fcntl.flock(lock, fcntl.LOCK_EX)
            os.replace(
                new, partial
            )  # whoever sees it finds it locked, from here until it has its last name
            meta = make(partial)
            sums = {
                p.name: [p.stat().st_size, sha256(p)]
                for p in sorted(partial.iterdir())
                if p.name != _LOCK
            }
            (partial / "meta.json").write_text(json.dumps({**meta, "files": sums}))
            _remember_times(partial, sums)
            os.replace(partial, folder)
            (folder / _LOCK).unlink(missing_ok=True)
    except OSError:
        if not folder.exists():  # another process may have been faster, with the same contents
            raise
    finally:
        for path in (new, partial):
            shutil.rmtree(path, ignore_errors=True)
    return True


def get_or_build(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What is remembered of a folder, which is made if it is not there or damaged."""
    while (meta := open_valid(folder)) is None:
        if not build_once(folder, make):
            time.sleep(0.1)
    return meta


def open_valid(folder: Path) -> dict[str, Any] | None:
    """What is remembered of a folder; None where there is none. A damaged one is named and removed."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        wrong = next(
            (
                n
                for n, (size, digest) in meta["files"].items()
                if not _is_whole(folder, n, size, digest)
            ),
            None,
        )
    except (OSError, ValueError, KeyError):
        meta, wrong = {}, "meta.json"
    if wrong is None:
        return meta
    print(
        f"data: {folder / wrong} is damaged (its size or checksum differs); made again",
        file=sys.stderr,
        flush=True,
    )
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial~damaged~"))
    with contextlib.suppress(FileNotFoundError):  # another process has done so
        os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
    return None


def clean(cache: Path) -> None:
    """Remove what preparations that have died left behind."""
    for file in (cache / "files").glob(".new-*"):
        if time.time() - file.stat().st_mtime > _SILENT:
            file.unlink(missing_ok=True)
    for partial in (*cache.glob(".partial*"), *cache.glob(".new~*")):
        if not _is_alive(partial):
            shutil.rmtree(partial, ignore_errors=True)


def _is_alive(partial: Path) -> bool:
    """Whether a process still writes: on this machine it holds the lock, elsewhere it has written lately."""
    try:
        with open(partial / _LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if f"~{_HOST}~" in partial.name:
            return False
    except BlockingIOError:
        return True
    except OSError:  # a folder without a lock, or a file system without
        pass
    times = [path.stat().st_mtime for path in (partial, *partial.glob("*")) if path.exists()]
    return time.time() - max(times, default=0.0) < _SILENT


def _is_whole(folder: Path, name: str, size: int, digest: str) -> bool:
    path, times = folder / name, folder / ".times"
    if path.stat().st_size != size:
        return False
    known = json.loads(times.read_text()) if times.exists() else {}
    if size > _ALWAYS_READ and known.get(name) == _times(path):
        return True
    if sha256(path) != digest:
        return False
    if known.get(name) != _times(path):  # a copied cache
        _remember_times(folder, [*known, name])
    return True


def _remember_times(folder: Path, names: Any) -> None:
    write_json(folder / ".times", {name: _times(folder / name) for name in names})


def _times(path: Path) -> list[int]:
    """What changes with every write; the second cannot be set back."""
    info = path.stat()
    return [info.st_mtime_ns, info.st_ctime_ns]


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """At once: a reader sees the old or the new file."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".new-", delete=False) as file:
        json.dump(value, file)
    os.replace(file.name, path)


def key_of(*values: Any) -> str:
    """One name for JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def fingerprint_file(path: str, every: int, cache: Path) -> dict[str, Any]:
    """{"size", "version": sha256, "lines": newlines before each multiple of `every`} of a local file, as it is now.

    A large one is read once, until its times change.
    """
    record, file = cache / "files" / f"{key_of(os.path.abspath(path), every)}.json", Path(path)
    info = [file.stat().st_size, *_times(file)]
    if (
        info[0] > _ALWAYS_READ
        and record.exists()
        and (known := json.loads(record.read_text()))["info"] == info
    ):
        return known
    digest, lines, total = hashlib.sha256(), [], 0
    with open(path, "rb") as opened:
        while chunk := opened.read(every):
            lines.append(total)
            total += chunk.count(b"\n")
            digest.update(chunk)
    found = {"info": info, "size": info[0], "version": digest.hexdigest(), "lines": lines}
    if (
        info[0] > _ALWAYS_READ and time.time_ns() - info[2] > 2e9
    ):  # a change right now might not change the times
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, found)
    return found


class ArrayFile:
    """A one-dimensional array in a file. It is read by pread: mapped pages would count as the process's memory."""

    def __init__(self, path: Path, dtype: Any):
        self.path, self.dtype = path, np.dtype(dtype)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the object
        self._size = os.fstat(self._file.fileno()).st_size // self.dtype.itemsize

    def __len__(self) -> int:
        return self._size

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop); safe from any thread. Raises InputError where the file has become shorter."""
        size = max(0, stop - start) * self.dtype.itemsize
        data = os.pread(self._file.fileno(), size, start * self.dtype.itemsize)
        if len(data) != size:
            raise InputError(
                f"{self.path}: has lost its end since it was opened; run again to make it anew"
            )
        return np.frombuffer(data, self.dtype)

    def chunks(self, size: int = 1 << 16):
        """The whole array, piece by piece."""
        return (self.read(i, min(i + size, len(self))) for i in range(0, len(self), size))
