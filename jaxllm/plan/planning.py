"""`jaxllm plan`: a stage's real step, compiled for accelerators that are not there.

libtpu compiles for a topology on any machine (`jax.experimental.topologies`), and its memory, its collectives and whether
it fits are those of the hardware. Times are a roofline: what the step has to compute and to move, over what the data
sheets promise.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from jaxllm import stages
from jaxllm.config import InputError
from jaxllm.config.ranges import PositiveInt
from jaxllm.life import Config, with_defaults
from jaxllm.models import transformer
from jaxllm.plan import estimate
from jaxllm.run import plan_path
from jaxllm.runtime.files import write_json
from jaxllm.runtime.hardware import CHIPS, EFFICIENCY, Chip
from jaxllm.sharding import check_batch, num_slices, planned_mesh, slow_axis
from jaxllm.train import Program, TrainState


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """Compile a stage's step for a TPU topology, without the TPU: whether it fits, and what it costs."""

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """Config file; model.vocab_size must be in it, or a preset."""
    topology: str
    """Kind and shape of a slice: v5p:4x4x4, v6e:16x16, v5e:16x16, v4:4x4x4, tpu7x:4x4x4; for GPUs, which are estimated
    by formulas, kind and number: h100:8, h200:64, a100:8, b200:72."""
    stage: str = "pretrain"
    """pretrain, sft, reward, dpo, rloo, grpo or ppo."""
    slices: PositiveInt = 1
    """Slices joined by the data-centre network; the mesh's data axis goes over them."""
    search: bool = False
    """Try meshes, remat and batch sizes, and rank what fits by tokens per second."""
    tries: PositiveInt = 6
    """Candidates of a search that are compiled, the likeliest first."""
    exact: bool = False
    """Compile exactly as training would. By default plan compiles at a low optimization level, about twice as fast, which may
    underestimate memory by up to 8%; it compiles again exactly where more than 85% of a device's memory would be taken."""
    json: bool = False
    """Print one JSON object in place of tables."""
    leaves: bool = False
    """Show the sharding of every parameter."""
    keep: bool = False
    """Keep the report in the run directory: the stage's result then shows it beside what was measured."""


def command(args: PlanArgs, config: Config) -> None:
    """Print the report of a stage's step; InputError where the config or the topology makes no sense."""
    config = with_defaults(config)
    if args.search:
        ranked = search(config, args)
        print(json.dumps(ranked)) if args.json else _show_ranking(ranked)
        return
    report = plan(config, args)
    if args.keep:
        kept = plan_path(config, args.stage)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {key: value for key, value in report.items() if key != "leaves"})
    print(json.dumps(report)) if args.json else _show(report, args)


def plan(config: Config, args: PlanArgs) -> dict[str, Any]:
    """The report, as it is printed with --json."""
    known = [stage.name for stage in stages.TABLE if stage.programs]
    if args.stage not in known:
        raise InputError(f"--stage {args.stage}: is not known; known: {', '.join(known)}")
    if not config.model.vocab_size:
        raise InputError(
            f"{args.config}: model.vocab_size: is the tokenizer's, which plan does not train; set it"
        )
    chip, devices = _devices(args)
    mesh = planned_mesh(config.mesh_of(args.stage), devices)
    programs, held = stage_programs(config, args.stage, mesh)
    report = {**_sizes(config, args.stage, mesh, held), "compile_seconds": 0.0, "fits": True}
    if chip.kind.startswith("NVIDIA"):
        report |= estimate.figures(config, args.stage, mesh, chip, report)
    else:
        report |= _compiled(programs, mesh, chip, report, args)
    if args.leaves:
        report["leaves"] = _shardings(held)
    return report


_TIGHT = 0.85  # share of a device's memory above which a quick compilation does not decide whether a program fits


