"""Schedule-free AdamW (Defazio et al. 2024, algorithm 1): the average of all iterates instead of a decaying rate.

    y = (1 - b1) z + b1 x      where the gradient is taken
    z                          moves by AdamW without its first moment
    x                          the average of z: the model

The parameters of the training state are x. Whatever evaluates, saves or exports them has the averaged model, and only the
training step asks for y (`Optimizer.gradient_point`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ScheduleFreeState(NamedTuple):
    """What the average leaves out."""

    count: Any  # int32[]: updates so far
    weight: Any  # float32[]: the sum of all weights of the average
    unaveraged: Any  # z, like the parameters
    moments: Any  # of the optimizer that moves z


def schedule_free(
    optimizer: optax.GradientTransformation, rate: optax.Schedule, b1: float, axes: Any
) -> optax.GradientTransformation:
    """The optimizer, whose iterates are averaged.

    As `optax.contrib.schedule_free`, but of x instead of y: nothing has to be computed back from y, which would round.

    Args:
      optimizer: moves z by a gradient at y. It has no momentum of its own.
      rate: its learning rate. An iterate has the weight of its rate squared, so that warm-up counts little.
      b1: how much of x there is in y.
      axes: a tree like the parameters.
    """

    def init(params: Any) -> ScheduleFreeState:
        # A copy: the parameters and the state are donated as two buffers.
        z = jax.tree.map(jnp.copy, params)
        return ScheduleFreeState(jnp.zeros((), jnp.int32), jnp.zeros(()), z, optimizer.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScheduleFreeState]:
        y = interpolate(params, state.unaveraged, b1, axes)
        moves, moments = optimizer.update(updates, state.moments, y)
        z = optax.apply_updates(state.unaveraged, moves)
        own = jnp.square(jnp.float32(rate(state.count)))
        weight = state.weight + own
        # A rate of 0 leaves the average where it is.
        share = own / jnp.where(weight > 0, weight, 1.0)
        towards_z = jax.tree.map(lambda x, new: share * (new - x), params, z)
        return towards_z, ScheduleFreeState(state.count + 1, weight, z, moments)

    return optax.GradientTransformation(init, update)


def interpolate(params: Any, unaveraged: Any, b1: float, axes: Any) -> Any:
    """y, where the gradient is taken, of x and z."""

    def between(path: Any, _: Any, x: jax.Array, z: jax.Array) -> jax.Array:
        # Biases of routers follow the load by a rule of their own, which moves x alone.
        return x if path[-1].key == "router_bias" else (1.0 - b1) * z + b1 * x

    return jax.tree_util.tree_map_with_path(between, axes, params, unaveraged)
