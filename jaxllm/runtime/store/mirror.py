"""Keeps a run directory in a store equal to the local folder, the scratch, that a run works in.

The run writes to its scratch as to any local run directory. A thread brings what has changed to the store:

    1. what commits something and is gone here (a seal, a result) is removed there first;
    2. files, several at a time; a growing file up to its last whole line;
    3. seals of checkpoints, then results, as new objects: whoever sees one of them sees all that belongs to it;
    4. what else is gone here is removed there.

So at every moment the store holds whole checkpoints, and the newest one that was whole here some seconds ago. A run that
starts takes its scratch if that was the last to write to the store, and else the store. What is large is fetched when it
is needed: tokenized data, and arrays of checkpoints, these again if their bytes here are not those that were sealed.
"""

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import Ending
from jaxllm.runtime.console import console
from jaxllm.runtime.files import read_json, sha256_of, write_json
from jaxllm.runtime.store.lease import FOLDER as LEASES
from jaxllm.runtime.store.lease import Lease, LeaseLost
from jaxllm.runtime.store.objects import Object, Store, in_parallel
from jaxllm.runtime.store.retry import Unavailable
from jaxllm.runtime.store.scratch import MANIFEST

# Seconds between looks at the scratch if nobody says that something has changed.
_PERIOD = 10.0
_STEP = re.compile(r"(?P<step>(?:.*/)?checkpoints/\d+)/(?P<file>.+)")
# Files that say that something is complete: uploaded after what they speak of, removed before it.
_SEAL = re.compile(r"(?:.*/)?checkpoints/\d+/seal\.json")
_RESULT = re.compile(r"[^/]+/result\.json")
# Folders that stay on this machine.
_LOCAL = {"damaged"}
# Of tokenized data, which only training needs.
_CACHE = "cache/"
# Of a file of which only the object is known.
_UNKNOWN_INODE = -1


class NotStored(Ending):
    """What was done could not be brought to the store."""


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


