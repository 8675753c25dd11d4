"""The decoder as functions of plain nested dicts: `init`, `apply`, `head`, and `apply_cached` for generation.

Parameters: {"embed": {"tokens" [V, D], "positions"?}, "dense_layers"?, "layers": stacked block [L, ...], "norm": {...},
"head"?: [V, D], "mtp"?: stacked `layers.Ahead`}. Layers are always stacked, so there is one checkpoint layout; where the first ones have a dense MLP and
the rest experts, they are two stacks. NNX is used inside this package only: a block is
split into a graph definition (cached per config) and a dict of arrays, and merged where it is called.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.models import lora, moe
from jaxllm.models.attention import ATTENDED
from jaxllm.models.config import ModelConfig
from jaxllm.models.layers import Block, MTPModule, Norm, normal
from jaxllm.models.pipeline import staged
from jaxllm.sharding import (
    constrain,
    constrain_residual,
    constrain_weights,
    platform,
    undo_zigzag,
    zigzag_order,
)

Params = dict[str, Any]


class KVCache(NamedTuple):
    """Keys and values of past tokens, one array per group of `decoded_groups`: each [B, K, S, H], a head's places side by
    side, as attention reads them; of several layers [layers, B, K, S, H]. Latent attention has one head, and no values."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters; the same on every mesh (jit it with out_shardings to be born sharded)."""
    embed_key, head_key, layers_key = jax.random.split(key, 3)
    layer_keys = jax.random.split(layers_key, config.num_layers)
    params: Params = {
        "embed": _init(_Embed, config, embed_key),
        "norm": _init(_FinalNorm, config, head_key),
    }
    for name, block, numbers in stacks(config):
        params[name] = jax.vmap(lambda k, block=block: _init(Block, block, k))(
            layer_keys[numbers.start : numbers.stop]
        )
    if not config.tie_embeddings:
        params["head"] = _init(_Head, config, head_key)
    if config.mtp_modules:
        keys = jax.random.split(jax.random.fold_in(layers_key, 1), config.mtp_modules)
        params["mtp"] = jax.vmap(lambda k: _init(MTPModule, config, k))(keys)
    return params


def axes(config: ModelConfig) -> Params:
    """The logical axes of every parameter, a tree like that of `init`."""
    tree = {"embed": _axes(_Embed, config), "norm": _axes(_FinalNorm, config)}
    stacked = lambda over, tree: jax.tree.map(lambda names: (over, *names), tree, is_leaf=_is_axes)
    tree |= {name: stacked("layers", _axes(Block, block)) for name, block, _ in stacks(config)}
    tree |= {"mtp": stacked("modules", _axes(MTPModule, config))} if config.mtp_modules else {}
    return tree if config.tie_embeddings else {**tree, "head": _axes(_Head, config)}


def stacks(config: ModelConfig) -> list[tuple[str, ModelConfig, range]]:
    """(name in the parameters, config of its blocks, numbers of its layers) of each stack of layers."""
    first, dense = config.moe.first_dense, dataclasses.replace(config, moe=moe.MoEConfig())
    every = [
        ("dense_layers", dense, range(first)),
        ("layers", config, range(first, config.num_layers)),
    ]
    return [stack for stack in every if stack[2]]


def abstract(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, without making them."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


@functools.cache  # a search asks for it hundreds of times
def num_params(config: ModelConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)))


