"""The mirror of a job of several processes, which share a run directory in a store and no disk.

Every process, called a host here, works in a scratch of its own. Host 0 writes what a job of one process would write; the
others write the shards of checkpoints that they hold, and tokenized data. So a checkpoint is brought to the store:

    every host      its shards, checkpoints/600/params.w/3.0
    hosts 1, 2, ..  what they have brought, checkpoints/600/seal.1.json
    host 0          once all of these are there, checkpoints/600/seal.json, which speaks of the files of all hosts

A checkpoint exists when that last object does. At a start only the store counts, since no scratch says what the others
hold; files in a scratch whose bytes are those of the store need not be fetched.

What host 0 writes is seen by the others when all call `share`, as files on a shared disk would be after a barrier.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.runtime.chunks import is_of_one_process
from jaxllm.runtime.processes import gather_json, on_all
from jaxllm.runtime.seal import parse_seal, seal_text
from jaxllm.runtime.store import names
from jaxllm.runtime.store.known import UNKNOWN_SIZE, Signature, in_store_only, scan
from jaxllm.runtime.store.lease import Lease
from jaxllm.runtime.store.mirror import Mirror, NotStored
from jaxllm.runtime.store.objects import Store, in_parallel


class Host(NamedTuple):
    """One process of a job.

    Attributes:
        index: 0 for the one that holds the lease.
        count: how many there are.
    """

    index: int
    count: int

    @property
    def is_first(self) -> bool:
        return self.index == 0


class SharedMirror(Mirror):
    """The mirror of one host. All hosts call `open` and `share` together."""

    def __init__(self, store: Store, folder: Path, lease: Lease, host: Host):
        super().__init__(store, folder, lease)
        self._under = lease
        self._host = host
        # What this host has brought to the store or removed there since it was last shared: size and version, or None.
        self._news: dict[str, list[Any] | None] = {}
        # Whether a checkpoint here is sealed that other hosts have not brought yet.
        self._waits = False

    @property
    def _period(self) -> float:
        return 1.0 if self._waits else super()._period

    @property
    def num_hosts(self) -> int:
        return self._host.count

    def seal_fields(self) -> dict[str, Any]:
        return {"host": list(self._host)}

    # --- From the store.

    def open(self) -> None:
        """Make the scratch equal to the store, and begin to watch it."""
        on_all(self._under.take if self._host.is_first else _nothing)
        number = gather_json(self._under.number)[0]
        if not self._host.is_first:
            self._under.follow(number)
        # Host 0 removes what a killed job has left; then the others look.
        for now in (self._host.is_first, not self._host.is_first):
            on_all(self._fetch_and_clean if now else _nothing)
        self._begin(self._under)

    def _fetch_and_clean(self) -> None:
        self.fetch()
        for step in self.folder.glob("*/checkpoints/*"):
            if not (step / "seal.json").exists():
                shutil.rmtree(step)

    def share(self) -> None:
        """Bring everything to the store, and what the other hosts have brought here.

        Raises:
            NotStored: it could not be brought to the store, on any host.
        """
        first = self._host.is_first
        with self._pushing:
            # Host 0 first removes the seals of what is made again, and last writes those of what all have brought.
            on_all(self._retract_now if first else _nothing)
            on_all(self._push_whole if not first else _nothing)
            self._exchange_news()
            on_all(self._push_whole if first else _nothing)
            self._exchange_news()

    def _retract_now(self) -> None:
        self.check()
        self._retract(self._under)

    def _push_whole(self) -> None:
        """Push; raises NotStored if a checkpoint is then not whole in the store."""
        self.push()
        for name in scan(self.folder):
            if names.is_seal(name) and name not in self._known:
                raise NotStored(f"{self.store}/{name}: a host has not brought its part")

    def _exchange_news(self) -> None:
        """Fetch what other hosts have brought, and remove what they have removed."""
        news, self._news = self._news, {}
        fetched = []
        for host, theirs in enumerate(gather_json(news)):
            for name, found in theirs.items() if host != self._host.index else ():
                (self.folder / name).unlink(missing_ok=True)
                self._known.pop(name, None)
                if found:
                    size, version = found
                    self._known[name] = in_store_only(version, size)
                    fetched.append(name)
        on_all(lambda: in_parallel(self._download, fetched))

    # --- To the store.

    def _brings(self, name: str) -> bool:
        if self._host.is_first or names.is_seal(name) or names.is_shared_cache(name):
            return True
        return names.is_array(name) and is_of_one_process(names.inside_step(name))

    @property
    def _cleans(self) -> bool:
        return self._host.is_first

    def _writable(self, stale: list[str]) -> list[str]:
        """Without checkpoints that are made again, until host 0 has removed the seal of what was there before."""
        if self._host.is_first:
            return stale
        is_sealed: dict[str, bool] = {}
        writable = []
        for name in stale:
            seal = names.seal_of(name) if names.is_array(name) or names.is_seal(name) else ""
            if seal and seal not in is_sealed:
                is_sealed[seal] = self.store.look(seal) is not None
            if not is_sealed.get(seal):
                writable.append(name)
        return writable

    def _upload(self, name: str, signature: Signature) -> None:
        super()._upload(name, signature)
        known = self._known.get(name)
        if known and not (names.is_array(name) or names.is_seal(name)):
            # Of a file that grows, the object may lack a line that was being written.
            size = UNKNOWN_SIZE if name.endswith(".jsonl") else known.size
            self._news[name] = [size, known.version]

    def _remove(self, gone: Any) -> None:
        gone = list(gone)
        if self._host.is_first:
            super()._remove(gone)
            self._news |= dict.fromkeys(gone)
            for seal in {names.seal_of(name) for name in gone if names.is_array(name)}:
                self._remove_rest(seal.removesuffix("/seal.json"))
            return
        # Host 0 removes a checkpoint with the files of all; before it is written anew, nobody must believe the old part.
        self.store.delete(self._part(name) for name in gone if names.is_seal(name))
        for name in gone:
            self._known.pop(name, None)

    def _remove_rest(self, step: str) -> None:
        """Remove what other hosts have brought of a checkpoint that is gone before it was whole in the store."""
        if not (self.folder / step).exists():
            self.store.delete(self.store.list(step))

    def _part(self, seal: str) -> str:
        return names.part_of(seal, self._host.index)

    def _commit(self, name: str, file: Path) -> str:
        if not names.is_seal(name):
            return self._create(name, file.read_bytes())
        if not self._is_complete(name):
            return ""
        if not self._host.is_first:
            return self.store.write(self._part(name), file.read_bytes()).version
        version = self._merge(name, parse_seal(file.read_bytes()))
        self._waits = not version
        return version

    def _merge(self, name: str, own: dict[str, Any]) -> str:
        """Write the seal that speaks of the files of all hosts; "" if one of them has not brought its part."""
        step = name.removesuffix("seal.json")
        found = self.store.list(step.rstrip("/"))
        parts = [names.part_of(name, host) for host in range(1, self._host.count)]
        if not all(part in found for part in parts):
            return ""
        files: dict[str, str] = {}
        for part in parts:
            sealed = self._read_part(part, own)
            if sealed is None:
                return ""
            for file, digest in sealed["files"].items():
                if is_of_one_process(file):
                    files[file] = digest
        files |= own["files"]
        if not all(step + file in found for file in files):
            return ""
        whole = {field: value for field, value in own.items() if field != "host"}
        version = self._create(name, seal_text({**whole, "files": files}).encode())
        # What the others have brought goes when the seal here goes.
        self._learn(found)
        return version

    def _read_part(self, name: str, own: dict[str, Any]) -> dict[str, Any] | None:
        """What another host has sealed of the same save; None if it has not yet."""
        content = self.store.read(name)
        part = parse_seal(content) if content else {}
        return part if part.get("digests") == own["digests"] else None


def _nothing() -> None:
    """What a host does while another one works."""
