"""Checkpoints: Orbax writes and reads the arrays; this module decides what is complete, trusted and kept.

A stage's checkpoints/ folder holds a folder for every step that is kept:

    pretrain/checkpoints/
        200/
            seal.json               written last: only now the checkpoint exists (see jaxllm.runtime.seal)
            _METADATA               the tree: names, dtypes and shapes of the leaves
            d/..., manifest.ocdbt   the arrays, in TensorStore's format
            ocdbt.process_0/...     and as each process wrote them
        400/...
        600/                        no seal: a save that was killed, removed at the next start
    pretrain/damaged/300/           a checkpoint that failed its check, set aside

Everything that the seal holds is checked before a checkpoint is used. Restoring goes through the abstract state with
the target shardings, so that another mesh or another number of devices or hosts is not a special case. A tree that
does not match the model is an error that lists both sides; nothing is overlaid on newly initialized weights.
"""

import functools
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxllm.config import Ending, InputError
from jaxllm.runtime import chunks, digest, tree_shapes
from jaxllm.runtime.config import CheckpointConfig
from jaxllm.runtime.console import console
from jaxllm.runtime.damage import set_aside, warn_damaged
from jaxllm.runtime.files import absolute, check_path
from jaxllm.runtime.processes import any_process, barrier
from jaxllm.runtime.seal import (
    IO_ERRORS,
    READ_ERRORS,
    SEAL,
    Damaged,
    check_files,
    committed_steps,
    read_seal,
    short_text,
    write_seal,
)
from jaxllm.runtime.store import working
from jaxllm.runtime.store.mirror import Mirror
from jaxllm.runtime.store.working import mirror_of

# What the training loop stores with a checkpoint, as JSON.
Record = dict[str, Any]
# (folder of the step, record, abstract subtree, its path) -> the subtree, read from an imported model's own files
ReadImported = Callable[[Path, Record, Any, Sequence[str]], Any]


class SaveFailed(Ending):
    """The last state could not be saved in several attempts."""


