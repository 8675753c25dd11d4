"""Checkpoints: Orbax writes and reads the arrays; what is whole, what is trusted and what is kept is decided here.

A step's folder is committed once its seal.json is there, which is written last, at once. It holds the size and hash of
every file, a digest of every leaf taken on the devices before saving, and a record: fingerprints of what the run was
made from, held-out metrics, skipped batches. All of it is checked before a checkpoint is used. Restoring goes through
the abstract state with the target shardings, so that another mesh, device or host count is no special case. A tree that
does not match is an error that lists both sides; nothing is overlaid on fresh weights.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxllm.config import Ending, InputError
from jaxllm.config.ranges import NonNegativeInt, PositiveInt
from jaxllm.runtime import digest, tree_shapes
from jaxllm.runtime.console import console
from jaxllm.runtime.processes import any_process, barrier

Record = dict[str, Any]
SEAL = "seal.json"
# (folder of the step, record, abstract subtree, its path) -> the subtree, out of an imported model's own files
ReadImported = Callable[[Path, Record, Any, Sequence[str]], Any]
# What Orbax, TensorStore and the operating system raise where a disk is full or not writable, a file is short, ...
_IO_ERRORS = (OSError, ValueError, RuntimeError)
_READ_ERRORS = (*_IO_ERRORS, KeyError, TypeError, AttributeError)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep, and what to do where something is damaged."""

    save_every: PositiveInt = 200
    """Steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_best: NonNegativeInt = 1
    """Checkpoints with the best held-out metric kept besides."""
    keep_every: NonNegativeInt = 0
    """Steps between checkpoints that are kept for ever; 0: none."""
    damaged: Literal["fall_back", "stop"] = "fall_back"
    """Where the newest checkpoint is damaged: go on from the newest good one, with a warning, or stop."""
    rewind_after: NonNegativeInt = 20
    """Updates skipped in a row (not finite, or a spike) after which training goes back; 0: never."""
    rewind_skip: NonNegativeInt = 100
    """Batches skipped beyond the last bad one, after going back (PaLM: 200 to 500)."""
    max_rewinds: NonNegativeInt = 3
    """Training has failed when it would have to go back once more."""
    compare_replicas_every: NonNegativeInt = 0
    """Steps between comparisons of what several devices hold in common, to find silent corruption; 0: never."""


class Damaged(InputError):
    """A checkpoint that is not what was saved; `step_dir` is its folder."""

    def __init__(self, step_dir: epath.Path, what: str):
        super().__init__(
            f"{step_dir}: this checkpoint is damaged or half-written ({what}); `jaxllm run` makes it again, from the "
            "newest good one"
        )
        self.step_dir, self.what = step_dir, what


class SaveFailed(Ending):
    """The last state could not be saved, although it was tried again and again."""


class Checkpoints:
    """A stage's checkpoints/ folder, written by this run. All processes make every call together."""

    def __init__(
        self,
        directory: epath.PathLike,
        config: CheckpointConfig,
        metric: str = "",
        lower_is_better: bool = True,
    ):
        check_path(directory)
        self.directory, self.config, self.metric = _absolute(directory), config, metric
        self.sign = -1.0 if lower_is_better else 1.0
        self._writer: ocp.AsyncCheckpointer | None = None
        self._commit: threading.Thread | None = None
        self._saving, self._error = -1, ""
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            _clean(self.directory)
        barrier("checkpoints")

    def restore_or_init(self, abstract: Any, init: Callable[[], Any]) -> tuple[Any, Record]:
        """(state, record) of the newest checkpoint that is whole, else (init(), {}).

        A damaged one is named and set aside in STAGE/damaged/. Raises Damaged where config.damaged says stop.
        """
        for step in reversed(committed_steps(self.directory)):
            try:
                return restore(self.directory / str(step), abstract)
            except Damaged as error:
                if self.config.damaged == "stop":
                    raise
                warn_damaged(error, "the one before is used")
                set_aside(error.step_dir)
        return init(), {}

    def save(self, step: int, state: Any, record: Record) -> None:
        """Start saving: the state is off the devices when this returns, the rest is done in the background.

        A failure (a full disk, a folder that cannot be written) ends the save, not the run: it says so, and the next
        save tries again.
        """
        self.wait()
        self._saving, self._error = step, self._no_room(state)
        if not any_process(bool(self._error)):
            seal = {"record": record, "digests": digest.digests(state)}
            try:
                self._writer = self._writer or _new_writer(state)
                self._writer.save(
                    self.directory / str(step), args=ocp.args.PyTreeSave(state), force=True
                )
            except _IO_ERRORS as error:
                self._error = _short(error)
            else:
                self._commit = threading.Thread(
                    target=self._finish, args=(self._writer, step, seal, tree_shapes.shapes(state))
                )
                self._commit.start()
        if any_process(bool(self._error)):
            self._failed()

    def wait(self) -> None:
        """Until what was being saved is committed, or has failed."""
        if self._commit:
            self._commit.join()
            self._commit = None
            if any_process(bool(self._error)):
                self._failed()

    def save_surely(
        self, step: int, state: Any, record: Record, attempts: int = 5, pause: float = 5.0
    ) -> None:
        """Save and wait until it is on disk. Raises SaveFailed after so many attempts, `pause` seconds apart."""
        self.wait()
        for attempt in range(attempts):
            if step in committed_steps(self.directory):
                return
            if attempt:
                time.sleep(pause)
            self.save(step, state, record)
            self.wait()
        if step not in committed_steps(self.directory):
            raise SaveFailed(
                f"{self.directory}: step {step} could not be saved in {attempts} attempts; make room or make the folder "
                "writable, and run the same command again: it goes on from the newest checkpoint"
            )

    def go_back(self, step: int) -> None:
        """Remove the checkpoints after `step`."""
        self.wait()
        if jax.process_index() == 0:
            for later in (s for s in committed_steps(self.directory) if s > step):
                _remove(self.directory / str(later))
        barrier("go back")

    def close(self) -> None:
        self.wait()
        if self._writer:
            self._writer.close()

    def _finish(
        self, writer: ocp.AsyncCheckpointer, step: int, seal: dict[str, Any], shapes: dict[str, str]
    ) -> None:
        """In a thread: seal the checkpoint once it can be read back, and remove what need not be kept."""
        step_dir = self.directory / str(step)
        try:
            writer.wait_until_finished()  # of all processes
            if jax.process_index() == 0:
                self._error = _unreadable(step_dir, shapes)
                if not self._error:
                    write_seal(step_dir, seal)
                    self._prune()
        except _IO_ERRORS as error:
            self._error = _short(error)

    def _failed(self) -> None:
        reason = self._error or "another process could not write"
        console.print(
            f"warning: saving step {self._saving} into {self.directory} failed ({reason}); the run goes on, and the next "
            "save tries again",
            soft_wrap=True,
        )
        self._writer, self._error = None, ""  # a writer that has failed once is not trusted again
        if jax.process_index() == 0:
            _remove(self.directory / str(self._saving))
        barrier("save failed")

    def _no_room(self, state: Any) -> str:
        """Why there is no room for the state, before anything is written; empty where there is."""
        if _is_remote(self.directory):
            return ""
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        try:
            free = shutil.disk_usage(self.directory).free
        except OSError as error:
            return _short(error)
        return (
            f"{needed / 2**20:,.1f} MiB needed, {free / 2**20:,.1f} MiB free"
            if free < needed
            else ""
        )

    def _prune(self) -> None:
        """Keep the newest, the best, and one every so many steps. A step saved without the metric is the worst."""
        config, steps = self.config, committed_steps(self.directory)
        value = lambda step: self.sign * self._metrics(step).get(self.metric, -self.sign * np.inf)
        best = (
            sorted(steps, key=lambda step: (value(step), step))[-config.keep_best :]
            if config.keep_best
            else []
        )
        forever = [step for step in steps if config.keep_every and step % config.keep_every == 0]
        for step in {*steps} - {
            *steps[-config.keep_last :],
            *(best if self.metric else []),
            *forever,
        }:
            _remove(self.directory / str(step))

    def _metrics(self, step: int) -> Mapping[str, float]:
        try:
            return read_seal(self.directory / str(step))["record"].get("metrics", {})
        except Damaged:  # found when it is needed; until then it is the worst
            return {}


