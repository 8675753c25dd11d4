"""What accelerators promise: the one table that measured MFU, plans and estimates read; and whether one is here."""

import dataclasses
import glob
import importlib.util
import os
import sys


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as JAX counts them (a TPU7x chip is two), from the vendors' data sheets, read 2026-11."""

    kind: str  # JAX's device_kind begins with it
    flops: float  # bf16 products without sparsity, per second
    hbm: float  # bytes
    hbm_bandwidth: float  # bytes per second
    link: float  # bytes per second out of a device to its neighbours: all ICI links of a TPU, NVLink of a GPU, one way
    dcn: float = 6.25e9  # bytes per second and device between slices or nodes: 50 Gbit/s


_GB, _GIB = 1e9, 2**30
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * _GIB, 1.2e12, 6 * 4.5e10),
    "v5e": Chip("TPU v5 lite", 197e12, 16 * _GIB, 8.1e11, 4 * 4.5e10),
    "v5p": Chip("TPU v5", 459e12, 95 * _GIB, 2.765e12, 6 * 9e10),
    "v6e": Chip("TPU v6", 918e12, 32 * _GIB, 1.638e12, 4 * 9e10),
    "tpu7x": Chip("TPU7x", 1153.5e12, 96 * _GIB, 3.69e12, 3 * 9e10),
    "a100": Chip("NVIDIA A100", 312e12, 80 * _GB, 2.039e12, 300e9, 25e9),
    "h100": Chip("NVIDIA H100", 989e12, 80 * _GB, 3.35e12, 450e9, 50e9),
    "h200": Chip("NVIDIA H200", 989e12, 141 * _GB, 4.8e12, 450e9, 50e9),
    "b200": Chip("NVIDIA B200", 2250e12, 180 * _GB, 8e12, 900e9, 50e9),
}
# Share of the peak that matrix products reach in practice (MaxText's published runs: 0.45 to 0.71 on v5p and v6e).
EFFICIENCY = 0.65


def by_kind(device_kind: str) -> Chip | None:
    """The device that JAX calls so, if it is known."""
    known = [chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)]
    return max(known, key=lambda chip: len(chip.kind), default=None)  # "TPU v5 lite" is no "TPU v5"


def choose_platform() -> None:
    """Choose the CPU where libtpu is installed and no accelerator is there, before JAX is imported.

    Otherwise libtpu prints a trace of its failure at every start. JAX_PLATFORMS, where it is set, is left as it is.
    """
    accelerators = (
        "/dev/accel*",
        "/dev/vfio/[0-9]*",
        "/dev/nvidia[0-9]*",
        "/dev/kfd",
        "/dev/dxg",
    )  # TPU, NVIDIA, AMD, WSL
    if (
        "JAX_PLATFORMS" in os.environ
        or sys.platform != "linux"
        or importlib.util.find_spec("libtpu") is None
    ):
        return
    if not any(glob.glob(pattern) for pattern in accelerators):
        os.environ["JAX_PLATFORMS"] = "cpu"
