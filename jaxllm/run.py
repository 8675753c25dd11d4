"""Composition root: from a config to processes, devices and a run directory, and through the stages in order."""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath
from rich.table import Table
from rich.text import Text

from jaxllm import stages
from jaxllm.config import InputError, complete, to_tree
from jaxllm.life import Config, run_directory, with_defaults
from jaxllm.loop import Supervision, run_training
from jaxllm.metrics import require_finite
from jaxllm.plan.kept import compare_with_measured, plan_path
from jaxllm.runtime import checkpoint, compile_cache, goodput
from jaxllm.runtime.began import process_began
from jaxllm.runtime.console import console
from jaxllm.runtime.cpu import keep_pages
from jaxllm.runtime.damage import set_aside, warn_damaged
from jaxllm.runtime.files import check_path, read_json, read_jsonl
from jaxllm.runtime.hardware import num_cores
from jaxllm.runtime.hubs.names import is_on_hub
from jaxllm.runtime.mesh import make_mesh
from jaxllm.runtime.processes import Signals, barrier, gather_json, join, on_all
from jaxllm.runtime.programs import Programs
from jaxllm.runtime.store.working import mirror_of, share, shown, working_copy
from jaxllm.sharding import MESH_AXES
from jaxllm.stages import Stage, microbatches
from jaxllm.train import Training
from jaxllm.workspace import Workspace

# Fields of a stage, or of a section in it, that name a model.
_MODEL_FIELDS = ("init_from", "reward_from", "stage_dir")


def run_stages(config: Config, config_path: str, wanted: Sequence[str]) -> None:
    """Runs these stages in order. A finished stage is skipped; an interrupted one resumes.

    Args:
      config_path: the config as the user gave it, for the commands that are printed.

    Raises:
      Stopped: after a signal, with everything saved.
    """
    config = with_defaults(config)
    began = process_began()
    earlier = {"import": time.time() - began} if began else {}
    mesh, earlier["join"] = start_devices(config)
    for stage in wanted:
        make_mesh(config.mesh_of(stage))  # one that does not fit is refused before anything runs
    config = _with_pinned_models(config, wanted)
    directory = run_directory(config)
    check_path(directory)
    again = f"{config_path} --run-dir {config.run_dir}" if config.run_dir else config_path
    programs = Programs()
    with working_copy(directory, config.process.lease_seconds, config.scratch) as run_dir:
        if (mirror := mirror_of(run_dir)) and any(stages.named(stage).trains for stage in wanted):
            mirror.bring("cache/")
        ledger = goodput.Ledger(run_dir / "goodput.jsonl", began, earlier, programs)
        workspace = _open_workspace(config, run_dir, mesh, f"jaxllm STAGE {again}", ledger)
        worked = False
        with workspace.locked(), contextlib.closing(programs):
            remade: set[str] = set()
            for stage in wanted:
                worked |= run_stage(workspace, config, stage, again, remade)
        _conclude(workspace, config, wanted, worked)
    # A process that leaves early would be counted as lost: the others wait for heartbeat_seconds only.
    barrier("everything is written")


def _with_pinned_models(config: Config, wanted: Sequence[str]) -> Config:
    """The config with models on hubs by names that always mean the same files, for every process the same."""
    sections = {stage: _with_pinned_fields(getattr(config, stage)) for stage in wanted}
    return dataclasses.replace(config, **sections)


def _with_pinned_fields(section: Any) -> Any:
    """A section of the config, or a tuple of sections, whose fields that name models name them for good."""
    if isinstance(section, tuple):
        return tuple(_with_pinned_fields(each) for each in section)
    if not dataclasses.is_dataclass(section) or isinstance(section, type):
        return section
    changed = {}
    for field in dataclasses.fields(section):
        before = getattr(section, field.name)
        pin = _pinned if field.name in _MODEL_FIELDS else _with_pinned_fields
        after = pin(before)
        if after != before:
            changed[field.name] = after
    return dataclasses.replace(section, **changed) if changed else section


def _pinned(source: str) -> str:
    """The name of a stage directory; of a model on a hub, with what its branch is at now."""
    if not is_on_hub(source):
        return source
    # Importing models takes a tenth of a second, and few runs begin from a hub.
    from jaxllm.pretrained import hub_stages

    # Branches move: process 0 says what they are at.
    return gather_json(on_all(lambda: hub_stages.pinned(source)))[0]


