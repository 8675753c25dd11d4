"""The run directory, through which stages hand their results to each other.

    runs/NAME/
        .lock                locked by the process that works here
        goodput.jsonl        how the time was spent
        tokenizer/           the directory of the stage "tokenizer"; each stage has one, such as
        pretrain/
            config.json      the whole config, as it was when the stage began
            provenance.json  versions, devices, command
            tokenizer/       a copy: the directory is complete without the others
            checkpoints/     of stages that train
            metrics.jsonl    and tensorboard/
            model.json       how to load the model (`jaxllm.model_store`)
            result.json      written last, atomically: the stage is finished

A stage reads what earlier stages wrote and nothing else; no stage calls another.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from jaxllm.config import Ending, InputError, check_unchanged, differences
from jaxllm.runtime.files import lock_file, new_folder, read_json, write_json
from jaxllm.runtime.goodput import Ledger
from jaxllm.runtime.processes import Signals
from jaxllm.runtime.provenance import code_version, provenance
from jaxllm.runtime.seal import committed_steps
from jaxllm.runtime.store.working import make_durable, share
from jaxllm.tokenizers.published import load_tokenizer
from jaxllm.tokenizers.trained import Tokenizer

# Written while a stage runs: what a changed config would be mixed into.
_PROGRESS_FILES = ("result.json", "samples.jsonl", "rankings.jsonl")


class StageCut(Ending):
    """A stage stopped before its end on purpose; running it again resumes it there."""

    code = 3


@dataclasses.dataclass(frozen=True)
class Workspace:
    """What every stage gets: where it writes, the mesh it runs on, the seed, and the config as JSON."""

    run_dir: epath.Path
    """The run directory."""
    mesh: jax.sharding.Mesh
    """The mesh that the stage runs on."""
    seed: int
    """Seed of everything random."""
    config: Mapping[str, Any]
    """The whole config as plain JSON types, recorded next to every stage's results."""
    ledger: Ledger
    """Account of the time, one for all stages."""
    command: str = "jaxllm STAGE CONFIG"
    """How the user would run a stage by hand, for hints."""
    signals: Signals = dataclasses.field(default_factory=Signals)
    """Whether the process was told to stop."""
    allow_change: tuple[str, ...] = ()
    """Dotted names of config fields that may have changed since a stage began."""
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """Adds to recorded sections of a config the fields that are new since then (`config.complete`)."""

    def on(self, mesh: jax.sharding.Mesh) -> "Workspace":
        """The same workspace with another mesh."""
        return dataclasses.replace(self, mesh=mesh)

    def stage_dir(self, stage: str) -> epath.Path:
        """The directory of a stage."""
        return self.run_dir / stage

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the run directory and lock it for this process; the lock ends with the process, even if killed.

        Raises InputError if another process holds the lock.
        """
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InputError(
                f"{self.run_dir}: cannot be made ({reason}); choose another --run-dir"
            ) from None
        # Process 0 holds the lock for its job.
        if jax.process_index():
            yield
            return
        refusal = f"{self.run_dir}: another process works in it; wait for it or stop it"
        with lock_file(self.run_dir / ".lock", refusal):
            yield

    def begin(self, stage: str, sections: Sequence[str], extends: bool) -> None:
        """Record config and provenance; refuse to resume a stage that was begun with another config.

        Args:
            stage: name of the stage.
            sections: sections of the config that decide its outcome.
            extends: whether a finished stage is resumed if the config asks for more steps.

        Raises:
            InputError: fields differ from the recorded ones and are not in `allow_change`; it lists them.
        """
        directory = self.stage_dir(stage)
        # Process 0 alone writes; the others read what it wrote after a barrier.
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
        # A stage that has only failed so far may be begun with another config.
        recorded = read_json(directory / "config.json") if _has_progress(directory) else None
        if recorded is not None:
            # Recorded by an older version, it may lack fields; their defaults are what was used.
            old = self.complete({name: recorded.get(name) for name in sections})
            new = self._sections(sections)
            check_unchanged(
                _outcome(old), _outcome(new), self.allow_change, directory, "another config"
            )
            # A finished stage would be skipped.
            if extends and _length_changed(stage, old, new):
                self.reopen(stage)
        if jax.process_index() == 0:
            write_json(directory / "config.json", dict(self.config))
            write_json(directory / "provenance.json", provenance(self.mesh))
        share(self.run_dir, f"begin {stage}")

    def _sections(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: self.config[name] for name in names}

    def fingerprints(self, sections: Sequence[str], data: str) -> dict[str, Any]:
        """Everything that a stage is made from, as JSON. A run that differs in it does not resume from a checkpoint.

        Args:
            sections: sections of the config that decide the outcome.
            data: fingerprint of the data.
        """
        return {
            **_outcome(self._sections(sections)),
            "code": code_version(),
            "tokenizer": self.tokenizer().fingerprint,
            "data": data,
        }

    def complete_fingerprints(
        self, sections: Sequence[str], recorded: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Recorded fingerprints, with the defaults of config fields that are new since they were recorded."""
        old = {name: recorded[name] for name in sections if name in recorded}
        return {**recorded, **_outcome(self.complete(old))}

    def finish(self, stage: str, result: Mapping[str, Any]) -> None:
        """Write result.json, with the step of the newest checkpoint if the stage has any."""
        record = dict(result)
        directory = self.stage_dir(stage) / "checkpoints"
        steps = committed_steps(directory) if directory.exists() else []
        # Later stages load this step, not the newest: the stage may be training further meanwhile.
        if steps:
            record["checkpoint"] = steps[-1]
        write_json(self.stage_dir(stage) / "result.json", record)
        make_durable(self.run_dir)

    def reopen(self, stage: str) -> None:
        """Make a finished stage unfinished; it resumes from its newest checkpoint."""
        if jax.process_index() == 0:
            (self.stage_dir(stage) / "result.json").unlink(missing_ok=True)
        share(self.run_dir, f"reopen {stage}")

    def result(self, stage: str) -> dict[str, Any] | None:
        """The result of a finished stage, else None."""
        return read_json(self.stage_dir(stage) / "result.json")

    def require(self, stage: str, needed_by: str) -> dict[str, Any]:
        """The result of a stage that must be finished. Raises InputError with the command to run."""
        result = self.result(stage)
        if result is None:
            command = self.command.replace("STAGE", stage)
            raise InputError(
                f"{self.stage_dir(stage)}: {needed_by} needs the {stage} stage; run: {command}"
            )
        return result

    def source(self, given: str, stage: str, needed_by: str) -> str:
        """The stage directory `given`; if empty, that of `stage`, which must be finished."""
        if given:
            return os.path.expanduser(given)
        # A directory that the user gave may be an imported model, which no stage here has made.
        self.require(stage, needed_by)
        return str(self.stage_dir(stage))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of this run."""
        return load_tokenizer(self.run_dir / "tokenizer" / "tokenizer")

    def share_tokenizer(self, stage: str) -> None:
        """Copy the tokenizer into a stage's directory, which is then complete without the others."""
        self.tokenizer()  # if it is missing or damaged, this raises before anything is copied
        target = Path(self.stage_dir(stage) / "tokenizer")
        if not target.exists() and jax.process_index() == 0:
            with new_folder(target) as folder:
                shutil.copytree(
                    Path(self.run_dir / "tokenizer" / "tokenizer"), folder, dirs_exist_ok=True
                )
        share(self.run_dir, f"tokenizer of {stage}")


# Fields that change nothing that a later stage reads: the number of threads that prepare batches, how people are asked to
# rank, and with whom they are compared.
_NO_MATTER = ("workers", "host", "port", "guidelines", "open_browser", "compare_with")


def _outcome(tree: Any) -> Any:
    """A config without the fields that do not change any result."""
    if not isinstance(tree, dict):
        return tree
    outcome = {key: _outcome(value) for key, value in tree.items() if key not in _NO_MATTER}
    # The same person may go on in another place.
    if outcome.get("annotator") == "browser":
        outcome["annotator"] = "person"
    return outcome


def _length_changed(stage: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the config asks for another number of steps or epochs of a stage."""
    lengths = (f"{stage}.num_steps", f"{stage}.num_epochs")
    return any(change.startswith(lengths) for change in differences(old, new))


def _has_progress(directory: epath.Path) -> bool:
    """Whether a stage has produced anything that a changed config would be mixed into."""
    if any((directory / name).exists() for name in _PROGRESS_FILES):
        return True
    # Also a step without a seal counts: a save in progress when the process was killed.
    checkpoints = directory / "checkpoints"
    return checkpoints.exists() and any(entry.name.isdigit() for entry in checkpoints.iterdir())
