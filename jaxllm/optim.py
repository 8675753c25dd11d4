"""OptimConfig -> an Optax transformation: clipping, AdamW with decoupled weight decay, a learning-rate schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.optim_config import OptimConfig


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
) -> optax.GradientTransformation:
    """Clipping and AdamW for parameters with these axes.

    Args:
      config: of the optimizer.
      num_steps: optimizer updates of the schedule.
      axes: a tree like the trained parameters, whose leaves say which of them decay (`models.parameters.Axes`).
      bias_rate: step of the routers' biases, against the sign of their gradient (`models.moe.balance`); 0: none.
    """
    # Clip the gradient, scale it by Adam's moments, add the decay, and only then multiply by the learning rate.
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.state_dtype != "float32":
        adam = _store_moments_as(jnp.dtype(config.state_dtype), adam)
    optimizer = optax.chain(
        adam,
        optax.add_decayed_weights(config.weight_decay, decay_mask(axes)),
        optax.scale_by_learning_rate(learning_rate(config, num_steps)),
    )
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    # Outermost, so that neither clipping nor the learning rate changes the step of a router's bias.
    return _move_router_biases(bias_rate, optimizer) if bias_rate else optimizer


def decay_mask(axes: Any) -> Any:
    """A tree of bools like `axes`: True where weight decay applies."""
    return jax.tree.map(lambda leaf: leaf.decays, axes)


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
    dtype: jnp.dtype, adam: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Adam whose moments are rounded to a narrower type between updates."""

    # The count of steps stays an integer.
    def cast(state: Any, dtype: Any) -> Any:
        mu = jax.tree.map(lambda x: x.astype(dtype), state.mu)
        nu = jax.tree.map(lambda x: x.astype(dtype), state.nu)
        return state._replace(mu=mu, nu=nu)

    def init(params: Any) -> Any:
        return cast(adam.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moves, state = adam.update(updates, cast(state, jnp.float32), params)
        return moves, cast(state, dtype)

    return optax.GradientTransformation(init, update)
