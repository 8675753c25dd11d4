"""The decoder with a cache of keys and values, for the engine: `unstack` once, then `apply_in_blocks` for new tokens.

Shapes: R rows, T new tokens, D model width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.models import lora
from jaxllm.models.block_cache import LayerBlocks, View, cache_axes
from jaxllm.models.config import ModelConfig
from jaxllm.models.layers import Block
from jaxllm.models.transformer import Params, Stack, embed, final_norm, head, merge_module, stacks
from jaxllm.models.transformer import axes as transformer_axes
from jaxllm.runtime.products import has_bfloat16
from jaxllm.sharding import constrain, constrain_weights, param_shardings, platform

BlockCache = tuple[LayerBlocks, ...]
"""Keys and values in blocks, for each group of `decoded_groups`."""


def decoding_config(config: ModelConfig) -> ModelConfig:
    """The config to decode with: float32 on a CPU that does not multiply bfloat16 numbers, the same config elsewhere.

    On such a CPU, all bfloat16 weights and the cache would be converted for each token, which takes longer than reading
    float32.
    """
    if platform() == "cpu" and not has_bfloat16():
        return dataclasses.replace(config, dtype="float32")
    return config


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
    """Parameters for `apply_in_blocks`: {"embed", "norm", "layers": one tree per group, "unembed" [D, V]}.

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


def unstacked_shardings(mesh: Any, shapes: Params, config: ModelConfig) -> Params:
    """How the parameters from `unstack` are sharded; shapes: a tree of them."""
    axes = transformer_axes(config)

    def group(name: str, numbers: range) -> Params:
        # A single layer has no dimension of layers.
        return jax.tree.map(lambda a: a if len(numbers) > 1 else tuple(a)[1:], axes[name])

    head_axes = axes["head"]["tokens"] if "head" in axes else axes["embed"]["tokens"]
    unstacked = {
        "embed": jax.tree.map(lambda _: (None, "columns"), axes["embed"]),
        "norm": axes["norm"],
        "layers": [group(name, numbers) for name, _, numbers in decoded_groups(config)],
        "unembed": tuple(reversed(head_axes)),
    }
    return param_shardings(mesh, shapes, unstacked)


def _cache_sizes(config: ModelConfig) -> tuple[int, int, int]:
    """What is cached of a token and layer: number of heads, sizes of a key and of a value."""
    if config.mla.kv_rank:
        # The latent and the shared rotated key; values are made from the latent.
        return 1, config.mla.kv_rank + config.mla.rope_dim, 0
    return config.num_kv_heads, config.head_dim, config.head_dim


def empty_blocks(config: ModelConfig, count: int, size: int) -> BlockCache:
    """A cache of zeros with `count` blocks over all devices, of `size` positions each."""
    heads, key_size, value_size = _cache_sizes(config)

    def zeros(layers: int, *block: int) -> jax.Array:
        array = jnp.zeros((layers, count, heads, *block), config.compute_dtype)
        array = constrain(array, *cache_axes(array))
        return array if layers > 1 else array[0]

    return tuple(
        LayerBlocks(
            zeros(len(numbers), key_size, size),
            zeros(len(numbers), size, value_size),
        )
        for _, _, numbers in decoded_groups(config)
    )


def block_bytes(config: ModelConfig, size: int) -> int:
    """Bytes of a block of `size` positions, over all layers and devices."""
    heads, key_size, value_size = _cache_sizes(config)
    width = heads * (key_size + value_size) * config.compute_dtype.itemsize
    return config.num_layers * size * width


def apply_in_blocks(
    params: Params, config: ModelConfig, tokens: jax.Array, view: View, cache: BlockCache
) -> tuple[jax.Array, BlockCache]:
    """Runs the decoder on T new tokens of each row, which are written into the rows' blocks.

    Args:
      params: from `unstack`.
      config: from `decoding_config`.
      tokens: int32[R, T].
      view: where they go, and what they see.
      cache: of the tokens before.

    Returns:
      (hidden states [R, T, D] after the final norm, the cache with the new tokens).
    """
    x = embed(params, config, tokens, jnp.maximum(view.positions, 0), decoding=True)
    caches = []

    def run(block: Block, i: Any, use_window: Any, x: jax.Array, cache: LayerBlocks) -> Any:
        return block.in_blocks(x, view, cache, i, use_window)

    for group, weights, cached in zip(decoded_groups(config), params["layers"], cache, strict=True):
        x, cached = _run_group(weights, config, group, run, x, cached)
        caches.append(cached)
    return final_norm(params, config, x), tuple(caches)


def _run_group(
    weights: Params,
    config: ModelConfig,
    group: Stack,
    run: Callable[..., Any],
    x: jax.Array,
    cache: Any,
) -> tuple[jax.Array, Any]:
    """Runs a group of layers on x [B, T, D], in a loop if there is more than one; returns x and the group's cache.

    run: (block, index of the layer in the group or None, whether it has the window, x, cache) -> (x, cache).
    """
    _, block, numbers = group
    windowed = [config.windowed(i) for i in numbers]

    def layer(i: Any, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Layer i of stacked weights, or the only layer if i is None."""
        # A constant where possible, as in `transformer`.
        use_window = windowed[0] if len(set(windowed)) == 1 else jnp.array(windowed)[i]
        layer_weights = weights if i is None else jax.tree.map(lambda w: w[i], weights)
        return run(merge_module(Block, block, layer_weights), i, use_window, x, cache)

    if len(numbers) == 1:
        return layer(None, x, cache)
    # The whole stacked cache is carried, and each layer writes its own part.
    return jax.lax.fori_loop(0, len(numbers), lambda i, carry: layer(i, *carry), (x, cache))
