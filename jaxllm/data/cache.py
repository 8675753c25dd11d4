"""Cache folders: written completely or not at all, by any number of processes, and verified when they are opened.

A folder is filled under a temporary name and renamed when it is complete, so a reader never sees half of one:

    .new~abc  ->  .partial~NAME~HOST~abc  ->  NAME
    created       locked, being filled        complete, with checksums in meta.json
"""

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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import InputError
from jaxllm.runtime.files import sha256_of

# Larger files (in bytes) are hashed again only if their times have changed.
_ALWAYS_READ = 1 << 20
# Seconds after which a builder on another machine that writes nothing counts as dead.
_SILENT = 600
# "~" separates the fields of a partial folder's name.
_HOST = socket.gethostname().replace("~", "-")
_LOCK = ".lock"


def build_once(folder: Path, make: Callable[[Path], dict[str, Any]]) -> bool:
    """Fills a folder by calling make(partial folder), which returns the metadata to store with it.

    Returns:
        False if another process is building the folder: call again later.
    """
    if folder.exists():
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    if any(map(_is_alive, folder.parent.glob(f".partial~{folder.name}~*"))):
        return False
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new~"))
    partial = folder.parent / f".partial~{folder.name}~{_HOST}~{new.name.removeprefix('.new~')}"
    try:
        with open(new / _LOCK, "w") as lock:
            # Some file systems have no locks; there the time of the last write decides.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            # Locked before it gets the name that others look for: they never see it unlocked.
            os.replace(new, partial)
            meta = make(partial)
            checksums = _checksums(partial)
            (partial / "meta.json").write_text(json.dumps({**meta, "files": checksums}))
            _store_times(partial, checksums)
            os.replace(partial, folder)
            (folder / _LOCK).unlink(missing_ok=True)
    except OSError:
        # Another process may have been faster, with the same contents.
        if not folder.exists():
            raise
    finally:
        # After success neither exists any more.
        for path in (new, partial):
            shutil.rmtree(path, ignore_errors=True)
    return True


