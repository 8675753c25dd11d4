"""`jaxllm plan`: a stage's real step, compiled for accelerators that are not there.

libtpu compiles for a topology on any machine (`jax.experimental.topologies`), and its memory, its collectives and whether
it fits are those of the hardware. Times are a roofline: what the step has to compute and to move, over what the data
sheets promise.
"""

import dataclasses
import importlib.util
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from jaxllm.config import InputError
from jaxllm.models import transformer
from jaxllm.run import Config, with_defaults
from jaxllm.sharding import check_batch, make_mesh
from jaxllm.stages import language_model


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as JAX counts them (a TPU7x chip is two), from the vendors' pages."""

    flops: float  # bf16, per second
    hbm: float  # bytes
    hbm_bandwidth: float  # bytes per second
    ici: float  # bytes per second out of a device, over all of its links
    dcn: float = 6.25e9  # bytes per second and device between slices: 50 Gbit/s (v5p)


# Cloud TPU's pages on each version, read 2026-11; ICI: links times the bandwidth of one, one way.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1.2e12, 6 * 4.5e10),
    "v5e": Chip(197e12, 16 * 2**30, 8.1e11, 4 * 4.5e10),
    "v5p": Chip(459e12, 95 * 2**30, 2.765e12, 6 * 9e10),
    "v6e": Chip(918e12, 32 * 2**30, 1.638e12, 4 * 9e10),
    "tpu7x": Chip(1153.5e12, 96 * 2**30, 3.69e12, 3 * 9e10),
}
# Share of the peak that matrix products reach in practice on v5p and v6e (MaxText's published runs: 0.45 to 0.71).
EFFICIENCY = 0.65


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """Compile a stage's step for a TPU topology, without the TPU: whether it fits, and what it costs."""

    config: Annotated[str, tyro.conf.Positional]
    """Config file; model.vocab_size must be in it, or a preset."""
    topology: str
    """Kind and shape of a slice: v5p:4x4x4, v6e:16x16, v5e:16x16, v4:4x4x4, tpu7x:4x4x4."""
    stage: str = "pretrain"
    """pretrain or sft."""
    slices: int = 1
    """Slices joined by the data-centre network; the mesh's data axis goes over them."""
    json: bool = False
    """Print one JSON object in place of tables."""
    leaves: bool = False
    """Show the sharding of every parameter."""


def command(args: PlanArgs, config: Config) -> None:
    """Print the report of a stage's step; InputError where the config or the topology makes no sense."""
    report = plan(with_defaults(config), args)
    if args.json:
        print(json.dumps(report))
        return
    console = Console()
    table = Table(title=f"{args.stage} on {args.topology}{f' x {args.slices}' * (args.slices > 1)}", show_header=False)
    for name, value in report.items():
        if name not in ("collectives", "leaves"):
            table.add_row(name, _readable(name, value))
    console.print(table)
    if report["collectives"]:
        moves = Table("collective", "axes", "times", "bytes per device", title="Collectives of one step")
        for each in report["collectives"]:
            moves.add_row(each["kind"], "+".join(each["axes"]), f"{each['count']:,}", _bytes(each["bytes"]))
        console.print(moves)
    for name, leaf in report.get("leaves", {}).items():
        console.print(f"{name}: {leaf}")


