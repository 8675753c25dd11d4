"""Moves arrays between meshes, and from devices to the host."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh


def fetch(tree: Any) -> Any:
    """A tree of global arrays as whole NumPy arrays, on every process; all processes must call it together."""

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)


def reshard_across_meshes(tree: Any, mesh: Mesh, shardings: Any) -> Any:
    """Reshard arrays onto a mesh that may order the same devices differently.

    JAX accepts another order of devices only under the mesh that the arrays go to.
    """
    with jax.set_mesh(mesh):
        return jax.device_put(tree, shardings)
