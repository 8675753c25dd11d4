"""Metrics of training: collected at every step, reduced and written once an interval.

A metric of a step is a pair (sum, weight), both scalars on the devices. An interval's value is the sum of the sums
divided by the sum of the weights, which is not a mean of means. Values are fetched one interval late, so that the
devices never wait for the host.

They go to metrics.jsonl, to a line on the terminal, and, if configured, to TensorBoard and Weights & Biases.
"""

import json
import math
import numbers
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jaxllm.config import Ending
from jaxllm.losses import Metrics
from jaxllm.runtime import hardware
from jaxllm.runtime.config import LoggingConfig
from jaxllm.runtime.console import console
from jaxllm.runtime.files import read_jsonl, write_whole
from jaxllm.runtime.store.working import shown
from jaxllm.runtime.trackers import Writer, open_trackers
from jaxllm.runtime.transfer import fetch


class Work(NamedTuple):
    """The cost of one step, for throughput."""

    tokens: int
    """Tokens per step over all devices."""
    flops: float = 0.0
    """Model FLOPs per step over all devices; 0: MFU is not shown."""
    peak_flops: float = 0.0
    """FLOP/s of all devices together (`peak_flops`)."""


class TrainingDiverged(Ending):
    """Training fails again and again. The newest checkpoint is from before."""


# As many updates skipped in a row at the end of a stage mean that the model no longer learns; a few are accidents.
_LONG_STREAK = 20
_LOWER = "lower the learning rate and run again: it resumes from the newest checkpoint"


def require_finite(title: str, values: Mapping[str, Any], when: str = "") -> None:
    """Raise TrainingDiverged if one of a stage's values is not finite."""
    for name, value in values.items():
        if isinstance(value, numbers.Real) and not math.isfinite(value):
            raise TrainingDiverged(f"{title}: {name} is {value}{when}; {_LOWER}")


class Rewind(Exception):
    """Too many updates in a row were skipped.

    Attributes:
        first_bad: step of the first of them.
        done: number of steps done by the last of them.
    """

    def __init__(self, first_bad: int, done: int):
        super().__init__(f"updates skipped from step {first_bad + 1} to {done}")
        self.first_bad = first_bad
        self.done = done


class _Interval(NamedTuple):
    """An interval that has ended and is not written yet."""

    step: int
    metrics: list[Any]
    seconds: float
    waited: float