def get_or_build(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Returns the metadata of a folder, after building it if it does not exist or is damaged."""
    while (meta := open_valid(folder)) is None:
        if not build_once(folder, make):
            # Another process is building it.
            time.sleep(0.1)
    return meta


def open_valid(folder: Path) -> dict[str, Any] | None:
    """Returns the metadata of a folder, or None if it does not exist; reports and removes a damaged one."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        damaged = _first_damaged(folder, meta["files"])
    except (OSError, ValueError, KeyError):
        meta, damaged = {}, "meta.json"
    if damaged is None:
        return meta
    print(
        f"data: {folder / damaged} is damaged (its size or checksum differs); building it again",
        file=sys.stderr,
        flush=True,
    )
    # Renamed before it is removed: other processes see all of the folder or nothing.
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial~damaged~"))
    with contextlib.suppress(FileNotFoundError):  # another process has removed it
        os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
    return None


def clean(cache: Path) -> None:
    """Removes what builders that were killed left behind."""
    # These have no lock; `_write_json` takes milliseconds.
    for file in (cache / "files").glob(".new-*"):
        if time.time() - file.stat().st_mtime > _SILENT:
            file.unlink(missing_ok=True)
    for partial in (*cache.glob(".partial*"), *cache.glob(".new~*")):
        if not _is_alive(partial):
            shutil.rmtree(partial, ignore_errors=True)


def _is_alive(partial: Path) -> bool:
    """Whether its builder is running: on this machine it holds the lock, elsewhere it has written lately."""
    try:
        with open(partial / _LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A lock taken on this machine is released when its process dies; elsewhere it proves nothing.
        if f"~{_HOST}~" in partial.name:
            return False
    except BlockingIOError:
        return True
    except OSError:  # a folder without a lock file, or a file system without locks
        pass
    last_write = 0.0
    for path in (partial, *partial.glob("*")):
        with contextlib.suppress(FileNotFoundError):
            last_write = max(last_write, path.stat().st_mtime)
    return time.time() - last_write < _SILENT


def _checksums(folder: Path) -> dict[str, tuple[int, str]]:
    """{name: (bytes, sha256)} of the files in a folder, without its lock."""
    checksums = {}
    for path in sorted(folder.iterdir()):
        if path.name != _LOCK:
            checksums[path.name] = (path.stat().st_size, sha256_of(path))
    return checksums


def _first_damaged(folder: Path, checksums: dict[str, Any]) -> str | None:
    for name, (size, digest) in checksums.items():
        if not _is_intact(folder, name, size, digest):
            return name
    return None


def _is_intact(folder: Path, name: str, size: int, digest: str) -> bool:
    path = folder / name
    stored = folder / ".times"
    # The size is checked first: it costs nothing, and finds files that were cut.
    if path.stat().st_size != size:
        return False
    known = json.loads(stored.read_text()) if stored.exists() else {}
    same_times = known.get(name) == _times(path)
    if size > _ALWAYS_READ and same_times:
        return True
    if sha256_of(path) != digest:
        return False
    if not same_times:  # the cache was copied
        _store_times(folder, [*known, name])
    return True


def _store_times(folder: Path, names: Iterable[str]) -> None:
    _write_json(folder / ".times", {name: _times(folder / name) for name in names})


def _times(path: Path) -> list[int]:
    """[modified, changed] in nanoseconds; every write changes both, and no program can set back the second."""
    info = path.stat()
    return [info.st_mtime_ns, info.st_ctime_ns]


def _write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically: a reader sees the old or the new file."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".new-", delete=False) as file:
        json.dump(value, file)
    os.replace(file.name, path)


def key_of(*values: Any) -> str:
    """A name for JSON values: 32 hex digits of their sha256."""
    # Keys are names of folders on disk: another spelling here would orphan every cache.
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def fingerprint_file(path: str, every: int, cache: Path) -> dict[str, Any]:
    """{"size": bytes, "version": sha256, "lines": newlines before each multiple of `every`} of a local file.

    A large file is read once; the record in cache/files is used until the file's times change.
    """
    file = Path(path)
    record = cache / "files" / f"{key_of(os.path.abspath(path), every)}.json"
    size = file.stat().st_size
    modified, changed = _times(file)
    info = [size, modified, changed]
    is_large = size > _ALWAYS_READ
    if is_large and record.exists():
        known = json.loads(record.read_text())
        if known["info"] == info:
            return known
    digest = hashlib.sha256()
    lines = []
    newlines = 0
    with open(path, "rb") as opened:
        while chunk := opened.read(every):
            lines.append(newlines)
            newlines += chunk.count(b"\n")
            digest.update(chunk)
    fingerprint = {"info": info, "size": size, "version": digest.hexdigest(), "lines": lines}
    # A write within the clock's resolution of the last one might not change the times.
    if is_large and time.time_ns() - changed > 2e9:
        record.parent.mkdir(parents=True, exist_ok=True)
        _write_json(record, fingerprint)
    return fingerprint


class ArrayFile:
    """A one-dimensional array in a file.

    It is read by pread and not mapped: mapped pages would count as memory of the process.
    """

    def __init__(self, path: Path, dtype: Any):
        self.path = path
        self.dtype = np.dtype(dtype)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the object
        self._size = os.fstat(self._file.fileno()).st_size // self.dtype.itemsize

    def __len__(self) -> int:
        return self._size

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop); safe from any thread.

        Raises:
            InputError: the file has become shorter since it was opened.
        """
        size = max(0, stop - start) * self.dtype.itemsize
        # pread moves no file position, which threads would share.
        data = os.pread(self._file.fileno(), size, start * self.dtype.itemsize)
        if len(data) != size:
            raise InputError(
                f"{self.path}: has become shorter since it was opened; run again to rebuild it"
            )
        return np.frombuffer(data, self.dtype)

    def chunks(self, size: int = 1 << 16) -> Iterator[np.ndarray]:
        """The whole array, `size` elements at a time."""
        for start in range(0, len(self), size):
            yield self.read(start, min(start + size, len(self)))
