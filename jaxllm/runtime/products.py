"""Matrix products: XLA's own, or oneDNN's where one CPU device computes.

XLA's kernel for CPUs is slow where an operand must be read transposed, as for every gradient of a weight matrix, and it
converts the operands of a bfloat16 product with a float32 result to float32 first. jaxlib contains oneDNN as well, which
does neither. XLA uses it only under a flag that rewrites whole programs, fuses additions into products and gets some of
those wrong (jax 0.12.0.1, float32). Here oneDNN is called for single products instead; all else stays XLA's.
"""

import functools
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax._src import compilation_cache  # it has no public name
from jax.typing import DTypeLike

from jaxllm.sharding import on_one_cpu

_TARGET = "__onednn$matmul"  # the name under which XLA's CPU runtime knows oneDNN's product
# Fewest multiplications of a product that goes to oneDNN. Below, as in decoding, nothing is gained.
_LARGE = 1 << 26


def contract(
    a: Array,
    b: Array,
    dims: tuple[Sequence[int], Sequence[int]],
    *,
    dtype: DTypeLike | None = None,
    float32_if_free: bool = False,
) -> Array:
    """Sums a[i.., k..] * b[k.., j..] over k; the result [i.., j..] has the other dimensions of a, then those of b.

    With a = x [B, T, D], b = w [D, F] and dims ((2,), (0,)) it is x @ w; with a = x, b = dy [B, T, F] and dims
    ((0, 1), (0, 1)) it is the gradient of w.

    Args:
      a, b: arrays of one dtype.
      dims: the dimensions that are summed over, in a and in b: the first ones or the last ones.
      dtype: of the result; None: that of the operands. Sums are in float32 always.
      float32_if_free: return float32 instead of `dtype` where that costs nothing.
    """
    dtype = a.dtype if dtype is None else dtype
    a_outer = [n for i, n in enumerate(a.shape) if i not in dims[0]]
    b_outer = [n for i, n in enumerate(b.shape) if i not in dims[1]]
    if not _to_onednn(a.size * math.prod(b_outer)):
        return lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=dtype)
    a_rows, transpose_a = _as_matrix(a, dims[0], inner_last=True)
    b_rows, transpose_b = _as_matrix(b, dims[1], inner_last=False)
    dtype = jnp.float32 if float32_if_free else dtype
    product = _onednn(a_rows, b_rows, transpose_a, transpose_b, dtype)
    return product.reshape(*a_outer, *b_outer)


def _as_matrix(x: Array, inner: Sequence[int], *, inner_last: bool) -> tuple[Array, bool]:
    """x as a matrix, without moving data, and whether the dimensions `inner` are on the other side than they should be."""
    count = len(inner)
    is_last = tuple(inner) == tuple(range(x.ndim - count, x.ndim))
    if not is_last and tuple(inner) != tuple(range(count)):
        raise ValueError(
            f"dimensions {tuple(inner)} of {x.shape} are neither the first nor the last"
        )
    split = x.ndim - count if is_last else count
    matrix = x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:]))
    return matrix, is_last != inner_last


def batched(
    a: Array,
    b: Array,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    dtype: DTypeLike | None = None,
    float32_if_free: bool = False,
) -> Array:
    """Products of the matrices in the last two dimensions of a [..., m, k] and b [..., k, n], of one dtype: [..., m, n].

    transpose_a, transpose_b: they are [..., k, m] and [..., n, k] instead. dtype, float32_if_free: as in `contract`.
    """
    dtype = a.dtype if dtype is None else dtype
    if _to_onednn(a.size * b.shape[-2 if transpose_b else -1]):
        dtype = jnp.float32 if float32_if_free else dtype
        return _onednn(a, b, transpose_a, transpose_b, dtype)
    last = a.ndim - 1
    dims = ((last - 1 if transpose_a else last,), (last if transpose_b else last - 1,))
    batch = tuple(range(last - 1))
    return lax.dot_general(a, b, (dims, (batch, batch)), preferred_element_type=dtype)


def _to_onednn(multiplications: int) -> bool:
    """Whether a product of the program being traced goes to oneDNN: it is large, and runs on one CPU device that has it.

    A program over several devices is cut by XLA's partitioner, which cannot cut a call that it does not know.
    """
    large = multiplications >= _LARGE
    return large and on_one_cpu() and jax.default_backend() == "cpu" and onednn_works()


@functools.cache
def onednn_works() -> bool:
    """Whether this jaxlib has oneDNN's product, and it is right. It is not part of JAX's API, so it is tried out."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or not _leave_out_of_cache():
        return False
    a = np.arange(6, dtype=np.float32).reshape(3, 2)
    b = np.arange(12, dtype=np.float32).reshape(3, 4)
    for dtype in (jnp.float32, jnp.bfloat16):
        run = jax.jit(
            functools.partial(_onednn, transpose_a=True, transpose_b=False, dtype=np.float32)
        )
        try:
            with jax.ensure_compile_time_eval():
                found = run(jnp.asarray(a, dtype), jnp.asarray(b, dtype))
        except jax.errors.JaxRuntimeError:  # no such call in this jaxlib
            return False
        if not np.array_equal(found, a.T @ b):
            return False
    return True


@functools.cache
def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers. Where it does not, oneDNN's product of them takes seconds, or aborts."""
    if os.environ.keys() & {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}:
        return False  # oneDNN may have been told to do without
    try:
        words = {*Path("/proc/cpuinfo").read_text().split()}
    except OSError:
        return False
    return bool(words & {"amx_bf16", "avx512_bf16"})


def _leave_out_of_cache() -> bool:
    """Makes JAX's persistent cache leave out programs with oneDNN's product; False if this JAX cannot be made to.

    jaxlib takes such a product for another kind of call when it writes a program to disk, and reads beyond it.
    """
    write = getattr(compilation_cache, "put_executable_and_time", None)
    if write is None:
        return False

    @functools.wraps(write)
    def write_others(key: str, name: str, executable: Any, *rest: Any) -> None:
        if not any(_TARGET in module.to_string() for module in executable.hlo_modules()):
            write(key, name, executable, *rest)

    compilation_cache.put_executable_and_time = write_others
    return True


def _onednn(a: Array, b: Array, transpose_a: bool, transpose_b: bool, dtype: DTypeLike) -> Array:
    """One call of oneDNN's product; arguments as in `batched`."""
    if a.dtype != b.dtype:  # oneDNN would end the process
        raise TypeError(f"a product of {a.dtype} and {b.dtype}; convert one of them")
    if a.dtype == jnp.bfloat16 and not has_bfloat16():
        wide = _onednn(
            a.astype(jnp.float32), b.astype(jnp.float32), transpose_a, transpose_b, jnp.float32
        )
        return wide.astype(dtype)
    m = a.shape[-1] if transpose_a else a.shape[-2]
    n = b.shape[-2] if transpose_b else b.shape[-1]
    config = {"onednn_matmul_config": {"transpose_a": transpose_a, "transpose_b": transpose_b}}
    call = jax.ffi.ffi_call(
        _TARGET,
        jax.ShapeDtypeStruct((*a.shape[:-2], m, n), dtype),
        vmap_method="broadcast_all",
        custom_call_api_version=2,
        legacy_backend_config=json.dumps(config),
    )
    return call(a, b)
