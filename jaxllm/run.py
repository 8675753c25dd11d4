"""Composition root: config -> processes, devices, run directory -> stages in order."""

import functools
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from rich.table import Table
from rich.text import Text

from jaxllm import stages
from jaxllm.config import InputError, complete, to_tree
from jaxllm.life import Config, run_directory, with_defaults
from jaxllm.loop import run_training
from jaxllm.metrics import require_finite
from jaxllm.plan.kept import compare_with_measured, plan_path
from jaxllm.runtime import checkpoint, goodput
from jaxllm.runtime.console import console
from jaxllm.runtime.files import read_json, read_metrics
from jaxllm.runtime.processes import Signals, join
from jaxllm.sharding import barrier, make_mesh
from jaxllm.stages import Stage
from jaxllm.train import Training
from jaxllm.workspace import Workspace


def run_stages(config: Config, config_path: str, wanted: Sequence[str]) -> None:
    """Run these stages in order: a finished one is skipped, a cut one resumes.

    Raises Stopped after a signal, with everything saved.
    """
    config = with_defaults(config)
    mesh = start_devices(config)
    for stage in wanted:
        make_mesh(config.mesh_of(stage))  # one that does not fit is refused before anything runs
    run_dir = run_directory(config)
    checkpoint.check_path(run_dir)
    moved = f" --run-dir {config.run_dir}" if config.run_dir else ""
    signals = Signals(config.process.watchdog_seconds)
    signals.install()
    command = f"jaxllm STAGE {config_path}{moved}"
    completed = functools.partial(complete, type(config))
    workspace = Workspace(
        run_dir,
        mesh,
        config.seed,
        to_tree(config),
        command,
        signals,
        config.allow_change,
        completed,
    )
    with workspace.locked():
        remade: set[str] = set()
        worked = [
            stage
            for stage in wanted
            if run_stage(workspace, config, stage, config_path + moved, remade)
        ]
    if not worked:
        console.print(
            f"Nothing to do: {'all stages are' if len(wanted) > 1 else 'it is'} finished in {run_dir}",
            soft_wrap=True,
        )
    if worked and jax.process_index() == 0:
        console.print(goodput.summary(goodput.read(workspace.ledger.path)))
    unwritten = (
        worked or not (run_dir / "report.html").exists()
    )  # it may have been killed just before
    if unwritten and jax.process_index() == 0 and stages.named(wanted[-1]).kind == "report":
        from jaxllm.report.report import write_report

        every = stages.names()
        write_report(
            run_dir, [s for s in every if s in config.stages or workspace.result(s) is not None]
        )
        policies = [
            stage for stage in stages.names("policy") if workspace.result(stage) is not None
        ]
        talk = f"; talk to it: jaxllm chat {run_dir}/{policies[-1]}" if policies else ""
        console.print(f"Report: {run_dir}/report.html and report.md{talk}", soft_wrap=True)
    barrier(
        "everything is written"
    )  # who leaves first waits for the others only heartbeat_seconds, then counts them lost


def run_stage(
    workspace: Workspace, config: Config, name: str, config_path: str, remade: set[str]
) -> bool:
    """Bring a stage to its end; False where it is there already.

    Where another stage's checkpoint that it needs is damaged, that stage is brought to its end again first, from its
    newest good checkpoint: the same config, data and code give the same bits. Stages made again are added to `remade`.
    """
    row = stages.named(name)
    workspace = workspace.on(make_mesh(config.mesh_of(name)))
    workspace.begin(name, row.sections, extends=row.kind == "policy")
    if workspace.result(name) is not None:
        console.print(f"{name}: finished already, in {workspace.stage_dir(name)}", soft_wrap=True)
        return False
    finished = False
    while not finished:
        began = time.monotonic()
        try:
            with jax.set_mesh(workspace.mesh):
                _prepare(workspace, row)
                made = stages.load(row.run)(workspace, config, name)
                if isinstance(made, Training):
                    keeping = workspace.keeping(row.sections, made.data)
                    state, metrics = run_training(
                        workspace.stage_dir(name), name, made, keeping, config.logging
                    )
                    made = made.result(state, metrics)
                _finish(workspace, config, name, made, began, config_path)
            finished = True
        except checkpoint.Damaged as error:
            owner = _to_be_remade(workspace, config, name, error, remade)
            run_stage(workspace, config, owner, config_path, remade)
    if workspace.signals.received:
        raise workspace.signals.stopped(f"{name} is finished")
    return True


