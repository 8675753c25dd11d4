"""Metrics: summed over an interval, divided once, fetched one interval late; a live line, JSONL, TensorBoard, W&B."""

import dataclasses
import json
import math
import numbers
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tensorboardX
from etils import epath
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jaxllm.config import Ending, InputError
from jaxllm.losses import Metrics
from jaxllm.runtime import hardware
from jaxllm.runtime.console import console
from jaxllm.runtime.files import read_metrics, write_whole
from jaxllm.runtime.transfer import fetch


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go besides the progress line and metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files into STAGE/tensorboard."""
    wandb_project: str = ""
    """Weights & Biases project; empty: off. Needs `pip install wandb`."""


class Work(NamedTuple):
    """What one step costs, for throughput."""

    tokens: int  # tokens per step over all devices
    flops: float = 0.0  # model FLOPs per step; 0: MFU is not shown
    peak_flops: float = 0.0  # of all devices together


class TrainingDiverged(Ending):
    """Training goes wrong again and again. The newest checkpoint is from before."""


_LONG_STREAK = 20
_LOWER = "lower the learning rate and run again: it resumes from the newest checkpoint"


def require_finite(title: str, values: Mapping[str, Any], when: str = "") -> None:
    """Raise TrainingDiverged where one of the numbers of a stage is not finite."""
    for name, value in values.items():
        if isinstance(value, numbers.Real) and not math.isfinite(value):
            raise TrainingDiverged(f"{title}: {name} is {value}{when}; {_LOWER}")


class Rewind(Exception):
    """Too many updates in a row were skipped: the first of their steps, and the number of steps done by the last."""

    def __init__(self, first_bad: int, done: int):
        super().__init__(f"updates skipped from step {first_bad + 1} to {done}")
        self.first_bad, self.done = first_bad, done


class MetricLog:
    """Collects the metrics of every step and writes them each interval. Use as a hook with every=1.

    log_every and save_every both end an interval: a run resumed from a checkpoint then logs the same intervals
    as one never cut.
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
        """partial: the steps of an interval that was cut (`partial`); rewind_after: skipped updates in a row that raise
        Rewind, 0: never."""
        self.directory, self.title, self.num_steps, self.work = (
            epath.Path(directory),
            title,
            num_steps,
            work,
        )
        self.every, self.schedules, self.shown = (log_every, save_every), schedules or {}, shown
        kept = [
            line
            for line in read_metrics(self.directory / "metrics.jsonl", "skip")
            if line.get("step", math.inf) <= start
        ]
        self.latest: dict[str, float] = {k: v for line in kept for k, v in line.items() if "/" in k}
        self._steps: list[Any] = partial or []
        self._streak = 0  # updates skipped in a row
        self._uncounted, self._rewind_after = (
            len(self._steps),
            rewind_after,
        )  # steps that are not of this process
        self._pending: tuple[int, list[Any], float, float] | None = None
        self._interval_began = time.monotonic()
        self._start, self.waited = start, 0.0  # waited: seconds of this interval without a batch
        self._writers: list[Writer] = []
        if jax.process_index() == 0:
            self._writers += [_jsonl(self.directory, kept)]
            self._writers += [_tensorboard(self.directory, start)] if config.tensorboard else []
            self._writers += (
                [_wandb(self.directory, config.wandb_project)] if config.wandb_project else []
            )
        self._bar = _progress(title, num_steps, start)

    def __call__(self, step: int, state: Any, metrics: Metrics) -> bool:
        """Collect a step; True where an interval ends with it."""
        if self._steps:  # at most two steps in flight: the host stays ahead, and throughput is that of the device
            jax.block_until_ready(self._steps[-1])
        self._steps.append(metrics)
        if step == self._start + 1:  # compilation is not throughput
            jax.block_until_ready(metrics)
            self._uncounted += 1
            self._interval_began, self.waited = time.monotonic(), 0.0
        ends = any(step % every == 0 for every in self.every) or step == self.num_steps
        if ends:
            self.flush()
            now = time.monotonic()
            self._pending = (step, self._steps, now - self._interval_began, self.waited)
            self._steps, self._interval_began, self.waited = [], now, 0.0
        if step == self.num_steps:
            self.flush()
        self._bar.update(self._bar.task_ids[0], completed=step)
        return ends

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a point of its own, for example held-out numbers; the time until now is kept off throughput.

        Raises TrainingDiverged where a number is not finite.
        """
        self.flush()
        self._emit(step, dict(values))
        require_finite(self.title, values, f" at step {step}")
        self._interval_began = time.monotonic()

    def partial(self) -> list[dict[str, list[float]]]:
        """The steps of the interval that has not ended, as JSON: what a checkpoint in its middle must keep."""
        return [
            {name: [float(x) for x in pair] for name, pair in step.items()}
            for step in fetch(self._steps)
        ]

    def close(self) -> None:
        self._bar.stop()
        for writer in self._writers:
            writer.close()

    def flush(self) -> None:
        """Write the interval that has ended. Raises Rewind after too many skipped updates."""
        if self._pending is None:
            return
        (step, steps, seconds, waited), self._pending = self._pending, None
        steps = fetch(steps)
        self._check_streak(step, steps)
        values = reduce(steps)
        counted, self._uncounted = len(steps) - self._uncounted, 0
        if counted > 0 and seconds > 0:
            values["throughput/tokens_per_second"] = self.work.tokens * counted / seconds
            values["throughput/data_wait"] = waited / seconds
            if self.work.flops and self.work.peak_flops:
                values["throughput/mfu"] = (
                    self.work.flops * counted / seconds / self.work.peak_flops
                )
        values |= {name: float(schedule(step - 1)) for name, schedule in self.schedules.items()}
        self._emit(step, {k if "/" in k else f"train/{k}": v for k, v in values.items()})
        require_finite(self.title, values, f" at step {step}")
        # One skipped update is an accident; as many as this at the end are a model that does not learn any more.
        most = self.num_steps * max(map(_num_updates, steps))
        if step == self.num_steps and self._streak >= min(_LONG_STREAK, most):
            raise TrainingDiverged(
                f"{self.title}: the last {self._streak} updates were skipped; {_LOWER}"
            )

    def _check_streak(self, step: int, steps: list[Any]) -> None:
        for done, metrics in enumerate(steps, start=step - len(steps) + 1):
            streaks = (
                float(total) for name, (total, _) in metrics.items() if name.endswith("skip_streak")
            )
            self._streak = int(max(streaks, default=0))
            if self._rewind_after and self._streak >= self._rewind_after:
                raise Rewind(max(0, done - self._streak), done)

    def _emit(self, step: int, values: dict[str, float]) -> None:
        self.latest |= values
        for writer in self._writers:
            writer.write(step, values)
        text = _line(self.latest, self.shown)
        self._bar.update(self._bar.task_ids[0], text=text)
        if self._bar.disable and jax.process_index() == 0:
            console.print(f"{self.title} {step}/{self.num_steps} {text}", soft_wrap=True)


def _num_updates(step: Metrics) -> int:
    """Updates of a step: PPO makes one for each minibatch, and weighs the skipped ones by their number."""
    return int(
        max(
            (float(weight) for name, (_, weight) in step.items() if name.endswith("skipped")),
            default=1,
        )
    )


def reduce(steps: list[Metrics]) -> dict[str, float]:
    """Sums over steps divided by weights over steps; a metric without weight is left out."""
    totals: dict[str, list[float]] = {}
    for metrics in steps:
        for name, (total, weight) in metrics.items():
            pair = totals.setdefault(name, [0.0, 0.0])
            pair[0], pair[1] = pair[0] + float(total), pair[1] + float(weight)
    return {name: total / weight for name, (total, weight) in totals.items() if weight}


def held_out(metrics: Mapping[str, float]) -> dict[str, float]:
    """The numbers named "eval/NAME", by NAME: what a stage measured on its held-out rows."""
    return {
        name.removeprefix("eval/"): value
        for name, value in metrics.items()
        if name.startswith("eval/")
    }


def peak_flops(mesh: jax.sharding.Mesh) -> float:
    """bf16 FLOP/s of all devices: from the data sheet, on a CPU measured by a matrix product; 0 if unknown."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return _measure_matmul(mesh)
    chip = hardware.by_kind(device.device_kind)
    return chip.flops * mesh.size if chip else 0.0


