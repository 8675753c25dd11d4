"""A grid over a config's fields: each point is a separate run, and the results are one table and one plot.

    python launch/sweep.py configs/tiny.yaml --stages tokenizer pretrain --jobs 2 \\
        --grid pretrain.optim.learning-rate=1e-3,3e-3 --grid model.num-layers=1,2,4
    python launch/sweep.py ... --slurm='--partition=gpu --gpus-per-node=8 --time=4:00:00'
    python launch/sweep.py ... --grid model.embed-dim+model.mlp-dim=64+192,128+384
    python launch/sweep.py ... --runs gs://BUCKET/sweep

A point's run directory is RUNS/FIELD=VALUE,... Running it again skips finished points and resumes interrupted ones;
a failed one is named, and the exit code is then 1. OUT gets table.csv, table.md and plot.png. If the model's size varies
and the metric is a loss, L = E + A / N^alpha is fitted to the best loss of each size.
"""

import csv
import dataclasses
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from sweep_plot import plot

from jaxllm.config import InputError, build, load, merge, parse_overrides, read_yaml, tyro_cli
from jaxllm.scaling.runs import read_result


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A grid over a config's fields."""

    config: Annotated[str, tyro.conf.Positional]
    """Config file."""
    grid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """FIELD=VALUE,VALUE,...; given several times: all combinations. FIELD+FIELD=VALUE+VALUE,... sets fields together."""
    stages: tuple[str, ...] = ("tokenizer", "pretrain")
    """Stages to run; the last one's result is gathered."""
    metric: str = "loss"
    """Number of the result to plot."""
    out: str = ""
    """Folder of tables, logs and the plot; empty: runs/sweep-CONFIG."""
    runs: str = ""
    """Folder of the run directories, also in a store (gs://BUCKET/PATH, s3://BUCKET/PATH); empty: that of --out."""
    jobs: int = 1
    """Runs at a time. On Linux each has its own share of the processor's cores."""
    options: str = ""
    """More options of jaxllm run, for all points: --options='--OPTION VALUE ...'"""
    slurm: str = "no"
    """Run the points as an array job with these options of sbatch (--slurm=''), and wait for it."""


class Axis(NamedTuple):
    """Fields that are set together, and their values."""

    fields: list[str]
    values: list[list[str]]
    """For each step along the axis one value of each field."""


class Point(NamedTuple):
    """One combination of values."""

    values: dict[str, str]
    directory: str
    """Of the run: a path, or a URL in a store."""
    log: Path
    """What it prints, if it runs here."""
    command: list[str]
    """Arguments of jaxllm run."""


def main(arguments: Sequence[str]) -> int:
    """Run what is not finished, then gather; the exit code."""
    sweep = tyro_cli(Sweep, arguments, "sweep")
    grid = [read_axis(text) for text in sweep.grid]
    check(sweep, grid)
    out = Path(sweep.out or f"runs/sweep-{Path(sweep.config).stem}")
    points = make_points(sweep, grid, out)
    left = [point for point in points if not read_result(point.directory, sweep.stages[-1])]
    where = sweep.runs or out
    print(
        f"{len(points)} points, {len(points) - len(left)} of them finished, in {where}", flush=True
    )
    codes = on_slurm(sweep, left, out) if sweep.slurm != "no" else here(sweep, left)
    rows = [row(point, sweep, codes.get(point.directory)) for point in points]
    write_tables(rows, sweep, grid, out)
    finished = [one for one in rows if one["status"] == "finished"]
    if finished:
        # Of fields that are set together, one says which point it is.
        fields = [axis.fields[0] for axis in grid]
        said = plot(finished, fields, sweep.metric, out / "plot.png")
        print("\n".join([*said, f"{out}/table.csv, table.md, plot.png"]), flush=True)
    for one in rows:
        if one not in finished:
            print(f"sweep: {one['status']}: {one['log']}", file=sys.stderr)
    return 0 if len(finished) == len(rows) else 1


