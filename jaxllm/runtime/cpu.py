"""What is particular to running on a CPU."""

import ctypes
import sys
from typing import Any

import jax

from jaxllm import sharding

# Settings of glibc's mallopt (malloc.h): every block from the heap instead of a mapping of its own (M_MMAP_MAX 0), one heap
# (M_ARENA_MAX 1) that never shrinks (M_TRIM_THRESHOLD, the largest number) and grows by 64 MiB (M_TOP_PAD).
_KEEP_PAGES = {-4: 0, -8: 1, -1: -1, -2: 1 << 26}


def keep_pages() -> None:
    """Makes this process keep the memory it has had from the system.

    A step allocates and frees all its temporaries. Given back to the system, their pages are new in every step, and each
    costs a page fault: without them a step takes a tenth less. Other C libraries than glibc are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for setting, value in _KEEP_PAGES.items():
            mallopt(setting, value)


def computed_once(x: Any) -> Any:
    """The same arrays, which a CPU computes and writes once, whatever uses them.

    XLA computes cheap operations again in each operation that uses them. On a CPU it takes sines for cheap, and would
    compute those of a position for each element of every head.
    """
    return jax.lax.optimization_barrier(x) if sharding.platform() == "cpu" else x
