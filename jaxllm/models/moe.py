"""Mixture of experts: routing, dropless and with a capacity, the experts of a layer spread over devices.

Each device routes its own tokens. Over the mesh's expert axis the tokens of a group of devices are gathered, every
device runs its own experts on them, and the sums go back to where the tokens came from: no token is dropped, and no
shape depends on the routing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxllm.config.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from jaxllm.sharding import ACT_RULES, spec

_TOKEN_AXES = (
    "data",
    "fsdp",
    "context",
)  # over which tokens stay spread where those of the expert axis are gathered


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Experts in place of the MLP; num_experts 0: a dense MLP."""

    num_experts: NonNegativeInt = 0
    """Routed experts of a layer."""
    per_token: PositiveInt = 2
    """Experts that a token goes to."""
    mlp_dim: NonNegativeInt = 0
    """Hidden size of an expert; 0: model.mlp_dim."""
    num_shared: NonNegativeInt = 0
    """Experts that every token goes to besides (one MLP of num_shared times the size)."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """Scores of the experts: softmax over all (Mixtral, Qwen3, DeepSeek-V2) or a sigmoid each (DeepSeek-V3)."""
    normalise: bool = True
    """Divide the weights of a token's experts by their sum."""
    scale: PositiveFloat = 1.0
    """The weights are multiplied by it."""
    num_groups: PositiveInt = 1
    """Groups of experts (DeepSeek): a token first chooses groups."""
    groups_per_token: PositiveInt = 1
    """Groups that a token chooses its experts from."""
    first_dense: NonNegativeInt = 0
    """The first layers have a dense MLP."""
    capacity_factor: NonNegativeFloat = 0.0
    """Places of an expert over those at perfect balance; tokens beyond are dropped. 0: dropless."""
    aux_coef: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss (Fedus et al. 2022, eq. 4)."""
    bias_rate: NonNegativeFloat = 0.0
    """Step of the bias that balances the load without a loss (Wang et al. 2024; DeepSeek-V3, section 2.1.2)."""

    def __post_init__(self) -> None:
        if not self.num_experts:
            return
        if self.per_token > self.num_experts:
            raise ValueError("per_token: must be at most num_experts")
        if self.num_experts % self.num_groups or self.groups_per_token > self.num_groups:
            raise ValueError(
                "num_groups: must divide num_experts, and be at least groups_per_token"
            )
        if self.per_token > self.groups_per_token * (self.num_experts // self.num_groups):
            raise ValueError(
                "groups_per_token: the groups chosen hold fewer experts than per_token"
            )
        if self.bias_rate and self.router != "sigmoid":
            raise ValueError("bias_rate: balancing by a bias needs router sigmoid; use aux_coef")


class Load(NamedTuple):
    """What the router did with a layer's tokens, over all devices."""

    tokens: jax.Array  # float32[]: real tokens
    load: jax.Array  # float32[E]: how many went to each expert
    probability: jax.Array  # float32[E]: sum over tokens of the router's probability
    dropped: jax.Array  # float32[]: places of tokens that found their expert full


_ROWS = 1 << 15  # places of tokens in experts that are gone through at a time, with in_parts


