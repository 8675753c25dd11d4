"""OptimConfig -> an optimizer: clipping, its kind of update, decoupled weight decay, a learning-rate schedule.

Kinds that Optax has come from it. Those below this package need to know what the dimensions of a parameter are: stacked
layers and experts are batches of matrices, and a shape alone does not say so.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.models.parameters import Axes
from jaxllm.models.scaling import LIKE_BASE
from jaxllm.optim.adafactor import scale_by_adafactor
from jaxllm.optim.muon import scale_by_muon
from jaxllm.optim.schedule_free import interpolate, schedule_free
from jaxllm.optim.soap import scale_by_soap
from jaxllm.optim_config import OptimConfig


class Optimizer(NamedTuple):
    """An Optax transformation, and where it wants the gradient."""

    init: Callable[[Any], Any]  # parameters -> its state
    update: Callable[..., tuple[Any, Any]]  # (gradients, state, parameters) -> (moves, new state)
    gradient_point: Callable[[Any, Any], Any]
    """(parameters, state) -> the parameters to take the gradient at: the same ones, but in schedule-free AdamW."""


def learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """The schedule, from the number of an optimizer update to its learning rate, over num_steps updates."""
    peak = config.learning_rate
    end = peak * config.final_fraction
    warmup = config.warmup_steps
    rest = max(num_steps - warmup, 1)
    decay = max(int(num_steps * config.decay_fraction), 1)
    # Optax counts the steps of a joined schedule from its boundary: those of `after` from the end of warm-up.
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, end, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_fraction),
        "wsd": optax.linear_schedule(peak, end, decay, transition_begin=max(rest - decay, 0)),
    }[config.schedule]
    if not warmup:
        return after
    # (step + 1) / warmup, so that the first update is not lost to a learning rate of 0.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: OptimConfig, num_steps: int, axes: Any, bias_rate: float = 0.0
) -> Optimizer:
    """Clipping and an optimizer of the configured kind for parameters with these axes.

    Args:
      config: of the optimizer.
      num_steps: optimizer updates of the schedule.
      axes: a tree of `models.parameters.Axes` like the trained parameters: which of them decay, which are matrices, and how
        they follow the model's size.
      bias_rate: step of the routers' biases, against the sign of their gradient (`models.moe.balance`); 0: none.
    """
    # Clip the gradient, scale it by Adam's moments, add the decay, and only then multiply by the learning rate.
    config.check_scaling("optim", any(leaf.scale != LIKE_BASE for leaf in jax.tree.leaves(axes)))
    scale = _follow_size(config, _scaling(config, axes), axes)
    if config.state_dtype != "float32":
        scale = _store_moments_as(jnp.dtype(config.state_dtype), scale)
    optimizer = optax.chain(
        scale,
        optax.add_decayed_weights(config.weight_decay, decay_mask(axes)),
        _descent(config, num_steps, axes),
    )
    if config.kind == "schedule_free":
        rate = learning_rate(config, num_steps)
        optimizer = schedule_free(optimizer, rate, config.b1, axes)
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    # Outermost, so that neither clipping nor the learning rate changes the step of a router's bias.
    if bias_rate:
        optimizer = _move_router_biases(bias_rate, optimizer)
    return Optimizer(optimizer.init, optimizer.update, _gradient_point(config, axes))


def decay_mask(axes: Any) -> Any:
    """A tree of bools like `axes`: True where weight decay applies."""
    return jax.tree.map(lambda leaf: leaf.decays, axes)


def groups(axes: Any) -> Any:
    """A tree like `axes`: "matrices" where a product sums over inputs; "rest" for tables, norms and biases.

    Muon and SOAP are for the matrices. AdamW trains the rest: embeddings and the head among it, as published.
    """
    return jax.tree.map(lambda leaf: "matrices" if leaf.num_inputs else "rest", axes)


def _scaling(config: OptimConfig, axes: Any) -> optax.GradientTransformation:
    """Gradients -> directions, before decay and learning rate."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.kind == "adamw":
        return adam
    if config.kind == "adafactor":
        return scale_by_adafactor(axes)
    if config.kind == "lion":
        return optax.scale_by_lion(config.b1, config.b2)
    if config.kind == "sgd":
        return optax.trace(config.momentum)
    if config.kind == "schedule_free":
        # Adam without a first moment.
        return optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)

    labels = groups(axes)
    # Optax passes each group with empty nodes in place of the other's parameters.
    absent = optax.MaskedNode()
    own = jax.tree.map(lambda leaf, group: leaf if group == "matrices" else absent, axes, labels)
    if config.kind == "muon":
        matrices = scale_by_muon(config.momentum, config.muon_scaling, own)
    else:
        every, longest = config.basis_every, config.longest_basis
        matrices = scale_by_soap(config.b1, config.b2, config.eps, every, longest, own)
    return optax.partition({"matrices": matrices, "rest": adam}, labels)


