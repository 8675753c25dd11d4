"""Moves arrays from devices to the host, and from one mesh to another."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh


def fetch(tree: Any) -> Any:
    """The leaves of a tree as complete NumPy arrays, on every process; all processes must call it together."""
    return jax.tree.map(_fetch_leaf, tree)


def _fetch_leaf(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        # Its shards are on several hosts, none of which has all of them.
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def place(tree: Any, sharding: Any) -> Any:
    """Arrays of the host, which every process has whole, on devices."""

    def place_leaf(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place_leaf, tree)


def reshard_across_meshes(tree: Any, mesh: Mesh, shardings: Any) -> Any:
    """Reshard arrays onto a mesh that may order the same devices differently."""
    # JAX accepts another order of devices only while the target mesh is the current one.
    with jax.set_mesh(mesh):
        return jax.device_put(tree, shardings)
