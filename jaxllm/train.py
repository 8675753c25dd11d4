"""The one training loop and the one step maker. This file knows no stage."""

import concurrent.futures
import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from etils import epath

from jaxllm.config import Ending, InputError, check_unchanged
from jaxllm.config.ranges import LARGEST_INT
from jaxllm.losses import Loss, Metrics
from jaxllm.metrics import LoggingConfig, MetricLog, Rewind, TrainingDiverged, Work
from jaxllm.runtime import checkpoint
from jaxllm.runtime.console import console
from jaxllm.runtime.digest import unequal_replicas
from jaxllm.runtime.goodput import Ledger
from jaxllm.runtime.processes import Signals
from jaxllm.sharding import param_shardings, replicated, with_shardings

Batch = Any
Hook = Callable[[int, Any, Metrics], None]


class Guard(NamedTuple):
    """What decides whether an update is taken."""

    norm: Any  # float32[]: running mean of the gradient norms of the updates taken
    taken: Any  # int32[]: updates taken
    streak: Any  # int32[]: updates skipped since the last one taken


class TrainState(NamedTuple):
    """Everything that moves: what is here is checkpointed, what is checkpointed is here."""

    step: Any  # int32[]: updates tried, those skipped included: the number of the next batch
    params: Any  # float32
    opt_state: Any
    guard: Guard


class Run(NamedTuple):
    """A stage, as `fit` sees it."""

    state: Any  # a pytree with a .step leaf
    step: Callable[[Any, Batch], tuple[Any, Metrics]]
    batch_at: Callable[[int], Batch]  # a pure function of the step number
    num_steps: int
    hooks: Sequence[
        tuple[int, Hook]
    ]  # (every, fn(step, state, metrics)); all run after the last step too


LossFunction = Callable[..., Loss]  # (params, batch, key, **frozen)


def count_steps(given: int, epochs: float, per_epoch: float, field: str) -> int:
    """The updates of a stage: `given`, where that is 0 as many as `epochs` of `per_epoch` updates each take.

    Raises InputError where they are more than devices can count.
    """
    steps = given or math.ceil(epochs * per_epoch)
    if steps > LARGEST_INT:
        raise InputError(
            f"{field}: {epochs:g} takes {steps:,} updates and {LARGEST_INT:,} can be counted; lower it"
        )
    return steps


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    count = lambda: jnp.zeros((), jnp.int32)
    return TrainState(count(), params, tx.init(params), Guard(jnp.zeros(()), count(), count()))