def _measure_matmul(mesh: jax.sharding.Mesh, size: int = 1024) -> float:
    """The best of a few bf16 products, one on each device at once, in FLOP/s over all of them."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    x = jax.device_put(jnp.ones((mesh.size, size, size), jnp.bfloat16), sharding)
    product = jax.jit(lambda a: jnp.einsum("nij,njk->nik", a, a))
    product(x).block_until_ready()
    best = math.inf
    for _ in range(20):
        began = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2.0 * mesh.size * size**3 / best


def _line(values: Mapping[str, float], shown: tuple[str, ...]) -> str:
    names = [name if "/" in name else f"train/{name}" for name in shown]
    # Held-out numbers keep their prefix: the last update has a score and a KL as well.
    short = lambda name: name if name.startswith("eval/") else name.split("/")[-1]
    parts = [f"{short(name)} {values[name]:.4g}" for name in names if name in values]
    if (rate := values.get("throughput/tokens_per_second")) is not None:
        parts.append(f"{rate:,.0f} tokens/s")
    if (mfu := values.get("throughput/mfu")) is not None:
        parts.append(f"MFU {mfu:.0%}")
    return " · ".join(parts)


def _progress(title: str, num_steps: int, start: int) -> Progress:
    done = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    disable = not console.is_terminal or jax.process_index() != 0
    bar = Progress(
        *done, TextColumn("{task.fields[text]}"), *times, console=console, disable=disable
    )
    bar.add_task(title, total=num_steps, completed=start, text="compiling")
    bar.start()
    return bar


class Writer(NamedTuple):
    write: Callable[[int, Mapping[str, float]], None]  # (step, values)
    close: Callable[[], None]


def _jsonl(directory: epath.Path, kept: list[dict[str, Any]]) -> Writer:
    """Append to metrics.jsonl; what a killed run wrote past the checkpoint it left is dropped first."""
    path = directory / "metrics.jsonl"
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
    file = path.open("a", encoding="utf-8")

    def write(step: int, values: Mapping[str, float]) -> None:
        file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        file.flush()

    return Writer(write, file.close)


def _tensorboard(directory: epath.Path, start: int) -> Writer:
    writer = tensorboardX.SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):  # it would warn of each; metrics.jsonl has them
                writer.add_scalar(name, value, step)

    return Writer(write, writer.close)


def _wandb(directory: epath.Path, project: str) -> Writer:
    try:
        import wandb  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        raise InputError(
            "logging.wandb_project: needs wandb; pip install 'jaxllm[wandb]', or leave it empty"
        ) from None

    name = f"{directory.parent.name}-{directory.name}"
    run = wandb.init(project=project, name=name, id=name, dir=str(directory), resume="allow")
    return Writer(lambda step, values: run.log(dict(values), step=step), run.finish)
