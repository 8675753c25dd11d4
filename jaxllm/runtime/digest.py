"""Digests of arrays where they are: equal for equal bits, whatever the sharding, the mesh or the number of hosts."""

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.runtime.transfer import fetch

Digests = dict[str, list[int]]  # dotted path of a leaf -> two 32-bit words


def digests(tree: Any) -> Digests:
    """The digest of each leaf, as {path: [word, word]}; the same on every process."""
    found: Digests = {}
    for mesh, leaves in _by_mesh(named_leaves(tree)).items():
        shares = tuple((name, _shared(leaf)) for name, leaf in leaves.items())
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            words = _digest_all(leaves, shares)
        found |= {name: np.asarray(each).tolist() for name, each in fetch(words).items()}
    return found


def _by_mesh(leaves: Mapping[str, Any]) -> dict[Any, dict[str, Any]]:
    """Leaves can live on meshes with different device orders: group them, since one program accepts only one order."""
    found: dict[Any, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        found.setdefault(getattr(getattr(leaf, "sharding", None), "mesh", None), {})[name] = leaf
    return found


def named_leaves(tree: Any) -> dict[str, Any]:
    """{dotted path: leaf}; the path is the same for a NamedTuple and for the dict a checkpoint makes of it."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_name(path: Any) -> str:
    """A tree path as dotted text: a.b.0.c."""
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def differing(one: Mapping[str, list[int]], other: Mapping[str, list[int]]) -> list[str]:
    """The paths that are in only one of the two, or whose digests differ."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


@functools.partial(jax.jit, static_argnums=1)
def _digest_all(
    leaves: dict[str, jax.Array], shares: tuple[tuple[str, Any], ...]
) -> dict[str, jax.Array]:
    place = lambda leaf, where: jax.lax.with_sharding_constraint(leaf, where) if where else leaf
    return {name: leaf_digest(place(leaves[name], where)) for name, where in shares}


def _shared(leaf: Any) -> NamedSharding | None:
    """Sharding under which replicas each hash a part of a leaf instead of the whole: the axes it is copied over shard it."""
    if not isinstance(sharding := getattr(leaf, "sharding", None), NamedSharding):
        return None
    parts = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
    used = {axis for part in parts if part for axis in ((part,) if isinstance(part, str) else part)}
    free = tuple(
        axis
        for axis in sharding.mesh.axis_names
        if axis not in used and sharding.mesh.shape[axis] > 1
    )
    copies = math.prod(sharding.mesh.shape[axis] for axis in free)
    dims = [i for i, part in enumerate(parts) if part is None and leaf.shape[i] % copies == 0]
    if copies == 1 or not dims:
        return None
    largest = max(dims, key=lambda i: leaf.shape[i])
    return NamedSharding(
        sharding.mesh, P(*(free if i == largest else part for i, part in enumerate(parts)))
    )


def leaf_digest(x: jax.Array) -> jax.Array:
    """uint32[2]: sums modulo 2^32 of each element's bits mixed with its place in the array.

    A sum does not depend on the order, so neither do shards. The mixing (that of MurmurHash3's end) is one to one in
    the bits of an element: one changed element always changes the first sum.
    """
    words = _words(x)
    mixed = _mix(words + _places(words.shape) * jnp.uint32(0x9E3779B1))
    again = _mix(mixed ^ jnp.uint32(0x85EBCA6B))
    return jnp.stack([mixed.sum(dtype=jnp.uint32), again.sum(dtype=jnp.uint32)])


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32, of the same shape (8-byte elements: with a last dimension of 2)."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    size = min(x.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(
        x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]
    ).astype(jnp.uint32)


def _places(shape: tuple[int, ...]) -> jax.Array:
    """The number uint32 of each element in row-major order, modulo 2^32; made where it is used, so that it shards."""
    place = jnp.zeros(shape, jnp.uint32)
    for dim in range(len(shape)):
        stride = math.prod(shape[dim + 1 :]) % 2**32
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride)
    return place


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> jnp.uint32(16))


def unequal_replicas(tree: Any) -> list[str]:
    """ "device: path" of every copy of a shard that differs from most of its copies on other devices.

    Where a leaf is replicated over some axes of the mesh, the devices along them hold the same shard, and its bits
    must be equal: what differs is silent corruption. Of two copies that differ, both are named.
    """
    groups = _by_mesh(named_leaves(tree))
    return [
        text
        for mesh, leaves in groups.items()
        if mesh is not None
        for text in _unequal(leaves, mesh)
    ]


def _unequal(leaves: Mapping[str, Any], mesh: jax.sharding.Mesh) -> list[str]:
    specs = {name: leaf.sharding.spec for name, leaf in leaves.items()}
    one = lambda shards: {name: leaf_digest(shard)[None] for name, shard in shards.items()}
    own = jax.shard_map(
        one, mesh=mesh, in_specs=(specs,), out_specs=P(mesh.axis_names), check_vma=False
    )
    with jax.set_mesh(mesh):
        words = jax.jit(own)(leaves)
    words = fetch(words)  # {name: uint32[devices, 2]}, in the order of the mesh
    return [
        text for name, leaf in leaves.items() for text in _outvoted(name, leaf, words[name], mesh)
    ]


def _outvoted(name: str, leaf: jax.Array, words: np.ndarray, mesh: jax.sharding.Mesh) -> list[str]:
    where = leaf.sharding.devices_indices_map(leaf.shape)
    copies: dict[str, list[tuple[Any, tuple[int, ...]]]] = {}
    for device, own in zip(mesh.devices.flat, words.tolist(), strict=True):
        copies.setdefault(str(where[device]), []).append((device, tuple(own)))
    found = []
    for group in copies.values():
        votes = [own for _, own in group]
        most = max(votes, key=votes.count)
        trusted = votes.count(most) > len(votes) / 2
        found += [
            f"{device}: {name}"
            for device, own in group
            if len({*votes}) > 1 and not (trusted and own == most)
        ]
    return found
