"""The decoder with a cache of keys and values, for generation: `unstack` once, then `apply_cached` for new tokens.

Shapes: B rows, T new tokens, S positions of the cache, K key heads of size H, D model width, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.models import lora
from jaxllm.models.config import ModelConfig
from jaxllm.models.layers import Block
from jaxllm.models.self_attention import CacheSlot, LayerCache
from jaxllm.models.transformer import Params, Stack, embed, final_norm, head, merge_module, stacks
from jaxllm.sharding import constrain, constrain_weights, platform


class KVCache(NamedTuple):
    """Keys and values of past tokens, one array per group of `decoded_groups`.

    Each is [B, K, S, H], or [layers, B, K, S, H] for several layers; see `self_attention.LayerCache`.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def decoding_config(config: ModelConfig) -> ModelConfig:
    """The config to decode with: float32 on a CPU, the same config elsewhere.

    On a CPU, XLA would convert all bfloat16 weights and the cache for each token, which takes longer than reading float32.
    """
    return dataclasses.replace(config, dtype="float32") if platform() == "cpu" else config


def decoded_groups(config: ModelConfig) -> list[Stack]:
    """Groups of layers that decoding computes in one loop, as `transformer.stacks`.

    On a TPU they are whole stacks, so that compilation takes the same time at any depth. Elsewhere they are single
    layers, since slicing the weights in a loop would copy them.
    """
    if platform() == "tpu":
        return stacks(config)
    groups = []
    for name, block, numbers in stacks(config):
        groups += [(name, block, range(i, i + 1)) for i in numbers]
    return groups


def unstack(params: Params, config: ModelConfig) -> Params:
    """Parameters for `apply_cached`: {"embed", "norm", "layers": one tree per group, "unembed" [D, V]}.

    Adapters are merged, matrices are cast to config.dtype, and the head is transposed. Done once before a decode loop,
    so that no step slices, casts or transposes a weight again.
    """
    # Adapters are merged: one product per matrix and step is cheaper than three.
    params = lora.merge(params)

    def cast(x: jax.Array, stacked: bool = False) -> jax.Array:
        """Casts matrices; norms and biases stay float32."""
        return x.astype(config.compute_dtype) if x.ndim > 1 + stacked else x

    # Layers are numbered over both stacks, and indexed within their own.
    first = {name: numbers.start for name, _, numbers in stacks(config)}

    def group(name: str, numbers: range) -> Params:
        stacked = len(numbers) > 1
        begin = numbers.start - first[name]
        # An index, not a slice of length 1: a single layer is not stacked.
        index: Any = slice(begin, begin + len(numbers)) if stacked else begin
        return jax.tree.map(lambda x: cast(x[index], stacked), params[name])

    # Sharded over columns: each device looks up its part of every token's embedding.
    embedding = jax.tree.map(lambda x: constrain_weights(cast(x), None, "columns"), params["embed"])
    return {
        "embed": embedding,
        "norm": jax.tree.map(cast, params["norm"]),  # a vector, which stays float32
        "layers": [group(name, numbers) for name, _, numbers in decoded_groups(config)],
        "unembed": cast(head(params)).T,
    }


def empty_cache(config: ModelConfig, batch_size: int, length: int) -> KVCache:
    """A cache of zeros with `length` positions, in config.dtype."""
    heads = config.num_kv_heads
    key_size = value_size = config.head_dim
    if config.mla.kv_rank:
        # The latent and the shared rotated key; values are made from the latent.
        heads = 1
        key_size = config.mla.kv_rank + config.mla.rope_dim
        value_size = 0

    def zeros(layers: int, size: int) -> jax.Array:
        array = jnp.zeros((layers, batch_size, heads, length, size), config.compute_dtype)
        # A single head, as in latent attention, cannot be split over the tensor axis.
        sharded_heads = "kv_heads" if heads > 1 else None
        array = constrain(array, None, "batch", sharded_heads, "cache", "head_dim")
        return array if layers > 1 else array[0]

    counts = [len(numbers) for _, _, numbers in decoded_groups(config)]
    return KVCache(
        k=tuple(zeros(count, key_size) for count in counts),
        v=tuple(zeros(count, value_size) for count in counts),
    )


def grow_cache(cache: KVCache, count: int) -> KVCache:
    """The cache with `count` more positions at its end."""

    def grow(x: jax.Array) -> jax.Array:
        # Positions are the dimension before the last, with or without stacked layers.
        widths = [(0, 0)] * x.ndim
        widths[-2] = (0, count)
        return jnp.pad(x, widths)

    return jax.tree.map(grow, cache)


def apply_cached(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    kv_segment_ids: jax.Array,
    cache: KVCache,
    offset: jax.Array | int,
) -> tuple[jax.Array, KVCache]:
    """Runs the decoder on T new tokens, which are written into the cache.

    Args:
      params: from `unstack`.
      config: from `decoding_config`.
      tokens: int32[B, T].
      positions: int32[B, T], of the tokens in their rows.
      kv_segment_ids: int32[B, S], 0 where the cache holds no token.
      cache: of the tokens before.
      offset: position in the cache of the first new token.

    Returns:
      (hidden states [B, T, D] after the final norm, the cache with the new tokens).
    """
    x = embed(params, config, tokens, positions, decoding=True)
    # The cache is updated group by group; XLA writes in place where the old one is not needed.
    ks = []
    vs = []
    groups = decoded_groups(config)
    for group, weights, k, v in zip(groups, params["layers"], *cache, strict=True):
        x, layer_cache = _apply_group(
            weights, config, group, x, positions, kv_segment_ids, LayerCache(k, v), offset
        )
        ks.append(layer_cache.k)
        vs.append(layer_cache.v)
    return final_norm(params, config, x), KVCache(tuple(ks), tuple(vs))


def _apply_group(
    weights: Params,
    config: ModelConfig,
    group: Stack,
    x: jax.Array,
    positions: jax.Array,
    kv_segment_ids: jax.Array,
    cache: LayerCache,
    offset: jax.Array | int,
) -> tuple[jax.Array, LayerCache]:
    """Runs a group of layers on new tokens x [B, T, D], in a loop if there is more than one."""
    _, block, numbers = group
    windowed = [config.windowed(i) for i in numbers]

    def layer(i: Any, x: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        """Layer i of stacked weights, or the only layer if i is None."""
        # A constant where possible, as in `transformer`.
        use_window = windowed[0] if len(set(windowed)) == 1 else jnp.array(windowed)[i]
        layer_weights = weights if i is None else jax.tree.map(lambda w: w[i], weights)
        module = merge_module(Block, block, layer_weights)
        return module.cached(x, positions, kv_segment_ids, cache, CacheSlot(i, offset), use_window)

    if len(numbers) == 1:
        return layer(None, x, cache)
    # The whole stacked cache is carried, and each layer writes its own part.
    return jax.lax.fori_loop(0, len(numbers), lambda i, carry: layer(i, *carry), (x, cache))
