"""Mesh axes, the mesh, and the one table that says where every array dimension goes.

Arrays name *logical* axes where they are made ("embed", "heads", "batch"); PARAM_RULES and ACT_RULES map them
to mesh axes. There is no catch-all: an unknown name raises, since a typo would otherwise replicate silently.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.config import InputError, require

MESH_AXES = ("data", "fsdp", "context", "expert", "tensor")  # slowest network first

Rules = Mapping[str, str | tuple[str, ...] | None]

_BOTH: Rules = {"heads": "tensor", "kv_heads": "tensor", "head_dim": None, "mlp": "tensor", "vocab": "tensor"}
PARAM_RULES: Rules = {
    **_BOTH,
    "layers": None,
    "embed": "fsdp",
    # The embedding table is split by rows only: split over its embed dimension, XLA's gather falls back to
    # "involuntary full rematerialization" of the whole table.
    "vocab_rows": ("fsdp", "tensor"),
    "positions": ("fsdp", "tensor"),  # rows, for the same reason
    "norm": None,
    "experts": "expert",
    "router": None,
    "latent": None,
}
ACT_RULES: Rules = {**_BOTH, "batch": ("data", "fsdp", "expert"), "seq": "context", "embed": None, "cache": None}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices. One of them may be -1: what is left."""

    data: int = -1
    """Replicas of the parameters, each with its share of the batch."""
    fsdp: int = 1
    """Shards of parameters and optimiser state, each with its share of the batch (ZeRO-3)."""
    context: int = 1
    """Shards of the sequence dimension."""
    expert: int = 1
    """Shards of the experts, each with its share of the batch."""
    tensor: int = 1
    """Shards of heads, MLP and vocabulary."""

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size >= 1 or size == -1, f"{name}: must be positive, or -1 for the devices that are left")
        require(list(sizes.values()).count(-1) <= 1, "data: only one axis can be -1")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices, with Auto axes. Raises InputError where the sizes do not fit their number."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    given = math.prod(size for size in sizes if size != -1)
    if len(devices) % given or (-1 not in sizes and given != len(devices)):
        shape = ", ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if size != 1)
        raise InputError(
            f"mesh: {shape} does not divide the {len(devices)} devices; "
            "set one axis to -1 or make the product equal to the number of devices"
        )
    sizes = [len(devices) // given if size == -1 else size for size in sizes]
    return jax.make_mesh(tuple(sizes), MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes (None: never sharded).

    Raises KeyError on an unknown name and ValueError where two dimensions would share a mesh axis.
    """
    mapped = [None if axis is None else rules[axis] for axis in axes]
    used = [name for part in mapped if part for name in ((part,) if isinstance(part, str) else part)]
    if len(set(used)) != len(used):
        raise ValueError(f"axes {tuple(axes)} use a mesh axis twice: {used}")
    return PartitionSpec(*mapped)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to its place on the current mesh (`jax.set_mesh`); without one, return it as it is."""
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names for an array of {x.ndim} dimensions")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    where = spec(axes, ACT_RULES)
    if own := {*mesh.manual_axes}:  # in `tokenwise`: along these a device has its own part already
        where = PartitionSpec(*(tuple(a for a in _names(part) if a not in own) or None for part in where))
    return jax.lax.with_sharding_constraint(x, where)


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


def tokenwise(function: Callable[..., Any], shared: Any, *arrays: jax.Array, dtype: Any, parts: int = 1) -> Any:
    """function(shared, *arrays) of arrays [B, T, ...], which looks at each token alone; returns arrays [B, T, ...].

    Each device goes through its own tokens, in so many parts that are recomputed in the backward pass, so that what the
    function makes of one part only is in memory. The shared weights, float32, are gathered once in `dtype`, and their
    gradient, summed in float32 over the parts, is reduced once: left to XLA, either happens for every part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else {axis: mesh.shape[axis] for axis in mesh.axis_names if axis not in mesh.manual_axes}
    place = spec(("batch", "seq"), ACT_RULES)
    own = tuple(tuple(axis for axis in _names(part) if sizes.get(axis, 1) > 1) for part in place)
    counts = [math.prod(sizes[axis] for axis in axes) for axes in own]
    run = lambda shared, *arrays: _in_parts(function, parts, jax.tree.map(_wide, shared), arrays)
    if math.prod(counts) == 1 or arrays[0].shape[0] % counts[0] or arrays[0].shape[1] % counts[1]:
        return run(shared, *arrays)
    if platform() != "cpu":  # there XLA dies of a bfloat16 sum over devices
        shared = jax.tree.map(lambda w: w.astype(dtype), shared)
    tokens, axes = PartitionSpec(*own), {*own[0], *own[1]}
    specs = (PartitionSpec(), *(tokens for _ in arrays))
    return jax.shard_map(run, in_specs=specs, out_specs=tokens, axis_names=axes, check_vma=False)(shared, *arrays)


def _wide(weights: jax.Array) -> jax.Array:
    return weights.astype(jnp.float32)


def _in_parts(function: Callable[..., Any], parts: int, shared: Any, arrays: Sequence[jax.Array]) -> Any:
    """Rows are parted first. Within a row part i takes tokens i, i + strides, ...: that keeps each on its device."""
    B, T = arrays[0].shape[:2]
    if parts == 1:
        return function(shared, *arrays)
    by_rows = math.gcd(parts, B)
    strides = min(parts // by_rows, T)
    size = -(-T // strides)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, strides * size - T), *((0, 0) for _ in x.shape[2:])))
        x = x.reshape(by_rows, B // by_rows, size, strides, *x.shape[2:])
        return jnp.moveaxis(x, 3, 1).reshape(by_rows * strides, B // by_rows, size, *x.shape[4:])

    def join(y: jax.Array) -> jax.Array:
        y = y.reshape(by_rows, strides, *y.shape[1:])
        return jnp.moveaxis(y, 1, 3).reshape(B, strides * size, *y.shape[4:])[:, :T]

    one = jax.checkpoint(function, prevent_cse=False)
    _, made = jax.lax.scan(lambda _, part: (None, one(shared, *part)), None, tuple(map(split, arrays)))
    return jax.tree.map(join, made)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the current mesh (`jax.set_mesh`), which may be one that is only compiled for."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def memories() -> int:
    """How many devices of the current mesh have a memory of their own: virtual CPU devices share one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or platform() == "cpu" else mesh.size


def activation(mesh: Mesh, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(axes, ACT_RULES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def fetch(tree: Any) -> Any:
    """A tree of global arrays as whole NumPy arrays, on every process; all processes must call it together."""

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; all processes must call it together."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def meet(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


# The config field that sets the size of a logical axis, for error messages.
_FIELDS = {
    "embed": "model.embed_dim",
    "heads": "model.num_heads",
    "kv_heads": "model.num_kv_heads",
    "mlp": "model.mlp_dim",
    "experts": "model.moe.num_experts",
    "positions": "model.max_length",
    "vocab": "model.vocab_size",
    "vocab_rows": "model.vocab_size",
}


def param_shardings(mesh: Mesh, params: Any, axes: Any) -> Any:
    """NamedShardings for a tree of (abstract) parameters whose logical axes are in the like tree `axes`.

    Raises InputError naming the parameter and the config field where a size does not divide.
    """

    def one(path, leaf, names: tuple[str | None, ...]) -> NamedSharding:
        where = spec(names, PARAM_RULES)
        for size, name, part in zip(leaf.shape, names, where, strict=True):
            shards = math.prod(mesh.shape[a] for a in ((part,) if isinstance(part, str) else part or ()))
            if size % shards:
                raise InputError(
                    f"{_FIELDS.get(name or '', name)}: {size} does not divide over {shards} shards "
                    f"(mesh {part}) in parameter {jax.tree_util.keystr(path)}; change the size or the mesh"
                )
        return NamedSharding(mesh, where)

    return jax.tree_util.tree_map_with_path(one, params, axes)


def check_batch(mesh: Mesh, size: int, field: str) -> None:
    """Raise InputError where `size` rows do not divide over the devices that share the batch."""
    if size % (shards := batch_shards(mesh)):
        raise InputError(
            f"{field}: {size} does not divide over the {shards} shards of the batch (data x fsdp x expert)"
        )


def batch_shards(mesh: Mesh) -> int:
    """Devices that each have their own rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in ACT_RULES["batch"] or ())


def bytes_table(tree: Any, top: int = 12) -> list[tuple[str, str, int, int]]:
    """(path, spec, bytes in all, bytes on one device) of the largest leaves of a tree of sharded arrays."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        shard = leaf.sharding.shard_shape(leaf.shape)
        size = np.dtype(leaf.dtype).itemsize
        name, where = jax.tree_util.keystr(path), str(getattr(leaf.sharding, "spec", ""))
        rows.append((name, where, size * math.prod(leaf.shape), size * math.prod(shard)))
    return sorted(rows, key=lambda row: -row[2])[:top]
