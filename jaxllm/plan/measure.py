"""What one program of an update needs, from compiling it: memory, FLOPs and collectives."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax

from jaxllm.plan.flops import count_flops
from jaxllm.plan.hlo import collectives
from jaxllm.plan.results import Results, key_of
from jaxllm.runtime.mesh import num_slices, slow_axis
from jaxllm.train import Program


def measure(program: Program, mesh: Any, results: Results) -> dict[str, Any]:
    """Compiles a program for its mesh, unless it is known. Figures are those of one run of it, on one device.

    "fits" is False where the compiler runs out of the device's memory; "reason" then says what it said. "known" is
    whether the figures, "compile_seconds" among them, are those of an earlier compilation.
    """
    # A role of RL may have its own mesh.
    mesh = program.mesh or mesh
    with jax.set_mesh(mesh):
        traced = program.run.trace(*program.arguments, **program.keywords)
        model_flops = program.flops / mesh.size
        flops = model_flops
        if not program.decoded:  # the end of a decoding loop depends on data
            flops = count_flops(traced.jaxpr.jaxpr) / mesh.size
        lowered = traced.lower()
        key = key_of(lowered, mesh, program.decoded)
        figures = results.get(key)
        known = figures is not None
        if figures is None:
            figures = _compiled_figures(program, lowered, mesh)
            results.put(key, figures)
    return {
        **figures,
        "known": known,
        "times": program.times,
        "flops_per_device": flops,
        "model_flops_per_device": model_flops,
    }


def _compiled_figures(program: Program, lowered: Any, mesh: Any) -> dict[str, Any]:
    """What only compiling tells."""
    began = time.monotonic()
    compiled, refusal = _compile(lowered)
    report = {
        "fits": compiled is not None,
        "compile_seconds": round(time.monotonic() - began, 1),
    }
    if compiled is None:
        return report | {"reason": refusal, "collectives": []}
    return report | _memory(compiled) | _collectives(program, compiled, mesh)


def _memory(compiled: Any) -> dict[str, int]:
    memory = compiled.memory_analysis()
    return {
        "argument_bytes_per_device": memory.argument_size_in_bytes,
        "temp_bytes_per_device": memory.temp_size_in_bytes,
        "host_bytes_per_device": memory.host_temp_size_in_bytes,
        # Donated arguments are outputs too: they take no memory twice.
        "output_bytes_per_device": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }


def _collectives(program: Program, compiled: Any, mesh: Any) -> dict[str, Any]:
    slices = num_slices(mesh.devices.flatten().tolist())
    slow = slow_axis(tuple(mesh.shape.values()), slices)
    # Decoding is one loop for each size of the cache, of which there are at most four.
    trips = max(program.decoded // 4, 1)
    return {
        "collectives": collectives(compiled.as_text(), mesh, trips, slow),
        "slow_axis": slow if slices > 1 else "",
    }


def _compile(lowered: Any) -> tuple[Any, str]:
    """(the program, "") or (None, why it does not fit). Too little memory is an answer, not an error."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, " ".join(str(error).split())[:300]


@contextlib.contextmanager
def optimization_level(level: str | None) -> Iterator[None]:
    """Compiles at one of XLA's optimization levels, such as "O0"; None: at that of training."""
    before = jax.config.jax_optimization_level  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_optimization_level", level or before)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def bytes_of(tree: Any) -> int:
    """Bytes on one device of arrays or shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        # The largest shard: padding makes others no smaller.
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total
