"""Digests of arrays, computed on the devices: equal for equal bits, for any sharding, mesh and number of hosts.

A checkpoint stores the digests of the state it was saved from. A run can also compare the digests of replicas, which
must be equal: a difference is silent data corruption.
"""

import contextlib
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.runtime.transfer import fetch
from jaxllm.sharding import mesh_axes

# Dotted path of a leaf -> two 32-bit words.
Digests = dict[str, list[int]]

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def digests(tree: Any) -> Digests:
    """The digest of each leaf as {path: [word, word]}; all processes call it together and get the same."""
    found: Digests = {}
    for mesh, leaves in _by_mesh(named_leaves(tree)).items():
        shardings = tuple((name, _spread(leaf)) for name, leaf in leaves.items())
        # Leaves that are on a single device or on the host have no mesh.
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            words = _digest_all(leaves, shardings)
        for name, pair in fetch(words).items():
            found[name] = np.asarray(pair).tolist()
    return found


def _by_mesh(leaves: Mapping[str, Any]) -> dict[Any, dict[str, Any]]:
    """Leaves can live on meshes with different device orders: group them, since one program accepts only one order."""
    groups: dict[Any, dict[str, Any]] = defaultdict(dict)
    for name, leaf in leaves.items():
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
        groups[mesh][name] = leaf
    return groups


def named_leaves(tree: Any) -> dict[str, Any]:
    """{dotted path: leaf}; the path is the same for a NamedTuple and for the dict a checkpoint makes of it."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_name(path: Any) -> str:
    """A tree path as dotted text: a.b.0.c."""
    return ".".join(_key_name(key) for key in path)


def _key_name(key: Any) -> str:
    """Of a dict's key, a NamedTuple's field or an index, which JAX stores under different attributes."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def differing(first: Mapping[str, list[int]], second: Mapping[str, list[int]]) -> list[str]:
    """The paths that only one of the two has, or whose digests differ."""
    names = {*first, *second}
    return sorted(name for name in names if first.get(name) != second.get(name))


@functools.partial(jax.jit, static_argnums=1)
def _digest_all(
    leaves: dict[str, jax.Array], shardings: tuple[tuple[str, NamedSharding | None], ...]
) -> dict[str, jax.Array]:
    """uint32[2] for each leaf, computed under the given shardings."""
    words = {}
    for name, sharding in shardings:
        leaf = leaves[name]
        if sharding:
            leaf = jax.lax.with_sharding_constraint(leaf, sharding)
        words[name] = leaf_digest(leaf)
    return words


def _spread(leaf: Any) -> NamedSharding | None:
    """Sharding under which replicas each hash a part of a leaf instead of the whole; None if there is none.

    The mesh axes over which the leaf is replicated shard its largest dimension that is not sharded yet. On a mesh of
    data 2 and fsdp 4, a leaf [16, 24] with P(None, "fsdp") is hashed under P("data", "fsdp").
    """
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    mesh = sharding.mesh
    # A PartitionSpec may be shorter than the shape; the remaining dimensions are not sharded.
    entries: list[Any] = [None] * leaf.ndim
    entries[: len(sharding.spec)] = sharding.spec
    used = {axis for entry in entries for axis in mesh_axes(entry)}
    free = tuple(axis for axis in mesh.axis_names if axis not in used and mesh.shape[axis] > 1)
    replicas = math.prod(mesh.shape[axis] for axis in free)
    dims = [i for i in range(leaf.ndim) if entries[i] is None and leaf.shape[i] % replicas == 0]
    if replicas == 1 or not dims:
        return None
    entries[max(dims, key=lambda i: leaf.shape[i])] = free
    return NamedSharding(mesh, P(*entries))


