"""A process on a CPU keeps its memory, and computes once what it is told to compute once."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.runtime.cpu import computed_once

# Page faults of a process that allocates, uses and frees 64 MiB ten times.
COUNT = """
import ctypes, resource, sys
from jaxllm.runtime.cpu import keep_pages
if sys.argv[1] == "keep":
    keep_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
faults = []
for _ in range(10):
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[0])
"""


@pytest.mark.skipif(
    sys.platform != "linux"
    or not hasattr(os, "confstr")
    or "glibc" not in str(os.confstr("CS_GNU_LIBC_VERSION")),
    reason="a setting of glibc",
)
def test_pages_are_kept():
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    faults = {}
    for how in ("keep", "plain"):
        command = [sys.executable, "-c", COUNT, how]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        faults[how] = int(run.stdout)
    assert faults["keep"] < 100 < 9 * (64 << 20) // 4096 * 0.9 < faults["plain"]


def test_what_is_computed_once_is_unchanged_and_not_computed_again():
    x = jnp.linspace(0.0, 1.0, 64)
    run = jax.jit(lambda x: (jnp.zeros((50, 1)) + computed_once(jnp.sin(x))[None]).sum(0))
    np.testing.assert_allclose(run(x), 50 * np.sin(np.asarray(x)), rtol=1e-5)
    program = run.lower(x).compile().as_text()
    fused = [part for part in program.split("\n\n") if "sine" in part and "50,64" in part]
    assert not fused, fused