def _open_workspace(
    config: Config,
    run_dir: epath.Path,
    mesh: jax.sharding.Mesh,
    command: str,
    ledger: goodput.Ledger,
) -> Workspace:
    signals = Signals(config.process.watchdog_seconds)
    signals.install()
    return Workspace(
        run_dir=run_dir,
        mesh=mesh,
        seed=config.seed,
        config=to_tree(config),
        ledger=ledger,
        command=command,
        signals=signals,
        allow_change=config.allow_change,
        complete=functools.partial(complete, type(config)),
    )


def _conclude(workspace: Workspace, config: Config, wanted: Sequence[str], worked: bool) -> None:
    """Says what was done, and writes the report after a stage that ends a life."""
    run_dir = workspace.run_dir
    if not worked:
        them = "all stages are" if len(wanted) > 1 else "it is"
        console.print(f"Nothing to do: {them} finished in {shown(run_dir)}", soft_wrap=True)
    if jax.process_index():
        return
    if worked:
        console.print(goodput.summary(goodput.read(workspace.ledger.path)))
    # The process may have been killed between the last stage and its report.
    unwritten = worked or not (run_dir / "report.html").exists()
    if unwritten and stages.named(wanted[-1]).kind == "report":
        _write_report(workspace, config)


def _write_report(workspace: Workspace, config: Config) -> None:
    from jaxllm.report.report import write_report

    run_dir = workspace.run_dir
    finished = [name for name in stages.names() if workspace.result(name) is not None]
    write_report(
        run_dir, [name for name in stages.names() if name in config.stages or name in finished]
    )
    policies = [name for name in stages.names("policy") if name in finished]
    where = shown(run_dir)
    console.print(f"Report: {where}/report.html and report.md", soft_wrap=True)
    if policies:
        # An extra.
        install = "" if importlib.util.find_spec("starlette") else "  (pip install 'jaxllm[web]')"
        console.print(
            f"Talk to it: jaxllm chat {where}/{policies[-1]}\n"
            f"In a browser: jaxllm serve {where} --browser{install}",
            soft_wrap=True,
        )


# --- One stage.


def run_stage(
    workspace: Workspace, config: Config, name: str, config_path: str, remade: set[str]
) -> bool:
    """Finishes a stage; False if it was finished already.

    If the checkpoint of another stage that it needs is damaged, that stage is finished again first, from its newest good
    checkpoint: the same config, data and code give the same bits. Stages made again are added to `remade`.
    """
    row = stages.named(name)
    workspace = workspace.on(make_mesh(config.mesh_of(name)))
    workspace.begin(name, row.sections, extends=row.kind == "policy")
    if workspace.result(name) is not None:
        where = shown(workspace.stage_dir(name))
        console.print(f"{name}: finished already, in {where}", soft_wrap=True)
        return False
    fitted = microbatches.fit(config, name, workspace.mesh, workspace.stage_dir(name))
    finished = False
    while not finished:
        began = time.monotonic()
        try:
            with jax.set_mesh(workspace.mesh):
                _prepare(workspace, row)
                result = stages.load(row.run)(workspace, fitted, name)
                # Trained here rather than in a function of its own: few frames lie between `main` and the model.
                if isinstance(result, Training):
                    training = result
                    state, metrics = run_training(
                        workspace.stage_dir(name),
                        name,
                        training,
                        _supervision(workspace, row, training),
                        config.logging,
                    )
                    result = training.result(state, metrics)
                _finish(workspace, config, name, result, began, config_path)
            finished = True
        except checkpoint.Damaged as error:
            owner = _stage_to_remake(workspace, config, name, error, remade)
            run_stage(workspace, config, owner, config_path, remade)
    if workspace.signals.received:
        raise workspace.signals.stopped(f"{name} is finished")
    return True


def _prepare(workspace: Workspace, row: Stage) -> None:
    """Before a stage's own work: its title, the stages it needs, the tokenizer in its folder."""
    console.rule(Text(row.name, style="bold"))
    for needed in row.needs:
        workspace.require(needed, row.name)
    if row.trains:
        workspace.share_tokenizer(row.name)


def _supervision(workspace: Workspace, row: Stage, training: Training) -> Supervision:
    return Supervision(
        signals=workspace.signals,
        ledger=workspace.ledger,
        fingerprints=workspace.fingerprints(row.sections, training.data),
        allowed=workspace.allow_change,
        complete=functools.partial(workspace.complete_fingerprints, row.sections),
    )


