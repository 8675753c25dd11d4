"""The training step and the loop that repeats it. This file knows no stage.

A stage that trains is a record, `Training`. `jaxllm.loop.run_training` runs it: restores or starts, calls `fit`, logs,
evaluates and saves.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxllm.config import InputError
from jaxllm.config.ranges import LARGEST_INT
from jaxllm.losses import Loss, Metrics
from jaxllm.metrics import Work
from jaxllm.optim import Optimizer
from jaxllm.optim.state_axes import state_axes
from jaxllm.runtime.config import CheckpointConfig
from jaxllm.sharding import param_shardings, replicated, with_shardings

Batch = Any
Hook = Callable[[int, Any, Metrics], None]
LossFunction = Callable[..., Loss]  # (params, batch, key, **frozen) -> (sum, weight, metrics)

# --- The state of training.


class Guard(NamedTuple):
    """Decides whether an update is applied."""

    norm: Any  # float32[]: running mean of the gradient norms of applied updates
    taken: Any  # int32[]: updates applied
    streak: Any  # int32[]: updates skipped since the last one that was applied


class TrainState(NamedTuple):
    """Everything that changes. What is here is checkpointed; what is checkpointed is here."""

    step: Any  # int32[]: updates tried, including skipped ones: the number of the next batch
    params: Any  # float32
    opt_state: Any
    guard: Guard


class StateLayout(NamedTuple):
    """How a TrainState is made and where its leaves live."""

    init: Callable[[Any], TrainState]  # parameters -> state; donates the parameters
    abstract: TrainState  # shapes, dtypes and shardings, through which checkpoints are restored
    shardings: TrainState


def init_state(params: Any, tx: Optimizer) -> TrainState:
    """The state before the first update."""

    def zero() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    guard = Guard(norm=jnp.zeros(()), taken=zero(), streak=zero())
    return TrainState(zero(), params, tx.init(params), guard)


def state_layout(
    mesh: jax.sharding.Mesh, abstract_params: Any, axes: Any, tx: Optimizer
) -> StateLayout:
    """Shards parameters by their logical axes, and the optimizer's state by those of the parameters that it is about.

    Args:
      abstract_params: shapes and dtypes of the parameters.
      axes: the same tree with a tuple of logical axes for each parameter.
    """
    everywhere = replicated(mesh)
    params = param_shardings(mesh, abstract_params, axes)
    shapes = jax.eval_shape(lambda p: init_state(p, tx), abstract_params)
    opt_state = param_shardings(mesh, shapes.opt_state, state_axes(shapes.opt_state, axes))
    guard = Guard(everywhere, everywhere, everywhere)
    shardings = TrainState(everywhere, params, opt_state, guard)
    init = jax.jit(lambda p: init_state(p, tx), out_shardings=shardings, donate_argnums=0)
    return StateLayout(init, with_shardings(shapes, shardings), shardings)


# --- One update.


def make_step(
    loss: LossFunction,
    tx: Optimizer,
    *,
    num_micro: int = 1,
    seed: int = 0,
    state_shardings: Any = None,
    mixed: tuple[LossFunction, float] | None = None,
    spike_factor: float = 0.0,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A jitted (state, batch, **frozen) -> (state, metrics), which donates the state.

    An update whose loss or gradient is not finite, or whose gradient norm is a spike, is skipped on all devices alike:
    parameters and optimizer stay as they were, and its metrics count nothing but the skip.

    Args:
      loss: (params, batch, key, **frozen) -> (sum of the loss, weight, {name: (sum, weight)}).
      num_micro: the batch is cut into this many microbatches. Their sums are added in float32 and divided once, by
        the weight of all of them, so that the gradient does not depend on how tokens fall into microbatches.
      seed: the key of step n is fold_in(seed, n). The step number is the whole random state.
      state_shardings: pins the new state to where the old one was. Without it XLA may drop a gradient's fsdp axis.
      mixed: another loss and its coefficient. A batch is then a pair, and the gradients of the two means are added.
      spike_factor: skip updates whose gradient norm exceeds this many times the running mean; 0: never.
    """

    def add_mixed(grads: Any, params: Any, batch: Batch, key: jax.Array, frozen: Any) -> Any:
        """(gradient, metrics) with those of the other loss added."""
        assert mixed
        other_loss, coef = mixed
        sums, weight, metrics = accumulate(other_loss, params, batch, key, num_micro, frozen)
        grads = jax.tree.map(lambda g, m: g + coef * m, grads, _mean(sums, weight))
        return grads, {f"mixed_{name}": pair for name, pair in metrics.items()}

    def step(state: TrainState, batch: Batch, **frozen: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        batch, other_batch = batch if mixed is not None else (batch, None)
        point = tx.gradient_point(state.params, state.opt_state)
        sums, weight, metrics = accumulate(loss, point, batch, key, num_micro, frozen)
        grads = _mean(sums, weight)
        if mixed is not None:
            grads, other_metrics = add_mixed(grads, point, other_batch, key, frozen)
            metrics |= other_metrics
        if state_shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, state_shardings.params)
        norm = optax.tree.norm(grads)
        good = _admits(state.guard, norm, metrics, spike_factor)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to an integer power
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A select, not a branch: every device takes the same path whatever its own shard holds.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        guard = _next_guard(state.guard, norm, good)
        metrics = _guarded_metrics(metrics, norm, good, guard)
        return TrainState(state.step + 1, params, opt_state, guard), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def accumulate(
    loss: LossFunction,
    params: Any,
    batch: Batch,
    key: jax.Array,
    num_micro: int,
    frozen: dict[str, Any],
) -> tuple[Any, jax.Array, Metrics]:
    """(gradient of the loss sum, weight, metrics), summed over microbatches.

    Arrays of the batch have B rows, a multiple of num_micro. With B = 6 and num_micro = 2, the microbatches are rows
    0 2 4 and rows 1 3 5: striding keeps each row on the device that has it, where a contiguous cut would move most of
    the batch.
    """

    def loss_sum(params: Any, micro: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        total, weight, metrics = loss(params, micro, key, **frozen)
        return total, (weight, metrics)

    gradient = jax.value_and_grad(loss_sum, has_aux=True)

    if num_micro == 1:
        (_, (weight, metrics)), grads = gradient(params, batch, key)
        return grads, weight, metrics

    def of_microbatch(micro: Batch, key: jax.Array) -> tuple[Any, jax.Array, Metrics]:
        (_, (weight, metrics)), grads = gradient(params, micro, key)
        return grads, weight, metrics

    def split(x: jax.Array) -> jax.Array:
        # [B, ...] -> [num_micro, B / num_micro, ...]
        return x.reshape(x.shape[0] // num_micro, num_micro, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, micro_and_key: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_microbatch(*micro_and_key)), None

    micros = jax.tree.map(split, batch)
    keys = jax.random.split(key, num_micro)
    first = jax.tree.map(lambda x: x[0], micros)
    shapes = jax.eval_shape(of_microbatch, first, key)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zero, (micros, keys))[0]


def _mean(sums: Any, weight: jax.Array) -> Any:
    """A tree of sums divided by their common weight; 0 where nothing has weight."""
    return jax.tree.map(lambda total: total / jnp.where(weight > 0, weight, 1.0), sums)


_NORM_DECAY = 0.98  # of the running mean of gradient norms
_WARMUP = 50  # updates after which that mean is trusted


def _admits(guard: Guard, norm: jax.Array, metrics: Metrics, spike_factor: float) -> jax.Array:
    """bool[]: whether an update with this gradient norm and these metrics should be applied."""
    good = jnp.isfinite(norm)
    for total, _ in metrics.values():
        good &= jnp.isfinite(total)
    if spike_factor:
        good &= (guard.taken < _WARMUP) | (norm <= spike_factor * guard.norm)
    return good


def _next_guard(guard: Guard, norm: jax.Array, good: jax.Array) -> Guard:
    # The first updates are averaged evenly: 1, 1/2, 1/3, ... until 1/n falls below 1 - decay.
    weight = jnp.maximum(1.0 - _NORM_DECAY, 1.0 / (guard.taken + 1).astype(jnp.float32))
    mean = guard.norm + weight * (jnp.where(good, norm, guard.norm) - guard.norm)
    return Guard(
        norm=mean,
        taken=guard.taken + good.astype(jnp.int32),
        streak=jnp.where(good, 0, guard.streak + 1),
    )


def _guarded_metrics(metrics: Metrics, norm: jax.Array, good: jax.Array, guard: Guard) -> Metrics:
    """Metrics of an update, sums and weights 0 if it was skipped; and whether it was."""
    one = jnp.ones(())
    counted = {**metrics, "grad_norm": (norm, one)}
    counted = jax.tree.map(lambda x: jnp.where(good, x, 0.0), counted)
    return counted | {
        "skipped": ((~good).astype(jnp.float32), one),
        "skip_streak": (guard.streak.astype(jnp.float32), one),
    }


# --- Many updates.


class Run(NamedTuple):
    """What `fit` repeats."""

    state: Any  # a pytree with a .step leaf
    step: Callable[[Any, Batch], tuple[Any, Metrics]]
    batch_at: Callable[[int], Batch]  # a pure function of the step number
    num_steps: int
    hooks: Sequence[tuple[int, Hook]]  # (every, hook); all of them also run after the last step


def fit(run: Run) -> Any:
    """Runs the remaining steps and their hooks; returns the final state.

    The step number alone decides batch and randomness, so a restored state continues exactly as if it had never been
    interrupted.
    """
    state, first = run.state, int(run.state.step)
    for number in range(first, run.num_steps):
        state, metrics = run.step(state, run.batch_at(number))
        done = number + 1
        for every, hook in run.hooks:
            if done % every == 0 or done == run.num_steps:
                hook(done, state, metrics)
    return state


def count_steps(given: int, epochs: float, per_epoch: float, field: str) -> int:
    """The updates of a stage: `given`, or if that is 0, as many as `epochs` of `per_epoch` updates each take.

    Raises:
      InputError: where they are more than an int32 on a device can count.
    """
    steps = given or math.ceil(epochs * per_epoch)
    if steps > LARGEST_INT:
        raise InputError(
            f"{field}: {epochs:g} takes {steps:,} updates and {LARGEST_INT:,} can be counted; lower it"
        )
    return steps


# --- A stage that trains.


class LoopSettings(Protocol):
    """What the config of every training stage has."""

    @property
    def data(self) -> Any: ...  # .workers: threads that prepare batches ahead
    @property
    def log_every(self) -> int: ...
    @property
    def eval_every(self) -> int: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...


class Training(NamedTuple):
    """A stage that trains, as a record: all that `jaxllm.run` knows about it."""

    init: Callable[[], Any]  # the state before the first update
    abstract: Any  # shapes, dtypes and shardings of the state
    step: Callable[[Any, Batch], tuple[Any, Metrics]]
    batch_at: Callable[[int], Batch]  # a pure function of the step number
    num_steps: int
    settings: LoopSettings  # the stage's section of the config
    data: str  # fingerprint of what batches are made of
    work: Work
    evaluate: Callable[[int, Any], Mapping[str, float]]  # (step, state) -> held-out metrics
    best: str  # the metric of `evaluate` by which the best checkpoints are kept
    result: Callable[[Any, Mapping[str, float]], dict[str, Any]]
    """(final state, newest metrics) -> the stage's result."""
    lower_is_better: bool = True  # whether a lower `best` is
    finalize: Callable[[Any], Any] | None = None
    """Applied once to the trained state, which is then saved as step num_steps + 1."""
    schedules: Mapping[str, Callable[[int], Any]] | None = None  # logged with the metrics
    shown: tuple[str, ...] = ("loss",)  # metrics on the progress line


class Program(NamedTuple):
    """A compiled part of a stage's update, which `jaxllm plan` looks at without running it."""

    name: str
    run: Any  # jitted
    arguments: tuple[Any, ...]  # shapes with their shardings
    keywords: Mapping[str, Any]
    flops: float  # what the model needs, on all devices together
    times: int = 1  # how often an update runs it
    trips: int = 0  # repetitions of loops whose end depends on data; 0: it has none
    mesh: Any = None  # its own mesh, if it is not the stage's
    copied: Any = None  # arguments that exist only while it runs