def _follow_size(
    config: OptimConfig, optimizer: optax.GradientTransformation, axes: Any
) -> optax.GradientTransformation:
    """The optimizer, whose directions have the sizes that a model of this size needs (`models.scaling`).

    Before weight decay, which takes the same share of every parameter per update at any size (CompleteP: the decay grows as
    the learning rate falls; Dey et al. 2025, table 1).
    """
    rates = jax.tree.map(lambda leaf: _rate(config, leaf), axes)
    # Gradients as large as the base's need the base's epsilon.
    gradients = jax.tree.map(lambda leaf: 1.0 / leaf.scale.gradient, axes)
    # Nothing is added where nothing changes: states and bits are those of a model without rules.
    if all(factor == 1.0 for factor in jax.tree.leaves((rates, gradients))):
        return optimizer
    return optax.chain(_times(gradients), optimizer, _times(rates))


def _rate(config: OptimConfig, axes: Axes) -> float:
    """The factor of a parameter's learning rate."""
    # Muon scales matrices by their own sizes (`muon._scale`).
    if config.kind == "muon" and axes.num_inputs:
        return axes.scale.folded
    return axes.scale.rate


def _times(factors: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda x, f: f * x, updates, factors))


def _descent(config: OptimConfig, num_steps: int, axes: Any) -> optax.GradientTransformation:
    """Multiplies by minus the learning rate, of each group if the rest has its own."""
    own = optax.scale_by_learning_rate(learning_rate(config, num_steps))
    if not config.rest_learning_rate:
        return own
    rest = dataclasses.replace(config, learning_rate=config.rest_learning_rate)
    scale_rest = optax.scale_by_learning_rate(learning_rate(rest, num_steps))
    return optax.partition({"matrices": own, "rest": scale_rest}, groups(axes))


def _gradient_point(config: OptimConfig, axes: Any) -> Callable[[Any, Any], Any]:
    if config.kind != "schedule_free":
        return lambda params, state: params

    def between(params: Any, state: Any) -> Any:
        return interpolate(params, optax.tree.get(state, "unaveraged"), config.b1, axes)

    return between


def _move_router_biases(
    rate: float, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The optimizer, with updates of `rate` against the sign of the gradient for leaves named router_bias."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moves, state = optimizer.update(updates, state, params)

        def choose(path: Any, move: jax.Array, grad: jax.Array) -> jax.Array:
            return -rate * jnp.sign(grad) if path[-1].key == "router_bias" else move

        return jax.tree_util.tree_map_with_path(choose, moves, updates), state

    return optax.GradientTransformation(optimizer.init, update)


def _store_moments_as(
    dtype: jnp.dtype, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The optimizer, whose state is rounded to a narrower type between updates."""

    # Counts of steps stay integers.
    def cast(state: Any, dtype: Any) -> Any:
        is_moment = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        return jax.tree.map(lambda x: x.astype(dtype) if is_moment(x) else x, state)

    def init(params: Any) -> Any:
        return cast(optimizer.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moves, state = optimizer.update(updates, cast(state, jnp.float32), params)
        return moves, cast(state, dtype)

    return optax.GradientTransformation(init, update)