def make_step(
    loss: LossFunction,
    tx: optax.GradientTransformation,
    *,
    num_micro: int = 1,
    seed: int = 0,
    state_shardings: Any = None,
    mixed: tuple[LossFunction, float] | None = None,
    spike_factor: float = 0.0,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """(state, batch, **frozen) -> (state, metrics), jitted; the state is donated.

    loss(params, batch, key, **frozen) -> (loss_sum, weight, {name: (sum, weight)}). The batch's leading
    dimension is cut into num_micro microbatches whose sums are added in float32 and divided once, by the weight
    of all of them. The key of step n is fold_in(seed, n): the step number is the whole random state.
    state_shardings pins the new state where the old one was (without it XLA may drop a gradient's fsdp axis).
    mixed: another loss and its coefficient; a batch is then a pair, and the gradients of the two means are added.
    An update whose loss or gradient is not finite, or whose gradient norm is more than spike_factor times the usual
    (0: never), is skipped on all devices alike: parameters and optimizer stay, its metrics count nothing but the skip.
    """

    def step(state: TrainState, batch: Batch, **frozen: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        batch, other = batch if mixed is not None else (batch, None)
        sums, weight, metrics = accumulate(loss, state.params, batch, key, num_micro, frozen)
        grads = mean(sums, weight)
        if mixed is not None:
            other_loss, coef = mixed
            sums, weight, more = accumulate(other_loss, state.params, other, key, num_micro, frozen)
            extra = mean(sums, weight)
            grads = jax.tree.map(lambda g, e: g + coef * e, grads, extra)
            metrics |= {f"mixed_{name}": pair for name, pair in more.items()}
        if state_shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, state_shardings.params)
        norm = optax.tree.norm(grads)
        good = admit(state.guard, norm, metrics, spike_factor)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to an integer power
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        chosen = lambda new, old: jnp.where(good, new, old)
        params, opt_state = jax.tree.map(
            chosen, (params, opt_state), (state.params, state.opt_state)
        )
        guard = next_guard(state.guard, norm, good)
        one = jnp.ones(())
        metrics = jax.tree.map(
            lambda x: jnp.where(good, x, 0.0), {**metrics, "grad_norm": (norm, one)}
        )
        skips = {"skipped": ~good, "skip_streak": guard.streak}
        metrics |= {name: (count.astype(jnp.float32), one) for name, count in skips.items()}
        return TrainState(state.step + 1, params, opt_state, guard), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


_USUAL = 0.98  # decay of the running mean of gradient norms
_SETTLED = 50  # updates until that mean tells what is usual


def admit(guard: Guard, norm: jax.Array, metrics: Metrics, spike_factor: float) -> jax.Array:
    """bool[]: whether an update with this gradient norm and these metrics is to be taken."""
    good = jnp.isfinite(norm)
    for total, _ in metrics.values():
        good &= jnp.isfinite(total)
    if spike_factor:
        good &= (guard.taken < _SETTLED) | (norm <= spike_factor * guard.norm)
    return good


def next_guard(guard: Guard, norm: jax.Array, good: jax.Array) -> Guard:
    weight = jnp.maximum(1.0 - _USUAL, 1.0 / (guard.taken + 1).astype(jnp.float32))
    mean = guard.norm + weight * (jnp.where(good, norm, guard.norm) - guard.norm)
    return Guard(mean, guard.taken + good.astype(jnp.int32), jnp.where(good, 0, guard.streak + 1))


def mean(sums: Any, weight: jax.Array) -> Any:
    """A tree of sums divided by the weight of all of them; 0 where nothing has weight."""
    return jax.tree.map(lambda total: total / jnp.where(weight > 0, weight, 1.0), sums)


def accumulate(
    loss: LossFunction,
    params: Any,
    batch: Batch,
    key: jax.Array,
    num_micro: int,
    frozen: dict[str, Any],
):
    """Gradient of the loss sum, the weight and the metrics, summed over microbatches."""

    def scalar(params: Any, micro: Batch, key: jax.Array):
        total, weight, metrics = loss(params, micro, key, **frozen)
        return total, (weight, metrics)

    gradient = jax.value_and_grad(scalar, has_aux=True)
    if num_micro == 1:
        (_, (weight, metrics)), grads = gradient(params, batch, key)
        return grads, weight, metrics

    def one(micro: Batch, key: jax.Array):
        (_, (weight, metrics)), grads = gradient(params, micro, key)
        return grads, weight, metrics

    # [B, ...] -> [num_micro, B / num_micro, ...]: microbatch i takes rows i, i + num_micro, ... Striding keeps each row
    # on the device that has it: a contiguous cut would move most of the batch.
    split = lambda x: x.reshape(x.shape[0] // num_micro, num_micro, *x.shape[1:]).swapaxes(0, 1)
    micros = jax.tree.map(split, batch)
    keys = jax.random.split(key, num_micro)
    first = jax.tree.map(lambda x: x[0], micros)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, first, key))
    add = lambda total, xs: (jax.tree.map(jnp.add, total, one(*xs)), None)
    return jax.lax.scan(add, zero, (micros, keys))[0]


def fit(run: Run) -> Any:
    """Run the steps that are left, and the hooks; returns the final state.

    The step number alone decides batch and randomness, so a restored state goes on exactly where it was.
    """
    state, first = run.state, int(run.state.step)
    for number in range(first, run.num_steps):
        state, metrics = run.step(state, run.batch_at(number))
        done = number + 1
        for every, hook in run.hooks:
            if done % every == 0 or done == run.num_steps:
                hook(done, state, metrics)
    return state


