"""Mixture of experts: routing, dropless or with a capacity, with the experts of a layer spread over devices.

Each device routes its own tokens. Over the mesh's expert axis the tokens of a group of devices are gathered, every
device runs its own experts on them, and the sums go back to the devices that own the tokens. No token is dropped
unless there is a capacity, and no shape depends on the routing.

Shapes: B rows, T positions, N = B * T tokens, D model width, E experts (e of them on a device), F hidden units of an
expert, k experts per token.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxllm.models.parts_config import MoEConfig
from jaxllm.sharding import ACT_RULES, spec

# Mesh axes over which tokens stay spread while those of the expert axis are gathered.
_TOKEN_AXES = ("data", "fsdp", "context")

# With in_parts: how many pairs of a token and an expert are computed at a time.
_ROWS = 1 << 15


class Load(NamedTuple):
    """What the router did with a layer's tokens, over all devices."""

    tokens: jax.Array  # float32[]: number of real tokens
    load: jax.Array  # float32[E]: how many of them went to each expert
    probability: jax.Array  # float32[E]: sum over tokens of the router's probability
    dropped: jax.Array  # float32[]: pairs of a token and an expert that was full


def moe(
    x: jax.Array,
    mask: jax.Array,
    weights: dict[str, Any],
    config: MoEConfig,
    *,
    in_parts: bool = False,
) -> tuple[jax.Array, Load]:
    """Sends each token through its experts, on any mesh.

    Args:
      x: [B, T, D] activations.
      mask: bool[B, T]; where it is False (padding) the output is 0 and nothing is counted.
      weights: router float32[D, E], router_bias float32[E] if there is one, and experts {gate, up [E, D, F],
        down [E, F, D]} in x's dtype.
      config: of the routing.
      in_parts: process some tokens at a time and recompute part by part in the backward pass; ignored with a capacity,
        which must see all tokens at once.

    Returns:
      ([B, T, D] in x's dtype, the load over all devices).
    """
    mesh = jax.sharding.get_abstract_mesh()
    in_parts &= not config.capacity_factor
    if mesh.empty:
        return _local(x, mask, weights, config, {}, in_parts)
    sizes = dict(mesh.shape)
    sequence: str | None = "seq"
    if x.shape[1] % sizes["context"]:
        # The single token of a decoding step: every shard of the sequence has it.
        sizes["context"] = 1
        sequence = None
    tokens = spec(("batch", sequence, None), ACT_RULES)
    # Whole matrices of a device's experts, but for the hidden units, which are split over the tensor axis.
    experts = {
        "gate": P("expert", None, "tensor"),
        "up": P("expert", None, "tensor"),
        "down": P("expert", "tensor", None),
    }
    weight_specs = {name: experts if name == "experts" else P() for name in weights}
    # Each device sees its own tokens; the load is summed, so that every device has all of it.
    run = functools.partial(_local, config=config, sizes=sizes, in_parts=in_parts)
    out_specs: Any = (tokens, Load(*[P()] * 4))  # type: ignore
    return jax.shard_map(
        run, in_specs=(tokens, P(*tokens[:2]), weight_specs), out_specs=out_specs, check_vma=False
    )(x, mask, weights)