class Checkpoints:
    """The checkpoints/ folder of a stage that is training. All processes make every call together.

    Args:
        directory: the folder; what a killed save left there is removed.
        config: when to save and what to keep.
        metric: name of the metric in `record["metrics"]` that decides which checkpoints are best; "": none are.
        lower_is_better: whether a low value of the metric is good.

    Raises:
        InputError: checkpoints in this directory could not be read back (`check_path`).
    """

    def __init__(
        self,
        directory: epath.PathLike,
        config: CheckpointConfig,
        metric: str = "",
        lower_is_better: bool = True,
    ):
        check_path(directory)
        self.directory = absolute(directory)
        self.config = config
        self.metric = metric
        # Times the metric, it makes higher values better.
        self.sign = -1.0 if lower_is_better else 1.0
        self._writer: ocp.AsyncCheckpointer | None = None
        # The save in progress: the thread that will commit it, its step, and why it failed ("": it has not).
        self._commit: threading.Thread | None = None
        self._saving = -1
        self._error = ""
        if working.keeps(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            _remove_unsealed(self.directory)
        barrier("checkpoints")

    def restore_or_init(self, abstract: Any, init: Callable[[], Any]) -> tuple[Any, Record]:
        """(state, record) of the newest good checkpoint; (init(), {}) if there is none.

        A damaged checkpoint is reported and moved to STAGE/damaged/. Raises Damaged if `config.damaged` is "stop".
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
        """Start saving: when this returns the state has been copied off the devices; a thread does the rest.

        A failure (a full disk, a folder that cannot be written) ends the save and not the run: it is reported, and the
        next save tries again.
        """
        self.wait()  # one save at a time: the host has memory for one copy of the state
        if mirror := mirror_of(self.directory):
            mirror.check()
        self._saving = step
        self._error = self._no_room(state)
        # Orbax's save has barriers: all processes start it, or none does.
        if not any_process(bool(self._error)):
            self._start_save(step, state, record)
        if any_process(bool(self._error)):
            self._give_up()

    def _start_save(self, step: int, state: Any, record: Record) -> None:
        # The digests come from the arrays on the devices, not from what was copied or written.
        seal = {"record": record, "digests": digest.digests(state)}
        if mirror := mirror_of(self.directory):
            seal |= mirror.seal_fields()
        shapes = tree_shapes.shapes(state)
        try:
            self._writer = self._writer or _new_writer(state, working.has_own_copy(self.directory))
            self._writer.save(
                self.directory / str(step), args=ocp.args.PyTreeSave(state), force=True
            )
        except IO_ERRORS as error:
            self._error = short_text(error)
        else:
            # Sealing waits for Orbax's threads on all processes; training does not wait for it.
            self._commit = threading.Thread(
                target=self._finish_save, args=(self._writer, step, seal, shapes)
            )
            self._commit.start()

    def _finish_save(
        self, writer: ocp.AsyncCheckpointer, step: int, seal: dict[str, Any], shapes: dict[str, str]
    ) -> None:
        """In a thread: seal the checkpoint once it can be read back, and remove those that need not be kept."""
        step_dir = self.directory / str(step)
        try:
            writer.wait_until_finished()  # on all processes
            if jax.process_index() == 0:
                # Not every failed write is reported, and this checkpoint replaces an older one.
                self._error = _read_back_error(step_dir, shapes)
            if working.keeps(self.directory) and not self._error:
                write_seal(step_dir, seal)
                self._prune()
            if mirror := mirror_of(self.directory):
                mirror.wake()
        except IO_ERRORS as error:
            self._error = short_text(error)

    def wait(self) -> None:
        """Wait until the save in progress is committed or has failed."""
        if self._commit:
            self._commit.join()
            self._commit = None
            # Every process must know: it may have failed on one of them only.
            if any_process(bool(self._error)):
                self._give_up()

    def save_surely(
        self, step: int, state: Any, record: Record, attempts: int = 5, pause: float = 5.0
    ) -> None:
        """Save and wait until it is where it lasts. Raises SaveFailed after `attempts`, `pause` seconds apart."""
        self.wait()
        for attempt in range(attempts):
            # The step may be one that `save_every` has saved before.
            if step in committed_steps(self.directory):
                break
            if attempt:
                time.sleep(pause)
            self.save(step, state, record)
            self.wait()
        working.share_durably(self.directory, "saved")
        if step not in committed_steps(self.directory):
            raise SaveFailed(
                f"{self.directory}: step {step} could not be saved in {attempts} attempts; make room "
                "or make the folder writable, and run the same command again: it resumes from the "
                "newest checkpoint"
            )

    def go_back(self, step: int) -> None:
        """Remove the checkpoints after `step`."""
        self.wait()
        # Without this, a restart would resume from beyond the rewind.
        if working.keeps(self.directory):
            for later in committed_steps(self.directory):
                if later > step:
                    _remove(self.directory / str(later))
        working.share(self.directory, "go back")

    def close(self) -> None:
        """Wait for the save in progress and end the writer's threads."""
        self.wait()
        if self._writer:
            self._writer.close()

    def _give_up(self) -> None:
        """Report that the save failed, and remove what it has written."""
        reason = self._error or "another process could not write"
        console.print(
            f"warning: saving step {self._saving} into {self.directory} failed ({reason}); "
            "training continues, and the next save tries again",
            soft_wrap=True,
        )
        self._writer = None  # a writer that has failed once is not trusted again
        self._error = ""
        # It takes up space that the next save needs.
        if working.keeps(self.directory):
            _remove(self.directory / str(self._saving))
        barrier("save failed")

    def _no_room(self, state: Any) -> str:
        """Why the disk is too full for the state, asked before anything is written; "" if it is not."""
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        try:
            free = shutil.disk_usage(self.directory).free
        except OSError as error:
            return short_text(error)
        if free >= needed:
            return ""
        return f"{needed / 2**20:,.1f} MiB needed, {free / 2**20:,.1f} MiB free"

    def _prune(self) -> None:
        """Remove all checkpoints but the newest, the best, and one every `keep_every` steps."""
        steps = committed_steps(self.directory)
        kept = set(steps[-self.config.keep_last :])
        if self.metric and self.config.keep_best:
            # Of equal ones the newer is better.
            best_last = sorted(steps, key=lambda step: (self._quality(step), step))
            kept.update(best_last[-self.config.keep_best :])
        for step in steps:
            forever = self.config.keep_every and step % self.config.keep_every == 0
            if step not in kept and not forever:
                _remove(self.directory / str(step))

    def _quality(self, step: int) -> float:
        """The metric of a checkpoint, its sign such that higher is better; without the metric, -infinity."""
        try:
            metrics = read_seal(self.directory / str(step))["record"].get("metrics", {})
        except Damaged:  # reported when the checkpoint is needed
            return -np.inf
        return self.sign * metrics[self.metric] if self.metric in metrics else -np.inf


def _read_back_error(step_dir: epath.Path, shapes: Mapping[str, str]) -> str:
    """Why a checkpoint that was just written cannot be read back; "" if it can.

    This opens every array; the values are checked against their digests when they are restored.
    """
    try:
        # The metadata of arrays is read from the arrays' own files.
        saved = ocp.PyTreeCheckpointHandler().metadata(step_dir).tree
    except READ_ERRORS as error:
        return f"it cannot be read back: {short_text(error)}"
    wrong = {*tree_shapes.shapes(saved).items()} ^ {*shapes.items()}
    return f"it reads back as another tree, at {min(wrong)[0]}" if wrong else ""


def _new_writer(state: Any, own_folder: bool) -> ocp.AsyncCheckpointer:
    """own_folder: whether each process writes into a folder that the others do not see."""
    # Without this, a folder that cannot be created is not an error at first: Orbax's threads wait for it for minutes.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    # Host memory: the copy off the devices takes one state. Compression takes the size of a leaf again for each leaf
    # in progress; this limit, in GB, admits the largest leaf, and several small ones at a time.
    largest = max(x.nbytes for x in jax.tree.leaves(state))
    limit = max(1.2 * largest, 10**8) / 10**9
    # In folders of their own each process makes its own; each chunk is a file, since OCDBT would gather those of all.
    processes = ocp.options.MultiprocessingOptions(primary_host=None if own_folder else 0)
    handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=limit,  # pyright: ignore
        use_ocdbt=not own_folder,
        multiprocessing_options=processes,
    )
    return ocp.AsyncCheckpointer(handler, async_options=options, multiprocessing_options=processes)