def read_axis(text: str) -> Axis:
    """FIELD=VALUE,VALUE,... or FIELD+FIELD=VALUE+VALUE,VALUE+VALUE,..."""
    names, _, points = text.partition("=")
    fields = names.split("+")
    # A "+" in the value of a single field is part of a number, as in 1e+3.
    values = [point.split("+") if len(fields) > 1 else [point] for point in points.split(",")]
    complete = all(fields) and all(all(each) for each in values)
    if not complete or len({*map(tuple, values)}) < len(values):
        raise InputError(f"--grid {text}: must be FIELD=VALUE,VALUE,... with different values")
    for each in values:
        if len(each) != len(fields):
            given = f"{'+'.join(each)} has {len(each)} values for {len(fields)} fields"
            raise InputError(f"--grid {text}: {given}; give one for each, joined by +")
    return Axis(fields, values)


def combinations(grid: Sequence[Axis]) -> list[dict[str, str]]:
    """{field: value} of every point, in the order of the grid."""
    points = []
    for combination in itertools.product(*(axis.values for axis in grid)):
        point: dict[str, str] = {}
        for axis, values in zip(grid, combination, strict=True):
            point |= zip(axis.fields, values, strict=True)
        points.append(point)
    return points


def flag(field: str, value: str) -> str:
    """The option of jaxllm that sets a field; of a boolean there is one for each value."""
    if value not in ("true", "false"):
        return f"--{field}={value}"
    section, dot, name = field.rpartition(".")
    return f"--{section}{dot}{'no-' * (value == 'false')}{name}"


def fields_of(grid: Sequence[Axis]) -> list[str]:
    return [field for axis in grid for field in axis.fields]


def check(sweep: Sweep, grid: Sequence[Axis]) -> None:
    """Refuse what the config would refuse in any point, before anything runs."""
    from jaxllm.life import Config

    if not grid:
        raise InputError("--grid: give at least one, as model.num-layers=2,4")
    fields = fields_of(grid)
    for field in fields:
        if fields.count(field) > 1:
            raise InputError(f"--grid {field}: is given twice; give all of its values at once")
    if "://" in sweep.out:
        raise InputError("--out: tables and logs go to a local folder; name the store with --runs")
    if sweep.jobs < 1:
        raise InputError("--jobs: must be at least 1")
    if sweep.slurm != "no" and not shutil.which("sbatch"):
        raise InputError("--slurm: there is no sbatch here")
    base = load(Config, sweep.config)
    tree, _ = read_yaml(Path(sweep.config))
    if sweep.options:
        tree = merge(
            tree, parse_overrides(Config, base, shlex.split(sweep.options), "sweep --options")
        )
    for values in combinations(grid):
        point = tree | {"stages": [*sweep.stages]}
        for field, value in values.items():
            point = merge(point, nested(field, value))
        build(Config, point, name="sweep")


def nested(field: str, value: str) -> dict[str, Any]:
    """The field as in a config file."""
    tree: Any
    try:
        tree = json.loads(value)
    except ValueError:
        tree = value
    for name in reversed(field.replace("-", "_").split(".")):
        tree = {name: tree}
    return tree


def make_points(sweep: Sweep, grid: Sequence[Axis], out: Path) -> list[Point]:
    points = []
    for values in combinations(grid):
        name = ",".join(f"{field}={value}" for field, value in values.items())
        directory = f"{sweep.runs.rstrip('/') or out}/{name}"
        flags = [flag(field, value) for field, value in values.items()]
        command = [sweep.config, "--run-dir", directory, *flags, *shlex.split(sweep.options)]
        log = out / f"{name}.log"
        points.append(Point(values, directory, log, [*command, "--stages", *sweep.stages]))
    return points


