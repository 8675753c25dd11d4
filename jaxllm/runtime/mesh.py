"""The mesh of a run: sizes of its axes, and devices in an order that fits the network."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxllm.config import InputError, require
from jaxllm.config.ranges import AxisSize
from jaxllm.sharding import MESH_AXES


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices. One of them may be -1: what is left."""

    data: AxisSize = -1
    """Replicas of the parameters, each with its share of the batch."""
    pipeline: AxisSize = 1
    """Stages that layers are shared out over; rows go through them in microbatches."""
    fsdp: AxisSize = 1
    """Shards of parameters and optimizer state, each with its share of the batch (ZeRO-3)."""
    context: AxisSize = 1
    """Shards of the sequence dimension."""
    expert: AxisSize = 1
    """Shards of the experts, each with its share of the batch."""
    tensor: AxisSize = 1
    """Shards of heads, MLP and vocabulary."""

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        require(sizes.count(-1) <= 1, "data: only one axis can be -1")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices, with Auto axes. Raises InputError where the sizes do not fit their number."""
    devices = jax.devices() if devices is None else devices
    sizes, types = mesh_sizes(config, len(devices)), (AxisType.Auto,) * len(MESH_AXES)
    if devices[0].platform != "tpu":
        return jax.make_mesh(sizes, MESH_AXES, types, devices=devices)
    # jax.make_mesh would not split a side of the torus between two axes, and knows no slices.
    slices = num_slices(devices)
    slow = slow_axis(sizes, slices)
    between = [slices if axis == slow else 1 for axis in MESH_AXES]
    inside = [size // times for size, times in zip(sizes, between, strict=True)]
    place = functools.partial(mesh_utils.create_hybrid_device_mesh, inside, between)
    if slices == 1:
        place = functools.partial(mesh_utils.create_device_mesh, inside)
    return Mesh(place(devices=devices, allow_split_physical_axes=True), MESH_AXES, axis_types=types)


def num_slices(devices: Sequence[Any]) -> int:
    """Slices that the devices lie in, joined by the data-centre network."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def slow_axis(sizes: Sequence[int], slices: int) -> str:
    """The mesh axis that goes over slices: data, or pipeline where data does not divide. Raises InputError."""
    found = next(
        (axis for axis, size in zip(MESH_AXES[:2], sizes[:2], strict=True) if size % slices == 0),
        None,
    )
    if found is None:
        raise InputError(
            f"mesh.data: {sizes[0]} is not a multiple of the {slices} slices it goes over, nor is pipeline"
        )
    return found


def planned_mesh(config: MeshConfig, devices: Sequence[Any] | int) -> Any:
    """`make_mesh`; of a number of devices, a mesh without devices, for shapes and shardings."""
    if not isinstance(devices, int):
        return make_mesh(config, devices)
    return AbstractMesh(
        mesh_sizes(config, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def mesh_sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    """Sizes of the axes over so many devices. Raises InputError where they do not fit."""
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    given = math.prod(size for size in sizes if size != -1)
    if count % given or (-1 not in sizes and given != count):
        shape = ", ".join(
            f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if size != 1
        )
        raise InputError(
            f"mesh: {shape} does not divide the {count} devices; "
            "set one axis to -1 or make the product equal to the number of devices"
        )
    return tuple(count // given if size == -1 else size for size in sizes)
