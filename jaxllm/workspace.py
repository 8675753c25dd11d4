"""The run directory: the only contract between stages.

runs/NAME/STAGE/{config.json, provenance.json, tokenizer/, checkpoints/, metrics.jsonl, tensorboard/, result.json}

`result.json` is written last, by an atomic rename: a stage is finished when it is there.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from jaxllm.config import Ending, InputError, build, check_unchanged, differences, to_tree
from jaxllm.loop import Supervision
from jaxllm.models import lora, scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.lora import LoRAConfig
from jaxllm.pretrained.safetensors_files import read_imported
from jaxllm.runtime import checkpoint
from jaxllm.runtime.files import read_json, write_json
from jaxllm.runtime.goodput import Ledger
from jaxllm.runtime.processes import Signals
from jaxllm.sharding import barrier, place_params
from jaxllm.tokenizers.published import load_tokenizer
from jaxllm.tokenizers.trained import Tokenizer


class StageCut(Ending):
    """A stage stopped before its end on purpose; running it again resumes it there."""

    code = 3


@dataclasses.dataclass(frozen=True)
class Workspace:
    """What every stage gets: where it writes, the mesh it runs on, the seed, and the whole config as JSON."""

    run_dir: epath.Path
    mesh: jax.sharding.Mesh
    seed: int
    config: Mapping[str, Any]
    """The whole config as plain JSON types, recorded beside every stage's results."""
    command: str = "jaxllm STAGE CONFIG"
    """How the user would run a stage by hand, for hints."""
    signals: Signals = dataclasses.field(default_factory=Signals)
    """Whether the process was told to stop."""
    allow_change: tuple[str, ...] = ()
    """Dotted names of what may have changed since a stage was begun."""
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """Recorded sections of a config with the fields that are new since then (`config.complete`)."""

    @functools.cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.run_dir / "goodput.jsonl", _process_began())

    def on(self, mesh: jax.sharding.Mesh) -> "Workspace":
        """The same, with another mesh."""
        other = dataclasses.replace(self, mesh=mesh)
        other.__dict__["ledger"] = self.ledger  # one account of the time
        return other

    def stage_dir(self, stage: str) -> epath.Path:
        return self.run_dir / stage

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only this process writes the run directory, until it ends however it ends.

        Raises InputError where another one does. An object store has no locks.
        """
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InputError(
                f"{self.run_dir}: cannot be made ({reason}); choose another --run-dir"
            ) from None
        if jax.process_index() or "://" in str(self.run_dir):
            yield
            return
        descriptor = os.open(self.run_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.run_dir}: another process works in it; wait for it or stop it"
            ) from None
        else:
            yield
        finally:
            os.close(descriptor)

    def begin(self, stage: str, sections: Sequence[str], extends: bool) -> None:
        """Record config and provenance; refuse to resume where another config left off.

        sections: the parts of the config that decide the outcome; extends: whether a finished stage with more steps is
        resumed. Raises InputError listing the fields that differ from the recorded ones, unless they may change.
        """
        directory = self.stage_dir(stage)
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
        mine = {name: self.config[name] for name in sections}
        if (
            _has_progress(directory)
            and (recorded := read_json(directory / "config.json")) is not None
        ):
            old = self.complete({name: recorded.get(name) for name in sections})
            check_unchanged(
                _outcome(old), _outcome(mine), self.allow_change, directory, "another config"
            )
            longer = [
                c
                for c in differences(old, mine)
                if c.startswith((f"{stage}.num_steps", f"{stage}.num_epochs"))
            ]
            if longer and extends:
                self.reopen(stage)
        if jax.process_index() == 0:
            write_json(directory / "config.json", dict(self.config))
            write_json(directory / "provenance.json", provenance(self.mesh))
        barrier(f"begin {stage}")

    def keeping(self, sections: Sequence[str], data: str) -> Supervision:
        """What looks after a stage, with these sections of the config, while it trains on data with this fingerprint."""
        decisive = _outcome({name: self.config[name] for name in sections})
        prints = {
            **decisive,
            "code": code_version(),
            "tokenizer": self.tokenizer().fingerprint,
            "data": data,
        }

        def completed(old: Mapping[str, Any]) -> dict[str, Any]:
            return {
                **old,
                **_outcome(self.complete({name: old[name] for name in sections if name in old})),
            }

        return Supervision(self.signals, self.ledger, prints, self.allow_change, completed)

    def finish(self, stage: str, result: Mapping[str, Any]) -> None:
        saved = self.stage_dir(stage) / "checkpoints"
        steps = checkpoint.committed_steps(saved) if saved.exists() else []
        write_json(
            self.stage_dir(stage) / "result.json",
            {**result, **({"checkpoint": steps[-1]} if steps else {})},
        )

    def reopen(self, stage: str) -> None:
        """A finished stage is not finished any more; it goes on from its newest checkpoint."""
        if jax.process_index() == 0:
            (self.stage_dir(stage) / "result.json").unlink(missing_ok=True)
        barrier(f"reopen {stage}")

    def result(self, stage: str) -> dict[str, Any] | None:
        """The result of a finished stage, else None."""
        return read_json(self.stage_dir(stage) / "result.json")

    def require(self, stage: str, needed_by: str) -> dict[str, Any]:
        """The result of a stage that must be finished. Raises InputError with the command to run."""
        if (result := self.result(stage)) is None:
            hint = self.command.replace("STAGE", stage)
            raise InputError(
                f"{self.stage_dir(stage)}: {needed_by} needs the {stage} stage; run: {hint}"
            )
        return result

    def source(self, given: str, stage: str, needed_by: str) -> str:
        """The stage directory `given`; where it is empty that of `stage`, which must be finished."""
        if not given:
            self.require(stage, needed_by)
        return os.path.expanduser(given) or str(self.stage_dir(stage))

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.run_dir / "tokenizer" / "tokenizer")

    def share_tokenizer(self, stage: str) -> None:
        """Copy the tokenizer into a stage's directory, which is thereby complete by itself."""
        target = Path(self.stage_dir(stage) / "tokenizer")
        self.tokenizer()  # one that is missing or damaged is an error before anything is copied
        if not target.exists() and jax.process_index() == 0:
            partial = target.with_name("tokenizer.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(Path(self.run_dir / "tokenizer" / "tokenizer"), partial)
            os.replace(partial, target)
        barrier(f"tokenizer of {stage}")


def _outcome(tree: Any) -> Any:
    """Without the fields that change nothing: how many threads prepare batches."""
    return (
        {k: _outcome(v) for k, v in tree.items() if k != "workers"}
        if isinstance(tree, dict)
        else tree
    )


def _has_progress(directory: epath.Path) -> bool:
    """Whether the stage has produced anything that a changed config would be mixed into."""
    if any(
        (directory / name).exists() for name in ("result.json", "samples.jsonl", "rankings.jsonl")
    ):
        return True
    saved = directory / "checkpoints"
    return saved.exists() and any(entry.name.isdigit() for entry in saved.iterdir())


def write_model_card(
    stage_dir: epath.Path,
    model: ModelConfig,
    kind: str,
    path: tuple[str, ...],
    adapters: LoRAConfig | None = None,
    base: str = "",
) -> None:
    """Write model.json, by which a stage directory can be used as a model without its config.

    kind: "policy" or "reward"; path: where the parameters are in the checkpoint. With adapters of a rank above 0
    they are all the checkpoint holds, and base is the stage directory of the policy they belong to.
    """
    record: dict[str, Any] = {"kind": kind, "path": list(path), "model": to_tree(model)}
    if adapters and adapters.rank:
        near = (
            base if "://" in base else os.path.relpath(base, stage_dir)
        )  # the run directory may be moved
        record |= {"adapters": to_tree(adapters), "base": near}
    if jax.process_index() == 0:
        write_json(stage_dir / "model.json", record)


def read_model_card(stage_dir: epath.PathLike) -> tuple[ModelConfig, dict[str, Any]]:
    """(config of the model in a stage directory, what `describe_model` wrote). Raises InputError where it holds none."""
    if (record := read_json(epath.Path(stage_dir).expanduser() / "model.json")) is None:
        raise InputError(
            f"{stage_dir}: is not the directory of a trained stage (no model.json); give runs/NAME/STAGE"
        )
    return build(ModelConfig, record["model"], name=f"{stage_dir}/model.json"), record


def load_model(
    stage_dir: epath.PathLike,
    mesh: jax.sharding.Mesh,
    kind: str = "policy",
    bases: dict[str, Any] | None = None,
) -> tuple[Any, ModelConfig]:
    """(parameters, config) of the model in a stage directory, sharded over the mesh.

    A model that was trained as adapters comes as its base's parameters with the adapters beside them, which
    `transformer.apply` takes as they are and `lora.merge` makes one of; bases {stage directory: parameters} are then
    not loaded again. Raises InputError where the directory holds no model, or one of another kind.
    """
    stage_dir = epath.Path(stage_dir).expanduser()
    model, record = read_model_card(stage_dir)
    if record["kind"] != kind:
        raise InputError(
            f"{stage_dir}: holds a {record['kind']} model where a {kind} model is needed"
        )
    adapters = build(LoRAConfig, record.get("adapters", {}), name=f"{stage_dir}/model.json")
    family = {"policy": transformer, "reward": scalar}[kind]
    shapes, axes = lora.trained(adapters, family.abstract(model), family.axes(model))
    abstract = place_params(mesh, shapes, axes)
    finished = read_json(stage_dir / "result.json") or {}
    params = checkpoint.load_params(
        stage_dir, abstract, record["path"], finished.get("checkpoint"), read_imported=read_imported
    )
    if adapters.rank:
        source = (
            record["base"]
            if "://" in record["base"]
            else os.path.normpath(stage_dir / record["base"])
        )
        known = {os.path.normpath(path): params for path, params in (bases or {}).items()}
        policy = known[source] if source in known else lora.merge(load_model(source, mesh)[0])
        params = lora.join(
            lora.frozen(adapters, policy if kind == "policy" else {"trunk": policy}), params
        )
    return params, model


def load_policy(
    stage_dir: epath.PathLike, mesh: jax.sharding.Mesh
) -> tuple[Any, ModelConfig, Tokenizer]:
    """(parameters, config, tokenizer) of the policy in a stage directory, trained here or imported."""
    params, model = load_model(stage_dir, mesh)
    return params, model, load_tokenizer(epath.Path(stage_dir).expanduser() / "tokenizer")


def provenance(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Where and with what a stage ran: time, command, code version, packages, devices."""
    packages = (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "sentencepiece",
        "numpy",
    )
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "code": _git_version(),
        "code_version": code_version(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
    }


@functools.cache
def code_version() -> dict[str, str]:
    """What decides the bits besides config and data: a hash of this package's source, and JAX."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return {
        "jaxllm": digest.hexdigest()[:16],
        **{n: importlib.metadata.version(n) for n in ("jax", "jaxlib")},
    }


def _process_began() -> float | None:
    """time.time() when this process was started, where the system tells: imports are part of the wall time."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        boot = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    return time.time() - boot + ticks / os.sysconf("SC_CLK_TCK")


def _git_version() -> str:
    where = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "installed package, no git checkout"