def moe(
    x: jax.Array,
    mask: jax.Array,
    weights: dict[str, Any],
    config: MoEConfig,
    *,
    in_parts: bool = False,
) -> tuple[jax.Array, Load]:
    """x [B, T, D] through each token's experts -> ([B, T, D], load); mask bool[B, T]: False tokens get zeros.

    weights: router [D, E], router_bias [E] or none, experts {gate, up [E, D, F], down [E, F, D]} in x's dtype.
    in_parts: some tokens at a time, recomputed part by part backward; where capacity drops none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    in_parts &= not config.capacity_factor
    if mesh.empty:
        return _local(x, mask, weights, config, {}, in_parts)
    sizes, seq = dict(mesh.shape), "seq"
    if (
        x.shape[1] % sizes["context"]
    ):  # the one token of a decoding step: every shard of the sequence has it
        sizes["context"], seq = 1, None
    tokens = spec(("batch", seq, None), ACT_RULES)
    experts = {
        "gate": P("expert", None, "tensor"),
        "up": P("expert", None, "tensor"),
        "down": P("expert", "tensor", None),
    }
    specs = {name: P() if name != "experts" else experts for name in weights}
    run = functools.partial(_local, config=config, sizes=sizes, in_parts=in_parts)
    out_specs: Any = (tokens, Load(*[P()] * 4))  # type: ignore
    return jax.shard_map(
        run, in_specs=(tokens, P(*tokens[:2]), specs), out_specs=out_specs, check_vma=False
    )(x, mask, weights)


def _local(
    x, mask, weights, config: MoEConfig, sizes: dict[str, int], in_parts: bool
) -> tuple[jax.Array, Load]:
    """`moe` on one device's share of the tokens and of the experts."""
    run = functools.partial(_at_once, config=config, sizes=sizes)
    rows = mask.size * sizes.get("expert", 1) * config.per_token
    parts = math.gcd(x.shape[1], max(rows // _ROWS, 1)) if in_parts else 1
    if parts > 1:
        # Gradients of the experts' matrices are summed over parts in float32.
        wide = {
            **weights,
            "experts": jax.tree.map(lambda w: w.astype(jnp.float32), weights["experts"]),
        }
        narrow = lambda weights: {
            **weights,
            "experts": jax.tree.map(lambda w: w.astype(x.dtype), weights["experts"]),
        }
        one = jax.checkpoint(lambda x, mask: run(x, mask, narrow(wide)), prevent_cse=False)
        split = lambda a: jnp.moveaxis(a.reshape(a.shape[0], parts, -1, *a.shape[2:]), 1, 0)
        _, (y, stats) = jax.lax.scan(
            lambda _, part: (None, one(*part)), None, (split(x), split(mask))
        )
        y, stats = jnp.moveaxis(y, 0, 1).reshape(x.shape), jax.tree.map(lambda a: a.sum(0), stats)
    else:
        y, stats = run(x, mask, weights)
    over = tuple(axis for axis in _TOKEN_AXES if sizes.get(axis, 1) > 1)
    return y, jax.tree.map(lambda a: jax.lax.psum(a, over), stats) if over else stats


def _at_once(x, mask, weights, config: MoEConfig, sizes: dict[str, int]) -> tuple[jax.Array, Load]:
    """The same, with a load of these tokens alone: of all that the shards of the experts brought together."""
    shards = sizes.get("expert", 1)
    if shards > 1:
        x, mask = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x, mask))
    flat, real = x.reshape(-1, x.shape[-1]), mask.reshape(-1)
    chosen, expert, probability = route(flat, weights["router"], weights.get("router_bias"), config)
    expert = jnp.where(real[:, None], expert, config.num_experts)  # nobody's
    run = functools.partial(_capacity, config=config) if config.capacity_factor else _dropless
    first = jax.lax.axis_index("expert") * (config.num_experts // shards) if shards > 1 else 0
    local = jnp.where(
        real[:, None], (expert - first) % config.num_experts, config.num_experts
    )  # this device's first
    y, dropped = run(flat, chosen, local, weights["experts"])
    if sizes.get("tensor", 1) > 1:
        y = jax.lax.psum(y, "tensor")
    y = y.reshape(x.shape)
    if shards > 1:
        y, dropped = (
            jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True),
            jax.lax.psum(dropped, "expert"),
        )
    load = jnp.zeros(config.num_experts, jnp.float32).at[expert.reshape(-1)].add(1.0, mode="drop")
    stats = Load(
        real.astype(jnp.float32).sum(),
        load,
        jnp.where(real[:, None], probability, 0.0).sum(0),
        dropped,
    )
    return y.astype(x.dtype), stats