def apply(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> jax.Array:
    """Token ids int32[B, T] -> hidden states [B, T, D] after the final norm, in config.dtype.

    segment_ids int32[B, T] (0 = padding) keep packed documents apart; positions int32[B, T] restart in each.
    Without them a row is one document. Adapters in the parameters (`lora.join`) are added layer by layer.
    """
    return apply_routed(params, config, tokens, segment_ids, positions)[0]


def apply_routed(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """`apply`, and what the routers of its experts did: a `moe.Load` of arrays [L, ...], {} without experts."""
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    if positions is None:
        positions = jnp.broadcast_to(
            jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape
        )
    adapters, load = params.get("lora", {}), {}
    if (order := zigzag_order(tokens.shape[1])) is not None:
        tokens, segment_ids, positions = (x[:, order] for x in (tokens, segment_ids, positions))
    x = _embed(params, config, tokens, positions)
    for name, block, numbers in stacks(config):
        windowed = [config.windowed(i) for i in numbers]

        def run(
            layers: Any, x: Any, positions: Any, segment_ids: Any, block=block, windowed=windowed
        ) -> Any:
            def body(x: jax.Array, layer: tuple[Any, ...]) -> tuple[jax.Array, Any]:
                weights = lora.add(layer[0], layer[1], adapters.get("scale"))
                # Where all layers are alike it is a constant, and the mask is compiled for it.
                local = windowed[0] if len(set(windowed)) == 1 else layer[2]
                return _merge(Block, block, weights)(
                    checkpoint_name(x, _INPUT), positions, segment_ids, local, order
                )

            return jax.lax.scan(_remat(body, config), x, layers, unroll=config.scan_unroll)

        layers = (params[name], adapters.get(name, {}), jnp.array(windowed))
        x, load = staged(run, layers, x, positions, segment_ids)
    x = x if order is None else constrain_residual(undo_zigzag(x))
    return _merge(_FinalNorm, config, params["norm"]).norm(x), load


def ahead(
    params: Params,
    config: ModelConfig,
    hidden: jax.Array,
    tokens: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
) -> tuple[list[jax.Array], Any]:
    """([hidden states [B, T, D] that predict the token after the next, ...], the experts' loads [M, ...] or {}).

    hidden is what `apply` returns; module k adds token t + k at place t. Near the end of a segment that token is
    another's: what is made there predicts nothing, and no place before it sees it.
    """
    made, loads = [], []
    for k in range(config.mtp_modules):
        tokens = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        body = functools.partial(_ahead, config, positions, segment_ids)
        module = jax.tree.map(lambda w, k=k: w[k], params["mtp"])
        hidden, load = _remat(body, config)(
            module, hidden, _embed(params, config, tokens, positions)
        )
        made, loads = [*made, hidden], [*loads, load]
    return made, jax.tree.map(lambda *x: jnp.stack(x), *loads)


def _ahead(
    config: ModelConfig,
    positions: Any,
    segment_ids: Any,
    module: Params,
    hidden: Any,
    embedded: Any,
) -> Any:
    return _merge(MTPModule, config, module)(hidden, embedded, positions, segment_ids)


def routing_loss(
    layers: Params, config: ModelConfig, load: moe.Load
) -> tuple[jax.Array, dict[str, Any]]:
    """(what is added to the mean loss of a token, {metric: (sum, weight)}) for the loads of these layers."""
    one, places = jnp.ones(()), jnp.maximum(load.load.sum(-1), 1.0)
    total = moe.balance(load, layers["mlp"].get("router_bias"), config.moe)
    busiest = (load.load.max(-1) * config.moe.num_experts / places).mean()
    idle = (load.load == 0).astype(jnp.float32).mean()
    metrics = {
        "router/balance_loss": total,
        "router/busiest_expert": busiest,
        "router/idle_experts": idle,
    }
    dropped = {"router/dropped": (load.dropped.sum(), load.load.sum())}
    return total, {
        name: (jax.lax.stop_gradient(value), one) for name, value in metrics.items()
    } | dropped


def head(params: Params) -> jax.Array:
    """The output matrix float32[V, D]: hidden @ head.T are the logits."""
    return params["head"]["tokens"] if "head" in params else params["embed"]["tokens"]


def grow_vocab(params: Params, vocab_size: int) -> Params:
    """Parameters with more rows of embeddings and head, each the mean of those that are there; enough: as they are."""

    def grow(table: jax.Array) -> jax.Array:
        more = max(vocab_size - table.shape[0], 0)
        return jnp.concatenate(
            [table, jnp.broadcast_to(table.mean(0, keepdims=True), (more, table.shape[1]))]
        )

    tables = {
        name: {**params[name], "tokens": grow(params[name]["tokens"])}
        for name in ("embed", "head")
        if name in params
    }
    return {**params, **tables}


def empty_cache(config: ModelConfig, batch_size: int, length: int) -> KVCache:
    m, heads = config.mla, config.num_kv_heads
    keys, values = (heads, config.head_dim), (heads, config.head_dim)
    if m.kv_rank:
        keys, values = (1, m.kv_rank + m.rope_dim), (1, 0)

    def zeros(layers: int, heads: int, size: int) -> jax.Array:
        empty = jnp.zeros((layers, batch_size, heads, length, size), config.compute_dtype)
        empty = constrain(
            empty, None, "batch", "kv_heads" if heads > 1 else None, "cache", "head_dim"
        )
        return empty if layers > 1 else empty[0]

    counts = [len(numbers) for _, _, numbers in decoded_groups(config)]
    return KVCache(*(tuple(zeros(n, *shape) for n in counts) for shape in (keys, values)))


def decoded_groups(config: ModelConfig) -> list[tuple[str, ModelConfig, range]]:
    """(stack, config, numbers) of the layers that decoding goes through as one: on a TPU whole stacks, in a loop that
    compiles in the same time at any depth; elsewhere single layers, since slicing weights would copy them."""
    if platform() == "tpu":
        return stacks(config)
    return [
        (name, block, range(i, i + 1)) for name, block, numbers in stacks(config) for i in numbers
    ]


def decoding(config: ModelConfig) -> ModelConfig:
    """The config to decode with: float32 on a CPU, where XLA would convert all bfloat16 weights and the cache anew for
    each token, which takes longer than reading float32."""
    return dataclasses.replace(config, dtype="float32") if platform() == "cpu" else config


def grow_cache(cache: KVCache, places: int) -> KVCache:
    """The cache with so many more places at its end."""
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, places if i == x.ndim - 2 else 0) for i in range(x.ndim)]), cache
    )


