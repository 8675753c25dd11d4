"""The files of a scratch, and what is known of them and their objects."""

import contextlib
import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

from jaxllm.runtime.store import names

# Size, time of change in nanoseconds, and inode of a file.
type Signature = tuple[int, int, int]

UNKNOWN_SIZE = -1
# Of a file that has changed since it was brought, or is gone.
_UNKNOWN_INODE = -1


class Known(NamedTuple):
    """A file as it was when here and store last agreed."""

    version: str  # of the object
    size: int  # of the file here
    changed: int  # its time of change, ns
    inode: int

    @property
    def is_here(self) -> bool:
        """Whether the file was in the scratch; arrays of a checkpoint may be in the store only."""
        return self.inode != 0

    @property
    def signature(self) -> Signature:
        return self[1:]

    @property
    def size_in_store(self) -> int | None:
        """What must come when the file is fetched; None: it is not known."""
        return None if self.is_here or self.size == UNKNOWN_SIZE else self.size


def in_store_only(version: str, size: int) -> Known:
    return Known(version, size, 0, 0)


def changed_since(version: str, size: int) -> Known:
    """Of a file that was brought by a process that did not live to note it."""
    return Known(version, size, 0, _UNKNOWN_INODE)


def fetched(version: str, file: Path) -> Known:
    """Of a file that is here as it is in the store."""
    return Known(version, *_signature(file.stat()))


def scan(folder: Path) -> dict[str, Signature]:
    """{name: signature} of every file in a scratch that belongs to the run."""
    found = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if _belongs(Path(root), name)]
        for file in files:
            if names.is_local(file):
                continue
            path = Path(root) / file
            with contextlib.suppress(FileNotFoundError):
                found[path.relative_to(folder).as_posix()] = _signature(path.stat())
    return found


def sealed_files(seal: Path) -> dict[str, str]:
    """The hashes in a checkpoint's seal, by the names of the files. Raises FileNotFoundError if it is gone."""
    return _parsed(seal, _signature(seal.stat()))


# It is asked for every array of a checkpoint, and may be long.
@functools.lru_cache(maxsize=8)
def _parsed(seal: Path, signature: Signature) -> dict[str, str]:
    del signature  # another one after every change
    return json.loads(seal.read_bytes())["files"]


def whole_lines(file: Path, size: int) -> bytes:
    """The first `size` bytes of a file that grows by lines, without a line that is being written."""
    with file.open("rb") as opened:
        content = opened.read(size)
    return content[: content.rfind(b"\n") + 1]


def _belongs(root: Path, name: str) -> bool:
    """Whether a folder is part of the run: not hidden, no save that is not sealed."""
    if names.is_local(name):
        return False
    return root.name != "checkpoints" or (root / name / "seal.json").exists()


def _signature(state: os.stat_result) -> Signature:
    return state.st_size, state.st_mtime_ns, state.st_ino
