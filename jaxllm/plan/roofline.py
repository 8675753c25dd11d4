"""The programs of an update together: how much memory they take, how long they run, and what limits them."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.plan.measure import bytes_of
from jaxllm.plan.tables import in_bytes
from jaxllm.runtime.hardware import EFFICIENCY, Chip
from jaxllm.train import Program

# {name of a program: what `measure` found}
Measured = Mapping[str, dict[str, Any]]


def add_up(
    programs: Sequence[Program], measured: Measured, state_bytes: int, chip: Chip
) -> dict[str, Any]:
    """Totals of an update on one device.

    FLOPs add up. Of memory the largest program counts, on top of every role's state, which stays.
    """

    def total(key: str) -> float:
        return sum(measured[p.name][key] * p.times for p in programs)

    def largest(key: str) -> int:
        return max(figures[key] for figures in measured.values())

    seconds = sum(figures["compile_seconds"] for figures in measured.values())
    report: dict[str, Any] = {
        "flops_per_device": total("flops_per_device"),
        "model_flops_per_device": total("model_flops_per_device"),
        "compile_seconds": round(seconds, 1),
        "hbm_bytes": int(chip.hbm),
        "fits": True,
        "collectives": [],
    }
    # The first program that does not fit is the reason; the others have no figures to add.
    for name, figures in measured.items():
        if not figures["fits"]:
            return report | {"fits": False, "reason": f"{name}: {figures['reason']}"}
    for key in ("argument_bytes_per_device", "temp_bytes_per_device", "host_bytes_per_device"):
        report[key] = largest(key)
    # The arguments of a single program are the state and a batch.
    held = report["argument_bytes_per_device"] if len(programs) == 1 else state_bytes
    # Programs run one after another: the temporaries of one are gone when the next starts.
    needed = held + max(_own_bytes(program, measured[program.name]) for program in programs)
    report["total_bytes_per_device"] = needed
    report["moved_bytes_per_device"] = total("moved_bytes_per_device")
    report["collectives"] = _merged_collectives(programs, measured)
    if needed > chip.hbm:
        report["fits"] = False
        report["reason"] = (
            f"{in_bytes(needed)} of state and temporaries exceed {in_bytes(chip.hbm)}"
        )
    return report


def _own_bytes(program: Program, figures: Mapping[str, Any]) -> int:
    """What exists only while a program runs."""
    return (
        figures["temp_bytes_per_device"]
        + figures["output_bytes_per_device"]
        + bytes_of(program.copied)
    )


def _merged_collectives(programs: Sequence[Program], measured: Measured) -> list[dict[str, Any]]:
    merged: dict[tuple[str, ...], dict[str, Any]] = {}
    for program in programs:
        for row in measured[program.name]["collectives"]:
            key = (row["kind"], *row["axes"])
            empty = {"kind": row["kind"], "axes": row["axes"], "count": 0, "bytes": 0}
            total = merged.setdefault(key, empty)
            total["count"] += row["count"] * program.times
            total["bytes"] += row["bytes"] * program.times
    return [merged[key] for key in sorted(merged)]


def predict(
    programs: Sequence[Program], measured: Measured, chip: Chip, tokens: int
) -> dict[str, Any]:
    """Seconds of an update by a roofline: each program takes as long as what limits it, and they run in turn.

    compute  FLOPs / (peak x EFFICIENCY)
    hbm      bytes read from and written to the device's memory (`plan.traffic`) / bandwidth
    links    bytes of collectives / bandwidth, within a slice or node (ici) and between them (dcn)
    """
    total: dict[str, float] = {}
    for program in programs:
        figures = measured[program.name]
        once = _seconds(figures, chip)
        figures["predicted_seconds"] = once["predicted_step_seconds"]
        for name, seconds in once.items():
            total[name] = total.get(name, 0.0) + seconds * program.times
    # Not the largest of the sums: each program is limited by something else.
    step = total["predicted_step_seconds"]
    model_flops = sum(measured[p.name]["model_flops_per_device"] * p.times for p in programs)
    return {
        **total,
        "predicted_tokens_per_second": tokens / step,
        "predicted_mfu": model_flops / chip.flops / step,
    }


def _seconds(figures: Mapping[str, Any], chip: Chip) -> dict[str, float]:
    """Of one run of a program."""
    near = far = 0.0
    for row in figures["collectives"]:
        if row["ways_out"]:
            far += row["bytes"] / row["ways_out"]
        else:
            near += row["bytes"]
    compute = figures["flops_per_device"] / chip.flops
    memory = figures["moved_bytes_per_device"] / chip.hbm_bandwidth
    ici = near / chip.link
    dcn = far / chip.dcn
    return {
        "compute_seconds": compute,
        "hbm_seconds": memory,
        "ici_seconds": ici,
        "dcn_seconds": dcn,
        "predicted_step_seconds": max(compute / EFFICIENCY, memory, ici + dcn),
    }