class StateLayout(NamedTuple):
    """How a TrainState is made and where its leaves live."""

    init: Callable[[Any], TrainState]  # parameters -> state; the parameters are donated
    abstract: TrainState  # shapes, dtypes and shardings, as checkpoints are restored through
    shardings: TrainState


def state_layout(
    mesh: jax.sharding.Mesh, abstract_params: Any, axes: Any, tx: optax.GradientTransformation
) -> StateLayout:
    """Shardings for parameters by their logical axes, and for the optimizer's copies of them likewise."""
    params = param_shardings(mesh, abstract_params, axes)
    shapes = jax.eval_shape(lambda p: init_state(p, tx), abstract_params)
    everywhere = replicated(mesh)
    opt_state = optax.tree_map_params(
        tx, lambda _, s: s, shapes.opt_state, params, transform_non_params=lambda _: everywhere
    )
    shardings = TrainState(everywhere, params, opt_state, Guard(everywhere, everywhere, everywhere))
    init = jax.jit(lambda p: init_state(p, tx), out_shardings=shardings, donate_argnums=0)
    abstract = with_shardings(shapes, shardings)
    return StateLayout(init, abstract, shardings)


class Program(NamedTuple):
    """A compiled part of a stage's update, as `plan` looks at it without running it."""

    name: str
    run: Any  # jitted
    arguments: tuple[Any, ...]  # shapes with their shardings
    keywords: Mapping[str, Any]
    flops: float  # what the model needs, on all devices together
    times: int = 1  # how often an update runs it
    decoded: int = 0  # tokens that it makes one after the other
    mesh: Any = None  # where it has one of its own
    copied: Any = None  # temporary arguments, freed after the program


class LoopSettings(Protocol):
    """What every training stage's config has."""

    @property
    def data(self) -> Any: ...  # .workers: threads that prepare batches ahead
    @property
    def log_every(self) -> int: ...
    @property
    def eval_every(self) -> int: ...
    @property
    def checkpoint(self) -> checkpoint.CheckpointConfig: ...


class Supervision(NamedTuple):
    """Signals, time ledger and fingerprints of a training run."""

    signals: Signals
    ledger: Ledger
    fingerprints: Mapping[str, Any]  # of what the stage is made from, as JSON
    allowed: tuple[
        str, ...
    ] = ()  # dotted names of fingerprints that may have changed since the checkpoint
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = (
        dict  # recorded ones, with the fields that are new
    )


class Training(NamedTuple):
    """A stage that trains, as a record: `jaxllm.run` runs it, and knows nothing else of the stage."""

    init: Callable[[], Any]  # the first state
    abstract: Any  # shapes, dtypes and shardings of the state
    step: Callable[[Any, Batch], tuple[Any, Metrics]]
    batch_at: Callable[[int], Batch]  # a pure function of the step number
    num_steps: int
    settings: LoopSettings  # the stage's section of the config
    data: str  # fingerprint of what batches are made of
    work: Work
    evaluate: Callable[[int, Any], Mapping[str, float]]
    best: str  # the metric of `evaluate` whose best checkpoints are kept
    result: Callable[
        [Any, Mapping[str, float]], dict[str, Any]
    ]  # (final state, newest metrics) -> the stage's result
    lower_is_better: bool = True  # whether that metric is
    finalize: Callable[[Any], Any] | None = (
        None  # applied once to the trained state, saved as step num_steps + 1
    )
    schedules: Mapping[str, Callable[[int], Any]] | None = None  # logged beside the metrics
    shown: tuple[str, ...] = ("loss",)  # metrics of the progress line