def check_path(directory: epath.PathLike) -> None:
    """Raise InputError where Orbax could not read back what it writes into this directory.

    Orbax finds its own files with a glob below the directory's unescaped name, so `r[1]` would lead it to `r1`. Its
    storage library takes only names that are valid Unicode.
    """
    if "\0" in str(directory):
        raise InputError(
            f"{directory}: a directory's name cannot hold a NUL character; choose another --run-dir"
        )
    path = str(_absolute(directory))
    if found := re.search(r"[*?[\\]", path):
        raise InputError(
            f"{directory}: the checkpoint library reads {found[0]!r} in a directory's name as a pattern and would lose "
            f"checkpoints; choose another --run-dir, or rename {path}"
        )
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{path!a}: this directory's name is not valid UTF-8; choose another --run-dir"
        ) from None


def _unreadable(step_dir: epath.Path, shapes: Mapping[str, str]) -> str:
    """Why a checkpoint that was just written cannot be read back; empty where it can.

    It opens every array that should be there; the values themselves are checked against their digests when restored.
    """
    try:
        saved = ocp.PyTreeCheckpointHandler().metadata(step_dir).tree
    except _READ_ERRORS as error:
        return f"it cannot be read back: {_short(error)}"
    wrong = {*tree_shapes.shapes(saved).items()} ^ {*shapes.items()}
    return f"it reads back as another tree, at {min(wrong)[0]}" if wrong else ""