def _to_be_remade(
    workspace: Workspace, config: Config, name: str, error: checkpoint.Damaged, remade: set[str]
) -> str:
    """The stage whose damaged checkpoint is set aside, so that it is made again.

    Raises `error` where it is not a stage of this run, or is to stop it, and InputError where it was made again already
    in this command: the disk does not keep what is written.
    """
    owner = error.step_dir.parent.parent.name
    mine = error.step_dir.parent.parent == workspace.stage_dir(owner).resolve() and owner not in (
        "",
        name,
    )
    if not mine or getattr(config, owner).checkpoint.damaged == "stop":
        raise error
    if owner in remade:
        raise InputError(
            f"{error.step_dir}: is damaged again ({error.what}), although {owner} was just made again; check the disk, or "
            "choose another --run-dir"
        ) from None
    remade.add(owner)
    checkpoint.warn_damaged(error, f"and {owner} makes it again")
    checkpoint.set_aside(error.step_dir)
    workspace.reopen(owner)
    return owner


def set_cpu_devices(count: int) -> None:
    """Make `count` virtual CPU devices (0: one per core); must come before the first use of a device."""
    count = (
        count or len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else count or os.cpu_count() or 1
    )
    # Several executions in flight on virtual devices can starve each other of threads inside a collective.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except (
        RuntimeError
    ):  # the backend runs already: we are inside somebody's process, and take what there is
        if len(jax.devices()) != count and jax.devices()[0].platform == "cpu":
            console.print(f"note: {len(jax.devices())} CPU devices exist already, {count} wanted")


def start_devices(config: Config) -> jax.sharding.Mesh:
    if config.deterministic:
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
        )
    set_cpu_devices(config.cpu_devices)
    if config.distributed:
        join(config.process)
    return make_mesh(config.mesh)


def _prepare(workspace: Workspace, row: Stage) -> None:
    """What comes before a stage's own work: its title, the stages it needs, the tokenizer in its folder."""
    console.rule(Text(row.name, style="bold"))
    for needed in row.needs:
        workspace.require(needed, row.name)
    if row.trains:
        workspace.share_tokenizer(row.name)


def _finish(
    workspace: Workspace,
    config: Config,
    stage: str,
    result: dict[str, Any],
    began: float,
    config_path: str,
) -> None:
    """Write and show the result of a stage. Raises TrainingDiverged where a number in it is not finite."""
    require_finite(stage, dict(_flat(result)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    result = {
        **result,
        "wall_seconds": round(time.monotonic() - began, 1),
        "peak_memory_bytes": peak,
    }
    kept = read_json(plan_path(config, stage))
    result |= compare_with_measured(
        kept, read_metrics(workspace.stage_dir(stage) / "metrics.jsonl") if kept else ()
    )
    barrier(f"end of {stage}")
    if jax.process_index() == 0:
        workspace.finish(stage, result)
        print_result(stage, result)
        if (
            following := config.stages[config.stages.index(stage) + 1 :]
            if stage in config.stages
            else stages.names("report")
        ):
            console.print(f"next: jaxllm {following[0]} {config_path}", soft_wrap=True)
    workspace.ledger.mark("work")
    workspace.ledger.write(stage, event="finished")
    barrier(f"{stage} is finished")


def print_result(stage: str, result: dict[str, Any]) -> None:
    """The stage's numbers as a table; nested ones a row each."""
    simulated = any(result.get(flag) for flag in ("simulated", "annotator_simulated"))
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