def route(x: jax.Array, router: jax.Array, bias: jax.Array | None, config: MoEConfig):
    """x [N, D] -> (weights float32[N, k], experts int32[N, k], probabilities float32[N, E]), all in float32.

    Softmax (Jiang et al. 2024, section 2.1), or a sigmoid whose bias chooses but does not weigh (DeepSeek-V3, eq. 13
    to 16). A group's score is that of its best expert (DeepSeek-V2), with the sigmoid that of its best two.
    """
    c = config
    logits = jnp.einsum(
        "nd,de->ne", x.astype(jnp.float32), router.astype(jnp.float32), precision="highest"
    )
    scores = jax.nn.softmax(logits, axis=-1) if c.router == "softmax" else jax.nn.sigmoid(logits)
    choice = scores if bias is None else scores + bias[None]
    if c.num_groups > 1:
        groups = choice.reshape(-1, c.num_groups, c.num_experts // c.num_groups)
        best = jax.lax.top_k(groups, 2)[0].sum(-1) if c.router == "sigmoid" else groups.max(-1)
        kept = jax.nn.one_hot(
            jax.lax.top_k(best, c.groups_per_token)[1], c.num_groups, dtype=bool
        ).any(1)
        choice = jnp.where(kept[:, :, None], groups, -jnp.inf).reshape(choice.shape)
    expert = jax.lax.top_k(choice, c.per_token)[1]
    weights = jnp.take_along_axis(scores, expert, axis=-1)
    if c.normalise:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return weights * c.scale, expert, scores / scores.sum(-1, keepdims=True)


def _swiglu(
    rows: jax.Array, experts: dict[str, jax.Array], product: Callable[..., jax.Array]
) -> jax.Array:
    """Rows through their experts' MLPs; product(rows, one of the matrices)."""
    return product(
        jax.nn.silu(product(rows, experts["gate"])) * product(rows, experts["up"]), experts["down"]
    )


def _dropless(x, weights, local, experts) -> tuple[jax.Array, jax.Array]:
    """Tokens sorted by expert, and one grouped product a matrix: (float32[N, D], 0).

    local int32[N, k]: numbers of experts, those of this device first; the number after the last is nobody's.
    """
    N, k = local.shape
    here = experts["gate"].shape[0]
    order = jnp.argsort(local.reshape(-1), stable=True)
    sizes = jnp.zeros(here, jnp.int32).at[local.reshape(-1)].add(1, mode="drop")
    out = _swiglu(
        x[order // k], experts, lambda rows, matrix: jax.lax.ragged_dot(rows, matrix, sizes)
    )
    # What follows the last group belongs to another device's experts, or to none.
    mine = jnp.arange(N * k)[:, None] < sizes.sum()
    out = jnp.where(mine, out, 0.0)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(N * k, dtype=order.dtype))
    out = out[back].reshape(N, k, -1).astype(jnp.float32)
    return (out * weights[:, :, None]).sum(1), jnp.float32(0)


def _capacity(x, weights, local, experts, config: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """Each expert has so many places, given in the order of the tokens: (float32[N, D], places not found)."""
    N, k = local.shape
    here, local = experts["gate"].shape[0], local.reshape(-1)
    capacity = min(N, max(1, math.ceil(N * k / config.num_experts * config.capacity_factor)))
    chosen = jax.nn.one_hot(local, here, dtype=jnp.int32)  # [N k, here]
    place = ((jnp.cumsum(chosen, axis=0) - 1) * chosen).sum(-1)
    fits = (local < here) & (place < capacity)
    at = jnp.where(fits, local * capacity + place, here * capacity)
    rows = (
        jnp.zeros((here * capacity, x.shape[1]), x.dtype)
        .at[at]
        .set(jnp.repeat(x, k, axis=0), mode="drop")
    )
    rows = rows.reshape(here, capacity, -1)
    out = _swiglu(rows, experts, functools.partial(jnp.einsum, "eci,eio->eco")).reshape(
        here * capacity, -1
    )
    out = jnp.where(fits[:, None], out[jnp.minimum(at, here * capacity - 1)], 0.0).reshape(N, k, -1)
    dropped = ((local < here) & ~fits).astype(jnp.float32).sum()
    return (out.astype(jnp.float32) * weights[:, :, None]).sum(1), dropped


def balance(load: Load, bias: jax.Array | None, config: MoEConfig) -> jax.Array:
    """What is added to the loss of one token on average, for layers' loads stacked [L, ...].

    The load-balancing loss E * sum_e f_e P_e, f_e the tokens of expert e over all tokens, P_e its mean probability;
    and for the bias a term of value 0 whose gradient has the sign of the expert's excess load, which is all that
    `optim.make_optimizer` uses of it.
    """
    tokens = jnp.maximum(load.tokens, 1.0)[:, None]
    share = jax.lax.stop_gradient(load.load / tokens)
    total = (
        config.aux_coef * config.num_experts * (share * load.probability / tokens).sum(-1).mean()
    )
    if bias is not None and config.bias_rate:
        # Counts are whole numbers: an expert with exactly its share has exactly no excess, on any mesh.
        excess = jax.lax.stop_gradient(
            load.load * config.num_experts - load.load.sum(-1, keepdims=True)
        )
        pull = (bias * excess / tokens).sum()
        total = total + 1e-6 * (
            pull - jax.lax.stop_gradient(pull)
        )  # small: the gradient's norm does not feel it
    return total