class Mirror:
    """A scratch folder and the run directory in a store that it stands for.

    Args:
        store: the run directory.
        folder: the scratch, which the caller has locked.
        lease: the right to write to the store; None: only read from it, with `fetch`.
    """

    def __init__(self, store: Store, folder: Path, lease: Lease | None):
        self.store = store
        self.folder = folder
        self._lease = lease
        manifest = read_json(folder / MANIFEST) or {}
        # The number of the lease under which this scratch was last written.
        self._written_under: int = manifest.get("lease", 0)
        self._known = {name: Known(*fields) for name, fields in manifest.get("files", {}).items()}
        self._pushing = threading.Lock()
        self._warned: set[Path] = set()
        self._wake = threading.Event()
        self._ended = False
        self._error: Ending | None = None
        self._thread: threading.Thread | None = None

    @property
    def reads_only(self) -> bool:
        return self._lease is None

    # --- From the store.

    def open(self) -> None:
        """Make the scratch equal to the store, or keep it where it is ahead, and begin to watch it."""
        if not self._lease:
            return  # a reader fetches the folders it needs
        self._lease.take()
        # No other run has written since this scratch did.
        if self._lease.number == self._written_under + 1:
            self._agree()
        else:
            self.fetch()
        self._written_under = self._lease.number
        self._write_manifest()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="mirror")
        self._thread.start()

    def fetch(self, folder: str = "") -> None:
        """Bring everything small below a folder from the store; what it does not have is removed here."""
        remote = self._listed(folder)
        here = self._scan()
        for name in [*here, *self._known]:
            if name not in remote and name.startswith(folder):
                (self.folder / name).unlink(missing_ok=True)
                self._known.pop(name, None)
        stale = []
        for name, found in remote.items():
            known = self._known.get(name)
            if known and known.version == found.version and here.get(name) == _signature(known):
                continue
            # What is here is of another run, or was changed by one.
            (self.folder / name).unlink(missing_ok=True)
            self._known[name] = Known(found.version, found.size, 0, 0)
            if not _is_lazy(name):
                stale.append(name)
        in_parallel(self._download, stale)

    def _agree(self) -> None:
        """Learn what a killed process has brought to the store without noting it; the scratch is ahead in everything."""
        remote = self._listed()
        for name in [*self._known]:
            if name not in remote:
                del self._known[name]
        for name, found in remote.items():
            known = self._known.get(name)
            if known is None or known.version != found.version:
                # As of a file that has changed since, or is gone.
                self._known[name] = Known(found.version, found.size, 0, _UNKNOWN_INODE)

    def _listed(self, folder: str = "") -> dict[str, Object]:
        """The objects below a folder; what a killed run has left without a seal is removed."""
        remote = {}
        for name, found in self.store.list(folder.rstrip("/")).items():
            if not name.startswith(f"{LEASES}/"):
                remote[name] = found
        if self._lease:
            unsealed = [name for name in remote if _is_array(name) and _seal_of(name) not in remote]
            self.store.delete(unsealed)
            for name in unsealed:
                del remote[name]
        return remote

    def _download(self, name: str) -> None:
        target = self.folder / name
        known = self._known[name]
        self.store.download(name, target, None if known.is_here else known.size)
        self._known[name] = _known(known.version, target)

    def bring(self, folder: str) -> None:
        """Fetch the tokenized data below a folder that is in the store only."""
        missing = []
        # Under the lock: a look at the scratch must not take half a file for a new one.
        with self._pushing:
            for name, known in self._known.items():
                if name.startswith(folder) and not known.is_here and not _is_array(name):
                    missing.append(name)
            in_parallel(self._download, missing)

    def complete(self, step_dir: Path, seal: dict[str, Any]) -> None:
        """Fetch the files of a checkpoint that are missing here, or are not what was sealed."""
        prefix = step_dir.relative_to(self.folder)

        def fetch(file: str, wanted: str) -> None:
            target = step_dir / file
            if target.exists() and sha256_of(target) == wanted:
                return
            try:
                self._download(str(prefix / file))
            except (KeyError, FileNotFoundError):  # the seal's check will say that it is missing
                return

        with self._pushing:
            in_parallel(lambda item: fetch(*item), seal["files"].items())

    # --- To the store.

    def wake(self) -> None:
        """Bring what has changed to the store soon, without waiting for it."""
        self._wake.set()

    def check(self) -> None:
        """Raises what has ended the mirror, if anything has."""
        if self._error:
            raise self._error

    def push(self) -> None:
        """Bring what has changed to the store, and return when it is there.

        Raises:
            LeaseLost: another run has taken over.
            NotStored: the store could not be reached.
        """
        self.check()
        if not self._lease:
            return
        try:
            with self._pushing:
                self._push(self._lease)
        except Unavailable as error:
            raise NotStored(
                f"{self.store}: not everything could be brought there ({error}); it is safe in {self.folder}, and the "
                "same command on this machine brings it"
            ) from None

    def close(self) -> None:
        """Bring everything to the store and let others work there."""
        self._ended = True
        self._wake.set()
        if self._thread:
            self._thread.join()
        if not self._lease:
            self._write_manifest()
        else:
            try:
                if not self._error:
                    self.push()
            finally:
                if not isinstance(self._error, LeaseLost):
                    self._lease.give_back()

    def _watch(self) -> None:
        """In a thread."""
        said = False
        while not self._ended and not self._error:
            self._wake.wait(_PERIOD)
            self._wake.clear()
            if self._ended:
                return
            try:
                self.push()
                said = False
            except NotStored as error:
                # Training goes on: the next look tries again, and the end of a stage insists.
                if not said:
                    console.print(f"warning: {error}", soft_wrap=True)
                said = True
            except Ending as error:
                self._error = error

    def _push(self, lease: Lease) -> None:
        lease.check()
        here = self._scan()
        stale = [name for name in here if self._is_stale(name, here)]
        gone = [name for name, known in self._known.items() if self._is_gone(name, known, here)]
        if not stale and not gone:
            return
        # Also of a commit that is written anew: what it speaks of changes first.
        self._remove(filter(_is_commit, [*gone, *(name for name in stale if name in self._known)]))
        for belongs in (_is_plain, _is_seal, _is_result):
            lease.check()
            in_parallel(lambda name: self._upload(name, here[name]), filter(belongs, stale))
        self._remove(name for name in gone if not _is_commit(name))
        self._write_manifest()

    def _upload(self, name: str, signature: tuple[int, int, int]) -> None:
        file = self.folder / name
        try:
            if _is_seal(name) and not self._is_complete(name):
                return
            if _is_array(name) and not self._is_sealed(name):
                self._warn_damaged(file)
                return
            if _is_commit(name):
                content = file.read_bytes()
            elif name.endswith(".jsonl"):
                content = _whole_lines(file, signature[0])
            else:
                content = None
        except FileNotFoundError:
            return  # removed meanwhile: the next look sees it
        if content is None:
            try:
                version = self.store.upload(file, name).version
            except FileNotFoundError:
                if file.exists():  # it is the store that lacks something
                    raise
                return
        elif _is_commit(name):
            # As a new object: of two runs that both believe to have the lease, one learns here that it has not.
            if not self.store.create(name, content):
                raise LeaseLost(f"{self.store}/{name}: another run wrote it; this one stops")
            version = self.store.look(name).version  # type: ignore[union-attr]
        else:
            version = self.store.write(name, content).version
        self._known[name] = Known(version, *signature)

    def _warn_damaged(self, file: Path) -> None:
        if file not in self._warned:  # every look at the scratch finds it again
            self._warned.add(file)
            console.print(
                f"warning: {file} is not what was sealed; this checkpoint is not brought to the store",
                soft_wrap=True,
            )

    def _is_sealed(self, array: str) -> bool:
        """Whether an array is what its seal says."""
        seal = json.loads((self.folder / _seal_of(array)).read_bytes())
        inside = _STEP.fullmatch(array)["file"]  # type: ignore[index]
        return sha256_of(self.folder / array) == seal["files"].get(inside)

    def _is_complete(self, seal: str) -> bool:
        """Whether the store has everything that a seal speaks of."""
        step = seal.removesuffix("seal.json")
        files = json.loads((self.folder / seal).read_bytes())["files"]
        return all(step + file in self._known for file in files)

    def _remove(self, names: Iterable[str]) -> None:
        names = list(names)
        self.store.delete(names)
        for name in names:
            self._known.pop(name, None)

    def _is_stale(self, name: str, here: dict[str, tuple[int, int, int]]) -> bool:
        """Whether the store does not have a file as it is here."""
        known = self._known.get(name)
        if known and here[name] == _signature(known):
            return False
        # Arrays do not change unless they are saved and sealed again: another one is damaged, and stays here.
        return not known or not _is_array(name) or self._is_stale(_seal_of(name), here)

    def _is_gone(self, name: str, known: Known, here: dict[str, Any]) -> bool:
        if known.is_here:
            return name not in here
        # Arrays that were never fetched go with the seal of their checkpoint.
        return _is_array(name) and _seal_of(name) not in here

    # --- What there is.

    def _scan(self) -> dict[str, tuple[int, int, int]]:
        """{name: (size, time of change, inode)} of every file in the scratch that belongs to the run."""
        found = {}
        for root, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if _belongs(Path(root), name)]
            for file in files:
                if file.startswith("."):
                    continue
                path = Path(root) / file
                with contextlib.suppress(FileNotFoundError):
                    state = path.stat()
                    name = path.relative_to(self.folder).as_posix()
                    found[name] = (state.st_size, state.st_mtime_ns, state.st_ino)
        return found

    def _write_manifest(self) -> None:
        files = {name: list(known) for name, known in self._known.items()}
        write_json(self.folder / MANIFEST, {"lease": self._written_under, "files": files})


