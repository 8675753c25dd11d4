"""NVIDIA GPUs that are not there, described so that XLA compiles for them.

XLA asks a GPU for its properties before it compiles; without one it reads them from a text (the protocol buffer
GpuTargetConfigProto). The plugin and cuDNN come with the extra `plan-gpu`. What needs a device is left out: tiles of
matrix products are not tuned, so their speed is not that of a real run.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from jaxllm.config import InputError
from jaxllm.models.attention_gpu import asked_about

PLUGIN = "jax_cuda13_plugin"
# GPUs that NVLink joins in one machine, of every kind described here.
PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class GPU:
    """What the compiler wants to know, from NVIDIA's data sheets and the CUDA programming guide, read 2026-11."""

    name: str
    """As the driver reports it."""
    capability: tuple[int, int]
    """CUDA compute capability."""
    cores: int
    """Streaming multiprocessors."""
    fpus: int
    """float32 units of a multiprocessor."""
    shared: int
    """Shared memory of a multiprocessor, bytes; a block of threads may use 1,024 bytes less."""
    l2: int
    """Level-2 cache, bytes."""
    clock: float
    """GHz, boosted."""
    memory: int
    """Bytes."""
    bandwidth: int
    """Of the memory, bytes per second."""


_KIB, _MIB = 2**10, 2**20
_H100 = GPU(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    cores=132,
    fpus=128,
    shared=228 * _KIB,
    l2=50 * _MIB,
    clock=1.98,
    memory=81_559 * _MIB,
    bandwidth=3_350_000_000_000,
)
GPUS = {
    "a100": GPU(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        fpus=64,
        shared=164 * _KIB,
        l2=40 * _MIB,
        clock=1.41,
        memory=81_920 * _MIB,
        bandwidth=2_039_000_000_000,
    ),
    "h100": _H100,
    "h200": dataclasses.replace(
        _H100, name="NVIDIA H200", memory=143_771 * _MIB, bandwidth=4_800_000_000_000
    ),
    "b200": GPU(
        name="NVIDIA B200",
        capability=(10, 0),
        cores=148,
        fpus=128,
        shared=228 * _KIB,
        l2=126 * _MIB,
        clock=1.965,
        memory=183_359 * _MIB,
        bandwidth=8_000_000_000_000,
    ),
}


def installed() -> bool:
    """Whether XLA's compiler for NVIDIA GPUs is there."""
    return importlib.util.find_spec(PLUGIN) is not None


def nodes(shape: Sequence[int], topology: str) -> tuple[int, int]:
    """(nodes, GPUs of each) of a shape: a number of GPUs, in nodes of eight, or nodes x GPUs. Raises InputError.

    topology: as it was asked for, for the error.
    """
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) > 2:
        raise InputError(f"--topology {topology}: GPUs have a number or NODESxGPUS, as h100:4x8")
    count = shape[0]
    if count <= PER_NODE:
        return 1, count
    if count % PER_NODE:
        raise InputError(
            f"--topology {topology}: {count} GPUs are not whole nodes of {PER_NODE}; give NODESxGPUS, as h100:3x4"
        )
    return count // PER_NODE, PER_NODE


def devices(kind: str, nodes: int, per_node: int) -> list[Any]:
    """GPUs to compile for, node by node; `process_index` is the node."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=description(GPUS[kind]),
        topology=f"1x{nodes}x{per_node}",  # partitions x nodes x GPUs
    )
    return list(topology.devices)


@contextlib.contextmanager
def as_if_present(device: Any) -> Iterator[None]:
    """Within, attention's kernels are chosen for this GPU, which need not be present; any other device: as ever."""
    if device.platform != "gpu":
        yield
        return

    def reaches(capability: str) -> bool:
        own, asked = (text.split(".") for text in (device.compute_capability, capability))
        return list(map(int, own)) >= list(map(int, asked))

    # JAX asks a GPU that is present what it is capable of, and takes none for an old one.
    present = mock.patch.object(fused_attention_stablehlo, "check_compute_capability", reaches)
    with asked_about(device), present:
        yield


def description(gpu: GPU) -> str:
    """A GPU as text of XLA's GpuTargetConfigProto."""
    major, minor = gpu.capability
    # The same for all these kinds (CUDA programming guide, technical specifications per compute capability).
    limits = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "shared_memory_per_block": 48 * _KIB,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "device_address_bits": 64,
    }
    own = {
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "shared_memory_per_core": gpu.shared,
        "shared_memory_per_block_optin": gpu.shared - _KIB,
        "l2_cache_size": gpu.l2,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": gpu.memory,
        "memory_bandwidth": gpu.bandwidth,
        "name": f'"{gpu.name}"',
        "device_vendor": '"NVIDIA Corporation"',
        "driver_version": '"13.0.0"',
        "runtime_version": '"13.0.0"',
        "compile_time_toolkit_version": '"13.0.0"',
    }
    fields = "\n".join(f"  {name}: {value}" for name, value in (limits | own).items())
    return (
        f"gpu_device_info {{\n{fields}\n"
        f"  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 patch: 0 }\n"
        f'device_description_str: "{gpu.name}"\n'
    )
