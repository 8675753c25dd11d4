"""OptimConfig -> an Optax transformation: clipping, AdamW with decoupled decay, a schedule."""

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

# Whether weight decay applies, by the name of the leaf. Every parameter must be here: an unknown name is an error.
_MATRICES = (
    "tokens",
    "positions",
    "project",
    "q",
    "k",
    "v",
    "out",
    "gate",
    "up",
    "down",
    "kernel",
    "a",
    "b",
)
_MATRICES += ("q_a", "q_b", "kv_a", "kv_b", "router")
_OTHERS = (
    "scale",
    "bias",
    "q_bias",
    "k_bias",
    "v_bias",
    "out_bias",
    "gate_bias",
    "up_bias",
    "down_bias",
    "router_bias",
)
DECAYED = dict.fromkeys(_MATRICES, True) | dict.fromkeys(_OTHERS, False)


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
    """wsd: the share of all steps spent decaying."""
    b1: ProportionBelowOne = 0.9
    """Decay of the gradient's running mean."""
    b2: ProportionBelowOne = 0.95
    """Decay of the squared gradient's running mean."""
    eps: Epsilon = 1e-8
    """Added to the root of the second moment."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type both moments are kept in between updates; they are computed in float32 (bfloat16: DeepSeek-V3, section 3.3.2)."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices and embeddings; norms and biases have none."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    spike_factor: NonNegativeFloat = 0.0
    """An update whose gradient norm is more than this times the usual (a running mean) is skipped; 0: only what is not
    finite is skipped."""

    def __post_init__(self) -> None:
        require(
            not self.spike_factor or self.spike_factor > 1,
            "spike_factor: must be above 1, or 0 for off",
        )
        # At 0.999 a step is less than half of bfloat16's last place: the second moment would never fall.
        narrow = self.state_dtype == "bfloat16"
        require(
            not narrow or max(self.b1, self.b2) <= 0.99,
            "state_dtype: bfloat16 needs b1 and b2 of at most 0.99",
        )


def learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Step number -> learning rate, over num_steps optimizer updates."""
    peak, end, warmup = (
        config.learning_rate,
        config.learning_rate * config.final_fraction,
        config.warmup_steps,
    )
    rest = max(num_steps - warmup, 1)
    decay = max(int(num_steps * config.decay_fraction), 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, end, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_fraction),
        "wsd": optax.linear_schedule(peak, end, decay, transition_begin=max(rest - decay, 0)),
    }[config.schedule]
    if not warmup:
        return after
    # (step + 1) / warmup: the first update is not lost to a learning rate of 0.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: OptimConfig, num_steps: int, bias_rate: float = 0.0
) -> optax.GradientTransformation:
    """AdamW; routers' biases, where bias_rate is given, move by it against the sign of their gradient (`moe.balance`)."""
    rate = learning_rate(config, num_steps)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
    adam = (
        adam if config.state_dtype == "float32" else _kept_in(jnp.dtype(config.state_dtype), adam)
    )
    adamw = optax.chain(adam, decay, optax.scale_by_learning_rate(rate))
    whole = (
        optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
        if config.clip_norm
        else adamw
    )
    if not bias_rate:
        return whole

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moves, state = whole.update(updates, state, params)
        one = lambda path, move, grad: (
            -bias_rate * jnp.sign(grad) if path[-1].key == "router_bias" else move
        )
        return jax.tree_util.tree_map_with_path(one, moves, updates), state

    return optax.GradientTransformation(whole.init, update)


def _kept_in(dtype: jnp.dtype, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam whose moments are rounded to a narrower type between updates."""

    def cast(state: Any, to: Any) -> Any:
        mu, nu = (jax.tree.map(lambda x: x.astype(to), moment) for moment in (state.mu, state.nu))
        return state._replace(mu=mu, nu=nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moves, state = adam.update(updates, cast(state, jnp.float32), params)
        return moves, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(adam.init(params), dtype), update)


def decay_mask(params: Any) -> Any:
    """A tree of bools like `params`: True where weight decay applies. Raises KeyError on an unknown leaf name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: DECAYED[path[-1].key], params)