def _belongs(root: Path, name: str) -> bool:
    """Whether a folder is part of the run: not hidden, no save that is not sealed."""
    if name.startswith(".") or name in _LOCAL:
        return False
    return root.name != "checkpoints" or (root / name / "seal.json").exists()


def _is_seal(name: str) -> bool:
    return bool(_SEAL.fullmatch(name))


def _is_result(name: str) -> bool:
    return bool(_RESULT.fullmatch(name))


def _is_commit(name: str) -> bool:
    return _is_seal(name) or _is_result(name)


def _is_plain(name: str) -> bool:
    return not _is_commit(name)


def _is_array(name: str) -> bool:
    return bool(_STEP.fullmatch(name)) and not _is_seal(name)


def _is_lazy(name: str) -> bool:
    return _is_array(name) or name.startswith(_CACHE)


def _seal_of(name: str) -> str:
    """The seal of the checkpoint that an array belongs to."""
    return f"{_STEP.fullmatch(name)['step']}/seal.json"  # type: ignore[index]


def _signature(known: Known) -> tuple[int, int, int]:
    return known[1:]


def _known(version: str, file: Path) -> Known:
    state = file.stat()
    return Known(version, state.st_size, state.st_mtime_ns, state.st_ino)


def _whole_lines(file: Path, size: int) -> bytes:
    """The first `size` bytes of a file that grows by lines, without a line that is being written."""
    with file.open("rb") as opened:
        content = opened.read(size)
    return content[: content.rfind(b"\n") + 1]
