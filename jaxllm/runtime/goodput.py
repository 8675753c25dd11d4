"""The goodput ledger: how the wall time of a run was spent, over all its attempts, in goodput.jsonl.

An attempt is a process (or a job of processes) that worked on the run. Each second of it has one kind (KINDS). A line
of the ledger holds the seconds since the line before:

    {"attempt": 2, "time": 1790000000.0, "stage": "pretrain", "step": 40, "seconds": {"step": 9.1, "save": 0.4}}

A line may also have "programs", what it cost to have the compiled programs since the line before, "restored", the step
of the checkpoint that the attempt resumed from, and "event". Work of earlier attempts beyond that checkpoint is lost; the
time between two attempts is "down":

    attempt 1   start  compile  step 1-10  save  step 11-14  killed
                                                 (lost)
    attempt 2                                                      down  start  restore  compile  step 11-20
"""

import dataclasses
import functools
import json
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from jaxllm.runtime.files import read_jsonl
from jaxllm.runtime.programs import Cost, Programs

# Training steps, and the work of stages that have no steps.
PRODUCTIVE = ("step", "work")
KINDS = (
    *PRODUCTIVE,
    "import",  # Python, JAX and this package
    "join",  # waiting for the other processes of the job
    "start",  # everything else before a checkpoint is restored: devices, data, tokenizer
    "compile",  # the first step
    "data_wait",
    "evaluation",
    "save",
    "restore",
    "lost",
    "down",
)
# Necessary in each attempt, whatever became of its work.
_STARTING = ("import", "join", "start")
_FIELDS = {"attempt", "time", "stage", "step", "seconds"}


class Ledger:
    """Accounts for this process's time; only process 0 writes it.

    Args:
        path: goodput.jsonl.
        began: `time.time()` when the process began, if that was before now (`began.process_began`).
        earlier: seconds between then and now whose kind is known; the first mark accounts for the others.
        programs: counts what compiling costs.
    """

    def __init__(
        self,
        path: epath.PathLike,
        began: float | None = None,
        earlier: Mapping[str, float] | None = None,
        programs: Programs | None = None,
    ):
        self.path = epath.Path(path)
        self._programs = programs
        self._seconds: dict[str, float] = defaultdict(float, earlier or {})
        self._since = time.monotonic()  # of the last mark
        if began:
            self._since -= max(0.0, time.time() - began)
        self._since += sum(self._seconds.values())

    @functools.cached_property
    def attempt(self) -> int:
        """Number of this attempt at the run, from 1."""
        # Read at the first use, when this process has locked the run directory.
        lines = read(self.path) if jax.process_index() == 0 else []
        return 1 + max((line["attempt"] for line in lines), default=0)

    @functools.cached_property
    def _has_cut_line(self) -> bool:
        """Whether an earlier attempt was killed while it wrote a line."""
        content = self.path.read_bytes() if self.path.exists() else b""
        return bool(content) and not content.endswith(b"\n")

    def mark(self, kind: str) -> float:
        """Account the time since the last mark to `kind`; returns its seconds."""
        now = time.monotonic()
        seconds = now - self._since
        self._since = now
        self._seconds[kind] += seconds
        return seconds

    def write(self, stage: str, step: int = 0, **more: Any) -> None:
        """Write a line with the times marked since the last line; `more`: further fields of the line."""
        seconds = {kind: round(value, 4) for kind, value in self._seconds.items()}
        self._seconds.clear()
        cost = self._programs.take() if self._programs else Cost()
        if jax.process_index() != 0:
            return
        if cost != Cost():
            more["programs"] = {**dataclasses.asdict(cost), "seconds": round(cost.seconds, 4)}
        line = {
            "attempt": self.attempt,
            "time": round(time.time(), 3),
            "stage": stage,
            "step": step,
            **more,
            "seconds": seconds,
        }
        # A cut line is ended first, so that only that one is damaged.
        newline = "\n" if self._has_cut_line else ""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(newline + json.dumps(line) + "\n")
        self._has_cut_line = False


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a ledger, without damaged ones; an empty list if the file does not exist."""
    return [line for line in read_jsonl(path, damaged="ignore") if line.keys() >= _FIELDS]


def totals(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each kind over all attempts, with lost work and the time between attempts."""
    restored: dict[tuple[int, str], int] = {}  # (attempt, stage) -> step that it resumed from
    for line in lines:
        if "restored" in line:
            restored.setdefault((line["attempt"], line["stage"]), line["restored"])

    seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    previous = None
    for line in lines:
        if previous and previous["attempt"] != line["attempt"]:
            began = line["time"] - sum(line["seconds"].values())
            seconds["down"] += max(0.0, began - previous["time"])
        lost = _is_lost(line, restored)
        for kind, value in line["seconds"].items():
            seconds["lost" if lost and kind not in _STARTING else kind] += value
        previous = line
    return seconds


def _is_lost(line: dict[str, Any], restored: dict[tuple[int, str], int]) -> bool:
    """Whether a later attempt resumed the stage from a step before this line's."""
    for (attempt, stage), step in restored.items():
        if attempt > line["attempt"] and stage == line["stage"] and step < line["step"]:
            return True
    return False


def summary(lines: list[dict[str, Any]]) -> str:
    """One line: the productive share of the wall time, and what the rest was spent on, the largest share first."""
    seconds = totals(lines)
    wall = sum(seconds.values())
    productive = sum(seconds[kind] for kind in PRODUCTIVE) / wall
    attempts = len({line["attempt"] for line in lines})
    plural = "s" if attempts > 1 else ""
    text = f"goodput: {productive:.1%} of {wall:,.0f} s productive in {attempts} attempt{plural}"

    shares = []
    for kind in sorted(KINDS, key=lambda kind: -seconds[kind]):
        if kind not in PRODUCTIVE and seconds[kind] > 0.0005 * wall:  # else it would print as 0.0%
            shares.append(f"{kind.replace('_', ' ')} {seconds[kind] / wall:.1%}")
    if shares:
        text += f"; {', '.join(shares)}"
    return text + _programs(lines)


def _programs(lines: list[dict[str, Any]]) -> str:
    """What compiled programs cost over all attempts; "" if no line says it."""
    costs = [line["programs"] for line in lines if "programs" in line]
    if not costs:
        return ""
    compiled = sum(cost["compiled"] for cost in costs)
    read_back = sum(cost["read"] for cost in costs)
    seconds = sum(cost["seconds"] for cost in costs)
    return f"; programs: {compiled} compiled, {read_back} read from the cache, {seconds:,.0f} s"