def newest(stage_dir: epath.PathLike, step: int | None = None) -> epath.Path:
    """The folder of a stage's newest checkpoint, or of that of `step`. Raises InputError if there is none."""
    directory = absolute(epath.Path(stage_dir) / "checkpoints")
    if not directory.exists():
        raise InputError(
            f"{stage_dir}: has no checkpoints; give the directory of a stage that trains a model"
        )
    steps = committed_steps(directory)
    if step is None and not steps:
        raise InputError(f"{directory}: holds no complete checkpoint; run the stage again")
    return directory / str(steps[-1] if step is None else step)


def load_params(
    stage_dir: epath.PathLike,
    abstract: Any,
    path: Sequence[str] = ("params",),
    step: int | None = None,
    check: bool = True,
    read_imported: ReadImported | None = None,
) -> Any:
    """The subtree at `path` of a stage's newest checkpoint, or of that of `step`; arguments as for `restore`."""
    return restore(newest(stage_dir, step), abstract, path, check, read_imported)[0]


def restore(
    step_dir: epath.Path,
    abstract: Any,
    path: Sequence[str] = (),
    check: bool = True,
    read_imported: ReadImported | None = None,
) -> tuple[Any, Record]:
    """(state or its subtree at `path`, record) of a checkpoint.

    Args:
        step_dir: the checkpoint's folder.
        abstract: the tree to restore, of ShapeDtypeStructs with the target shardings.
        path: keys from the root of the saved tree to `abstract`.
        check: whether to check the hashes of the files.
        read_imported: reads an imported model, whose files are not Orbax's.

    Raises:
        Damaged: a file or a leaf is not what was saved.
        InputError: the checkpoint is of another model.
    """
    if mirror := mirror_of(step_dir):
        _complete(
            mirror, step_dir, functools.partial(chunks.needed, Path(step_dir), abstract, path)
        )
    seal = read_seal(step_dir)
    record = seal["record"]
    if check and mirror is None:
        check_files(step_dir, seal)
    if record.get("format") == "safetensors":
        if read_imported is None:
            raise InputError(
                f"{step_dir}: holds an imported model, which cannot be trained in its own directory; "
                "give it as init_from"
            )
        return read_imported(Path(step_dir), record, abstract, path), record
    # Digests do not depend on the sharding: those taken on another mesh must be equal.
    state = _read_arrays(step_dir, abstract, path)
    wrong = digest.differing(digests_below(seal["digests"], path), digest.digests(state))
    if wrong:
        raise Damaged(
            step_dir, f"the values of {', '.join(wrong[:3])} are not those that were saved"
        )
    return state, record


