"""Matrix products through oneDNN equal XLA's, in every order of the operands; no program with one is cached."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.runtime import products
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.runtime.products import batched, contract

needs_onednn = pytest.mark.skipif(
    not products.onednn_works(), reason="this jaxlib has no product of oneDNN's"
)


def sample(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(sum(shape)), shape).astype(dtype)


@pytest.fixture(params=[0, 1 << 62], ids=["oneDNN", "XLA"])
def large(request, monkeypatch):
    """From how many multiplications on a product is oneDNN's."""
    monkeypatch.setattr(products, "_LARGE", request.param)


def calls(function, *arrays):
    return "__onednn" in jax.jit(function).lower(*arrays).as_text()


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("a", "b", "dims"),
    [
        ((2, 3, 4), (4, 5), ((2,), (0,))),
        ((2, 3, 4), (5, 4), ((2,), (1,))),
        ((2, 3, 4), (2, 3, 5), ((0, 1), (0, 1))),
        ((2, 3, 4), (2, 3, 5, 6), ((0, 1), (0, 1))),
        ((2, 3, 5, 6), (4, 5, 6), ((2, 3), (1, 2))),
        ((2, 4), (4,), ((1,), (0,))),
    ],
)
def test_contract_is_tensordot(a, b, dims, dtype):
    a, b = sample(*a, dtype=dtype), sample(*b, dtype=dtype)
    got = contract(a, b, dims, dtype=jnp.float32)
    want = np.tensordot(np.asarray(a, np.float64), np.asarray(b, np.float64), dims)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert contract(a, b, dims).dtype == dtype


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("transpose_a", "transpose_b"), [*itertools.product((False, True), repeat=2)]
)
def test_batched_is_matmul(transpose_a, transpose_b):
    a, b = sample(2, 3, 4, 5), sample(2, 3, 5, 6)
    want = np.matmul(a, b)
    flip = lambda x, do: x.swapaxes(-1, -2) if do else x
    how = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    got = batched(flip(a, transpose_a), flip(b, transpose_b), **how)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_dimensions_in_the_middle_are_refused(monkeypatch):
    monkeypatch.setattr(products, "_to_onednn", lambda size: True)
    with pytest.raises(ValueError, match="neither the first nor the last"):
        contract(sample(2, 3, 4), sample(3, 5), ((1,), (0,)))


@needs_onednn
def test_operands_of_two_types_are_refused(monkeypatch):
    monkeypatch.setattr(products, "_LARGE", 0)
    with pytest.raises(TypeError, match="float32 and bfloat16"):
        contract(sample(2, 3), sample(3, 4, dtype="bfloat16"), ((1,), (0,)))


@needs_onednn
def test_large_products_of_one_cpu_device_alone_are_onednns():
    product = lambda a, b: contract(a, b, ((1,), (0,)))
    large = sample(512, 512), sample(512, 512)
    assert calls(product, *large)
    assert not calls(product, sample(8, 512), large[1])
    with jax.set_mesh(make_mesh(MeshConfig(data=8))):  # XLA cuts its products, not this call
        assert not calls(product, *large)


# Prints the largest error of a product of bfloat16 numbers, relative to the largest result.
WITHOUT = """
import jax, jax.numpy as jnp, numpy as np
from jaxllm.runtime import products
products._LARGE = 0
a, b = (jax.random.normal(jax.random.key(n), (64, 96)).astype(jnp.bfloat16) for n in (0, 1))
product = jax.jit(lambda a, b: products.contract(a, b, ((0,), (0,)), dtype=jnp.float32))
assert "__onednn" in product.lower(a, b).as_text()
want = np.asarray(a, np.float64).T @ np.asarray(b, np.float64)
print(np.abs(product(a, b) - want).max() / np.abs(want).max())
"""


@needs_onednn
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_a_cpu_without_bfloat16_multiplies_in_float32(instructions):
    """oneDNN's own product of bfloat16 numbers aborts the process on the first, and takes seconds on the second."""
    environ = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6 and "reference implementation" not in done.stderr


@needs_onednn
def test_a_program_with_onednns_product_is_not_cached(tmp_path, monkeypatch):
    """jaxlib 0.12.0.1 cannot write it to disk: it would read beyond the call."""
    from jax._src import compilation_cache

    written = []
    monkeypatch.setattr(products, "compilation_cache", compilation_cache)
    # What the guard wraps is the function of the test, so that nothing reaches the disk.
    monkeypatch.setattr(
        compilation_cache, "put_executable_and_time", lambda key, name, *rest: written.append(name)
    )
    assert products._leave_out_of_cache()
    for rows, name in ((512, "large"), (8, "small")):
        run = lambda a, b: contract(a, b, ((1,), (0,)))
        compiled = jax.jit(run).lower(sample(rows, 512), sample(512, 512)).compile()
        executable = compiled._executable.xla_executable
        compilation_cache.put_executable_and_time("key", name, executable, None, 1)
    # JAX itself has written the small one as well, under its function's name, unless it was cached.
    assert [name for name in written if name in ("large", "small")] == ["small"]


def test_where_jaxlib_lacks_the_product_xla_computes(monkeypatch):
    monkeypatch.setattr(products, "_TARGET", "__no_such_call$matmul")
    monkeypatch.setattr(products, "_leave_out_of_cache", lambda: True)
    works = products.onednn_works.__wrapped__
    assert not works()
    monkeypatch.setattr(products, "onednn_works", works)
    assert not calls(lambda a, b: contract(a, b, ((1,), (0,))), sample(512, 512), sample(512, 512))
