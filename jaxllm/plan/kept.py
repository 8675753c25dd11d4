"""A plan that `jaxllm plan --keep` left in the run directory, next to what a run measured."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils import epath

from jaxllm.life import Config, run_directory


def plan_path(config: Config, stage: str) -> epath.Path:
    """Where `jaxllm plan --keep` leaves its report of a stage."""
    return run_directory(config) / "plans" / f"{stage}.json"


def compare_with_measured(
    report: Mapping[str, Any] | None, metrics: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """{"plan": {name: {planned, measured}}} of a kept plan; {} without one.

    metrics: the lines of the stage's log, of which the last numbers count.
    """
    if not report:
        return {}
    newest: dict[str, Any] = {}
    for line in metrics:
        newest |= line
    rate = newest.get("throughput/tokens_per_second")
    memory = jax.local_devices()[0].memory_stats() or {}
    measured = {
        "predicted_tokens_per_second": rate,
        "predicted_step_seconds": report["tokens_per_step"] / rate if rate else None,
        "predicted_mfu": newest.get("throughput/mfu"),
        "total_bytes_per_device": memory.get("peak_bytes_in_use"),
    }
    pairs = {}
    for name, value in measured.items():
        pair = {"planned": report.get(name), "measured": value}
        pairs[name.removeprefix("predicted_")] = pair
    return {"plan": pairs}