class MetricLog:
    """Collects the metrics of every step and writes them each interval. Call it after every step.

    log_every and save_every both end an interval: a run resumed from a checkpoint then logs the same intervals as a
    run that was not interrupted. For log_every 4 and save_every 5 they end at 4, 5, 8, 10, 12, ...

    Args:
        directory: the stage's directory.
        title: name of the stage.
        num_steps: steps of the whole stage.
        start: steps that were done before.
        log_every: steps between log lines.
        save_every: steps between checkpoints.
        work: the cost of a step.
        config: where metrics go.
        schedules: {name: function of the step}, whose values are logged too.
        shown: names of the metrics on the progress line.
        partial: steps of an interval that was interrupted, as `partial()` returned them.
        rewind_after: skipped updates in a row that raise Rewind; 0: never.

    Attributes:
        latest: the newest value of every metric, by its name.
        waited: seconds of this interval in which the devices had no batch.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        title: str,
        num_steps: int,
        *,
        start: int,
        log_every: int,
        save_every: int,
        work: Work,
        config: LoggingConfig,
        schedules: Mapping[str, Callable[[int], Any]] | None = None,
        shown: tuple[str, ...] = ("loss",),
        partial: list[Any] | None = None,
        rewind_after: int = 0,
    ):
        self.title = title
        self.num_steps = num_steps
        self.work = work
        self.every = (log_every, save_every)
        self.schedules = schedules or {}
        self.shown = shown
        self._start = start
        self._rewind_after = rewind_after
        self._streak = 0  # updates skipped in a row

        directory = epath.Path(directory)
        kept = _lines_until(directory / "metrics.jsonl", start)
        self.latest: dict[str, float] = _latest_values(kept)
        self._writers: list[Writer] = []
        if jax.process_index() == 0:
            self._writers = _open_writers(directory, kept, start, config)
        self._bar = _progress(title, num_steps, start)

        # The interval in progress. Steps of another process, and the one that compiles, do not count for throughput.
        self._steps: list[Any] = partial or []
        self._uncounted = len(self._steps)
        self._interval_began = time.monotonic()
        self.waited = 0.0
        self._pending: _Interval | None = None

    def __call__(self, step: int, state: Any, metrics: Metrics) -> bool:
        """Collect the metrics of a step, counted from 1; True if an interval ends with it."""
        # At most two steps are in flight: the host stays ahead, and throughput is that of the devices.
        if self._steps:
            jax.block_until_ready(self._steps[-1])
        self._steps.append(metrics)
        if step == self._start + 1:
            jax.block_until_ready(metrics)
            # Compilation is not throughput.
            self._uncounted += 1
            self._interval_began = time.monotonic()
            self.waited = 0.0
        # The last step ends an interval wherever it is.
        ends = any(step % every == 0 for every in self.every) or step == self.num_steps
        if ends:
            self._end_interval(step)
        if step == self.num_steps:
            self.flush()
        self._bar.update(self._bar.task_ids[0], completed=step)
        return ends

    def _end_interval(self, step: int) -> None:
        """Write the interval before this one, whose values are ready, and begin another."""
        self.flush()
        now = time.monotonic()
        self._pending = _Interval(step, self._steps, now - self._interval_began, self.waited)
        self._steps = []
        self._interval_began = now
        self.waited = 0.0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write values outside an interval, for example held-out metrics; the time since then is not throughput.

        Raises TrainingDiverged if a value is not finite.
        """
        # The lines of the file are in the order of their steps.
        self.flush()
        self._emit(step, dict(values))
        # Written before it raises: the value that ended the run is in the log.
        require_finite(self.title, values, f" at step {step}")
        self._interval_began = time.monotonic()

    def partial(self) -> list[dict[str, list[float]]]:
        """The steps of the interval in progress, as JSON: a checkpoint in its middle must keep them."""
        steps = []
        for metrics in fetch(self._steps):
            steps.append({name: [float(x) for x in pair] for name, pair in metrics.items()})
        return steps

    def close(self) -> None:
        """Stop the progress line and close the files."""
        self._bar.stop()
        for writer in self._writers:
            writer.close()

    def flush(self) -> None:
        """Write the interval that has ended. Raises Rewind or TrainingDiverged."""
        if self._pending is None:
            return
        step, pending, seconds, waited = self._pending
        self._pending = None
        steps = fetch(pending)
        # Before anything is written: after a rewind these steps are done again.
        self._check_streak(step, steps)
        values = reduce(steps)
        # Only the steps that this process ran after compilation took `seconds`.
        counted = len(steps) - self._uncounted
        self._uncounted = 0
        if counted > 0 and seconds > 0:
            values |= self._throughput(counted, seconds, waited)
        for name, schedule in self.schedules.items():
            values[name] = float(schedule(step - 1))  # a schedule counts steps from 0
        self._emit(step, {k if "/" in k else f"train/{k}": v for k, v in values.items()})
        require_finite(self.title, values, f" at step {step}")
        if step == self.num_steps:
            self._check_end(steps)

    def _throughput(self, steps: int, seconds: float, waited: float) -> dict[str, float]:
        values = {
            "throughput/tokens_per_second": self.work.tokens * steps / seconds,
            "throughput/data_wait": waited / seconds,
        }
        if self.work.flops and self.work.peak_flops:
            # PaLM (Chowdhery et al. 2022), appendix B: recomputation does not count.
            achieved = self.work.flops * steps / seconds
            values["throughput/mfu"] = achieved / self.work.peak_flops
        return values

    def _check_streak(self, step: int, steps: list[Any]) -> None:
        """Raise Rewind where the streak of skipped updates becomes too long. step: that of the last of `steps`."""
        for done, metrics in enumerate(steps, start=step - len(steps) + 1):
            self._streak = 0
            for name, (streak, _) in metrics.items():
                if name.endswith("skip_streak"):
                    self._streak = max(self._streak, int(float(streak)))
            # Step `done` is the last bad one: with a streak of 3 at step 12, updates 10 to 12 were skipped.
            if self._rewind_after and self._streak >= self._rewind_after:
                raise Rewind(max(0, done - self._streak), done)

    def _check_end(self, steps: list[Any]) -> None:
        """Raise TrainingDiverged if the stage ends in a long streak of skipped updates."""
        # A stage may have fewer updates than a long streak, for example a PPO of one step and 16 minibatches.
        most = self.num_steps * max(map(_num_updates, steps))
        if self._streak >= min(_LONG_STREAK, most):
            raise TrainingDiverged(
                f"{self.title}: the last {self._streak} updates were skipped; {_LOWER}"
            )

    def _emit(self, step: int, values: dict[str, float]) -> None:
        self.latest |= values
        for writer in self._writers:
            writer.write(step, values)
        text = _line(self.latest, self.shown)
        self._bar.update(self._bar.task_ids[0], text=text)
        # Not on a terminal: a line each time replaces the progress bar.
        if self._bar.disable and jax.process_index() == 0:
            console.print(f"{self.title} {step}/{self.num_steps} {text}", soft_wrap=True)