def check(step_dir: epath.Path, seal: dict[str, Any]) -> None:
    """Raises Damaged unless every file of a checkpoint is what was sealed; fetches what is in a store only."""
    if mirror := mirror_of(step_dir):
        _complete(mirror, step_dir, lambda files: files)
    else:
        check_files(step_dir, seal)


def _complete(
    mirror: Mirror, step_dir: epath.Path, needed: Callable[[Sequence[str]], Iterable[str]]
) -> None:
    """Fetch from a store what this process reads of a checkpoint. Raises Damaged on all processes together."""
    try:
        fault = mirror.complete(Path(step_dir), needed)
    except Damaged as error:
        fault = error.what
    if any_process(bool(fault)):
        raise Damaged(step_dir, fault or "found by another process")


def _read_arrays(step_dir: epath.Path, abstract: Any, path: Sequence[str]) -> Any:
    """The subtree at `path`, read by Orbax; raises like `restore`."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            metadata: Any = reader.metadata(step_dir).item_metadata
            saved = _subtree(tree_shapes.as_dicts(metadata.tree), path)
            tree_shapes.compare(saved, abstract, str(step_dir))
            # Orbax wants the path from the root: {"params": abstract}.
            item = abstract
            for key in reversed(path):
                item = {key: item}
            # partial_restore: without it, Orbax refuses a tree that lacks the rest of the saved one.
            args = ocp.args.PyTreeRestore(
                item, restore_args=jax.tree.map(_restore_arg, item), partial_restore=bool(path)
            )
            return _subtree(reader.restore(step_dir, args=args), path)
    except READ_ERRORS as error:
        raise Damaged(step_dir, short_text(error)) from None


def _subtree(tree: Any, path: Sequence[str]) -> Any:
    """The subtree at `path`, {} if the tree does not have it."""
    for key in path:
        tree = tree.get(key, {})
    return tree


def _restore_arg(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def digests_below(digests: digest.Digests, path: Sequence[str]) -> digest.Digests:
    """The digests of the subtree at `path`: for ("params",), {"params.w": d, "step": e} -> {"w": d}."""
    if not path:
        return digests
    prefix = ".".join(path)
    below: digest.Digests = {}
    for name, words in digests.items():
        if name == prefix:  # the subtree is a single leaf
            below[""] = words
        elif name.startswith(f"{prefix}."):
            below[name.removeprefix(f"{prefix}.")] = words
    return below


def _remove_unsealed(directory: epath.Path) -> None:
    """Remove what a killed save left: Orbax's temporary folders, and steps without a seal."""
    for entry in directory.iterdir():
        if entry.name.isdigit() and (entry / SEAL).exists():
            continue
        console.print(f"{entry}: left by an interrupted save; removed", soft_wrap=True)
        if entry.is_dir():
            entry.rmtree()
        else:
            entry.unlink()


def _remove(step_dir: epath.Path) -> None:
    # The seal first: if this is interrupted, the rest of the folder is not a checkpoint.
    (step_dir / SEAL).unlink(missing_ok=True)
    step_dir.rmtree(missing_ok=True)
