"""Mesh axes, the mesh, and the one table that says where every array dimension goes.

Arrays name *logical* axes where they are made ("embed", "heads", "batch"); PARAM_RULES and ACT_RULES map them
to mesh axes. There is no catch-all: an unknown name raises, since a typo would otherwise replicate silently.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxllm.config import InputError

MESH_AXES = ("data", "pipeline", "fsdp", "context", "expert", "tensor")  # slowest network first

Rules = Mapping[str, str | tuple[str, ...] | None]

_BOTH: Rules = {
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
}
PARAM_RULES: Rules = {
    **_BOTH,
    "layers": "pipeline",
    "modules": None,
    "embed": ("fsdp", "expert"),
    "expert_embed": "fsdp",  # of a routed expert's matrices, which lie on its shard
    "positions": "tensor",
    "columns": "tensor",  # of tables that tokens are looked up in while decoding
    "norm": None,
    "experts": "expert",
    "router": None,
    "latent": None,
    "rank": ("fsdp", "expert"),  # latents that queries, keys and values are made from
}
ACT_RULES: Rules = {
    **_BOTH,
    "batch": ("data", "fsdp", "expert"),
    "stages": "pipeline",
    "scored": (
        "data",
        "pipeline",
        "fsdp",
        "expert",
    ),  # batch, also split over pipeline stages: every stage would otherwise compute the same loss
    "seq": "context",
    "residual": (
        "context",
        "tensor",
    ),  # positions between blocks (Korthikanti et al. 2022, section 4.2.2)
    "embed": None,
    "cache": None,
}


def spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes (None: never sharded).

    Raises KeyError on an unknown name and ValueError where two dimensions would share a mesh axis.
    """
    mapped = [None if axis is None else rules[axis] for axis in axes]
    used = [
        name for part in mapped if part for name in ((part,) if isinstance(part, str) else part)
    ]
    if len(set(used)) != len(used):
        raise ValueError(f"axes {tuple(axes)} use a mesh axis twice: {used}")
    return PartitionSpec(*mapped)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to its place on the current mesh (`jax.set_mesh`); without one, return it as it is."""
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names for an array of {x.ndim} dimensions")
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, ACT_RULES))


def zigzag_order(length: int) -> np.ndarray | None:
    """Zigzag permutation of a row's positions for context parallelism, int[T]; None where `context` does not shard them.

    Of n shards each holds the chunks i and 2n - 1 - i of 2n, so that all have as many earlier keys to attend to (Brandon
    et al. 2023, "Striped Attention", has the same aim; this cut is Llama 3's, Grattafiori et al. 2024, section 3.3.2).
    """
    shards = mesh_size("context")
    if shards == 1 or length % (2 * shards):
        return None
    chunks = np.arange(length, dtype=np.int32).reshape(2, shards, -1)
    return np.stack([chunks[0], chunks[1, ::-1]], 1).reshape(-1)


def undo_zigzag(x: jax.Array) -> jax.Array:
    """[B, T, ...] in `balanced_order` -> as they are."""
    (B, T), shards = x.shape[:2], mesh_size("context")
    pairs = x.reshape(B, shards, 2, T // (2 * shards), *x.shape[2:])
    return jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], 1).reshape(x.shape)


def constrain_residual(x: jax.Array) -> jax.Array:
    """[B, T, D] between blocks: its positions are shared out over `tensor` too, where their number allows."""
    split = x.shape[1] % shards("residual") == 0
    return constrain(x, "batch", "residual" if split else "seq", "embed")


def constrain_scored(x: jax.Array) -> jax.Array:
    """[B, T, D] that goes to the vocabulary: shared out over the stages too, where the number of rows allows."""
    uneven = x.shape[0] % shards("scored")
    return constrain(x, "batch" if uneven else "scored", "seq", "embed")


def constrain_weights(x: jax.Array, *axes: str | None) -> jax.Array:
    """The same for weights, by PARAM_RULES; None where they are to be whole."""
    return (
        x
        if jax.sharding.get_abstract_mesh().empty
        else jax.lax.with_sharding_constraint(x, spec(axes, PARAM_RULES))
    )


def in_blocks(weights: jax.Array, dim: int, count: int) -> jax.Array:
    """Cut a dimension that goes over `tensor` into so many blocks: [..., N, ...] -> [count, ..., N / count, ...].

    A block has its share of what each device holds, so that nothing moves.
    """
    shape = weights.shape
    cut = weights.reshape(*shape[:dim], mesh_size("tensor"), count, -1, *shape[dim + 1 :])
    return jnp.moveaxis(cut, dim + 1, 0).reshape(count, *shape[:dim], -1, *shape[dim + 1 :])


def shards(axis: str) -> int:
    """Devices of the current mesh that a logical axis of activations is shared out over."""
    names = ACT_RULES[axis] or ()
    return math.prod(map(mesh_size, (names,) if isinstance(names, str) else names))


def mesh_size(axis: str) -> int:
    """Size of an axis of the current mesh; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[axis]


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


# The config field that sets the size of a logical axis, for error messages.
_FIELDS = {
    "layers": "model.num_layers (with moe.first_dense: both stacks)",
    "embed": "model.embed_dim",
    "expert_embed": "model.embed_dim",
    "rank": "model.mla.kv_rank, model.mla.q_rank",
    "heads": "model.num_heads",
    "kv_heads": "model.num_kv_heads",
    "mlp": "model.mlp_dim",
    "experts": "model.moe.num_experts",
    "positions": "model.max_length",
    "vocab": "model.vocab_size",
}


def param_shardings(mesh: Mesh, params: Any, axes: Any) -> Any:
    """NamedShardings for a tree of (abstract) parameters whose logical axes are in the like tree `axes`.

    Raises InputError naming the parameter and the config field where a size does not divide.
    """

    def one(path, leaf, names: tuple[str | None, ...]) -> NamedSharding:
        where = spec(names, PARAM_RULES)
        for size, name, part in zip(leaf.shape, names, where, strict=True):
            shards = math.prod(
                mesh.shape[a] for a in ((part,) if isinstance(part, str) else part or ())
            )
            if size % shards:
                raise InputError(
                    f"{_FIELDS.get(name or '', name)}: {size} does not divide over {shards} shards "
                    f"(mesh {part}) in parameter {jax.tree_util.keystr(path)}; change the size or the mesh"
                )
        return NamedSharding(mesh, where)

    return jax.tree_util.tree_map_with_path(one, params, axes)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that carry their shardings, as checkpoints are restored through."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def place_params(mesh: Mesh, shapes: Any, axes: Any) -> Any:
    """Shapes of parameters with their shardings, by their logical axes."""
    return with_shardings(shapes, param_shardings(mesh, shapes, axes))


def rows_like(mesh: Mesh, shapes: Any) -> Any:
    """Shapes of batches of rows, shared out over the devices that share the batch."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=activation(mesh, "batch")), shapes
    )


def check_batch(mesh: Mesh, size: int, field: str) -> None:
    """Raise InputError where `size` rows do not divide over the devices that share the batch."""
    if size % (shards := batch_shards(mesh)):
        raise InputError(
            f"{field}: {size} does not divide over the {shards} shards of the batch (data x fsdp x expert)"
        )


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Devices that each have their own rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in ACT_RULES["batch"] or ())