def _new_writer(state: Any) -> ocp.AsyncCheckpointer:
    # A folder that cannot be made is an error at once; made in the background, its threads wait for it for minutes.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    # The copy off the devices is one state; of it, a few leaves at a time are compressed, which takes their size again.
    at_once = max(1.2 * max(x.nbytes for x in jax.tree.leaves(state)), 10**8) / 10**9
    return ocp.AsyncCheckpointer(
        ocp.PyTreeCheckpointHandler(save_concurrent_gb=at_once), async_options=options
    )  # pyright: ignore


def load_params(
    stage_dir: epath.PathLike,
    abstract: Any,
    path: Sequence[str] = ("params",),
    step: int | None = None,
    check: bool = True,
    read_imported: ReadImported | None = None,
) -> Any:
    """The subtree at `path` of a stage directory's checkpoint, the newest or that of `step`, sharded like `abstract`.

    read_imported: the reader of a model that was imported, whose files are not Orbax's.
    Raises Damaged where that checkpoint is not whole.
    """
    return restore(newest(stage_dir, step), abstract, path, check, read_imported)[0]


def newest(stage_dir: epath.PathLike, step: int | None = None) -> epath.Path:
    """The folder of a stage's newest checkpoint, or that of `step`. Raises InputError where there is none."""
    directory = _absolute(epath.Path(stage_dir) / "checkpoints")
    if not directory.exists():
        raise InputError(
            f"{stage_dir}: has no checkpoints; give the directory of a stage that trains a model"
        )
    steps = committed_steps(directory)
    if step is None and not steps:
        raise InputError(f"{directory}: holds no complete checkpoint; run the stage again")
    return directory / str(steps[-1] if step is None else step)


def committed_steps(directory: epath.Path) -> list[int]:
    """The steps on disk, in order; always read anew."""
    return sorted(
        int(p.name) for p in directory.iterdir() if p.name.isdigit() and (p / SEAL).exists()
    )


def restore(
    step_dir: epath.Path,
    abstract: Any,
    path: Sequence[str] = (),
    check: bool = True,
    read_imported: ReadImported | None = None,
) -> tuple[Any, Record]:
    """(state or its subtree at `path`, record), placed by the shardings of `abstract`, a tree of ShapeDtypeStructs.

    Raises Damaged where a file or a leaf is not what was saved, InputError where it is of another model.
    """
    seal = read_seal(step_dir)
    if check:
        check_files(step_dir, seal)
    if seal["record"].get("format") == "safetensors":
        if read_imported is None:
            raise InputError(
                f"{step_dir}: holds an imported model, which cannot be trained where it is; give it as init_from"
            )
        return read_imported(Path(step_dir), seal["record"], abstract, path), seal["record"]
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            saved = reader.metadata(step_dir).item_metadata
            part = functools.reduce(
                lambda tree, key: tree.get(key, {}), path, tree_shapes.as_dicts(saved.tree)
            )  # pyright: ignore
            tree_shapes.compare(part, abstract, str(step_dir))
            item = functools.reduce(lambda tree, key: {key: tree}, reversed(path), abstract)
            to_args = lambda a: ocp.ArrayRestoreArgs(
                sharding=a.sharding, global_shape=a.shape, dtype=a.dtype
            )
            args = ocp.args.PyTreeRestore(
                item, restore_args=jax.tree.map(to_args, item), partial_restore=bool(path)
            )
            state = functools.reduce(
                lambda tree, key: tree[key], path, reader.restore(step_dir, args=args)
            )
    except _READ_ERRORS as error:
        raise Damaged(step_dir, _short(error)) from None
    prefix = ".".join(path)  # of the tree, or the name of the only leaf
    inside = lambda name: not prefix or name == prefix or name.startswith(f"{prefix}.")
    wanted = {k[len(prefix) :].lstrip("."): v for k, v in seal["digests"].items() if inside(k)}
    if wrong := digest.differing(wanted, digest.digests(state)):
        raise Damaged(
            step_dir, f"the values of {', '.join(wrong[:3])} are not those that were saved"
        )
    return state, seal["record"]