def plan(config: Config, args: PlanArgs) -> dict[str, Any]:
    """The report, as it is printed with --json."""
    if args.stage not in ("pretrain", "sft"):
        raise InputError(f"--stage {args.stage}: is not known; known: pretrain, sft")
    section, model = getattr(config, args.stage), config.model
    if not model.vocab_size:
        raise InputError(f"{args.config}: model.vocab_size: is the tokenizer's, which plan does not train; set it")
    chip, devices = _devices(args)
    mesh = make_mesh(config.mesh, devices)
    check_batch(mesh, section.batch_size // section.num_micro, f"{args.stage}.batch_size / {args.stage}.num_micro")
    step, placed = language_model.program(mesh, section, model, max(section.num_steps, 1), config.seed)
    state, batch, base = language_model.arguments(mesh, section, model, placed)
    length = section.length or model.max_length
    tokens = section.batch_size * length
    report: dict[str, Any] = {
        "devices": mesh.size,
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "parameters": transformer.num_params(model),
        "tokens_per_step": tokens,
        "parameter_bytes_per_device": _bytes_of(state.params),
        "optimizer_bytes_per_device": _bytes_of(state.opt_state),
    }
    with jax.set_mesh(mesh):
        traced = step.trace(state, batch, base=base)
        flops = count_flops(traced.jaxpr.jaxpr) / mesh.size
        needed = transformer.flops_per_token(model, length) * tokens / mesh.size
        began = time.monotonic()
        compiled, refusal = _compile(traced.lower())
    report |= {"compile_seconds": round(time.monotonic() - began, 1), "fits": compiled is not None}
    report |= {"flops_per_device": max(flops, needed), "model_flops_per_device": needed}
    if compiled is None:
        return report | {"reason": refusal, "collectives": []}
    memory, moved = compiled.memory_analysis(), collectives(compiled.as_text(), mesh)
    report |= {
        "argument_bytes_per_device": memory.argument_size_in_bytes,
        "temp_bytes_per_device": memory.temp_size_in_bytes,
    }
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    report |= {"total_bytes_per_device": total, "hbm_bytes": int(chip.hbm), "collectives": moved}
    report |= _times(report, chip, args.slices)
    if args.leaves:
        flat = jax.tree_util.tree_leaves_with_path(state.params)
        report["leaves"] = {
            jax.tree_util.keystr(path, simple=True, separator="."): f"{list(leaf.shape)} {leaf.sharding.spec}"
            for path, leaf in flat
        }
    return report


def _times(report: Mapping[str, Any], chip: Chip, slices: int) -> dict[str, Any]:
    """Roofline: compute = FLOPs / peak; hbm = (arguments read and written + temporaries written and read) / bandwidth;
    ici, dcn = bytes of collectives / bandwidth. Predicted: the largest of compute / EFFICIENCY, hbm and ici + dcn."""
    over_slices = {"data"} if slices > 1 else set()
    far = sum(c["bytes"] for c in report["collectives"] if over_slices & {*c["axes"]})
    near = sum(c["bytes"] for c in report["collectives"]) - far
    seconds = {
        "compute_seconds": report["flops_per_device"] / chip.flops,
        "hbm_seconds": 2 * report["total_bytes_per_device"] / chip.hbm_bandwidth,
        "ici_seconds": near / chip.ici,
        "dcn_seconds": far / chip.dcn,
    }
    moving = seconds["ici_seconds"] + seconds["dcn_seconds"]
    step = max(seconds["compute_seconds"] / EFFICIENCY, seconds["hbm_seconds"], moving)
    return {
        **seconds,
        "predicted_step_seconds": step,
        "predicted_tokens_per_second": report["tokens_per_step"] / step,
        "predicted_mfu": report["model_flops_per_device"] / chip.flops / step,
    }


def _devices(args: PlanArgs) -> tuple[Chip, Any]:
    kind, _, shape = args.topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise InputError(f"--topology {args.topology}: must be KIND:SHAPE, as v5p:4x4x4; kinds: {', '.join(CHIPS)}")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("jaxllm plan: compiling for a TPU needs libtpu; pip install 'jaxllm[tpu]'")
    more = {"num_slices": args.slices} if args.slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=args.topology, **more)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--topology {args.topology}: libtpu knows no such slice ({reason})") from None
    return CHIPS[kind], sorted(found.devices, key=lambda d: getattr(d, "slice_index", 0))