def run_training(
    directory: epath.Path,
    title: str,
    training: Training,
    keeping: Supervision,
    logging: LoggingConfig,
) -> tuple[Any, dict[str, float]]:
    """Restore or start, `fit` with logging, evaluation and saving, and finish: (final state, newest metrics).

    Raises Stopped, saved, after a signal; TrainingDiverged where going back did not help.
    """
    settings, num_steps = training.settings, training.num_steps
    log = functools.partial(
        MetricLog, directory, title, num_steps, log_every=settings.log_every, save_every=settings.checkpoint.save_every,
        work=training.work, config=logging, schedules=training.schedules, shown=training.shown,
        rewind_after=settings.checkpoint.rewind_after,
    )  # fmt: skip
    saves = checkpoint.Checkpoints(
        directory / "checkpoints", settings.checkpoint, training.best, training.lower_is_better
    )
    loop = _Loop(directory, title, num_steps, settings, keeping, saves, training.evaluate, log)
    with keeping.signals, contextlib.closing(loop):
        state = loop.restore(training.abstract, training.init)
        while int(state.step) < num_steps:
            try:
                state = fit(loop.run(state, training.step, training.batch_at))
            except Rewind as trouble:
                loop.go_back(trouble)
                state = loop.restore(training.abstract, training.init)
        # From num_steps on, the run was killed after its last step and before the stage was marked as finished:
        # its numbers are in the log.
        if training.finalize and int(state.step) == num_steps:
            state = training.finalize(state)._replace(step=jnp.int32(num_steps + 1))
        saves.save_surely(int(state.step), state, loop.record(int(state.step)))
        keeping.ledger.mark("save")
        keeping.ledger.write(title, int(state.step))
    return state, loop.log.latest | loop.held_out


