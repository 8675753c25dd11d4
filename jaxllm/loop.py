"""Runs a stage that trains: restore or start, fit, log, evaluate, save, and go back when training goes wrong."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from etils import epath

from jaxllm.config import Ending, check_unchanged
from jaxllm.losses import Metrics
from jaxllm.metrics import MetricLog, Rewind, TrainingDiverged
from jaxllm.runtime import checkpoint
from jaxllm.runtime.config import LoggingConfig
from jaxllm.runtime.console import console
from jaxllm.runtime.digest import unequal_replicas
from jaxllm.runtime.goodput import Ledger
from jaxllm.runtime.prefetch import Prefetch
from jaxllm.runtime.processes import Signals
from jaxllm.runtime.profile import Profiler
from jaxllm.runtime.seal import committed_steps
from jaxllm.train import Batch, Hook, Run, Training, fit


class SilentCorruption(Ending):
    """Devices that should hold the same bits do not."""


class Supervision(NamedTuple):
    """Signals, time ledger and fingerprints of a training run."""

    signals: Signals
    ledger: Ledger
    fingerprints: Mapping[str, Any]  # of everything the stage is made from, as JSON
    allowed: tuple[
        str, ...
    ] = ()  # dotted names of fingerprints that may differ from the checkpoint's
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """Recorded fingerprints -> the same with fields that are new since they were recorded."""


class _Stage(NamedTuple):
    """What stays the same while a stage trains, however often it restores."""

    directory: epath.Path
    title: str
    training: Training
    supervision: Supervision
    logging: LoggingConfig
    saves: checkpoint.Checkpoints


def run_training(
    directory: epath.Path,
    title: str,
    training: Training,
    supervision: Supervision,
    logging: LoggingConfig,
) -> tuple[Any, dict[str, float]]:
    """Trains to the last step: (final state, newest metrics).

    Raises:
      Stopped: after a signal, with everything saved.
      TrainingDiverged: where going back to a checkpoint did not help.
    """
    saves = checkpoint.Checkpoints(
        directory / "checkpoints",
        training.settings.checkpoint,
        training.best,
        training.lower_is_better,
    )
    stage = _Stage(directory, title, training, supervision, logging, saves)
    # Batches that were skipped stay skipped, also after going back once more.
    skipped: list[list[int]] = []
    with supervision.signals, contextlib.closing(saves):
        while True:
            state, attempt = _restore(stage, skipped)
            with contextlib.closing(attempt):
                try:
                    state = fit(attempt.as_run(state))
                except Rewind as trouble:
                    skipped = _go_back(stage, attempt.skipped, trouble)
                    continue
                state = _finish(stage, attempt, state)
            return state, attempt.log.latest | attempt.held_out


def _restore(stage: _Stage, skipped: list[list[int]]) -> "tuple[Any, _Attempt]":
    """The newest checkpoint's state, or the first one, and the attempt that continues from it.

    skipped: [first, end) of the batches that earlier attempts of this process skipped.

    Raises:
      InputError: where the checkpoint was made from another config, code or data.
    """
    ledger = stage.supervision.ledger
    ledger.mark("start")
    training = stage.training
    state, record = stage.saves.restore_or_init(training.abstract, training.init)
    recorded = record.get("fingerprints")
    # A checkpoint of an older version may lack fields that are new.
    old = None if recorded is None else stage.supervision.complete(recorded)
    check_unchanged(old, stage.supervision.fingerprints, stage.supervision.allowed, stage.directory)
    # A checkpoint before the trouble does not know what was skipped after it was saved.
    skipped = max(skipped, record.get("skipped", []), key=len)
    attempt = _Attempt(stage, int(state.step), skipped, record.get("interval"))
    ledger.mark("restore")
    # How many steps there are is known here only, if the data decides it.
    ledger.write(stage.title, attempt.first, restored=attempt.first, num_steps=training.num_steps)
    return state, attempt


def _go_back(stage: _Stage, skipped: list[list[int]], trouble: Rewind) -> list[list[int]]:
    """Returns to the newest checkpoint before the trouble; the batches from there to beyond it are skipped.

    With checkpoints at 4 and 8, updates 9 to 11 skipped, and rewind_skip 2, training returns to step 8 and
    continues with batch 13: step n then takes batch n + 5.
    """
    config = stage.training.settings.checkpoint
    # A checkpoint of the bad steps may still be on its way to the disk.
    stage.saves.wait()
    steps = committed_steps(stage.saves.directory)
    target = max((step for step in steps if step <= trouble.first_bad), default=0)
    # Trouble that comes back is not bad data; more rewinds would hide it.
    if len(skipped) >= config.max_rewinds:
        raise TrainingDiverged(
            f"{stage.title}: {trouble}, after going back {config.max_rewinds} times; lower the learning rate or "
            f"look at the data, and run again: it resumes from step {target}"
        )
    # Step n takes batch n + offset: batches count on, steps start over.
    offset = _num_skipped(skipped)
    first, end = target + offset, trouble.done + offset + config.rewind_skip
    console.print(
        f"warning: {stage.title}: {trouble}; back to step {target}, skipping batches {first} to {end - 1}",
        soft_wrap=True,
    )
    stage.saves.go_back(target)
    return [*skipped, [first, end]]


def _finish(stage: _Stage, attempt: "_Attempt", state: Any) -> Any:
    """Finalizes and saves the trained state.

    A run killed between its last step and this point restores with step num_steps or more: `fit` then does nothing,
    and the metrics come from the log.
    """
    training, step = stage.training, int(state.step)
    if training.finalize and step == training.num_steps:
        step += 1
        state = training.finalize(state)._replace(step=jnp.int32(step))
    stage.saves.save_surely(step, state, attempt.record(step))
    stage.supervision.ledger.mark("save")
    stage.supervision.ledger.write(stage.title, step)
    return state


def _num_skipped(skipped: list[list[int]]) -> int:
    return sum(end - first for first, end in skipped)


class _Attempt:
    """Training from one checkpoint until the end, a signal, or trouble: the hooks of `fit`, and what they share."""

    def __init__(
        self, stage: _Stage, first: int, skipped: list[list[int]], interval: list[Any] | None
    ):
        """interval: the steps of a logged interval that the checkpoint was saved in."""
        training, settings = stage.training, stage.training.settings
        self.stage = stage
        self.first = first
        self.skipped = skipped
        self.held_out: dict[str, float] = {}
        self.log = MetricLog(
            stage.directory,
            stage.title,
            training.num_steps,
            start=first,
            log_every=settings.log_every,
            save_every=settings.checkpoint.save_every,
            work=training.work,
            config=stage.logging,
            schedules=training.schedules,
            shown=training.shown,
            partial=interval,
            rewind_after=settings.checkpoint.rewind_after,
        )
        self.profiler = Profiler(stage.directory / "profile", stage.logging.profile_steps, first)
        offset = _num_skipped(skipped)
        self.batches = Prefetch(
            lambda number: training.batch_at(number + offset),
            settings.data.workers,
            training.num_steps,
        )

    def as_run(self, state: Any) -> Run:
        training, settings = self.stage.training, self.stage.training.settings
        # The order matters: corrupted state is not logged or saved, and metrics are on disk before the checkpoint.
        hooks: list[tuple[int, Hook]] = [
            (1, self.log_hook),
            (settings.eval_every, self.evaluate_hook),
            (settings.checkpoint.save_every, self.save_hook),
            (1, self.stop_hook),
        ]
        if self.stage.logging.profile_steps:
            # First: what the other hooks do is not part of a step.
            hooks.insert(0, (1, lambda number, state, _: self.profiler.after(number, state)))
        if every := settings.checkpoint.compare_replicas_every:
            hooks.insert(0, (every, self.compare_hook))
        return Run(state, training.step, self.next_batch, training.num_steps, hooks)

    def next_batch(self, number: int) -> Batch:
        ledger = self.stage.supervision.ledger
        ledger.mark("step")
        batch = self.batches(number)
        self.log.waited += ledger.mark("data_wait")
        return batch

    def compare_hook(self, number: int, state: Any, _: Metrics) -> None:
        if wrong := unequal_replicas(state):
            others = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise SilentCorruption(
                f"{self.stage.title}: after step {number} devices that should hold the same bits do not: "
                f"{'; '.join(wrong[:3])}{others}; nothing of this step is saved: remove that device from the job, "
                "and run the same command again"
            )

    def log_hook(self, number: int, state: Any, metrics: Metrics) -> None:
        ledger = self.stage.supervision.ledger
        interval_ends = self.log(number, state, metrics)
        # The first step of a process compiles; what remains of it is lost in that.
        ledger.mark("compile" if number == self.first + 1 else "step")
        if interval_ends:
            ledger.write(self.stage.title, number)

    def evaluate_hook(self, number: int, state: Any, _: Metrics) -> None:
        self.log.flush()
        # An evaluation may take longer than the watchdog waits for a step.
        self.stage.supervision.signals.alive()
        self.held_out.update(self.stage.training.evaluate(number, state))
        self.log.write(number, self.held_out)
        self.stage.supervision.ledger.mark("evaluation")

    def save_hook(self, number: int, state: Any, _: Metrics) -> None:
        # Metrics up to the checkpoint are in the log before it exists: a run that resumes from it does not redo them.
        self.log.flush()
        if number < self.stage.training.num_steps:
            self.stage.saves.save(number, state, self.record(number))
        self.stage.supervision.ledger.mark("save")

    def stop_hook(self, number: int, state: Any, _: Metrics) -> None:
        signals, ledger = self.stage.supervision.signals, self.stage.supervision.ledger
        num_steps = self.stage.training.num_steps
        # stop_after first: processes agree in it, so all of them have to call it.
        if not signals.stop_after() or number == num_steps:
            return
        self.log.flush()
        # Twice at most: the grace period after a signal is short.
        self.stage.saves.save_surely(number, state, self.record(number), attempts=2)
        ledger.mark("save")
        ledger.write(self.stage.title, number, event="stopped")
        raise signals.stopped(f"{self.stage.title}: step {number} of {num_steps} is saved")

    def record(self, number: int) -> checkpoint.Record:
        """What a checkpoint keeps in addition to the state."""
        training = self.stage.training
        # Held-out metrics belong to the checkpoint of the step they were measured at.
        measured = number % training.settings.eval_every == 0 or number >= training.num_steps
        return {
            "fingerprints": dict(self.stage.supervision.fingerprints),
            "metrics": dict(self.held_out) if measured else {},
            "skipped": self.skipped,
            "interval": self.log.partial(),
        }

    def close(self) -> None:
        self.profiler.close()
        # Threads first: they may be computing a batch that nobody will take.
        self.batches.close()
        self.log.close()
