"""From a run directory that may be in a store to a local folder to work in."""

import atexit
import contextlib
import functools
import importlib
import json
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from etils import epath

from jaxllm.config import Ending, InputError
from jaxllm.runtime.files import is_remote
from jaxllm.runtime.hubs.names import is_on_hub
from jaxllm.runtime.processes import barrier, gather_json, on_all
from jaxllm.runtime.store import scratch
from jaxllm.runtime.store.hosts import Host, SharedMirror
from jaxllm.runtime.store.lease import Lease
from jaxllm.runtime.store.mirror import Mirror, NotStored
from jaxllm.runtime.store.objects import Store

# Makes a stage directory of a model on a hub. By name, since importing a model rests on what is here.
_HUB_STAGES = "jaxllm.pretrained.hub_stages"
# The mirrors of this process, by their folders.
_OPEN: dict[Path, Mirror] = {}


@contextlib.contextmanager
def working_copy(
    directory: epath.PathLike, lease_seconds: float, scratch_folder: str = ""
) -> Iterator[epath.Path]:
    """A local folder that is the run directory while the block runs; of a local one, itself.

    In a job of several processes each has its own, and all call this together. When the block ends, everything is in the
    store. Should the process be killed, the next one brings what is missing.

    Args:
        directory: the run directory, a path or gs://BUCKET/PATH or s3://BUCKET/PATH.
        lease_seconds: how long others wait for a run that is killed before they take its place.
        scratch_folder: below which the local folder is made; "": `scratch.default_folder`.

    Raises:
        InputError: another run works in it, or the store cannot be used.
        NotStored: not everything could be brought to the store.
    """
    if not is_remote(directory):
        yield epath.Path(directory)
        return
    store = Store(str(directory))
    parent = Path(scratch_folder).expanduser() if scratch_folder else scratch.default_folder()
    folder = scratch.folder_of(store.url, parent, _number_on_machine())
    with contextlib.ExitStack() as stack:
        on_all(lambda: stack.enter_context(scratch.locked(folder)))
        scratch.clean(parent, folder)
        lease = Lease(store, lease_seconds, _identity(folder))
        host = Host(jax.process_index(), jax.process_count())
        if host.count == 1:
            mirror = Mirror(store, folder, lease)
        else:
            mirror = SharedMirror(store, folder, lease, host)
        mirror.open()
        _OPEN[folder] = mirror
        try:
            yield epath.Path(folder)
        except Ending as error:
            # It names files as they are called here; the user knows them by their URLs.
            if not isinstance(error, NotStored):
                error.args = (str(error).replace(str(folder), store.url),)
            raise
        finally:
            del _OPEN[folder]
            mirror.close()


def local_folder(stage_dir: epath.PathLike) -> epath.Path:
    """A stage's directory as a local folder: of one in a store, a copy, whose arrays follow when they are restored.

    Of a model on a hub (hf://ORG/NAME), a stage directory that is made of it.

    The copy is kept for the next command, which fetches what has changed.
    """
    if is_on_hub(str(stage_dir)):
        return epath.Path(importlib.import_module(_HUB_STAGES).folder_of(str(stage_dir)))
    path = epath.Path(stage_dir).expanduser()
    if is_remote(path):
        run, _, stage = str(path).rstrip("/").rpartition("/")
        path = epath.Path(_reader(run).folder) / stage
    mirror = mirror_of(path)
    if mirror and mirror.reads_only:
        mirror.fetch(f"{Path(path).relative_to(mirror.folder).parts[0]}/")
    return path


def local_run(run_dir: epath.PathLike) -> epath.Path:
    """A run directory as a local folder: of one in a store, a copy of what is small."""
    path = epath.Path(run_dir).expanduser()
    if not is_remote(path):
        return path
    mirror = _reader(str(path))
    mirror.fetch()
    return epath.Path(mirror.folder)


def _reader(url: str) -> Mirror:
    """The mirror of a run directory that this process only reads."""
    store = Store(url)
    for mirror in _OPEN.values():
        if mirror.reads_only and mirror.store.url == store.url:
            return mirror
    folder = scratch.folder_of(f"{store.url}/read", scratch.default_folder())
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    try:
        stack.enter_context(scratch.locked(folder))
    except InputError:  # another command reads there, at the same time
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxllm-")))
    mirror = Mirror(store, folder, None)
    stack.callback(mirror.close)
    _OPEN[folder] = mirror
    return mirror


def mirror_of(path: epath.PathLike) -> Mirror | None:
    """The mirror whose folder a path is in; None: the path is what lasts."""
    for folder, mirror in _OPEN.items():
        if Path(path).is_relative_to(folder):
            return mirror
    return None


def has_own_copy(path: epath.PathLike) -> bool:
    """Whether each process of this job has its own files at a path, of which none of the others knows."""
    mirror = mirror_of(path)
    return mirror is not None and mirror.num_hosts > 1


def exchange_of(folder: epath.PathLike) -> Callable[[], None] | None:
    """What brings the files that each process adds to a folder to all of them; None: they see the same folder."""
    return functools.partial(share, folder, f"files in {folder}") if has_own_copy(folder) else None


def keeps(path: epath.PathLike) -> bool:
    """Whether this process adds and removes the files at a path: process 0, or each where each has its own."""
    return jax.process_index() == 0 or has_own_copy(path)


def share(path: epath.PathLike, name: str) -> None:
    """Wait for all processes of the job; then what process 0 has written in a run directory is there for all.

    Args:
        path: in the run directory.
        name: of this place in the program.

    Raises:
        NotStored: without a shared disk, a process could not bring to the store what others need.
    """
    mirror = mirror_of(path)
    if isinstance(mirror, SharedMirror):
        mirror.share()
    else:
        barrier(name)


def share_durably(path: epath.PathLike, name: str) -> None:
    """As `share`, and what was written is where it lasts; `make_durable` for all processes together."""
    if not has_own_copy(path):
        make_durable(path)
    share(path, name)


def make_durable(path: epath.PathLike) -> None:
    """Return once what was written in a run directory is where it lasts: of one in a store, there.

    Raises:
        LeaseLost, NotStored: as `Mirror.push`.
    """
    if mirror := mirror_of(path):
        mirror.push()


def shown(path: epath.PathLike) -> str:
    """A path as the user knows it: of a run directory in a store, its URL."""
    mirror = mirror_of(path)
    if mirror is None:
        return str(path)
    inside = Path(path).relative_to(mirror.folder).as_posix()
    return mirror.store.url if inside == "." else f"{mirror.store.url}/{inside}"


def _number_on_machine() -> int:
    """How many processes of this job with lower numbers run on this machine; 0 where each has its own."""
    machines = gather_json(socket.gethostname())
    index = jax.process_index()
    return machines[:index].count(machines[index])


def _identity(folder: Path) -> str:
    """A name for a scratch that no folder on another machine has."""
    file = folder / ".identity.json"
    if not file.exists():
        file.write_text(json.dumps(uuid.uuid4().hex))
    return json.loads(file.read_text())