def _local(
    x: jax.Array,
    mask: jax.Array,
    weights: dict[str, Any],
    config: MoEConfig,
    sizes: dict[str, int],
    in_parts: bool,
) -> tuple[jax.Array, Load]:
    """`moe` on one device's tokens and experts; sizes: of the mesh axes, {} without a mesh."""
    pairs = mask.size * sizes.get("expert", 1) * config.per_token
    # Parts must divide the row length, so that each is a slice of all rows.
    parts = math.gcd(x.shape[1], max(pairs // _ROWS, 1)) if in_parts else 1
    if parts > 1:
        y, load = _local_in_parts(x, mask, weights, config, sizes, parts)
    else:
        y, load = _route_and_run(x, mask, weights, config, sizes)
    over = tuple(axis for axis in _TOKEN_AXES if sizes.get(axis, 1) > 1)
    if over:
        load = jax.tree.map(lambda a: jax.lax.psum(a, over), load)
    return y, load


def _local_in_parts(
    x: jax.Array,
    mask: jax.Array,
    weights: dict[str, Any],
    config: MoEConfig,
    sizes: dict[str, int],
    parts: int,
) -> tuple[jax.Array, Load]:
    """`_local` in a scan over `parts` slices of the sequence, each of which is recomputed in the backward pass."""

    def with_experts(dtype: Any, weights: dict[str, Any]) -> dict[str, Any]:
        return {**weights, "experts": jax.tree.map(lambda w: w.astype(dtype), weights["experts"])}

    # Cast outside of the parts, so that gradients of the experts' matrices are summed over parts in float32.
    wide = with_experts(jnp.float32, weights)

    def run(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, Load]:
        return _route_and_run(x, mask, with_experts(x.dtype, wide), config, sizes)

    run = jax.checkpoint(run, prevent_cse=False)

    def split(a: jax.Array) -> jax.Array:
        """[B, T, ...] -> [parts, B, T / parts, ...]."""
        return jnp.moveaxis(a.reshape(a.shape[0], parts, -1, *a.shape[2:]), 1, 0)

    _, (y, loads) = jax.lax.scan(lambda _, part: (None, run(*part)), None, (split(x), split(mask)))
    y = jnp.moveaxis(y, 0, 1).reshape(x.shape)
    return y, jax.tree.map(lambda a: a.sum(0), loads)


def _route_and_run(
    x: jax.Array,
    mask: jax.Array,
    weights: dict[str, Any],
    config: MoEConfig,
    sizes: dict[str, int],
) -> tuple[jax.Array, Load]:
    """Routes tokens and runs this device's experts; the load is of the tokens of one group of the expert axis.

    Experts are renumbered so that this device's come first: on the second of two devices with two experts each

        expert    0 1 2 3 4(none)
        local     2 3 0 1 4
    """
    shards = sizes.get("expert", 1)
    if shards > 1:
        x = jax.lax.all_gather(x, "expert", axis=0, tiled=True)
        mask = jax.lax.all_gather(mask, "expert", axis=0, tiled=True)
    flat = x.reshape(-1, x.shape[-1])
    real = mask.reshape(-1)[:, None]
    share, expert, probability = route(flat, weights["router"], weights.get("router_bias"), config)
    # Padding gets the number after the last expert, which no device has.
    none = config.num_experts
    expert = jnp.where(real, expert, none)
    first = jax.lax.axis_index("expert") * (config.num_experts // shards) if shards > 1 else 0
    local = jnp.where(real, (expert - first) % config.num_experts, none)
    if config.capacity_factor:
        y, dropped = _capacity(flat, share, local, weights["experts"], config)
    else:
        y, dropped = _dropless(flat, share, local, weights["experts"])
    if sizes.get("tensor", 1) > 1:
        # Each device has computed some of the hidden units.
        y = jax.lax.psum(y, "tensor")
    y = y.reshape(x.shape)
    if shards > 1:
        # Sums over the experts of a token, and gives each device its own tokens back.
        y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
        dropped = jax.lax.psum(dropped, "expert")
    counts = jnp.zeros(config.num_experts, jnp.float32)
    load = Load(
        tokens=real.astype(jnp.float32).sum(),
        load=counts.at[expert.reshape(-1)].add(1.0, mode="drop"),
        probability=jnp.where(real, probability, 0.0).sum(0),
        dropped=dropped,
    )
    return y.astype(x.dtype), load


def route(
    x: jax.Array, router: jax.Array, bias: jax.Array | None, config: MoEConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses each token's experts, in float32.

    By a softmax (Jiang et al. 2024, section 2.1), or by a sigmoid whose bias affects the choice but not the weights
    (DeepSeek-V3, eq. 13 to 16). The score of a group is that of its best expert (DeepSeek-V2), with the sigmoid the sum
    of its best two (DeepSeek-V3).

    Args:
      x: [N, D] tokens.
      router: float32[D, E].
      bias: float32[E] or None.
      config: of the routing.

    Returns:
      (weights float32[N, k], experts int32[N, k], probabilities float32[N, E]).
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
        chosen = jax.lax.top_k(best, c.groups_per_token)[1]
        kept = jax.nn.one_hot(chosen, c.num_groups, dtype=bool).any(1)  # [N, groups]
        choice = jnp.where(kept[:, :, None], groups, -jnp.inf).reshape(choice.shape)
    expert = jax.lax.top_k(choice, c.per_token)[1]
    # Weights are of the scores, not of the choice: neither bias nor groups change them.
    weights = jnp.take_along_axis(scores, expert, axis=-1)
    if c.normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return weights * c.scale, expert, scores / scores.sum(-1, keepdims=True)


def _swiglu(
    rows: jax.Array, experts: dict[str, jax.Array], product: Callable[..., jax.Array]
) -> jax.Array:
    """Rows through their experts' MLPs; product(rows, matrices) multiplies each row with its expert's matrix."""
    hidden = jax.nn.silu(product(rows, experts["gate"])) * product(rows, experts["up"])
    return product(hidden, experts["down"])


def _dropless(
    x: jax.Array, share: jax.Array, local: jax.Array, experts: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Runs tokens sorted by expert, with one grouped product per matrix.

    Pairs of a token and an expert are sorted, so that each expert's are adjacent. Two tokens, two experts per token, and
    two experts (0, 1) on this device:

        pair        0 1 2 3
        token       0 0 1 1
        local       1 3 0 1
        order       2 0 3 1      pairs sorted by expert; the first sizes.sum() = 3 are this device's
        sizes       1 2          pairs of expert 0 and of expert 1

    Args:
      x: [N, D] tokens.
      share: float32[N, k], weights of their experts.
      local: int32[N, k], numbers of their experts, this device's first.
      experts: matrices of this device's experts.

    Returns:
      (float32[N, D], 0: none is dropped).
    """
    N, k = local.shape
    num_local = experts["gate"].shape[0]
    order = jnp.argsort(local.reshape(-1), stable=True)
    sizes = jnp.zeros(num_local, jnp.int32).at[local.reshape(-1)].add(1, mode="drop")

    def product(rows: jax.Array, matrix: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, matrix, sizes)

    out = _swiglu(x[order // k], experts, product)
    # Rows after the last group belong to another device's experts, or are padding.
    mine = jnp.arange(N * k)[:, None] < sizes.sum()
    out = jnp.where(mine, out, 0.0)
    # The inverse permutation puts rows back in the order of pairs.
    back = jnp.zeros_like(order).at[order].set(jnp.arange(N * k, dtype=order.dtype))
    out = out[back].reshape(N, k, -1).astype(jnp.float32)
    return (out * share[:, :, None]).sum(1), jnp.float32(0)


def _capacity(
    x: jax.Array,
    share: jax.Array,
    local: jax.Array,
    experts: dict[str, jax.Array],
    config: MoEConfig,
) -> tuple[jax.Array, jax.Array]:
    """Runs each expert on a fixed number of slots, which tokens take in their order.

    Five tokens, one expert each, capacity 2; the last token of expert 0 finds it full:

        local       0 1 0 0 1
        slot        0 0 1 2 1      position in its expert's queue
        fits        y y y - y

    Arguments as `_dropless`. Returns (float32[N, D], float32[]: pairs that were dropped).
    """
    N, k = local.shape
    num_local = experts["gate"].shape[0]
    local = local.reshape(-1)
    capacity = min(N, max(1, math.ceil(N * k / config.num_experts * config.capacity_factor)))
    num_slots = num_local * capacity
    chosen = jax.nn.one_hot(local, num_local, dtype=jnp.int32)  # [N k, e]
    slot = ((jnp.cumsum(chosen, axis=0) - 1) * chosen).sum(-1)
    fits = (local < num_local) & (slot < capacity)
    # Pairs that do not fit get an index out of range, and the scatter drops them.
    index = jnp.where(fits, local * capacity + slot, num_slots)
    empty = jnp.zeros((num_slots, x.shape[1]), x.dtype)
    rows = empty.at[index].set(jnp.repeat(x, k, axis=0), mode="drop")
    rows = rows.reshape(num_local, capacity, -1)
    out = _swiglu(rows, experts, functools.partial(jnp.einsum, "eci,eio->eco"))
    out = out.reshape(num_slots, -1)[jnp.minimum(index, num_slots - 1)]
    out = jnp.where(fits[:, None], out, 0.0).reshape(N, k, -1)
    dropped = ((local < num_local) & ~fits).astype(jnp.float32).sum()
    return (out.astype(jnp.float32) * share[:, :, None]).sum(1), dropped


def balance(load: Load, bias: jax.Array | None, config: MoEConfig) -> jax.Array:
    """The term that balances the load, float32[], to add to the mean loss of a token.

    It is the load-balancing loss E * sum_e f_e P_e (Fedus et al. 2022, eq. 4), where f_e is the share of tokens of expert
    e and P_e its mean probability. For the bias it adds a term of value 0 whose gradient has the sign of the expert's
    excess load; `optim.make_optimizer` uses only that sign.

    Args:
      load: of L layers, its arrays stacked: [L, ...].
      bias: float32[L, E] or None.
      config: of the routing.
    """
    # A batch may be padding only.
    tokens = jnp.maximum(load.tokens, 1.0)[:, None]
    # Counts have no gradient; the router learns through its probabilities.
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
        # Small, so that it does not matter for the norm of the gradient, by which the gradient is clipped.
        total = total + 1e-6 * (pull - jax.lax.stop_gradient(pull))
    return total
