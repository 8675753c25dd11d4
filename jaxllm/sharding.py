"""The two rule tables that say which mesh axes shard each dimension of an array.

Code that creates an array names its dimensions by *logical* axes: a weight matrix of the MLP has the axes
("embed", "mlp"), hidden states have ("batch", "seq", "embed"). A rule table maps every logical axis to the mesh axis
or axes that split it, or to None where no axis does. With the tables below and a mesh of data 2, fsdp 4, tensor 2:

    array          logical axes               PartitionSpec                                    a device holds
    MLP weight     ("embed", "mlp")           (("fsdp", "expert"), "tensor")                   1/8
    hidden states  ("batch", "seq", "embed")  (("data", "fsdp", "expert"), "context", None)    1/8

Weights and activations have a table each because the same axis is sharded differently in them: fsdp splits the "embed"
dimension of a weight, which is gathered just before use (ZeRO-3), and never that of an activation.

There is no catch-all: an unknown name raises KeyError, because a misspelled name would replicate the array silently.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxllm.config import InputError

# From the axis with the least communication to the one with the most: the first ones may cross the slowest network.
MESH_AXES = ("data", "pipeline", "fsdp", "context", "expert", "tensor")

Rules = Mapping[str, str | tuple[str, ...] | None]

# Axes that weights and activations share.
_BOTH: Rules = {
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
}
PARAM_RULES: Rules = {
    **_BOTH,
    # Stacks of equal parts.
    "layers": "pipeline",
    "modules": None,  # of multi-token prediction
    # The model dimension is the one that ZeRO-3 splits. A device of the `expert` axis holds a share of every weight
    # but the experts', which that axis splits by expert already.
    "embed": ("fsdp", "expert"),
    "expert_embed": "fsdp",
    "rank": ("fsdp", "expert"),  # latents that queries, keys and values are projected from (MLA)
    "latent": None,
    # Embedding tables.
    "positions": "tensor",
    "columns": "tensor",  # the embed dimension of tables that decoding looks tokens up in
    # Small parameters, or such that every device of an expert group needs.
    "norm": None,
    "router": None,
    "experts": "expert",
}
ACT_RULES: Rules = {
    **_BOTH,
    # Rows. `data`, `fsdp` and `expert` all split the batch; `fsdp` and `expert` split the weights as well.
    "batch": ("data", "fsdp", "expert"),
    "stages": "pipeline",
    # Rows in the loss: pipeline stages split them too, since each would otherwise compute the same loss.
    "scored": ("data", "pipeline", "fsdp", "expert"),
    # Positions, within a block and between blocks (Korthikanti et al. 2022, section 4.2.2).
    "seq": "context",
    "residual": ("context", "tensor"),
    "embed": None,
    "cache": None,
}

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


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in an entry of a rule table or of a PartitionSpec: "a" -> ("a",), None -> ()."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes (None: a dimension that is never sharded).

    Raises:
        KeyError: a name is not in the rules.
        ValueError: two dimensions would be sharded by the same mesh axis.
    """
    entries = [None if axis is None else rules[axis] for axis in axes]
    used = [name for entry in entries for name in mesh_axes(entry)]
    if len(set(used)) != len(used):
        raise ValueError(f"axes {tuple(axes)} use a mesh axis twice: {used}")
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shard an activation by ACT_RULES on the current mesh (`jax.set_mesh`); unchanged without a mesh."""
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names for an array of {x.ndim} dimensions")
    return _constrain(x, axes, ACT_RULES)


def constrain_weights(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shard weights by PARAM_RULES on the current mesh; axes that are None are gathered."""
    return _constrain(x, axes, PARAM_RULES)


def _constrain(x: jax.Array, axes: Sequence[str | None], rules: Rules) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, rules))


def constrain_residual(x: jax.Array) -> jax.Array:
    """Shard the residual stream [B, T, D]; `tensor` splits its positions too if their number is divisible."""
    divisible = x.shape[1] % shards("residual") == 0
    return constrain(x, "batch", "residual" if divisible else "seq", "embed")


def constrain_scored(x: jax.Array) -> jax.Array:
    """Shard the input [B, T, D] of the output layer; `pipeline` splits its rows too if their number is divisible."""
    return constrain(x, scored_rows(x.shape[0]), "seq", "embed")


def scored_rows(num_rows: int) -> str:
    """The logical axis of so many rows in the output layer."""
    return "scored" if num_rows % shards("scored") == 0 else "batch"


