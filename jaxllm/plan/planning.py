"""`jaxllm plan`: a stage's real step, compiled for accelerators that are not there.

XLA compiles for a topology on any machine (`jax.experimental.topologies`), with libtpu or the plugin for NVIDIA GPUs: memory,
collectives and whether a step fits are those of the hardware. Times are a roofline over what the data sheets promise.
"""

import contextlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from jaxllm import stages
from jaxllm.config import InputError
from jaxllm.config.renames import print_once
from jaxllm.life import Config, with_defaults
from jaxllm.models import transformer
from jaxllm.plan import compiler, estimate, gpus, roofline, tables
from jaxllm.plan.config import PlanArgs
from jaxllm.plan.kept import plan_path
from jaxllm.plan.measure import bytes_of, measure, optimization_level
from jaxllm.plan.results import kept_results
from jaxllm.plan.search import candidates
from jaxllm.runtime.files import write_json
from jaxllm.runtime.hardware import CHIPS, Chip
from jaxllm.runtime.mesh import planned_mesh
from jaxllm.train import Program, TrainState


def command(args: PlanArgs, config: Config) -> None:
    """Prints the report of a stage's step.

    Raises:
      InputError: where config and topology do not fit together.
    """
    # Sections take data and prompts from others, as in a run.
    config = with_defaults(config)
    if args.search:
        ranked = search(config, args)
        print(json.dumps(ranked)) if args.json else tables.show_ranking(ranked)
        return
    report = plan(config, args)
    if args.keep:
        path = plan_path(config, args.stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {key: value for key, value in report.items() if key != "leaves"})
    if args.json:
        print(json.dumps(report))
        return
    slices = f" x {args.slices}" if args.slices > 1 else ""
    tables.show_report(report, f"{args.stage} on {args.topology}{slices}")


def plan(config: Config, args: PlanArgs) -> dict[str, Any]:
    """The report that --json prints."""
    known = [stage.name for stage in stages.TABLE if stage.programs]
    if args.stage not in known:
        raise InputError(f"--stage {args.stage}: is not known; known: {', '.join(known)}")
    if not config.model.vocab_size:
        raise InputError(
            f"{args.config}: model.vocab_size: plan does not train a tokenizer to learn it from; set it"
        )
    # A mesh of devices that exist only as a topology.
    chip, devices = _devices(args)
    mesh = planned_mesh(config.mesh_of(args.stage), devices)
    compiles = not isinstance(devices, int)
    with gpus.as_if_present(devices[0]) if compiles else contextlib.nullcontext():
        programs, held = stage_programs(config, args.stage, mesh)
        report = {**_sizes(config, args.stage, mesh, held), "compile_seconds": 0.0, "fits": True}
        if compiles:
            report["compiler"] = compiler.name(devices[0].platform)
            report |= _compiled(programs, mesh, chip, report, args.exact)
        else:
            report |= estimate.figures(config, args.stage, mesh, chip, report)
    if args.leaves:
        report["leaves"] = _shardings(held)
    return report


def stage_programs(config: Config, stage: str, mesh: Any) -> tuple[list[Program], dict[str, Any]]:
    """(the programs of a stage's update, {role: its state}), as shapes with their shardings on this mesh."""
    return stages.load(stages.named(stage).programs)(mesh, config, stage)


# Above this share of a device's memory, a quick compilation does not decide whether a program fits.
_TIGHT = 0.85


def _compiled(
    programs: Sequence[Program], mesh: Any, chip: Chip, sizes: Mapping[str, Any], exact: bool
) -> dict[str, Any]:
    """What compiling finds out about programs whose `sizes` are known."""
    results = kept_results()
    on_gpus = mesh.devices.flat[0].platform == "gpu"

    def compile_all(exact: bool) -> tuple[roofline.Measured, dict[str, Any]]:
        # Levels are libtpu's; for a GPU there is one.
        with optimization_level(None if exact or on_gpus else "O0"):
            measured = {program.name: measure(program, mesh, results) for program in programs}
        # A device also holds the states of models whose programs are not running.
        totals = roofline.add_up(programs, measured, sizes["state_bytes_per_device"], chip)
        known = sum(figures["known"] for figures in measured.values())
        return measured, totals | {"exact": exact or on_gpus, "programs_known": known}

    measured, report = compile_all(exact)
    if not report["exact"] and report.get("total_bytes_per_device", 0) > _TIGHT * chip.hbm:
        measured, report = compile_all(exact=True)
    if report["fits"]:
        report |= roofline.predict(programs, measured, chip, sizes["tokens_per_step"])
    if len(programs) > 1:
        report["programs"] = measured
    return report


