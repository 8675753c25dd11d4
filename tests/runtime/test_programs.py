"""Programs are counted once, as compiled or as read from the cache, whichever thread needs them."""

import concurrent.futures
import contextlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxllm.runtime.goodput import read, summary
from jaxllm.runtime.programs import Cost, Programs


@pytest.fixture
def programs():
    with contextlib.closing(Programs()) as counted:
        yield counted


def test_a_program_is_counted_when_it_is_made_and_not_again(programs):
    double = jax.jit(lambda x: 2 * x + 17.25)
    x = jnp.arange(7.0)
    programs.take()
    double(x)
    cost = programs.take()
    assert cost.compiled + cost.read == 1 and cost.seconds > 0
    double(x)
    assert programs.take() == Cost()


def test_threads_and_closing():
    programs = Programs()
    arrays = [jnp.zeros(size) for size in range(20, 24)]
    programs.take()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(jax.jit(lambda x: x - 3.5), arrays))
    cost = programs.take()
    assert cost.compiled + cost.read == 4
    programs.close()
    jax.jit(lambda x: x - 4.5)(arrays[0])
    assert programs.take() == Cost()


RUN = """
import jax, jax.numpy as jnp
from jaxllm.runtime import compile_cache
from jaxllm.runtime.goodput import Ledger
from jaxllm.runtime.programs import Programs
compile_cache.enable()
ledger = Ledger("goodput.jsonl", programs=Programs())
for factor in (1, 2, 3):
    jax.jit(lambda x: jnp.sin(x * factor) @ x)(jnp.arange(9.0))
ledger.mark("work")
ledger.write("pretrain")
"""


def test_the_ledger_says_what_was_compiled_and_what_was_read(tmp_path):
    environ = {**os.environ, "JAXLLM_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    for _ in range(2):
        subprocess.run([sys.executable, "-c", RUN], env=environ, cwd=tmp_path, check=True)
    first, second = read(tmp_path / "goodput.jsonl")
    count = first["programs"]["compiled"]
    assert count >= 3 and first["programs"]["read"] == 0
    assert (second["programs"]["compiled"], second["programs"]["read"]) == (0, count)
    assert f"programs: {count} compiled, {count} read from the cache, " in summary([first, second])
