"""Every test runs on 8 virtual CPU devices with strict dtype and rank promotion."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_cpu_enable_async_dispatch", False)

# The same small programs are compiled in many processes: a cache of this session's compilations halves the suite.
COMPILED = {"jax_compilation_cache_dir": tempfile.mkdtemp(), "jax_persistent_cache_min_compile_time_secs": 0.1}
for name, value in COMPILED.items():
    jax.config.update(name, value)
atexit.register(shutil.rmtree, COMPILED["jax_compilation_cache_dir"], ignore_errors=True)

ROOT = Path(__file__).parent.parent


def jaxllm(*args: str, **kwargs) -> subprocess.Popen:
    """Start `jaxllm ARGS` in a process of its own, from the repository's root."""
    cache = {name.upper(): str(value) for name, value in COMPILED.items()}
    env = {**os.environ, **cache, "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
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