def _lines_until(path: epath.Path, step: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to a step: those that a killed run wrote past its newest checkpoint are dropped."""
    lines = read_jsonl(path, damaged="skip")
    return [line for line in lines if line.get("step", math.inf) <= step]


def _latest_values(lines: list[dict[str, Any]]) -> dict[str, float]:
    latest = {}
    for line in lines:
        for name, value in line.items():
            if "/" in name:  # a metric; "step" and "time" are not
                latest[name] = value
    return latest


def _num_updates(metrics: Metrics) -> int:
    """Updates in a step: PPO makes one for each minibatch, and weighs the skipped ones by their number."""
    counts = [float(weight) for name, (_, weight) in metrics.items() if name.endswith("skipped")]
    return int(max(counts, default=1))


def reduce(steps: list[Metrics]) -> dict[str, float]:
    """Sums over steps divided by weights over steps; a metric without weight is left out.

    [{"loss": (6, 2)}, {"loss": (1, 1)}] -> {"loss": 7 / 3}, where a mean of means would be 2.
    """
    totals: dict[str, list[float]] = {}
    for metrics in steps:
        for name, (total, weight) in metrics.items():
            pair = totals.setdefault(name, [0.0, 0.0])
            pair[0] += float(total)
            pair[1] += float(weight)
    return {name: total / weight for name, (total, weight) in totals.items() if weight}


def held_out(metrics: Mapping[str, float]) -> dict[str, float]:
    """The values named "eval/NAME", by NAME: what a stage measured on its held-out rows."""
    values = {}
    for name, value in metrics.items():
        if name.startswith("eval/"):
            values[name.removeprefix("eval/")] = value
    return values


def peak_flops(mesh: jax.sharding.Mesh) -> float:
    """bfloat16 FLOP/s of all devices: from data sheets, measured on a CPU; 0 if unknown."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return _measure_matmul(mesh)
    chip = hardware.by_kind(device.device_kind)
    return chip.flops * mesh.size if chip else 0.0


def _measure_matmul(mesh: jax.sharding.Mesh, size: int = 1024) -> float:
    """FLOP/s over all devices of the fastest of 20 bfloat16 matrix products, one on each device at once."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    x = jax.device_put(jnp.ones((mesh.size, size, size), jnp.bfloat16), sharding)
    product = jax.jit(lambda a: jnp.einsum("nij,njk->nik", a, a))
    product(x).block_until_ready()  # compiles
    # The fastest, because other processes on the machine only make it slower.
    best = math.inf
    for _ in range(20):
        began = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    # A product of two n x n matrices is n^3 multiplications and as many additions.
    return 2.0 * mesh.size * size**3 / best


def _line(values: Mapping[str, float], shown: tuple[str, ...]) -> str:
    """The progress line: the metrics to show, and throughput."""
    parts = []
    for name in shown:
        name = name if "/" in name else f"train/{name}"
        if name in values:
            # Held-out values keep their prefix: the last update has a score and a KL as well.
            label = name if name.startswith("eval/") else name.split("/")[-1]
            parts.append(f"{label} {values[name]:.4g}")
    if "throughput/tokens_per_second" in values:
        parts.append(f"{values['throughput/tokens_per_second']:,.0f} tokens/s")
    if "throughput/mfu" in values:
        parts.append(f"MFU {values['throughput/mfu']:.0%}")
    return " · ".join(parts)


def _progress(title: str, num_steps: int, start: int) -> Progress:
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal or jax.process_index() != 0,
    )
    bar.add_task(title, total=num_steps, completed=start, text="compiling")
    bar.start()
    return bar


def _open_writers(
    directory: epath.Path, kept: list[dict[str, Any]], start: int, config: LoggingConfig
) -> list[Writer]:
    writers = [_jsonl(directory, kept)]
    if config.tensorboard:
        writers.append(_tensorboard(directory, start))
    # RUN-STAGE, as the user calls them: a run in a store works in a folder of another name.
    name = "-".join(shown(directory).rstrip("/").split("/")[-2:])
    if config.wandb_project:
        writers += open_trackers(["wandb"], config.wandb_project, name, Path(directory))
    others = [each for each in config.trackers if each != "wandb" or not config.wandb_project]
    return [*writers, *open_trackers(others, config.project, name, Path(directory))]


def _jsonl(directory: epath.Path, kept: list[dict[str, Any]]) -> Writer:
    """Appends to metrics.jsonl, which is first rewritten with the lines to keep."""
    path = directory / "metrics.jsonl"
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
    # Held open for the whole stage, and flushed after each line so that others can follow it.
    file = path.open("a", encoding="utf-8")

    def write(step: int, values: Mapping[str, float]) -> None:
        file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        file.flush()

    return Writer(write, file.close)


def _tensorboard(directory: epath.Path, start: int) -> Writer:
    # TensorBoard files cannot be cut like metrics.jsonl; purge_step hides the points that a killed run wrote past its newest checkpoint.
    import tensorboardX  # slow: it also imports cloud SDKs, where they are installed

    writer = tensorboardX.SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            # tensorboardX warns about every other value; metrics.jsonl has them.
            if math.isfinite(value):
                writer.add_scalar(name, value, step)

    return Writer(write, writer.close)
