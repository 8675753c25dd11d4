"""The one training loop and the one step maker. This file knows no stage."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from etils import epath

from jaxllm import checkpoint
from jaxllm.losses import Loss, Metrics
from jaxllm.metrics import LoggingConfig, MetricLog, Work
from jaxllm.sharding import param_shardings, replicated

Batch = Any
Hook = Callable[[int, Any, Metrics], None]


class TrainState(NamedTuple):
    """Everything that moves: what is here is checkpointed, what is checkpointed is here."""

    step: Any  # int32[]
    params: Any  # float32
    opt_state: Any


class Run(NamedTuple):
    """A stage, as `fit` sees it."""

    state: Any  # a pytree with a .step leaf
    step: Callable[[Any, Batch], tuple[Any, Metrics]]
    batch_at: Callable[[int], Batch]  # a pure function of the step number
    num_steps: int
    hooks: Sequence[tuple[int, Hook]]  # (every, fn(step, state, metrics)); all run after the last step too


LossFunction = Callable[..., Loss]  # (params, batch, key, **frozen)


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def make_step(
    loss: LossFunction,
    tx: optax.GradientTransformation,
    *,
    num_micro: int = 1,
    seed: int = 0,
    state_shardings: Any = None,
    mixed: tuple[LossFunction, float] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """(state, batch, **frozen) -> (state, metrics), jitted; the state is donated.

    loss(params, batch, key, **frozen) -> (loss_sum, weight, {name: (sum, weight)}). The batch's leading
    dimension is cut into num_micro microbatches whose sums are added in float32 and divided once, by the weight
    of all of them. The key of step n is fold_in(seed, n): the step number is the whole random state.
    state_shardings pins the new state where the old one was (without it XLA may drop a gradient's fsdp axis).
    mixed: another loss and its coefficient; a batch is then a pair, and the gradients of the two means are added.
    """

    def step(state: TrainState, batch: Batch, **frozen: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        batch, other = batch if mixed is not None else (batch, None)
        grads, metrics = mean_gradient(loss, state.params, batch, key, num_micro, frozen)
        if mixed is not None:
            other_loss, coef = mixed
            extra, more = mean_gradient(other_loss, state.params, other, key, num_micro, frozen)
            grads = jax.tree.map(lambda g, e: g + coef * e, grads, extra)
            metrics |= {f"mixed_{name}": pair for name, pair in more.items()}
        if state_shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, state_shardings.params)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to an integer power
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = (optax.tree.norm(grads), jnp.ones(()))
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def mean_gradient(
    loss: LossFunction, params: Any, batch: Batch, key: jax.Array, num_micro: int, frozen: dict[str, Any]
):
    """(gradient of the loss's mean, metrics): sums over microbatches, divided once; 0 where nothing has weight."""
    grads, weight, metrics = accumulate(loss, params, batch, key, num_micro, frozen)
    return jax.tree.map(lambda g: g / jnp.where(weight > 0, weight, 1.0), grads), metrics


def accumulate(loss: LossFunction, params: Any, batch: Batch, key: jax.Array, num_micro: int, frozen: dict[str, Any]):
    """Gradient of the loss sum, the weight and the metrics, summed over microbatches."""

    def one(micro: Batch, key: jax.Array):
        def scalar(params: Any):
            total, weight, metrics = loss(params, micro, key, **frozen)
            return total, (weight, metrics)

        (_, (weight, metrics)), grads = jax.value_and_grad(scalar, has_aux=True)(params)
        return grads, weight, metrics

    if num_micro == 1:
        return one(batch, key)
    micros = jax.tree.map(lambda x: _split(x, num_micro), batch)
    keys = jax.random.split(key, num_micro)
    first = jax.tree.map(lambda x: x[0], micros)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, first, key))
    add = lambda total, xs: (jax.tree.map(jnp.add, total, one(*xs)), None)
    return jax.lax.scan(add, zero, (micros, keys))[0]