def _compiled(
    programs: Sequence[Program], mesh: Any, chip: Chip, sizes: Any, args: PlanArgs
) -> dict[str, Any]:
    """What compiling finds of programs whose `sizes` are known."""

    def find(exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        with _optimization(None if exact else "O0"):
            every = {program.name: _measure(program, mesh) for program in programs}
        return every, _sum(programs, every, sizes["state_bytes_per_device"], chip) | {
            "exact": exact
        }

    every, report = find(args.exact)
    if not args.exact and report.get("total_bytes_per_device", 0) > _TIGHT * chip.hbm:
        every, report = find(exact=True)
    if report["fits"]:
        report |= _times(programs, every, chip, sizes["tokens_per_step"])
    return report | ({"programs": every} if len(programs) > 1 else {})


@contextlib.contextmanager
def _optimization(level: str | None) -> Iterator[None]:
    """Compile at another of XLA's optimization levels; None: at that of a run."""
    before = jax.config.jax_optimization_level  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_optimization_level", level or before)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def stage_programs(config: Config, stage: str, mesh: Any) -> tuple[list[Program], dict[str, Any]]:
    """(what an update of the stage runs, {role: its state}), as shapes with their shardings on this mesh."""
    section = getattr(config, stage)
    parts = getattr(section, "num_minibatches", 1) * section.num_micro
    check_batch(mesh, section.batch_size // parts, f"{stage}.batch_size / its parts, {parts},")
    return stages.load(stages.named(stage).programs)(mesh, config, stage)


def _sizes(config: Config, stage: str, mesh: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    """What is known before anything is compiled."""
    states = [tree for tree in held.values() if isinstance(tree, TrainState)]
    fixed = [tree for tree in held.values() if not isinstance(tree, TrainState)]
    return {
        "devices": mesh.size,
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "parameters": transformer.num_params(config.model),
        "tokens_per_step": estimate.tokens_per_step(config, stage),
        "parameter_bytes_per_device": bytes_of([[s.params for s in states], fixed]),
        "optimizer_bytes_per_device": bytes_of([s.opt_state for s in states]),
        "gradient_bytes_per_device": max((bytes_of(s.params) for s in states), default=0),
        "state_bytes_per_device": bytes_of(held),
        "state_bytes_by_role": {
            role: bytes_of(tree) for role, tree in held.items() if bytes_of(tree)
        },
    }


def _measure(program: Program, mesh: Any) -> dict[str, Any]:
    """Compile a program: what it needs and moves, once through."""
    mesh = program.mesh or mesh
    with jax.set_mesh(mesh):
        traced = program.run.trace(*program.arguments, **program.keywords)
        needed = program.flops / mesh.size
        # Decoding's loop has no end that could be read off.
        flops = needed if program.decoded else count_flops(traced.jaxpr.jaxpr) / mesh.size
        began = time.monotonic()
        compiled, refusal = _compile(traced.lower())
    found = {
        "fits": compiled is not None,
        "times": program.times,
        "compile_seconds": round(time.monotonic() - began, 1),
    }
    found |= {"flops_per_device": flops, "model_flops_per_device": needed}
    if compiled is None:
        return found | {"reason": refusal, "collectives": []}
    memory, slices = compiled.memory_analysis(), num_slices(mesh.devices.flatten().tolist())
    slow = slow_axis(tuple(mesh.shape.values()), slices)
    return found | {
        "argument_bytes_per_device": memory.argument_size_in_bytes,
        "temp_bytes_per_device": memory.temp_size_in_bytes,
        "host_bytes_per_device": memory.host_temp_size_in_bytes,
        "output_bytes_per_device": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "collectives": collectives(compiled.as_text(), mesh, max(program.decoded // 4, 1), slow),
        "slow_axis": slow if slices > 1 else "",
    }


def _sum(
    programs: Sequence[Program], every: Mapping[str, Any], state: int, chip: Chip
) -> dict[str, Any]:
    """All programs of an update: what they do adds up; of memory the largest counts, and every role's state stays."""
    add = lambda key: sum(every[p.name][key] * p.times for p in programs)
    total = {
        "flops_per_device": add("flops_per_device"),
        "model_flops_per_device": add("model_flops_per_device"),
    }
    total |= {
        "compile_seconds": round(sum(found["compile_seconds"] for found in every.values()), 1)
    }
    total |= {
        "hbm_bytes": int(chip.hbm),
        "fits": all(found["fits"] for found in every.values()),
        "collectives": [],
    }
    if not total["fits"]:
        return total | {
            "reason": next(f"{n}: {f['reason']}" for n, f in every.items() if not f["fits"])
        }
    largest = lambda key: max(found[key] for found in every.values())
    total["argument_bytes_per_device"] = largest("argument_bytes_per_device")
    total["temp_bytes_per_device"] = largest("temp_bytes_per_device")
    total["host_bytes_per_device"] = largest("host_bytes_per_device")
    batches = total["argument_bytes_per_device"] if len(programs) == 1 else state
    own = lambda p: (
        sum(every[p.name][f"{kind}_bytes_per_device"] for kind in ("temp", "output"))
        + bytes_of(p.copied)
    )
    peak = max(map(own, programs))
    total |= {"total_bytes_per_device": batches + peak, "collectives": _merge(programs, every)}
    if batches + peak > chip.hbm:
        total |= {
            "fits": False,
            "reason": f"{_bytes(batches + peak)} of state and temporaries exceed {_bytes(chip.hbm)}",
        }
    return total


def _merge(programs: Sequence[Program], every: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: dict[tuple[str, ...], list[int]] = {}
    for program in programs:
        for each in every[program.name]["collectives"]:
            entry = found.setdefault((each["kind"], *each["axes"]), [0, 0])
            entry[0], entry[1] = (
                entry[0] + each["count"] * program.times,
                entry[1] + each["bytes"] * program.times,
            )
    return [
        {"kind": key[0], "axes": [*key[1:]], "count": n, "bytes": size}
        for key, (n, size) in sorted(found.items())
    ]


def _times(programs: Sequence[Program], every: Any, chip: Chip, tokens: int) -> dict[str, Any]:
    """Roofline of each program, added up: compute = FLOPs / peak; hbm = (arguments, once for each token that is decoded,
    + temporaries written and read) / bandwidth; ici, dcn = bytes of collectives / bandwidth. A program takes the largest
    of compute / EFFICIENCY, hbm and ici + dcn."""
    total: dict[str, float] = {}
    for program in programs:
        found = every[program.name]
        far = sum(c["bytes"] for c in found["collectives"] if found["slow_axis"] in c["axes"])
        near = sum(c["bytes"] for c in found["collectives"]) - far
        moved = (
            found["argument_bytes_per_device"] * max(program.decoded, 1)
            + 2 * found["temp_bytes_per_device"]
        )
        once = {
            "compute_seconds": found["flops_per_device"] / chip.flops,
            "hbm_seconds": moved / chip.hbm_bandwidth,
            "ici_seconds": near / chip.link,
            "dcn_seconds": far / chip.dcn,
        }
        moving = once["ici_seconds"] + once["dcn_seconds"]
        once["predicted_step_seconds"] = max(
            once["compute_seconds"] / EFFICIENCY, once["hbm_seconds"], moving
        )
        found["predicted_seconds"] = once["predicted_step_seconds"]
        total = {
            name: total.get(name, 0.0) + seconds * program.times for name, seconds in once.items()
        }
    step = total["predicted_step_seconds"]
    needed = sum(every[p.name]["model_flops_per_device"] * p.times for p in programs)
    return {
        **total,
        "predicted_tokens_per_second": tokens / step,
        "predicted_mfu": needed / chip.flops / step,
    }


def _shardings(held: Mapping[str, Any]) -> dict[str, str]:
    params = {
        role: tree.params if isinstance(tree, TrainState) else tree for role, tree in held.items()
    }
    named = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {named(path): f"{list(leaf.shape)} {leaf.sharding.spec}" for path, leaf in flat}


def _show(report: Mapping[str, Any], args: PlanArgs) -> None:
    console = Console(markup=False, emoji=False)
    table = Table(
        title=f"{args.stage} on {args.topology}{f' x {args.slices}' * (args.slices > 1)}",
        show_header=False,
    )
    for name, value in report.items():
        if name not in ("collectives", "leaves", "programs"):
            table.add_row(name, _readable(name, value))
    console.print(table)
    if report.get("programs"):
        parts = Table(
            "program", "times", "temporaries", "FLOPs", "seconds", title="An update, on one device"
        )
        for name, found in report["programs"].items():
            sizes = (
                _bytes(found.get("temp_bytes_per_device", 0)),
                f"{found['flops_per_device']:,.3g}",
            )
            parts.add_row(
                name, str(found["times"]), *sizes, f"{found.get('predicted_seconds', 0):.3g}"
            )
        console.print(parts)
    if report["collectives"]:
        moves = Table(
            "collective", "axes", "times", "bytes per device", title="Collectives of one step"
        )
        for each in report["collectives"]:
            moves.add_row(
                each["kind"], "+".join(each["axes"]), f"{each['count']:,}", _bytes(each["bytes"])
            )
        console.print(moves)
    for name, leaf in report.get("leaves", {}).items():
        console.print(f"{name}: {leaf}")


def search(config: Config, args: PlanArgs) -> list[dict[str, Any]]:
    """Meshes x remat x batch sizes, the best first: estimated all, and the likeliest compiled where that is possible."""
    chip, devices = _devices(args)
    count = devices if isinstance(devices, int) else len(devices)
    found = []
    for candidate, guess in estimate.candidates(config, args.stage, count, args.slices, chip)[
        : args.tries
    ]:
        try:
            report = plan(candidate, args)
        except InputError as error:
            report = {"fits": False, "reason": str(error)}
        keys = (
            "fits",
            "total_bytes_per_device",
            "predicted_tokens_per_second",
            "predicted_mfu",
            "compile_seconds",
            "reason",
        )
        found.append({**guess, **{key: report[key] for key in keys if key in report}})
    return sorted(
        found, key=lambda each: (not each["fits"], -each.get("predicted_tokens_per_second", 0.0))
    )


def _show_ranking(ranked: Sequence[Mapping[str, Any]]) -> None:
    table = Table(
        "mesh", "remat", "batch", "fits", "bytes per device", "tokens/s", "MFU", title="Best first"
    )
    for each in ranked:
        mesh = ", ".join(f"{axis} {size}" for axis, size in each["mesh"].items())
        numbers = (
            f"{each.get('predicted_tokens_per_second', 0):,.0f}",
            f"{each.get('predicted_mfu', 0):.1%}",
        )
        size = _bytes(each.get("total_bytes_per_device", 0))
        table.add_row(
            mesh, each["remat"], str(each["batch_size"]), str(each["fits"]), size, *numbers
        )
    Console(markup=False, emoji=False).print(table)


def _devices(args: PlanArgs) -> tuple[Chip, Any]:
    kind, _, shape = args.topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise InputError(
            f"--topology {args.topology}: must be KIND:SHAPE, as v5p:4x4x4; kinds: {', '.join(CHIPS)}"
        )
    if CHIPS[kind].kind.startswith("NVIDIA"):
        return CHIPS[kind], math.prod(map(int, shape.split("x"))) * args.slices
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("jaxllm plan: compiling for a TPU needs libtpu; pip install 'jaxllm[tpu]'")
    more = {"num_slices": args.slices} if args.slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=args.topology, **more)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--topology {args.topology}: libtpu knows no such slice ({reason})"
        ) from None
    return CHIPS[kind], sorted(found.devices, key=lambda d: getattr(d, "slice_index", 0))


def _compile(lowered: Any) -> tuple[Any, str]:
    """(the program, "") or (None, why it does not fit): too little memory is an answer."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, " ".join(str(error).split())[:300]


def bytes_of(tree: Any) -> int:
    """Bytes on one device of arrays, by their shardings."""
    shard = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(shard, jax.tree.leaves(tree)))


def count_flops(jaxpr: Any, experts: int = 1) -> float:
    """FLOPs of the matrix products of a program, loops counted as often as they run, branches as the dearest.

    Grouped products count as with a balanced load of `experts` shards. A kernel is one of attention: half of its blocks lie
    above the diagonal and are skipped, which is too little forward and too much backward where it has a window.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            total += 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
        elif name == "ragged_dot_general":
            total += _grouped_flops(eqn) / experts
        elif name == "pallas_call":
            total += (
                math.prod(params["grid_mapping"].grid) * count_flops(params["jaxpr"], experts) / 2
            )
        elif name == "cond":
            total += max(count_flops(branch.jaxpr, experts) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else 1
            mesh = params["mesh"] if name == "shard_map" else None
            inside = mesh.shape.get("expert", 1) if mesh else experts
            times *= mesh.size if mesh else 1
            total += times * sum(count_flops(inner, inside) for inner in _inside(params))
    return total


def _grouped_flops(eqn: Any) -> float:
    """Each row meets one group's matrix; the gradient of the matrices has the groups in its result, not in an operand."""
    (rows, *_, inner), matrix = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    out = eqn.outvars[0].aval.shape
    return 2.0 * rows * inner * (matrix[-1] if len(matrix) == 2 else out[-1])


def _inside(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                yield inner


_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SIZES = {
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "bf16": 2,
    "f16": 2,
    "s8": 1,
    "u8": 1,
    "pred": 1,
    "f64": 8,
    "s64": 8,
    "s16": 2,
}


def collectives(
    text: str, mesh: Any, unknown_trips: int = 1, slow: str = "data"
) -> list[dict[str, Any]]:
    """What a compiled program sends: kind, mesh axes, how often it runs, bytes in all that leave a device.

    Loops are followed to their trip counts; unknown_trips: of an outermost one that data end. slow: the axis over slices. A
    ring sends (n - 1) / n of an all-gather's result, twice that for an all-reduce (Patarasuk and Yuan 2009).
    """
    bodies, entry = _computations(text)
    found: dict[tuple[str, tuple[str, ...]], list[float]] = {}

    def walk(name: str, times: int, unknown: int) -> None:
        for line in bodies.get(name, ()):
            if loop := re.search(r"while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                trips = _trips(bodies.get(loop[1], ()))
                walk(loop[2], times * (trips or unknown), unknown if trips else 1)
            elif call := re.search(
                r" (?:call|call-start|custom-call-start|conditional|async-start)\(.*", line
            ):
                # TPU7x's sparse cores run collectives of their own beside the rest: as called computations.
                for inner in re.findall(
                    r"(?:to_apply|calls|computation|called_computations)=\{?%?([\w.\-]+)", call[0]
                ):
                    walk(inner, times, unknown)
            if far := re.search(
                r' = \((\S+), .* send\(.*_xla_megascale_transfer_type="(\w+)"', line
            ):
                # Between slices the runtime of the hosts moves what a slice has added up already.
                entry = found.setdefault((far[2].lower().replace("_", "-"), (slow,)), [0, 0.0])
                entry[0], entry[1] = entry[0] + times, entry[1] + times * _bytes_of_shapes(far[1])
            elif kind := re.search(rf" ({'|'.join(_KINDS)})(?:-start)?\(", line):
                axes = _axes_of(line, mesh)
                count = math.prod(mesh.shape[a] for a in axes) if axes else mesh.size
                share = {"all-reduce": 2 * (count - 1) / count, "collective-permute": 1.0}.get(
                    kind[1], (count - 1) / count
                )
                size = _result_bytes(line) * (count if kind[1] == "reduce-scatter" else 1)
                entry = found.setdefault((kind[1], axes), [0, 0.0])
                entry[0], entry[1] = entry[0] + times, entry[1] + times * size * share

    walk(entry, 1, unknown_trips)
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
    """How often a loop runs: the constant its counter is compared with; 0 where something else ends it too."""
    numbers = [
        int(n) for line in condition for n in re.findall(r"s32\[\][^=]*constant\((\d+)\)", line)
    ]
    return 0 if any(" and(" in line for line in condition) else max(numbers, default=0)


def _result_bytes(line: str) -> int:
    result = line.split(" = ", 1)[1]
    return _bytes_of_shapes(re.split(rf" (?:{'|'.join(_KINDS)})", result)[0])


def _bytes_of_shapes(result: str) -> int:
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
    return sum(
        _SIZES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in shapes
    )


def _axes_of(line: str, mesh: Any) -> tuple[str, ...]:
    """The mesh axes that a collective's groups go along, from its replica groups."""
    names = [name for name, size in mesh.shape.items() if size > 1]
    if by_axis := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        parts = [part.split("=") for part in by_axis[1].split(",")]
        axes = [name.strip("' ") for name, size in parts if int(size) > 1]
        if len(axes) == len(names):
            return tuple(
                names[axes.index(a.strip("' "))]
                for a in by_axis[2].split(",")
                if a.strip("' ") in axes
            )
    if group := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        members = [int(n) for n in group[1].split(",")]
    elif iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        members = _first_group(*iota.groups(default=""))
    else:
        return tuple(names)
    places = np.unravel_index(members, tuple(mesh.shape.values()))
    return tuple(
        name for name, along in zip(mesh.shape, places, strict=True) if len({*along.tolist()}) > 1
    )


def _first_group(size: str, dims: str, order: str) -> list[int]:
    ids = np.arange(math.prod(map(int, dims.split(",")))).reshape([int(n) for n in dims.split(",")])
    ids = ids.transpose([int(n) for n in order.split(",")]) if order else ids
    return ids.reshape(-1, int(size))[0].tolist()


def _readable(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if "bytes" in name:
        return _bytes(value)
    return (
        f"{value:,.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if type(value) is int
        else str(value)
    )


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