def unstack(params: Params, config: ModelConfig) -> Params:
    """Parameters for `apply_cached`: a list of `decoded_groups`, matrices already in config.dtype, the head as "unembed" [D, V].

    Done once before a decode loop, so that no step slices, casts or turns a weight again.
    """
    params = lora.merge(params)
    cast = lambda x, stacked=0: x.astype(config.compute_dtype) if x.ndim > 1 + stacked else x
    first = {name: numbers.start for name, _, numbers in stacks(config)}

    def group(name: str, numbers: range) -> Params:
        begin, end = numbers.start - first[name], numbers.stop - first[name]
        some = slice(begin, end) if len(numbers) > 1 else begin
        return jax.tree.map(lambda x: cast(x[some], len(numbers) > 1), params[name])

    layers = [group(name, numbers) for name, _, numbers in decoded_groups(config)]
    embed = jax.tree.map(lambda x: constrain_weights(cast(x), None, "columns"), params["embed"])
    rest = {"embed": embed, "norm": jax.tree.map(cast, params["norm"])}
    return {**rest, "layers": layers, "unembed": cast(head(params)).T}


def apply_cached(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    kv_segment_ids: jax.Array,
    cache: KVCache,
    offset: jax.Array | int,
) -> tuple[jax.Array, KVCache]:
    """Hidden states [B, T, D] of T new tokens at places offset.. of the cache; params from `unstack`.

    positions: int32[B, T]; kv_segment_ids: int32[B, S], 0 where a place of the cache holds no token.
    """
    x = _embed(params, config, tokens, positions, decoded=True)
    ks, vs = [], []
    for (_, block, numbers), weights, k, v in zip(
        decoded_groups(config), params["layers"], *cache, strict=True
    ):
        windowed = [config.windowed(i) for i in numbers]

        def layer(i: Any, carry: Any, block=block, weights=weights, windowed=windowed) -> Any:
            local = windowed[0] if len({*windowed}) == 1 else jnp.array(windowed)[i]
            one = _merge(
                Block, block, weights if i is None else jax.tree.map(lambda w: w[i], weights)
            )
            x, k, v = carry
            return one.cached(x, positions, kv_segment_ids, k, v, (i, offset), local)

        carry = (x, k, v)
        x, k, v = (
            layer(None, carry)
            if len(numbers) == 1
            else jax.lax.fori_loop(0, len(numbers), layer, carry)
        )
        ks, vs = [*ks, k], [*vs, v]
    return _merge(_FinalNorm, config, params["norm"]).norm(x), KVCache(tuple(ks), tuple(vs))