def _finish(
    workspace: Workspace,
    config: Config,
    stage: str,
    result: dict[str, Any],
    began: float,
    config_path: str,
) -> None:
    """Writes and shows the result of a stage.

    Raises:
      TrainingDiverged: where a number in it is not finite.
    """
    require_finite(stage, dict(_flat(result)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":
        peak *= 1024  # Linux counts in KiB, macOS in bytes
    result = {
        **result,
        "wall_seconds": round(time.monotonic() - began, 1),
        "peak_memory_bytes": peak,
    }
    if plan := read_json(plan_path(config, stage)):
        metrics = read_jsonl(workspace.stage_dir(stage) / "metrics.jsonl")
        result |= compare_with_measured(plan, metrics)
    # The result says that the stage is finished: no process may still be writing its files.
    barrier(f"end of {stage}")
    if jax.process_index() == 0:
        workspace.finish(stage, result)
        print_result(stage, result)
        _print_next(config, stage, config_path)
    workspace.ledger.mark("work")
    workspace.ledger.write(stage, event="finished")
    share(workspace.run_dir, f"{stage} is finished")


def _print_next(config: Config, stage: str, config_path: str) -> None:
    following: Sequence[str] = stages.names("report")
    if stage in config.stages:
        following = config.stages[config.stages.index(stage) + 1 :]
    if following:
        console.print(f"next: jaxllm {following[0]} {config_path}", soft_wrap=True)


def _stage_to_remake(
    workspace: Workspace, config: Config, name: str, error: checkpoint.Damaged, remade: set[str]
) -> str:
    """The stage whose damaged checkpoint was set aside, and which has to run again.

    Raises:
      Damaged: where it is not a stage of this run, or its config says to stop.
      InputError: where it was made again in this command already: the disk does not keep what is written.
    """
    directory = error.step_dir.parent.parent
    owner = directory.name
    in_this_run = directory == workspace.stage_dir(owner).resolve() and owner not in ("", name)
    if not in_this_run or getattr(config, owner).checkpoint.damaged == "stop":
        raise error
    if owner in remade:
        raise InputError(
            f"{error.step_dir}: is damaged again ({error.what}), although {owner} was just made again; "
            "check the disk, or choose another --run-dir"
        ) from None
    remade.add(owner)
    warn_damaged(error, f"and {owner} makes it again")
    set_aside(error.step_dir)
    workspace.reopen(owner)
    return owner


# --- Devices.


def start_devices(config: Config) -> tuple[jax.sharding.Mesh, float]:
    """Makes the devices of this process, joins the others of the job, and arranges all devices in a mesh.

    Returns:
        The mesh, and the seconds that joining took.
    """
    if config.deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    set_cpu_devices(config.cpu_devices or _default_cpu_devices(config))
    compile_cache.enable()
    began = time.monotonic()
    if config.distributed:
        join(config.process)
    joined = time.monotonic() - began
    mesh = make_mesh(config.mesh)
    if mesh.devices.flat[0].platform == "cpu":
        keep_pages()
    return mesh, joined


def _default_cpu_devices(config: Config) -> int:
    """One device, whose products use all cores, or as many as the mesh asks for; in a job of several processes, the cores."""
    if config.distributed:
        return num_cores()
    sizes = [getattr(config.mesh, axis) for axis in MESH_AXES]
    return math.prod(size for size in sizes if size != -1)


def set_cpu_devices(count: int) -> None:
    """Makes `count` virtual CPU devices. Must come before the first use of a device."""
    # Several executions in flight on virtual devices can starve each other of threads inside a collective.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except (
        RuntimeError
    ):  # the backend runs already: this is somebody else's process, whose devices are used
        if len(jax.devices()) != count and jax.devices()[0].platform == "cpu":
            console.print(f"note: {len(jax.devices())} CPU devices exist already, {count} wanted")


# --- Printing.


def print_result(stage: str, result: dict[str, Any]) -> None:
    """The numbers of a stage as a table, nested ones with dotted names."""
    simulated = result.get("simulated") or result.get("annotator_simulated")
    note = " (annotator's numbers: SIMULATED)" if simulated else ""
    table = Table(title=f"{stage}: result{note}", show_header=False)
    for name, value in _flat(result):
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value))
    console.print(table)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            yield prefix + name, value
