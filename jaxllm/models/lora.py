"""Low-rank adapters (Hu et al. 2022, section 4.1): W + alpha / rank * a @ b, where a and b are trained and W is not.

Trained and frozen parameters are two trees. `join` merges them into one, which `transformer.apply` takes unchanged: it
adds the product layer by layer inside the scan, so that no second copy of the weights exists.

    frozen   {"embed", "layers", "norm", "lora": {"scale"}}
    trained  {"lora": {"layers": {"attention": {"q": {"a" [L, in, rank], "b" [L, rank, out]}, ...}}}}

With a scalar head both are below "trunk", and the head is trained (`scalar`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.models.parameters import Axes
from jaxllm.models.parts_config import LoRAConfig

_STACKS = ("dense_layers", "layers")  # entries of the parameters that hold stacked layers

# (a matrix [L, ...] or its shape, the matrix's axes) -> its adapter, or something else about it
Make = Callable[[Any, Axes], Any]


def trained(config: LoRAConfig, shapes: Any, axes: Any) -> tuple[Any, Any]:
    """(shapes, axes) of the trained parameters: the adapters, plus the scalar head if there is one; rank 0: all.

    shapes and axes: of all parameters, as `transformer.abstract` and `transformer.axes` return them.
    """
    if not config.rank:
        return shapes, axes
    if "trunk" in shapes:
        trunk_shapes, trunk_axes = trained(config, shapes["trunk"], axes["trunk"])
        return {**shapes, "trunk": trunk_shapes}, {**axes, "trunk": trunk_axes}
    adapters = jax.eval_shape(lambda: init(config, shapes, jax.random.key(0), axes))
    adapter_axes = _on_stacks(config, shapes, axes, lambda _, names: _adapter_axes(names))
    return adapters, {"lora": adapter_axes}


def frozen(config: LoRAConfig, params: Any) -> Any:
    """The frozen part of all parameters; {} if rank is 0."""
    if not config.rank:
        return {}
    if "trunk" in params:
        return {"trunk": frozen(config, params["trunk"])}
    # The scale is a parameter, so that `join`ed parameters need no config.
    return {**params, "lora": {"scale": jnp.float32(config.alpha / config.rank)}}


def place_frozen(config: LoRAConfig, placed: Any, everywhere: Any) -> Any:
    """The frozen part of `placed` (shapes with shardings), with shardings.

    everywhere: the sharding of the scale, which is not among the parameters.
    """
    leaves = jax.tree_util.tree_leaves_with_path(placed)
    shardings = {path: leaf.sharding for path, leaf in leaves}

    def with_sharding(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        # Only the scale of the adapters is not among `placed`.
        sharding = shardings.get(path, everywhere)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.eval_shape(lambda p: frozen(config, p), placed)
    return jax.tree_util.tree_map_with_path(with_sharding, shapes)


def init(config: LoRAConfig, params: Any, key: jax.Array, axes: Any) -> Any:
    """The trained part of all parameters, with fresh adapters; `params` themselves if rank is 0.

    a is sampled from N(0, 1 / inputs) and b is zero, so that nothing changes at first. axes: of all parameters.
    """
    if not config.rank:
        return params
    if "trunk" in params:
        return {**params, "trunk": init(config, params["trunk"], key, axes["trunk"])}
    # One key per adapter, in the order of the parameters: two stacks have fewer than 64.
    keys = iter(jax.random.split(key, 64))

    def adapter(weight: Any, names: Axes) -> dict[str, jax.Array]:
        # weight: [L, *inputs, *outputs]
        split = 1 + names.num_inputs
        depth = weight.shape[0]
        inputs = weight.shape[1:split]
        outputs = weight.shape[split:]
        noise = jax.random.normal(next(keys), (depth, *inputs, config.rank), jnp.float32)
        return {
            "a": noise / math.sqrt(math.prod(inputs)),
            "b": jnp.zeros((depth, config.rank, *outputs), jnp.float32),
        }

    return {"lora": _on_stacks(config, params, axes, adapter)}


def _adapter_axes(names: Axes) -> dict[str, Axes]:
    """Axes of an adapter: those of its matrix. The rank is never sharded."""
    split = 1 + names.num_inputs
    return {
        # Both are matrices, so both decay.
        "a": Axes((*names[:split], None), decays=True, num_inputs=names.num_inputs, num_stacked=1),
        "b": Axes((names[0], None, *names[split:]), decays=True, num_inputs=1, num_stacked=1),
    }


def _on_stacks(config: LoRAConfig, params: Any, axes: Any, make: Make) -> dict[str, Any]:
    return {
        name: _on_targets(config, params[name], axes[name], make)
        for name in _STACKS
        if name in params
    }


def _on_targets(
    config: LoRAConfig, tree: Mapping[str, Any], axes: Mapping[str, Any], make: Make
) -> dict[str, Any]:
    """make(matrix, axes) for every target in a tree of parameters, in their order; branches without one are left out."""
    results = {}
    for name, value in tree.items():
        # Routed experts have matrices of the same names, but are never targets.
        if name == "experts":
            continue
        if isinstance(value, Mapping):
            branch = _on_targets(config, value, axes[name], make)
            if branch:
                results[name] = branch
        elif name in config.targets:
            results[name] = make(value, axes[name])
    return results


def join(base: Any, own: Any) -> Any:
    """Merges the frozen tree `base` and the trained tree `own`, mapping by mapping; with base {}, returns `own`."""
    if not isinstance(base, Mapping) or not isinstance(own, Mapping):
        return own
    # Leaves of `own` replace those of `base`, which has none where `own` has adapters.
    merged = dict(base)
    for name, value in own.items():
        merged[name] = join(base[name], value) if name in base else value
    return merged


def add(weights: Any, adapters: Any, scale: Any) -> Any:
    """Weights with the products of their adapters added, for one layer or for stacked layers.

    weights: a tree of arrays; adapters: the part of the tree that has {"a", "b"} instead of arrays, or None.
    """
    if not isinstance(adapters, Mapping):
        return weights
    if "a" not in adapters:
        return {name: add(value, adapters.get(name), scale) for name, value in weights.items()}
    a, b = adapters["a"], adapters["b"]
    rank = a.shape[-1]
    # a [*stack, *in, rank] and b [*stack, rank, *out] become matrices; `stack` is one dimension if layers are stacked.
    stack = a.shape[: a.ndim + b.ndim - weights.ndim - 2]
    product = jnp.matmul(a.reshape(*stack, -1, rank), b.reshape(*stack, rank, -1))
    return weights + scale * product.reshape(weights.shape)


def merge(params: Any) -> Any:
    """Plain parameters, with the adapters added into the matrices; without adapters, `params` themselves."""
    if "trunk" in params:
        return {**params, "trunk": merge(params["trunk"])}
    if "lora" not in params:
        return params
    # The result has the structure of a model that never had adapters.
    plain = {name: value for name, value in params.items() if name != "lora"}
    adapters = params["lora"]
    for name in _STACKS:
        if name in plain:
            plain[name] = add(plain[name], adapters[name], adapters["scale"])
    return plain
