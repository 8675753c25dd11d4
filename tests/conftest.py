"""Every test runs on 8 virtual CPU devices with strict dtype and rank promotion."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The same small programs are compiled in many processes: a cache of this session's compilations halves the suite.
_COMPILED = tempfile.TemporaryDirectory(prefix="jaxllm-compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_cpu_enable_async_dispatch", False)

ROOT = Path(__file__).parent.parent


def jaxllm(*args: str, **kwargs) -> subprocess.Popen:
    """Start `jaxllm ARGS` in a process of its own, from the repository's root."""
    env = {**os.environ, "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen([sys.executable, "-m", "jaxllm", *args], env=env, **{**pipes, **kwargs})


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The run directory of configs/tiny.yaml, run once, never cut."""
    directory = tmp_path_factory.mktemp("tiny") / "run"
    process = jaxllm("run", "configs/tiny.yaml", "--run-dir", str(directory))
    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    (directory / "log.txt").write_text(log)
    return directory
