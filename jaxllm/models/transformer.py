"""The decoder as functions of plain nested dicts: `init`, `apply`, `head`, and `apply_cached` for generation.

Parameters: {"embed": {"tokens" [V, D], "positions"?}, "layers": stacked block [L, ...], "norm": {...}, "head"?: [V, D]}.
Layers are always stacked, so there is one checkpoint layout. NNX is used inside this package only: a block is
split into a graph definition (cached per config) and a dict of arrays, and merged where it is called.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models import lora
from jaxllm.models.config import ModelConfig
from jaxllm.models.layers import Block, Norm, normal
from jaxllm.sharding import constrain, platform

Params = dict[str, Any]


class KVCache(NamedTuple):
    """Keys and values of past tokens, one array per layer: each [B, K, S, H]: a head's places side by side, as attention reads them."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters; the same on every mesh (jit it with out_shardings to be born sharded)."""
    embed_key, head_key, layers_key = jax.random.split(key, 3)
    layer_keys = jax.random.split(layers_key, config.num_layers)
    params: Params = {
        "embed": _init(_Embed, config, embed_key),
        "layers": jax.vmap(lambda k: _init(Block, config, k))(layer_keys),
        "norm": _init(_FinalNorm, config, head_key),
    }
    if not config.tie_embeddings:
        params["head"] = _init(_Head, config, head_key)
    return params


def axes(config: ModelConfig) -> Params:
    """The logical axes of every parameter, a tree like that of `init`."""
    tree = {"embed": _axes(_Embed, config), "norm": _axes(_FinalNorm, config)}
    stacked = functools.partial(jax.tree.map, lambda names: ("layers", *names), is_leaf=_is_axes)
    tree["layers"] = stacked(_axes(Block, config))
    return tree if config.tie_embeddings else {**tree, "head": _axes(_Head, config)}


def abstract(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, without making them."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


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
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)

    adapters = params.get("lora", {})

    def body(x: jax.Array, layer: tuple[Params, Params]) -> tuple[jax.Array, None]:
        weights = lora.add(*layer, adapters.get("scale"))
        return _merge(Block, config, weights)(x, positions, segment_ids), None

    x = _embed(params, config, tokens, positions)
    layers = (params["layers"], adapters.get("layers", {}))
    x, _ = jax.lax.scan(_remat(body, config), x, layers, unroll=config.scan_unroll)
    return _merge(_FinalNorm, config, params["norm"]).norm(x)


def head(params: Params) -> jax.Array:
    """The output matrix float32[V, D]: hidden @ head.T are the logits."""
    return params["head"]["tokens"] if "head" in params else params["embed"]["tokens"]


def empty_cache(config: ModelConfig, batch_size: int, length: int) -> KVCache:
    shape = (batch_size, config.num_kv_heads, length, config.head_dim)
    zeros = lambda: constrain(jnp.zeros(shape, config.compute_dtype), "batch", "kv_heads", "cache", "head_dim")
    return KVCache(*(tuple(zeros() for _ in range(config.num_layers)) for _ in range(2)))


def decoding(config: ModelConfig) -> ModelConfig:
    """The config to decode with: float32 on a CPU, where XLA would convert all bfloat16 weights and the cache anew for
    each token, which takes longer than reading float32."""
    return dataclasses.replace(config, dtype="float32") if platform() == "cpu" else config


def grow_cache(cache: KVCache, places: int) -> KVCache:
    """The cache with so many more places at its end."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, places), (0, 0))), cache)


def unstack(params: Params, config: ModelConfig) -> Params:
    """Parameters for `apply_cached`: layers as a list, matrices already in config.dtype, the head as "unembed" [D, V].

    Done once before a decode loop, so that no step slices, casts or turns a weight again.
    """
    params = lora.merge(params)
    cast = lambda x: x.astype(config.compute_dtype) if x.ndim > 1 else x
    layers = [jax.tree.map(lambda x, i=i: cast(x[i]), params["layers"]) for i in range(config.num_layers)]
    rest = jax.tree.map(cast, {name: params[name] for name in ("embed", "norm")})
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
    x = _embed(params, config, tokens, positions)
    ks, vs = [], []
    for layer, k, v in zip(params["layers"], *cache, strict=True):
        block = _merge(Block, config, layer)
        x, k, v = block.cached(x, positions, kv_segment_ids, k, v, offset)
        ks, vs = [*ks, k], [*vs, v]
    return _merge(_FinalNorm, config, params["norm"]).norm(x), KVCache(tuple(ks), tuple(vs))


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Training FLOPs of one token: 6 per matrix parameter plus 6 N H T of causal attention per layer.

    PaLM (Chowdhery et al. 2022, appendix B) counts 12 L N H T for full attention; a causal mask needs half.
    """
    c = config
    attention = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    mlp = (3 if c.mlp == "swiglu" else 2) * c.embed_dim * c.mlp_dim
    matmul = c.num_layers * (attention + mlp) + c.vocab_size * c.embed_dim
    return 6.0 * matmul + 6.0 * c.num_layers * c.num_heads * c.head_dim * length


class _Embed(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.tokens = normal(rngs, config.init_std, vocab_rows=config.vocab_size, embed_=config.embed_dim)
        self.tokens.set_metadata(axes=("vocab_rows", None))
        if config.position == "learned":
            self.positions = normal(rngs, config.init_std, positions=config.max_length, norm=config.embed_dim)


class _Head(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.tokens = normal(rngs, config.init_std, vocab=config.vocab_size, embed=config.embed_dim)


class _FinalNorm(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        del rngs
        self.norm = Norm(config)


def _embed(params: Params, config: ModelConfig, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    x = params["embed"]["tokens"].astype(config.compute_dtype)[tokens]
    if config.position == "learned":
        x = x + params["embed"]["positions"].astype(config.compute_dtype)[positions]
    return constrain(x, "batch", "seq", "embed")


def _remat(body, config: ModelConfig):
    if config.remat == "none":
        return body
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(body, policy=dots if config.remat == "dots" else None, prevent_cse=False)


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
    names = jax.tree.map(lambda v: v.get_metadata()["axes"], state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.to_pure_dict(names)


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple)