def _split(x: jax.Array, num_micro: int) -> jax.Array:
    """[B, ...] -> [num_micro, B / num_micro, ...]; microbatch i takes rows i, i + num_micro, ...

    Striding keeps each row on the device that has it: a contiguous cut would move most of the batch.
    """
    return x.reshape(x.shape[0] // num_micro, num_micro, *x.shape[1:]).swapaxes(0, 1)


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


class Placed(NamedTuple):
    """How a TrainState is made and where its leaves live."""

    init: Callable[[Any], TrainState]  # parameters -> state; the parameters are donated
    abstract: TrainState  # shapes, dtypes and shardings
    shardings: TrainState


def place_state(mesh: jax.sharding.Mesh, abstract_params: Any, axes: Any, tx: optax.GradientTransformation) -> Placed:
    """Shardings for parameters by their logical axes, and for the optimiser's copies of them likewise."""
    params = param_shardings(mesh, abstract_params, axes)
    shapes = jax.eval_shape(lambda p: init_state(p, tx), abstract_params)
    everywhere = replicated(mesh)
    opt_state = optax.tree_map_params(
        tx, lambda _, s: s, shapes.opt_state, params, transform_non_params=lambda _: everywhere
    )
    shardings = TrainState(everywhere, params, opt_state)
    init = jax.jit(lambda p: init_state(p, tx), out_shardings=shardings, donate_argnums=0)
    return Placed(init, with_shardings(shapes, shardings), shardings)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that carry their shardings, as checkpoints are restored through."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


class LoopSettings(Protocol):
    """What every training stage's config has."""

    @property
    def log_every(self) -> int: ...
    @property
    def eval_every(self) -> int: ...
    @property
    def checkpoint(self) -> checkpoint.CheckpointConfig: ...


def run_stage(
    directory: epath.Path,
    title: str,
    *,
    init: Callable[[], Any],
    abstract: Any,
    step: Callable[[Any, Batch], tuple[Any, Metrics]],
    batch_at: Callable[[int], Batch],
    num_steps: int,
    settings: LoopSettings,
    logging: LoggingConfig,
    work: Work,
    evaluate: Callable[[int, Any], Mapping[str, float]],
    best: str,
    lower_is_better: bool = True,
    finalize: Callable[[Any], Any] | None = None,
    schedules: Mapping[str, Callable[[int], Any]] | None = None,
    shown: tuple[str, ...] = ("loss",),
) -> tuple[Any, dict[str, float]]:
    """Restore or start, `fit` with logging, evaluation and saving, and finish: (final state, newest metrics).

    best: the metric of `evaluate` whose best checkpoints are kept. finalize: applied once to the trained state,
    which is then saved as step num_steps + 1.
    """
    saving = settings.checkpoint
    manager = checkpoint.open_manager(directory / "checkpoints", saving, best, lower_is_better)
    state = checkpoint.restore_or_init(manager, abstract, init)
    start = int(state.step)
    intervals = {"log_every": settings.log_every, "save_every": saving.save_every}
    more: dict[str, Any] = {"start": start, "work": work, "config": logging, "schedules": schedules, "shown": shown}
    log = MetricLog(directory, title, num_steps, **intervals, **more)
    held_out: dict[str, float] = {}

    def evaluate_hook(number: int, state: Any, metrics: Metrics) -> None:
        del metrics
        held_out.update(evaluate(number, state))
        log.write(number, held_out)

    def save_hook(number: int, state: Any, metrics: Metrics) -> None:
        del metrics
        measured = number % settings.eval_every == 0 or number == num_steps
        checkpoint.save(manager, number, state, held_out if measured else None)

    hooks = ((1, log), (settings.eval_every, evaluate_hook), (saving.save_every, save_hook))
    try:
        # From num_steps on, the run was killed after its last step and before the stage was marked as finished:
        # its numbers are in the log.
        state = fit(Run(state, step, batch_at, num_steps, hooks))
        if finalize and int(state.step) == num_steps:
            state = finalize(state)._replace(step=jnp.int32(num_steps + 1))
            checkpoint.save(manager, num_steps + 1, state, held_out)
    finally:
        log.close()
        manager.wait_until_finished()
        manager.close()
    return state, log.latest | held_out
