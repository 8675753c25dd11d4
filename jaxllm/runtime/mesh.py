"""The mesh of a run: the sizes of its axes, and an order of the devices that suits the network."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxllm.config import InputError
from jaxllm.runtime.config import MeshConfig
from jaxllm.sharding import MESH_AXES

# XLA's partitioner propagates shardings between the constraints; no axis is sharded explicitly.
_AXIS_TYPES = (AxisType.Auto,) * len(MESH_AXES)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices`, by default all of them. Raises InputError if the sizes do not fit their number."""
    # In a job of several processes, jax.devices() has the devices of all of them.
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    # GPUs and CPUs have no torus to map the mesh onto.
    if devices[0].platform != "tpu":
        return jax.make_mesh(sizes, MESH_AXES, _AXIS_TYPES, devices=devices)
    return Mesh(_arrange_tpus(sizes, devices), MESH_AXES, axis_types=_AXIS_TYPES)


def _arrange_tpus(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """TPU devices in an array of these sizes, in which neighbors are near each other in the network.

    jax.make_mesh would not split a side of the torus between two axes, and does not know slices.
    """
    slices = num_slices(devices)
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    # sizes = inside * across: (8, 1, 4, ...) on 2 slices is (4, 1, 4, ...) in each, times (2, 1, 1, ...).
    slow = MESH_AXES.index(slow_axis(sizes, slices))
    across = [1] * len(sizes)
    across[slow] = slices
    inside = list(sizes)
    inside[slow] //= slices
    return mesh_utils.create_hybrid_device_mesh(
        inside, across, devices=devices, allow_split_physical_axes=True
    )


def num_slices(devices: Sequence[Any]) -> int:
    """Number of TPU slices that hold the devices; the data-center network joins slices."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def place_of(device: Any) -> int:
    """The TPU slice, or the node of GPUs, that a device is in. A slower network joins such places."""
    if device.platform == "gpu":
        return device.process_index
    return getattr(device, "slice_index", 0)


def slow_axis(sizes: Sequence[int], slices: int) -> str:
    """The mesh axis that crosses slices: data, or pipeline if data is not divisible. Raises InputError."""
    # The other axes exchange data in every layer, which is too slow between slices.
    for axis, size in zip(("data", "pipeline"), sizes, strict=False):
        if size % slices == 0:
            return axis
    raise InputError(
        f"mesh.data: {sizes[0]} is not a multiple of the {slices} slices that it crosses, nor is "
        "mesh.pipeline; make one of them a multiple"
    )


def planned_mesh(config: MeshConfig, devices: Sequence[Any] | int) -> Any:
    """`make_mesh`; for a number of devices, a mesh without devices, of which shapes and shardings can be made."""
    if not isinstance(devices, int):
        return make_mesh(config, devices)
    return AbstractMesh(mesh_sizes(config, devices), MESH_AXES, axis_types=_AXIS_TYPES)


def mesh_sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    """Sizes of the axes on `count` devices, in the order of MESH_AXES. Raises InputError if they do not fit."""
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    # With -1 on 8 devices: (-1, 1, 2, 1, 1, 2) -> (2, 1, 2, 1, 1, 2).
    fixed = math.prod(size for size in sizes if size != -1)
    if count % fixed or (-1 not in sizes and fixed != count):
        # Axes of size 1 would only make the error longer.
        named = zip(MESH_AXES, sizes, strict=True)
        shape = ", ".join(f"{axis} {size}" for axis, size in named if size != 1)
        raise InputError(
            f"mesh: {shape} does not divide the {count} devices; "
            f"set one axis to -1 or make the product equal to the number of devices ({fixed}, or with -1 any multiple of it)"
        )
    return tuple(count // fixed if size == -1 else size for size in sizes)