def _sizes(config: Config, stage: str, mesh: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    """What is known before anything is compiled."""
    trained, frozen = [], []
    for tree in held.values():
        # Frozen models have no optimizer state and no gradients.
        (trained if isinstance(tree, TrainState) else frozen).append(tree)
    by_role = {role: bytes_of(tree) for role, tree in held.items()}
    params = [state.params for state in trained]
    return {
        "devices": mesh.size,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "parameters": transformer.num_params(config.model),
        "embedding_parameters": config.model.embedding_parameters,
        "tokens_per_step": estimate.tokens_per_step(config, stage),
        "parameter_bytes_per_device": bytes_of([params, frozen]),
        "optimizer_bytes_per_device": bytes_of([state.opt_state for state in trained]),
        # Models are trained in turn: one set of gradients exists at a time.
        "gradient_bytes_per_device": max(map(bytes_of, params), default=0),
        "state_bytes_per_device": bytes_of(held),
        "state_bytes_by_role": {role: size for role, size in by_role.items() if size},
    }


def _shardings(held: Mapping[str, Any]) -> dict[str, str]:
    """{parameter: its shape and PartitionSpec}."""
    params = {}
    for role, tree in held.items():
        params[role] = tree.params if isinstance(tree, TrainState) else tree
    shardings = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shardings[name] = f"{list(leaf.shape)} {leaf.sharding.spec}"
    return shardings


def search(config: Config, args: PlanArgs) -> list[dict[str, Any]]:
    """Meshes, remat policies and batch sizes, the best first.

    All are estimated; the most promising are compiled, where that is possible.
    """
    chip, devices = _devices(args)
    count = devices if isinstance(devices, int) else len(devices)
    ranked = []
    # Estimates order all candidates; only the first ones are worth compiling.
    for candidate, change in candidates(config, args.stage, count, args.slices, chip)[: args.tries]:
        try:
            report = plan(candidate, args)
        except InputError as error:
            report = {"fits": False, "reason": str(error)}
        for key in _RANKED:
            if key in report:
                change[key] = report[key]
        ranked.append(change)

    def order(row: Mapping[str, Any]) -> tuple[bool, float]:
        # False sorts before True: what fits comes first, the fastest of it on top.
        return not row["fits"], -row.get("predicted_tokens_per_second", 0.0)

    return sorted(ranked, key=order)


# What a ranking shows of a report.
_RANKED = (
    "fits",
    "total_bytes_per_device",
    "predicted_tokens_per_second",
    "predicted_mfu",
    "compile_seconds",
    "reason",
)


def _devices(args: PlanArgs) -> tuple[Chip, Any]:
    """(the kind of device, a list of devices to compile for; of GPUs without their compiler, their number)."""
    kind, _, shape = args.topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise InputError(
            f"--topology {args.topology}: must be KIND:SHAPE, as v5p:4x4x4; kinds: {', '.join(CHIPS)}"
        )
    chip = CHIPS[kind]
    if kind in gpus.GPUS:
        return chip, _gpus(args, kind, [int(size) for size in shape.split("x")])
    return chip, _tpus(args)


def _gpus(args: PlanArgs, kind: str, shape: Sequence[int]) -> list[Any] | int:
    if args.slices > 1:
        raise InputError(
            f"--slices {args.slices}: GPUs come in nodes, not in slices; give NODESxGPUS, as --topology {kind}:4x8"
        )
    nodes, per_node = gpus.nodes(shape, args.topology)
    if gpus.installed():
        return gpus.devices(kind, nodes, per_node)
    print_once("note: estimated by formulas; pip install 'jaxllm[plan-gpu]' compiles the programs")
    return nodes * per_node


def _tpus(args: PlanArgs) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("jaxllm plan: compiling for a TPU needs libtpu; pip install 'jaxllm[tpu]'")
    if note := compiler.note(*compiler.libtpu()):
        print_once(note)  # a search comes here for every candidate
    # libtpu refuses the option for a single slice on some topologies.
    options = {"num_slices": args.slices} if args.slices > 1 else {}
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=args.topology, **options
        )
    # libtpu says by any of these that a shape does not exist, depending on its version and the number of slices.
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--topology {args.topology}: libtpu knows no such slice ({reason})"
        ) from None
    return sorted(topology.devices, key=lambda device: getattr(device, "slice_index", 0))
