"""Low-rank adapters (Hu et al. 2022, section 4.1): W + alpha / rank * a @ b, where a and b are trained and W is not.

What is trained and what is frozen are two trees; `join` makes one of them, which `transformer.apply` takes as it is:
the product is added layer by layer inside the scan, so that no second copy of the weights exists.

    frozen   {"embed", "layers", "norm", "lora": {"scale"}}
    trained  {"lora": {"layers": {"attention": {"q": {"a" [L, in, rank], "b" [L, rank, out]}, ...}}}}
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config.ranges import NonNegativeInt, PositiveFloat

# The leading dimensions that are summed over in each matrix that can have an adapter; the rest are its output.
_INPUTS = {
    "q": 1,
    "k": 1,
    "v": 1,
    "out": 2,
    "gate": 1,
    "up": 1,
    "down": 1,
    "q_a": 1,
    "q_b": 1,
    "kv_a": 1,
    "kv_b": 1,
}
_STACKS = ("dense_layers", "layers")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Adapters in place of full fine-tuning."""

    rank: NonNegativeInt = 0
    """Rank of an adapter; 0 trains all parameters."""
    alpha: PositiveFloat = 16.0
    """The adapter's product is scaled by alpha / rank."""
    targets: tuple[str, ...] = tuple(_INPUTS)
    """Matrices that have an adapter; by default every one in attention and MLP; routed experts have none."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.targets if name not in _INPUTS]:
            raise ValueError(f"targets: {unknown[0]!r} has no adapter; known: {', '.join(_INPUTS)}")
        if not self.targets:
            raise ValueError("targets: name at least one matrix, or set rank to 0")


def trained(config: LoRAConfig, shapes: Any, axes: Any) -> tuple[Any, Any]:
    """(shapes, logical axes) of the trainable subtree: adapters, plus the scalar head if there is one."""
    if not config.rank:
        return shapes, axes
    if "trunk" in shapes:
        inner = trained(config, shapes["trunk"], axes["trunk"])
        return {**shapes, "trunk": inner[0]}, {**axes, "trunk": inner[1]}
    adapters = jax.eval_shape(lambda: init(config, shapes, jax.random.key(0)))
    return adapters, {
        "lora": {s: _on_targets(config, axes[s], _adapter_axes) for s in _STACKS if s in axes}
    }


def frozen(config: LoRAConfig, params: Any) -> Any:
    """What is frozen of these parameters; {} without adapters."""
    if not config.rank:
        return {}
    if "trunk" in params:
        return {"trunk": frozen(config, params["trunk"])}
    return {**params, "lora": {"scale": jnp.float32(config.alpha / config.rank)}}


def place_frozen(config: LoRAConfig, placed: Any, everywhere: Any) -> Any:
    """Frozen subtree of `placed`, with shardings; everywhere: the sharding of scales."""
    of = {path: leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(placed)}
    place = lambda path, x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=of.get(path, everywhere)
    )
    return jax.tree_util.tree_map_with_path(
        place, jax.eval_shape(lambda p: frozen(config, p), placed)
    )


def init(config: LoRAConfig, params: Any, key: jax.Array) -> Any:
    """What is trained of these parameters: themselves without adapters, else fresh ones.

    a is drawn from N(0, 1 / inputs) and b is zero, so that nothing changes at first.
    """
    if not config.rank:
        return params
    if "trunk" in params:
        return {**params, "trunk": init(config, params["trunk"], key)}
    keys = iter(jax.random.split(key, 64))

    def adapter(name: str, weight: Any) -> dict[str, jax.Array]:
        cut = 1 + _INPUTS[name]
        depth, inputs, outputs = weight.shape[0], weight.shape[1:cut], weight.shape[cut:]
        a = jax.random.normal(next(keys), (depth, *inputs, config.rank), jnp.float32) / math.sqrt(
            math.prod(inputs)
        )
        return {"a": a, "b": jnp.zeros((depth, config.rank, *outputs), jnp.float32)}

    return {"lora": {s: _on_targets(config, params[s], adapter) for s in _STACKS if s in params}}


def _adapter_axes(name: str, names: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
    """The rank is whole on every device."""
    cut = 1 + _INPUTS[name]
    return {"a": (*names[:cut], None), "b": (names[0], None, *names[cut:])}


def _on_targets(
    config: LoRAConfig, tree: Mapping[str, Any], make: Callable[[str, Any], Any]
) -> dict[str, Any]:
    made = {}
    for name, value in tree.items():
        if name == "experts":
            continue
        if isinstance(value, Mapping):
            made[name] = _on_targets(config, value, make)
        elif name in config.targets:
            made[name] = make(name, value)
    return {name: value for name, value in made.items() if value}


def join(base: Any, own: Any) -> Any:
    """One tree of the frozen and the trained one: mappings merge key by key; base {} leaves the other as it is."""
    if not isinstance(base, Mapping) or not isinstance(own, Mapping):
        return own
    return {
        **base,
        **{key: join(base[key], value) if key in base else value for key, value in own.items()},
    }


def add(weights: Any, adapters: Any, scale: Any) -> Any:
    """Weights of a layer, or of stacked layers, with their adapters' products added; no adapters: as they are."""
    if not isinstance(adapters, Mapping):
        return weights
    if "a" in adapters:
        a, b = adapters["a"], adapters["b"]
        lead = a.ndim + b.ndim - weights.ndim - 2  # 1 where layers are stacked, else 0
        left, right = (
            a.reshape(*a.shape[:lead], -1, a.shape[-1]),
            b.reshape(*b.shape[:lead], a.shape[-1], -1),
        )
        return weights + scale * jnp.matmul(left, right).reshape(weights.shape)
    return {name: add(value, adapters.get(name), scale) for name, value in weights.items()}


def merge(params: Any) -> Any:
    """Plain parameters: adapters added into the matrices. What has none is returned as it is."""
    if "trunk" in params:
        return {**params, "trunk": merge(params["trunk"])}
    if "lora" not in params:
        return params
    plain = {name: value for name, value in params.items() if name != "lora"}
    adapters = params["lora"]
    return {
        **plain,
        **{s: add(params[s], adapters[s], adapters["scale"]) for s in _STACKS if s in params},
    }
