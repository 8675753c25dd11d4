"""Every test runs on 8 virtual CPU devices with strict dtype and rank promotion."""

import atexit
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from jaxllm.runtime import compile_cache

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_disable_most_optimizations", True)  # most programs here run once or twice


def _start_session() -> None:
    """Makes what the session's processes share (pytest's workers, each `jaxllm` that a test starts):

    compiled programs, which are kept for the next session, and one run of configs/tiny.yaml, which is not.
    """
    session = tempfile.mkdtemp()
    os.environ["JAXLLM_TEST_SESSION"] = session
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    # Beside a user's own programs, of which a session would drop many.
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAXLLM_CACHE", str(caches / "jaxllm-tests"))
    atexit.register(shutil.rmtree, session, ignore_errors=True)


if "PYTEST_XDIST_WORKER" not in os.environ:
    _start_session()
SESSION = Path(os.environ["JAXLLM_TEST_SESSION"])
compile_cache.enable()
# Units compile thousands of programs, most of them faster than they could be kept.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.devices()  # initializes the backend: a command that a test calls can no longer change the 8 devices

ROOT = Path(__file__).parent.parent


def jaxllm(*args: str, **kwargs) -> subprocess.Popen:
    """Starts `jaxllm ARGS` in a separate process, in the repository's root."""
    env = {
        **os.environ,
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen([sys.executable, "-m", "jaxllm", *args], env=env, **{**pipes, **kwargs})


# The longest files go to the workers first, so that both workers end at about the same time. Of these only
# test_life.py uses the tiny run: the other worker does not wait while it is made.
LONGEST = (
    "test_life.py",
    "test_proofs.py",
    "test_train.py",
    "test_generate.py",
    "test_families.py",
    "test_ppo.py",
)


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def tiny_run():
    """The run directory of configs/tiny.yaml, run once without interruption by the first worker that needs it."""
    directory, log = SESSION / "tiny", SESSION / "tiny" / "log.txt"
    with open(SESSION / "tiny.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            process = jaxllm("run", "configs/tiny.yaml", "--run-dir", str(directory))
            _, text = process.communicate(timeout=900)
            assert process.returncode == 0, text
            log.write_text(text)
    return directory


@pytest.fixture
def compiled_well():
    """Turns on XLA's costly optimizations, for programs that run many times."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