def leaf_digest(x: jax.Array) -> jax.Array:
    """uint32[2]: sums modulo 2^32 of each element's bits mixed with its position in the array.

    A sum does not depend on the order of its terms, nor on how they are sharded; the position makes an exchange of two
    elements visible. The mixing (the finalizer of MurmurHash3) is a bijection of an element's 32 bits, so that a
    single changed element always changes the first sum.
    """
    words = _words(x)
    # 0x9E3779B1 is the prime near 2^32 / golden ratio: multiples of it are spread evenly over 32 bits.
    mixed = _mix(words + _positions(words.shape) * jnp.uint32(0x9E3779B1))
    mixed_again = _mix(mixed ^ jnp.uint32(0x85EBCA6B))
    return jnp.stack([mixed.sum(dtype=jnp.uint32), mixed_again.sum(dtype=jnp.uint32)])


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32, of the same shape (8-byte elements: with another dimension of 2)."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:  # which cannot be bitcast
        return x.astype(jnp.uint32)
    # A bitcast to a smaller type adds a dimension: float64[3] -> uint32[3, 2].
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[min(x.dtype.itemsize, 4)])
    return bits.astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """uint32 of this shape: the row-major index of each element, modulo 2^32.

    For [2, 3] it is [[0, 1, 2], [3, 4, 5]]. It is a sum of iotas, which XLA shards like the array they are added to.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for dim in range(len(shape)):
        # Elements 2^32 apart share a position; their exchange would go unnoticed, a changed bit would not.
        stride = math.prod(shape[dim + 1 :]) % 2**32
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride)
    return index


def _mix(h: jax.Array) -> jax.Array:
    """MurmurHash3's fmix32 (Appleby 2011)."""
    h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> jnp.uint32(16))


def unequal_replicas(tree: Any) -> list[str]:
    """ "device: path" of every copy of a shard that differs from most of its copies on other devices.

    If a leaf is replicated over some axes of the mesh, the devices along them hold the same shard, and its bits must
    be equal. If two of two copies differ, both are named. All processes call it together.
    """
    found: list[str] = []
    for mesh, leaves in _by_mesh(named_leaves(tree)).items():
        if mesh is not None:
            found += _unequal_on(mesh, leaves)
    return found


def _unequal_on(mesh: Mesh, leaves: Mapping[str, Any]) -> list[str]:
    """`unequal_replicas` of leaves on one mesh."""

    def shard_digests(shards: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        # With a leading dimension for the devices, along which shard_map concatenates.
        return {name: leaf_digest(shard)[None] for name, shard in shards.items()}

    specs = {name: leaf.sharding.spec for name, leaf in leaves.items()}
    # check_vma=False: with the check, JAX takes it for granted that replicas are equal.
    on_each_device = jax.shard_map(
        shard_digests, mesh=mesh, in_specs=(specs,), out_specs=P(mesh.axis_names), check_vma=False
    )
    with jax.set_mesh(mesh):
        words = jax.jit(on_each_device)(leaves)
    words = fetch(words)  # {name: uint32[devices, 2]}, in the order of the mesh
    found: list[str] = []
    for name, leaf in leaves.items():
        for device in _outvoted(leaf, words[name], mesh):
            found.append(f"{device}: {name}")
    return found


def _outvoted(leaf: jax.Array, words: np.ndarray, mesh: Mesh) -> list[Any]:
    """Devices whose shard differs from the majority of its copies. words: uint32[devices, 2]."""
    index_of = leaf.sharding.devices_indices_map(leaf.shape)
    # Devices that hold the same slice of the array hold copies of one shard.
    copies: dict[str, list[tuple[Any, tuple[int, ...]]]] = defaultdict(list)
    for device, pair in zip(mesh.devices.flat, words.tolist(), strict=True):
        copies[str(index_of[device])].append((device, tuple(pair)))
    found: list[Any] = []
    for copies_of_shard in copies.values():
        votes = Counter(pair for _, pair in copies_of_shard)
        winner, count = votes.most_common(1)[0]
        # Of two copies that differ, neither is trusted.
        majority = winner if 2 * count > len(copies_of_shard) else None
        if len(votes) > 1:
            found += [device for device, pair in copies_of_shard if pair != majority]
    return found
