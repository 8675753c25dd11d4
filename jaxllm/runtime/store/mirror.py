"""Keeps a run directory in a store equal to the local folder, the scratch, that a run works in.

The run writes to its scratch as to any local run directory. A thread brings what has changed to the store:

    1. a result that is gone here, and a seal that is written anew, are removed there first;
    2. files, several at a time; a growing file up to its last whole line;
    3. seals of checkpoints, then results, as new objects: whoever sees one of them sees all that belongs to it;
    4. what else is gone here is removed there, of a checkpoint its seal first.

So at every moment the store holds whole checkpoints: at least one once there was one, and the newest one that was whole
here some seconds ago. A run that starts takes its scratch if that was the last to write to the store, and else the store.
What is large is fetched when it is needed: tokenized data, and arrays of checkpoints, these again if their bytes here are
not those that were sealed.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from jaxllm.config import Ending
from jaxllm.runtime.chunks import is_chunk
from jaxllm.runtime.console import console
from jaxllm.runtime.files import read_json, sha256_of, write_json, write_whole
from jaxllm.runtime.seal import read_seal
from jaxllm.runtime.store import names
from jaxllm.runtime.store.known import (
    Known,
    Signature,
    changed_since,
    fetched,
    in_store_only,
    scan,
    sealed_files,
    whole_lines,
)
from jaxllm.runtime.store.lease import FOLDER as LEASES
from jaxllm.runtime.store.lease import Lease, LeaseLost
from jaxllm.runtime.store.objects import Object, Store, in_parallel
from jaxllm.runtime.store.retry import Unavailable
from jaxllm.runtime.store.scratch import MANIFEST


class NotStored(Ending):
    """What was done could not be brought to the store."""


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
        # Scratches of several hosts say nothing of each other: then only the store counts.
        self._written_alone: bool = manifest.get("hosts", 1) == 1
        self._known = {name: Known(*fields) for name, fields in manifest.get("files", {}).items()}
        # Held while something is brought from here to there or back; again by whoever holds it.
        self._pushing = threading.RLock()
        self._warned: set[Path] = set()
        self._wake = threading.Event()
        self._ended = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def reads_only(self) -> bool:
        return self._lease is None

    @property
    def num_hosts(self) -> int:
        """How many hosts work in the run directory, each with a scratch of its own."""
        return 1

    @property
    def _period(self) -> float:
        """Seconds between looks at the scratch if nobody says that something has changed."""
        return 10.0

    def seal_fields(self) -> dict[str, Any]:
        """What the seals that are written here say in addition."""
        return {}

    # --- From the store.

    def open(self) -> None:
        """Make the scratch equal to the store, or keep it where it is ahead, and begin to watch it."""
        if not self._lease:
            return  # a reader fetches the folders it needs
        self._lease.take()
        # No other run has written since this scratch did.
        if self._lease.number == self._written_under + 1 and self._written_alone:
            self._agree()
        else:
            self.fetch()
        self._begin(self._lease)

    def _begin(self, lease: Lease) -> None:
        """Bring what changes to the store from now on."""
        self._written_under = lease.number
        self._write_manifest()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="mirror")
        self._thread.start()

    def fetch(self, folder: str = "") -> None:
        """Bring everything small below a folder from the store; what it does not have is removed here."""
        remote = self._listed(folder)
        here = scan(self.folder)
        for name in [*here, *self._known]:
            if name not in remote and name.startswith(folder):
                (self.folder / name).unlink(missing_ok=True)
                self._known.pop(name, None)
        stale = []
        for name, found in remote.items():
            known = self._known.get(name)
            if known and known.version == found.version and here.get(name) == known.signature:
                continue
            # What is here is of another run, or was changed by one.
            (self.folder / name).unlink(missing_ok=True)
            self._known[name] = in_store_only(found.version, found.size)
            if not names.is_lazy(name):
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
                self._known[name] = changed_since(found.version, found.size)

    def _listed(self, folder: str = "") -> dict[str, Object]:
        """The objects below a folder; what a killed run has left without a seal is removed."""
        remote = {}
        for name, found in self.store.list(folder.rstrip("/")).items():
            if not name.startswith(f"{LEASES}/"):
                remote[name] = found
        if self._cleans:
            unsealed = [
                name
                for name in remote
                if names.is_array(name) and names.seal_of(name) not in remote
            ]
            self.store.delete(unsealed)
            for name in unsealed:
                del remote[name]
        return remote

    def _download(self, name: str) -> None:
        target = self.folder / name
        known = self._known[name]
        self.store.download(name, target, known.size_in_store)
        self._known[name] = fetched(known.version, target)

    def bring(self, folder: str) -> None:
        """Fetch the tokenized data below a folder that is in the store only."""
        missing = []
        # Under the lock: a look at the scratch must not take half a file for a new one.
        with self._pushing:
            for name, known in self._known.items():
                if name.startswith(folder) and not known.is_here and not names.is_array(name):
                    missing.append(name)
            in_parallel(self._download, missing)

    def complete(self, step_dir: Path, needed: Callable[[Sequence[str]], Iterable[str]]) -> str:
        """Fetch the files of a checkpoint that are missing here, or are not what was sealed.

        Args:
            step_dir: the checkpoint's folder.
            needed: those of the sealed files that this process will read. It is asked once the files are here that say
                where the others belong: all but the chunks of arrays.

        Returns:
            Why the checkpoint cannot be used; "" if every file that is needed is here as it was sealed.

        Raises:
            Damaged: its seal is.
        """
        with self._pushing:
            seal = self._whole_seal(step_dir)
            if "host" in seal:
                return "other hosts have not brought their parts to the store"
            wanted = seal["files"]
            about = [file for file in wanted if not is_chunk(file)]
            for files in (lambda: about, lambda: needed([*wanted])):
                faults = in_parallel(
                    lambda file: self._complete_file(step_dir / file, wanted[file]), files()
                )
                if any(faults):
                    return next(filter(None, faults))
        return ""

    def _complete_file(self, target: Path, wanted: str) -> str:
        """Fetch a file of a checkpoint unless it is here; what is wrong with it then."""
        if target.exists() and sha256_of(target) == wanted:
            return ""
        name = target.relative_to(self.folder).as_posix()
        try:
            self._download(name)
        except (KeyError, FileNotFoundError):
            return f"{target.name} is missing, also in the store"
        return "" if sha256_of(target) == wanted else f"{target.name} is not what was sealed"

    def _whole_seal(self, step_dir: Path) -> dict[str, Any]:
        """A checkpoint's seal. Where this host has sealed its part only, the one in the store, which speaks of all."""
        seal = read_seal(epath.Path(step_dir))
        if "host" not in seal:
            return seal
        file = step_dir / "seal.json"
        name = file.relative_to(self.folder).as_posix()
        found = self.store.look(name)
        content = self.store.read(name)
        if not found or not content:
            return seal
        write_whole(file, content)
        self._known[name] = fetched(found.version, file)
        self._learn(self.store.list(name.removesuffix("/seal.json")))
        return read_seal(epath.Path(step_dir))

    def _learn(self, remote: dict[str, Object]) -> None:
        """Know of objects whose files are not here."""
        for name, found in remote.items():
            if name not in self._known:
                self._known[name] = in_store_only(found.version, found.size)

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
            self._wake.wait(self._period)
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
            except Exception as error:
                # Whatever it is, the next save raises it: training must not go on as if its saves lasted.
                self._error = error

    def _push(self, lease: Lease) -> None:
        here, stale, gone = self._retract(lease)
        if not stale and not gone:
            return
        stale = self._writable(stale)
        for belongs in (names.is_plain, names.is_seal, names.is_result):
            lease.check()
            in_parallel(lambda name: self._upload(name, here[name]), filter(belongs, stale))
        self._remove(filter(names.is_seal, gone))
        self._remove(name for name in gone if not names.is_commit(name))
        self._write_manifest()

    def _retract(self, lease: Lease) -> tuple[dict[str, Signature], list[str], list[str]]:
        """Remove from the store the commits of what changes: results that are gone here, and what is written anew.

        Returns:
            The files here, the names of those that the store does not have as they are here, and of those that only the
            store has.
        """
        lease.check()
        here = scan(self.folder)
        stale = [name for name in here if self._brings(name) and self._is_stale(name, here)]
        gone = [name for name, known in self._known.items() if self._is_gone(name, known, here)]
        # Of a commit that is written anew, what it speaks of changes first. A checkpoint that is no longer kept goes last:
        # until newer ones are there, it is what another machine would go on from.
        rewritten = [name for name in stale if name in self._known and names.is_commit(name)]
        self._remove([*filter(names.is_result, gone), *rewritten])
        return here, stale, gone

    def _writable(self, stale: list[str]) -> list[str]:
        """Those of the files that may be brought to the store now."""
        return stale

    def _upload(self, name: str, signature: Signature) -> None:
        file = self.folder / name
        try:
            if names.is_commit(name):
                version = self._commit(name, file)
            elif names.is_array(name) and not self._is_sealed(name):
                self._warn_damaged(file)
                return
            elif name.endswith(".jsonl"):
                version = self.store.write(name, whole_lines(file, signature[0])).version
            else:
                version = self.store.upload(file, name).version
        except FileNotFoundError:
            if file.exists() and not self._is_going(name):  # it is the store that lacks something
                raise
            return  # removed meanwhile: the next look sees it
        if version:
            self._known[name] = Known(version, *signature)

    def _commit(self, name: str, file: Path) -> str:
        """Write a seal or a result to the store; returns its version, "" if what it speaks of is not there yet."""
        if names.is_seal(name) and not self._is_complete(name):
            return ""
        return self._create(name, file.read_bytes())

    def _create(self, name: str, content: bytes) -> str:
        """Write a new object; returns its version."""
        # Of two runs that both believe to have the lease, one learns here that it has not.
        if not self.store.create(name, content):
            raise LeaseLost(f"{self.store}/{name}: another run wrote it; this one stops")
        return self.store.look(name).version  # type: ignore[union-attr]

    def _warn_damaged(self, file: Path) -> None:
        if file not in self._warned:  # every look at the scratch finds it again
            self._warned.add(file)
            console.print(
                f"warning: {file} is not what was sealed; this checkpoint is not brought to the store",
                soft_wrap=True,
            )

    def _is_sealed(self, array: str) -> bool:
        """Whether an array is what its seal says."""
        sealed = sealed_files(self.folder / names.seal_of(array))
        return sha256_of(self.folder / array) == sealed.get(names.inside_step(array))

    def _is_going(self, name: str) -> bool:
        """Whether a file is of a checkpoint that is being removed: its seal is gone first."""
        return names.is_array(name) and not (self.folder / names.seal_of(name)).exists()

    def _is_complete(self, seal: str) -> bool:
        """Whether the store has everything that this host has to bring before its seal."""
        step = seal.removesuffix("seal.json")
        files = [step + file for file in sealed_files(self.folder / seal)]
        return all(name in self._known for name in files if self._brings(name))

    def _brings(self, name: str) -> bool:
        """Whether it is this host that brings a file to the store."""
        del name
        return True

    @property
    def _cleans(self) -> bool:
        """Whether this host removes what killed runs have left in the store."""
        return self._lease is not None

    def _remove(self, gone: Iterable[str]) -> None:
        gone = list(gone)
        self.store.delete(gone)
        for name in gone:
            self._known.pop(name, None)

    def _is_stale(self, name: str, here: dict[str, Signature]) -> bool:
        """Whether the store does not have a file as it is here."""
        known = self._known.get(name)
        if known and here[name] == known.signature:
            return False
        # Arrays do not change unless they are saved and sealed again: another one is damaged, and stays here.
        return not known or not names.is_array(name) or self._is_stale(names.seal_of(name), here)

    def _is_gone(self, name: str, known: Known, here: dict[str, Any]) -> bool:
        if known.is_here:
            return name not in here
        # Arrays that were never fetched go with the seal of their checkpoint.
        return names.is_array(name) and names.seal_of(name) not in here

    def _write_manifest(self) -> None:
        files = {name: list(known) for name, known in self._known.items()}
        write_json(
            self.folder / MANIFEST,
            {"lease": self._written_under, "hosts": self.num_hosts, "files": files},
        )