def here(sweep: Sweep, points: Sequence[Point]) -> dict[str, int]:
    """Run the points on this machine, `jobs` at a time; their exit codes. Stopped, it stops them, and they save."""
    waiting, codes = list(points), {}
    shares = shares_of_cores(sweep.jobs)
    # (point, its process) by the share of the cores that it has.
    running: dict[int, tuple[Point, subprocess.Popen]] = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            for number, cores in enumerate(shares):
                if waiting and number not in running:
                    point = waiting.pop(0)
                    running[number] = point, start(point, cores)
            time.sleep(0.2)
            for number, (point, process) in [*running.items()]:
                if process.poll() is not None:
                    del running[number]
                    codes[point.directory] = process.returncode
                    print(f"{point.log.stem}: ended with status {process.returncode}", flush=True)
    except KeyboardInterrupt:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
        raise
    return codes


def shares_of_cores(jobs: int) -> list[set[int]]:
    """The cores of each job, which does not share them: XLA's threads of two runs on the same cores wait for each other.

    Jobs beyond the number of cores share; where a process cannot be bound to cores, the sets are empty.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    # Neighbors, which often share a cache.
    bounds = [number * len(cores) // jobs for number in range(jobs + 1)]
    shares = [{*cores[begin:end]} for begin, end in itertools.pairwise(bounds)]
    return [share or {cores[number % len(cores)]} for number, share in enumerate(shares)]


def start(point: Point, cores: set[int]) -> subprocess.Popen:
    """A run of the point, bound to these cores, whose output is added to its log."""
    point.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "jaxllm", "run", *point.command]
    before = os.sched_getaffinity(0) if cores else set()
    if cores:
        # A process has the cores of the one that starts it.
        os.sched_setaffinity(0, cores)
    try:
        with point.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)
    finally:
        if cores:
            os.sched_setaffinity(0, before)


def on_slurm(sweep: Sweep, points: Sequence[Point], out: Path) -> dict[str, int]:
    """Run the points as tasks of an array job, each of which resumes by itself, and wait for all of them."""
    if points:
        out.mkdir(parents=True, exist_ok=True)
        (out / "points.txt").write_text(
            "".join(shlex.join(point.command) + "\n" for point in points)
        )
        command = [
            "sbatch",
            "--wait",
            f"--array=0-{len(points) - 1}%{sweep.jobs}",
            f"--output={out}/slurm-%a.log",
        ]
        command += [*shlex.split(sweep.slurm), "launch/slurm.sbatch", f"@{out}/points.txt"]
        subprocess.run(command, env={**os.environ, "PYTHON": sys.executable})
    return {}


def row(point: Point, sweep: Sweep, code: int | None) -> dict[str, Any]:
    """A line of the table: values, how it ended, and every number of the result."""
    found = read_result(point.directory, sweep.stages[-1]) or {}
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
    if found and sweep.metric not in numbers:
        raise InputError(f"--metric {sweep.metric}: {sweep.stages[-1]} gives {', '.join(numbers)}")
    status = "finished" if found else f"failed with status {code}" if code else "not finished"
    log = point.log if sweep.slurm == "no" else point.log.parent / "slurm-*.log"
    return {**point.values, "status": status, "log": str(log), **numbers}


def write_tables(rows: list[dict[str, Any]], sweep: Sweep, grid: Sequence[Axis], out: Path) -> None:
    """table.csv with everything, table.md (also printed) with what one looks at."""
    out.mkdir(parents=True, exist_ok=True)
    columns = dict.fromkeys(name for one in rows for name in one)
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns])
        writer.writeheader()
        writer.writerows(rows)
    shown = dict.fromkeys(
        [*fields_of(grid), "status", sweep.metric, "parameters", "tokens", "wall_seconds"]
    )
    shown = [name for name in shown if name in columns]
    text = lambda value: f"{value:,.5g}" if isinstance(value, float) else str(value)
    lines = [
        shown,
        ["---"] * len(shown),
        *([text(one.get(name, "")) for name in shown] for one in rows),
    ]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    (out / "table.md").write_text(table + "\n")
    print(table, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(print(f"sweep: {str(error).removeprefix('sweep: ')}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(
            print("sweep: interrupted; run the same command again to resume", file=sys.stderr)
            or 130
        )