def _compile(lowered: Any) -> tuple[Any, str]:
    """(the program, "") or (None, why it does not fit): too little memory is an answer."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, " ".join(str(error).split())[:300]


def _bytes_of(tree: Any) -> int:
    """Bytes on one device of arrays, by their shardings."""
    shard = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(shard, jax.tree.leaves(tree)))


def count_flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products of a program, loops counted as often as they run, branches as the dearest.

    Kernels count by their own estimate where they have one.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            total += 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
        elif name == "ragged_dot_general":
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * eqn.invars[0].aval.shape[-1]
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            total += float(estimate.flops) if estimate is not None else 0.0
        elif name == "cond":
            total += max(count_flops(branch.jaxpr) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else 1
            times *= params["mesh"].size if name == "shard_map" else 1
            total += times * sum(count_flops(inner) for inner in _inside(params))
    return total


def _inside(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                yield inner


_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1, "f64": 8, "s64": 8, "s16": 2}


def collectives(text: str, mesh: Any) -> list[dict[str, Any]]:
    """What a compiled program sends: kind, mesh axes, how often it runs, bytes in all that leave a device.

    Loops are followed to their trip counts. A ring sends (n - 1) / n of an all-gather's result, twice that for an
    all-reduce (Patarasuk and Yuan 2009).
    """
    bodies, entry = _computations(text)
    found: dict[tuple[str, tuple[str, ...]], list[float]] = {}

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if loop := re.search(r"while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                walk(loop[2], times * _trips(bodies.get(loop[1], ())))
            elif call := re.search(r" (?:call|conditional|async-start)\(.*", line):
                for inner in re.findall(r"(?:to_apply|calls|computation)=%?([\w.\-]+)", call[0]):
                    walk(inner, times)
            if kind := re.search(rf" ({'|'.join(_KINDS)})(?:-start)?\(", line):
                axes = _axes_of(line, mesh)
                count = math.prod(mesh.shape[a] for a in axes) if axes else mesh.size
                share = {"all-reduce": 2 * (count - 1) / count, "collective-permute": 1.0}.get(
                    kind[1], (count - 1) / count
                )
                size = _result_bytes(line) * (count if kind[1] == "reduce-scatter" else 1)
                entry = found.setdefault((kind[1], axes), [0, 0.0])
                entry[0], entry[1] = entry[0] + times, entry[1] + times * size * share

    walk(entry, 1)
    return [
        {"kind": kind, "axes": [*axes], "count": int(count), "bytes": int(size)}
        for (kind, axes), (count, size) in sorted(found.items())
    ]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({name: lines}, the entry's name) of a module's text."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(|\{).*\{$", line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _trips(condition: Any) -> int:
    """How often a loop runs: the constant its counter is compared with."""
    numbers = [int(n) for line in condition for n in re.findall(r"s32\[\][^=]*constant\((\d+)\)", line)]
    return max(numbers, default=1)


def _result_bytes(line: str) -> int:
    result = line.split(" = ", 1)[1]
    result = re.split(rf" (?:{'|'.join(_KINDS)})", result)[0]
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
    return sum(_SIZES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in shapes)


def _axes_of(line: str, mesh: Any) -> tuple[str, ...]:
    """The mesh axes that a collective's groups go along, from its replica groups."""
    names = [name for name, size in mesh.shape.items() if size > 1]
    if by_axis := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        axes = [part.split("=")[0].strip("' ") for part in by_axis[1].split(",")]
        if len(axes) == len(names):
            return tuple(names[axes.index(a.strip("' "))] for a in by_axis[2].split(",") if a.strip("' ") in axes)
    if group := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        members = [int(n) for n in group[1].split(",")]
    elif iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        members = _first_group(*iota.groups(default=""))
    else:
        return tuple(names)
    places = np.unravel_index(members, tuple(mesh.shape.values()))
    return tuple(name for name, along in zip(mesh.shape, places, strict=True) if len({*along.tolist()}) > 1)


def _first_group(size: str, dims: str, order: str) -> list[int]:
    ids = np.arange(math.prod(map(int, dims.split(",")))).reshape([int(n) for n in dims.split(",")])
    ids = ids.transpose([int(n) for n in order.split(",")]) if order else ids
    return ids.reshape(-1, int(size))[0].tolist()


def _readable(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if "bytes" in name:
        return _bytes(value)
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