class _Loop:
    """The hooks of a training loop, and what they share."""

    def __init__(self, directory, title, num_steps, settings, keeping, saves, evaluate, make_log):
        self.directory, self.title, self.num_steps, self.settings = (
            directory,
            title,
            num_steps,
            settings,
        )
        self.keeping: Supervision = keeping
        self.saves: checkpoint.Checkpoints = saves
        self.evaluate, self.make_log = evaluate, make_log
        self.held_out: dict[str, float] = {}
        self.skipped: list[list[int]] = []  # [first, end) of the batches left out
        self.log: Any = None
        self.batches: Prefetch | None = None
        self.restored = 0

    def restore(self, abstract: Any, init: Callable[[], Any]) -> Any:
        self.keeping.ledger.mark("start")
        state, record = self.saves.restore_or_init(abstract, init)
        recorded = record.get("fingerprints")
        old = None if recorded is None else self.keeping.complete(recorded)
        check_unchanged(old, self.keeping.fingerprints, self.keeping.allowed, self.directory)
        self.restored = int(state.step)
        self.skipped = max(self.skipped, record.get("skipped", []), key=len)
        self.log = self.make_log(start=self.restored, partial=record.get("interval"))
        self.keeping.ledger.mark("restore")
        self.keeping.ledger.write(self.title, self.restored, restored=self.restored)
        return state

    def run(self, state: Any, step: Callable, batch_at: Callable[[int], Batch]) -> Run:
        left_out = sum(end - first for first, end in self.skipped)
        workers = self.settings.data.workers
        self.batches = Prefetch(lambda number: batch_at(number + left_out), workers, self.num_steps)
        every = (self.settings.eval_every, self.settings.checkpoint.save_every)
        hooks = [
            (1, self.log_hook),
            (every[0], self.evaluate_hook),
            (every[1], self.save_hook),
            (1, self.stop_hook),
        ]
        if compare := self.settings.checkpoint.compare_replicas_every:
            hooks.insert(0, (compare, self.compare_hook))
        return Run(state, step, self.next_batch, self.num_steps, hooks)

    def next_batch(self, number: int) -> Batch:
        assert self.batches
        self.keeping.ledger.mark("step")
        batch = self.batches(number)
        self.log.waited += self.keeping.ledger.mark("data_wait")
        return batch

    def log_hook(self, number: int, state: Any, metrics: Metrics) -> None:
        ends = self.log(number, state, metrics)
        self.keeping.ledger.mark("compile" if number == self.restored + 1 else "step")
        if ends:
            self.keeping.ledger.write(self.title, number)

    def evaluate_hook(self, number: int, state: Any, _: Metrics) -> None:
        self.log.flush()
        self.keeping.signals.alive()
        self.held_out.update(self.evaluate(number, state))
        self.log.write(number, self.held_out)
        self.keeping.ledger.mark("evaluation")

    def save_hook(self, number: int, state: Any, _: Metrics) -> None:
        self.log.flush()  # what is before the checkpoint is in the log: a run that goes on from here does not make it
        if number < self.num_steps:
            self.saves.save(number, state, self.record(number))
        self.keeping.ledger.mark("save")

    def stop_hook(self, number: int, state: Any, _: Metrics) -> None:
        if not self.keeping.signals.stop_after() or number == self.num_steps:
            return
        self.log.flush()
        self.saves.save_surely(number, state, self.record(number), attempts=2)
        self.keeping.ledger.mark("save")
        self.keeping.ledger.write(self.title, number, event="stopped")
        raise self.keeping.signals.stopped(
            f"{self.title}: step {number} of {self.num_steps} is saved"
        )

    def compare_hook(self, number: int, state: Any, _: Metrics) -> None:
        if wrong := unequal_replicas(state):
            raise SilentCorruption(
                f"{self.title}: after step {number} devices that should hold the same bits do not: "
                f"{'; '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}; nothing of this step "
                "is saved: take that device out, and run the same command again"
            )

    def record(self, number: int) -> checkpoint.Record:
        """What a checkpoint keeps beside the state."""
        measured = number % self.settings.eval_every == 0 or number >= self.num_steps
        return {
            "fingerprints": dict(self.keeping.fingerprints),
            "metrics": dict(self.held_out) if measured else {},
            "skipped": self.skipped,
            "interval": self.log.partial(),
        }

    def go_back(self, trouble: Rewind) -> None:
        """Back to the newest checkpoint before the trouble; the batches from there to beyond it are left out."""
        config = self.settings.checkpoint
        self.saves.wait()
        to = max(
            (s for s in checkpoint.committed_steps(self.saves.directory) if s <= trouble.first_bad),
            default=0,
        )
        if len(self.skipped) >= config.max_rewinds:
            raise TrainingDiverged(
                f"{self.title}: {trouble}, after going back {config.max_rewinds} times; lower the learning rate or look "
                f"at the data, and run again: it goes on from step {to}"
            )
        left_out = sum(end - first for first, end in self.skipped)
        self.skipped = [
            *self.skipped,
            [to + left_out, trouble.done + left_out + config.rewind_skip],
        ]
        console.print(
            f"warning: {self.title}: {trouble}; back to step {to}, leaving out batches {self.skipped[-1][0]} to "
            f"{self.skipped[-1][1] - 1}",
            soft_wrap=True,
        )
        self.close_log()
        self.saves.go_back(to)

    def close_log(self) -> None:
        if self.batches:
            self.batches.close()
        if self.log:
            self.log.close()

    def close(self) -> None:
        self.close_log()
        self.saves.close()


class SilentCorruption(Ending):
    """Devices that should hold the same bits do not."""


class Prefetch:
    """`batch_at` computed ahead in threads; what it returns does not depend on their number."""

    def __init__(self, batch_at: Callable[[int], Batch], workers: int, num_steps: int):
        self.batch_at, self.workers, self.num_steps = batch_at, workers, num_steps
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, "batches") if workers else None
        self._ahead: dict[int, concurrent.futures.Future] = {}

    def __call__(self, number: int) -> Batch:
        if self._pool is None:
            return self.batch_at(number)
        for n in range(number, min(number + self.workers + 2, self.num_steps)):
            if n not in self._ahead:
                self._ahead[n] = self._pool.submit(self.batch_at, n)
        return self._ahead.pop(number).result()

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
