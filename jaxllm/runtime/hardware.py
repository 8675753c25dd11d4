"""Data sheets of accelerators, for measured MFU and for plans; and what this machine has: an accelerator, cores."""

import dataclasses
import glob
import hashlib
import importlib.util
import os
import platform
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as JAX counts them (a TPU7x chip is two), from the vendors' data sheets, read 2026-11."""

    kind: str
    """JAX's `device_kind` begins with this."""
    flops: float
    """Peak of bfloat16 matrix products without sparsity, FLOP/s."""
    hbm: float
    """Size of the device's memory, bytes."""
    hbm_bandwidth: float
    """Bytes per second."""
    link: float
    """Bytes per second, one way, from a device to its neighbors: all ICI links of a TPU, NVLink of a GPU."""
    dcn: float = 6.25e9
    """Bytes per second and device between slices or nodes: 50 Gbit/s."""


_GB = 1e9
_GIB = 2**30
CHIPS = {
    # TPUs: FLOP/s, memory, its bandwidth, number of ICI links times the bandwidth of one
    "v4": Chip("TPU v4", 275e12, 32 * _GIB, 1.2e12, 6 * 4.5e10),
    "v5e": Chip("TPU v5 lite", 197e12, 16 * _GIB, 8.1e11, 4 * 4.5e10),
    "v5p": Chip("TPU v5", 459e12, 95 * _GIB, 2.765e12, 6 * 9e10),
    "v6e": Chip("TPU v6", 918e12, 32 * _GIB, 1.638e12, 4 * 9e10),
    "tpu7x": Chip("TPU7x", 1153.5e12, 96 * _GIB, 3.69e12, 3 * 9e10),
    # GPUs: NVLink inside a node, InfiniBand between nodes
    "a100": Chip("NVIDIA A100", 312e12, 80 * _GB, 2.039e12, 300e9, 25e9),
    "h100": Chip("NVIDIA H100", 989e12, 80 * _GB, 3.35e12, 450e9, 50e9),
    "h200": Chip("NVIDIA H200", 989e12, 141 * _GB, 4.8e12, 450e9, 50e9),
    "b200": Chip("NVIDIA B200", 2250e12, 180 * _GB, 8e12, 900e9, 50e9),
}
# Share of the peak that matrix products reach in practice (MaxText's published runs: 0.45 to 0.71 on v5p and v6e).
EFFICIENCY = 0.65

_PLUGINS = ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin")
# Device files of TPU (two drivers), NVIDIA, AMD, and GPUs under WSL.
_ACCELERATOR_FILES = (
    "/dev/accel*",
    "/dev/vfio/[0-9]*",
    "/dev/nvidia[0-9]*",
    "/dev/kfd",
    "/dev/dxg",
)


def num_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def by_kind(device_kind: str) -> Chip | None:
    """The device with this `device_kind`, if it is known."""
    known = [chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)]
    # The longest match: "TPU v5 lite" also begins with "TPU v5".
    return max(known, key=lambda chip: len(chip.kind), default=None)


def choose_platform() -> None:
    """Set JAX_PLATFORMS to the CPU if there is no accelerator, but a plugin for one. Call it before importing JAX.

    Without this, the plugins of TPUs and GPUs print tracebacks at every start. They are installed on machines that only
    compile for such devices. A JAX_PLATFORMS that is set already is kept.
    """
    if "JAX_PLATFORMS" in os.environ or sys.platform != "linux":
        return
    if not any(importlib.util.find_spec(plugin) for plugin in _PLUGINS):
        return
    if not any(glob.glob(pattern) for pattern in _ACCELERATOR_FILES):
        os.environ["JAX_PLATFORMS"] = "cpu"


def cpu_kind(about: Path = Path("/proc/cpuinfo")) -> str:
    """A name for what this machine's CPU can execute; machine code may run on CPUs of the same name only.

    about: where Linux describes the CPU.
    """
    # Of the first core: the others have the same.
    lines = about.read_text().partition("\n\n")[0].splitlines() if about.exists() else []
    wanted = ("model name", "flags", "Features", "CPU part")
    described = [line for line in lines if line.startswith(wanted)]
    text = "\n".join([platform.machine(), *described])
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
