"""OptimConfig -> an Optax transformation: clipping, AdamW with decoupled weight decay, a learning-rate schedule."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxllm.config import require
from jaxllm.config.ranges import (
    Epsilon,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveProportion,
    Proportion,
    ProportionBelowOne,
)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019) and its learning-rate schedule."""

    learning_rate: NonNegativeFloat = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After warm-up: constant, linear or cosine decay, or warm-up-stable-decay (Hu et al. 2024)."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from 0."""
    final_fraction: Proportion = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    decay_fraction: PositiveProportion = 0.2
    """wsd: the fraction of all steps spent decaying."""
    b1: ProportionBelowOne = 0.9
    """Decay of the gradient's running mean."""
    b2: ProportionBelowOne = 0.95
    """Decay of the squared gradient's running mean."""
    eps: Epsilon = 1e-8
    """Added to the root of the second moment."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which both moments are stored; they are updated in float32 (bfloat16: DeepSeek-V3, section 3.3.2)."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices and embeddings; norms and biases have none."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    spike_factor: NonNegativeFloat = 0.0
    """Skip an update whose gradient norm is more than this times its running mean; 0: skip only updates that are not
    finite."""

    def __post_init__(self) -> None:
        require(
            not self.spike_factor or self.spike_factor > 1,
            "spike_factor: must be above 1, or 0 for off",
        )
        # At 0.999 a step changes the second moment by less than bfloat16 resolves: it would never fall.
        narrow = self.state_dtype == "bfloat16"
        require(
            not narrow or max(self.b1, self.b2) <= 0.99,
            "state_dtype: bfloat16 needs b1 and b2 of at most 0.99",
        )


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