def read_seal(step_dir: epath.Path) -> dict[str, Any]:
    """{record, digests, files}. Raises Damaged where there is none or it is not what was written."""
    try:
        seal = json.loads((step_dir / SEAL).read_bytes())
        if seal.pop("sha256") == _hash_of(seal):
            return seal
        raise Damaged(step_dir, f"{SEAL} is not what was written")
    except _READ_ERRORS as error:
        raise Damaged(step_dir, f"{SEAL}: {_short(error)}") from None


def write_seal(step_dir: epath.Path, seal: dict[str, Any]) -> None:
    """Commit a step's folder: {record, digests}, with the hashes of the files that are there."""
    seal["files"] = {} if _is_remote(step_dir) else _hash_files(step_dir, _files(step_dir))
    partial = step_dir / f".{SEAL}"
    partial.write_text(json.dumps({**seal, "sha256": _hash_of(seal)}))
    partial.replace(step_dir / SEAL)


def check_files(step_dir: epath.Path, seal: dict[str, Any]) -> None:
    """Raise Damaged, on all processes together, where a file is missing, too many, or has other bytes.

    Each process reads its share of the files. An object store checks its own bytes; the leaves' digests still count.
    """
    wanted, here = seal["files"], _files(step_dir) if seal["files"] else []
    what = [f"{name} is missing" for name in wanted if name not in here]
    what += [f"{name} does not belong to it" for name in here if name not in wanted]
    if not what:
        mine = [*wanted][jax.process_index() :: jax.process_count()]
        try:
            found = _hash_files(step_dir, mine)
            what = [
                f"{name} is not what was written" for name in mine if found[name] != wanted[name]
            ]
        except OSError as error:
            what = [_short(error)]
    if any_process(bool(what)):
        raise Damaged(step_dir, what[0] if what else "found by another process")


def _files(step_dir: epath.Path) -> list[str]:
    root = Path(step_dir)
    return sorted(
        str(p.relative_to(root))
        for p in root.rglob("*")
        if p.is_file() and p.name not in (SEAL, f".{SEAL}")
    )


def _hash_files(step_dir: epath.Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each file, several at a time: hashing releases the interpreter's lock."""

    def one(name: str) -> tuple[str, str]:
        with open(Path(step_dir) / name, "rb") as file:
            return name, hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(pool.map(one, names))


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def warn_damaged(error: Damaged, then: str) -> None:
    console.print(
        f"warning: {error.step_dir} is damaged ({error.what}); it is set aside, {then}",
        soft_wrap=True,
    )


def set_aside(step_dir: epath.Path) -> None:
    """Move a damaged checkpoint to STAGE/damaged/STEP, for a look at it; the one before it there is removed."""
    if jax.process_index() == 0:
        kept = step_dir.parent.parent / "damaged"
        kept.rmtree(missing_ok=True)
        kept.mkdir()
        if step_dir.exists():
            step_dir.rename(kept / step_dir.name)
    barrier("set aside")


def _clean(directory: epath.Path) -> None:
    """Remove what a killed save left: Orbax's temporary folders, and steps without a seal. Never a committed step."""
    for entry in directory.iterdir():
        if not entry.name.isdigit() or not (entry / SEAL).exists():
            console.print(f"{entry}: left by a save that was cut; removed", soft_wrap=True)
            entry.rmtree() if entry.is_dir() else entry.unlink()


def _remove(step_dir: epath.Path) -> None:
    """The seal first: a folder whose removal is cut short is not a checkpoint any more."""
    (step_dir / SEAL).unlink(missing_ok=True)
    step_dir.rmtree(missing_ok=True)


def _absolute(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path)
    return path if _is_remote(path) else path.resolve()  # Orbax takes absolute paths only


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