def flops_per_token(config: ModelConfig, length: int, *, scored: bool = True) -> float:
    """Training FLOPs of one token: 6 per matrix parameter it meets, plus causal attention of every layer.

    A third of it goes forward only. scored: over the vocabulary, which a model with a scalar head leaves out.

    6 N H T for heads of H (PaLM, Chowdhery et al. 2022, appendix B, counts 12 L N H T for full attention; a causal
    mask needs half); with a window of W tokens, those within it.
    """
    c, m = config, config.mla
    heads = (scored + c.mtp_modules) * c.vocab_size * c.embed_dim
    matmul = heads + sum(len(numbers) * _met(block) for _, block, numbers in stacks(c))
    matmul += c.mtp_modules * (_met(c) + 2 * c.embed_dim**2)
    sizes = (m.nope_dim + m.rope_dim + m.value_dim) if m.kv_rank else 2 * c.head_dim
    seen = lambda i: (
        length - (length - c.window) ** 2 / length
        if c.windowed(i) and c.window < length
        else length
    )
    return 6.0 * matmul + 3.0 * c.num_heads * sizes * sum(
        map(seen, range(c.num_layers + c.mtp_modules))
    )


@functools.cache
def _met(block: ModelConfig) -> float:
    """Parameters of the matrices of a layer that one token is multiplied by."""
    every = jax.tree_util.tree_leaves_with_path(
        jax.eval_shape(lambda: _init(Block, block, jax.random.key(0)))
    )
    share = block.moe.per_token / block.moe.num_experts if block.moe.num_experts else 1.0
    named = ((jax.tree_util.keystr(path), math.prod(leaf.shape)) for path, leaf in every)
    matrices = [(name, size) for name, size in named if "norm" not in name and "bias" not in name]
    return sum(size * (share if "'experts'" in name else 1.0) for name, size in matrices)


class _Embed(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.tokens = normal(rngs, config.init_std, vocab=config.vocab_size, embed=config.embed_dim)
        if config.position == "learned":
            self.positions = normal(
                rngs, config.init_std, positions=config.max_length, embed=config.embed_dim
            )


class _Head(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.tokens = normal(rngs, config.init_std, vocab=config.vocab_size, embed=config.embed_dim)


class _FinalNorm(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        del rngs
        self.norm = Norm(config)


def _embed(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    decoded: bool = False,
) -> jax.Array:
    # Gathered here, in the narrow type: left to XLA, looking up in a table split over its columns ends in "involuntary
    # full rematerialization". Decoding looks up in whole columns (`unstack`): XLA would gather split rows for each token.
    place = lambda rows: (None, "columns") if decoded else (rows, None)
    table = lambda name, rows: constrain_weights(
        params["embed"][name].astype(config.compute_dtype), *place(rows)
    )
    x = table("tokens", "vocab")[tokens]
    if config.scale_embeddings:
        x = x * jnp.asarray(config.embed_dim**0.5, x.dtype)
    if config.position == "learned":
        x = x + table("positions", "positions")[positions]
    return constrain_residual(x)


_INPUT = "block_input"
_HOST = {"offload_src": "device", "offload_dst": "pinned_host"}


def _remat(body, config: ModelConfig):
    known = jax.checkpoint_policies
    if config.remat == "none":
        return body
    policy = {
        "dots": known.dots_with_no_batch_dims_saveable,
        "offload_dots": known.offload_dot_with_no_batch_dims("device", "pinned_host"),
        "attention": known.save_only_these_names(ATTENDED),
        "full": None,
        "offload": known.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[_INPUT], **_HOST
        ),
    }[config.remat]
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def _init(module: type, config: ModelConfig, key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.split(module(config, rngs=nnx.Rngs(params=key)))[1])


@functools.cache
def _definition(module: type, config: ModelConfig):
    return nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(params=0))))


def _merge(module: type, config: ModelConfig, params: Params) -> Any:
    """The NNX module with these parameters; costs tracing time only."""
    graph, state = _definition(module, config)
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the next line writes into it
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def _axes(module: type, config: ModelConfig) -> Params:
    _, state = _definition(module, config)
    names = jax.tree.map(
        lambda v: v.get_metadata()["axes"], state, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
    return nnx.to_pure_dict(names)


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple)