def on_each_device(
    function: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """A function that is called with each device's part of its arguments; itself where there is one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def zigzag_order(length: int) -> np.ndarray | None:
    """Zigzag permutation of a row's positions for context parallelism, int32[T]; None if `context` does not shard them.

    The row is cut into 2n chunks for n devices; device i holds the chunks i and 2n - 1 - i. Causal attention is then
    balanced: every device attends to the same number of keys. Eight positions on two devices:

                            device 0     device 1     keys attended to
        in row order        0 1 2 3      4 5 6 7      1+2+3+4 = 10, 5+6+7+8 = 26
        in zigzag order     0 1 6 7      2 3 4 5      1+2+7+8 = 18, 3+4+5+6 = 18

    This cut is that of Llama 3 (Grattafiori et al. 2024, section 3.3.2); Striped Attention (Brandon et al. 2023)
    has the same aim.
    """
    num_shards = mesh_size("context")
    if num_shards == 1 or length % (2 * num_shards):
        return None
    # [half of the row, chunk, position in it]; the later half is paired in reverse with the earlier one.
    chunks = np.arange(length, dtype=np.int32).reshape(2, num_shards, -1)
    return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)


def undo_zigzag(x: jax.Array) -> jax.Array:
    """[B, T, ...] whose positions are in `zigzag_order` -> [B, T, ...] in row order."""
    batch, length = x.shape[:2]
    num_shards = mesh_size("context")
    # [B, device, its early and its late chunk, position in the chunk, ...]
    chunks = x.reshape(batch, num_shards, 2, length // (2 * num_shards), *x.shape[2:])
    return jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1).reshape(x.shape)


def in_blocks(weights: jax.Array, dim: int, count: int) -> jax.Array:
    """Cut dimension `dim`, which `tensor` shards, into `count` blocks: [..., N, ...] -> [count, ..., N / count, ...].

    Each block takes an equal share of what every device holds, so that no data moves. Eight columns on two devices
    in two blocks:

        device 0: 0 1 2 3, device 1: 4 5 6 7   ->   block 0: 0 1 4 5, block 1: 2 3 6 7
    """
    before = weights.shape[:dim]
    after = weights.shape[dim + 1 :]
    # [..., device, block, position in the block, ...]
    cut = weights.reshape(*before, mesh_size("tensor"), count, -1, *after)
    return jnp.moveaxis(cut, dim + 1, 0).reshape(count, *before, -1, *after)


def shards(axis: str) -> int:
    """Number of shards that the current mesh splits a logical axis of activations into."""
    return math.prod(mesh_size(name) for name in mesh_axes(ACT_RULES[axis]))


def mesh_size(axis: str) -> int:
    """Size of an axis of the current mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[axis]


def on_one_cpu() -> bool:
    """Whether the current mesh is one CPU device (of this process, or one that is only compiled for)."""
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and (mesh.empty or mesh.size == 1)


def platform() -> str:
    """Platform of the current mesh ("cpu", "gpu" or "tpu"), which may be a mesh that is only compiled for."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def memories() -> int:
    """Number of separate device memories in the current mesh; virtual CPU devices share one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or platform() == "cpu" else mesh.size


def activation(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding by ACT_RULES of an array with these logical axes."""
    return NamedSharding(mesh, spec(axes, ACT_RULES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding under which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: Mesh, params: Any, axes: Any) -> Any:
    """NamedShardings for a tree of (abstract) parameters.

    Args:
        mesh: the mesh, with or without devices.
        params: a tree of arrays or ShapeDtypeStructs.
        axes: a tree of the same structure with a tuple of logical axes for each leaf.

    Raises:
        InputError: a size is not divisible; the error names the parameter and the config field.
    """

    def leaf_sharding(path: Any, leaf: Any, names: tuple[str | None, ...]) -> NamedSharding:
        entries = spec(names, PARAM_RULES)
        for size, name, entry in zip(leaf.shape, names, entries, strict=True):
            num_shards = math.prod(mesh.shape[axis] for axis in mesh_axes(entry))
            if size % num_shards:
                field = _FIELDS.get(name or "", name)
                raise InputError(
                    f"{field}: {size} does not divide over {num_shards} shards (mesh {entry}) in "
                    f"parameter {jax.tree_util.keystr(path)}; change the size or the mesh"
                )
        return NamedSharding(mesh, entries)

    return jax.tree_util.tree_map_with_path(leaf_sharding, params, axes)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that carry their shardings: what a checkpoint is restored to."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def place_params(mesh: Mesh, shapes: Any, axes: Any) -> Any:
    """`with_shardings` of parameters, by their logical axes (see `param_shardings`)."""
    return with_shardings(shapes, param_shardings(mesh, shapes, axes))


def rows_like(mesh: Mesh, shapes: Any) -> Any:
    """ShapeDtypeStructs of a batch [B, ...] whose rows are sharded."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=activation(mesh, "batch")), shapes
    )


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of shards of a batch's rows."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(ACT_RULES["batch"]))


def check_batch(mesh: Mesh, size: int, field: str) -> None:
    """Raise InputError, naming `field`, if a batch of `size` rows cannot be sharded evenly."""
    num_shards = batch_shards(mesh)
    if size % num_shards:
        raise InputError(
            f"{field}: {size} does not divide over the {num_shards} shards of the batch "
            "(data x fsdp x expert); make it a multiple, or change the mesh"
        )
