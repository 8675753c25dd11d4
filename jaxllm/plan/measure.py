"""What one program of an update needs, from compiling it: memory, FLOPs and collectives."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.plan import hlo, traffic
from jaxllm.plan.flops import count_flops
from jaxllm.plan.results import Results, key_of
from jaxllm.runtime.mesh import place_of
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
        if not program.trips:  # otherwise the number of FLOPs depends on data
            flops = count_flops(traced.jaxpr.jaxpr) / mesh.size
        lowered = traced.lower()
        key = key_of(lowered, mesh, program.trips)
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
    return report | _memory(compiled) | _moved(program, compiled, mesh)


def _memory(compiled: Any) -> dict[str, int]:
    memory = compiled.memory_analysis()
    return {
        "argument_bytes_per_device": memory.argument_size_in_bytes,
        "temp_bytes_per_device": memory.temp_size_in_bytes,
        "host_bytes_per_device": memory.host_temp_size_in_bytes,
        # Donated arguments are outputs too: they take no memory twice.
        "output_bytes_per_device": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }


def _moved(program: Program, compiled: Any, mesh: Any) -> dict[str, Any]:
    crossing = [axis for axis in mesh.axis_names if _ways_out(mesh, (axis,))]
    trips = max(program.trips, 1)
    module = hlo.Module(compiled.as_text())
    rows = hlo.collectives(module, mesh, trips, crossing[0] if crossing else "data")
    for row in rows:
        row["ways_out"] = _ways_out(mesh, row["axes"])
    return {"collectives": rows, "moved_bytes_per_device": traffic.bytes_moved(module, trips)}


def _ways_out(mesh: Any, axes: Sequence[str]) -> int:
    """By how many links a collective along these axes leaves a node or a slice; 0: it stays inside.

    Every GPU has a link of its own to other nodes, and a ring of a node's GPUs uses all of theirs: along fsdp 16 on two
    nodes of 8, an eighth of the bytes passes each of 8 links. What slices send to each other is counted where they send
    it, so one link has to carry it.
    """
    along = [mesh.axis_names.index(axis) for axis in axes]
    # The devices of one group: those that differ in these axes only.
    member = tuple(slice(None) if axis in along else 0 for axis in range(mesh.devices.ndim))
    group = np.array(mesh.devices[member]).flatten().tolist()
    places = {place_of(device) for device in group}
    if len(places) == 1:
        return 0
    return len(group) // len(places) if group[0].platform == "gpu" else 1


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
