"""The goodput ledger: where a run's wall time went, over all its attempts, in goodput.jsonl.

Every second of a process belongs to one kind. A line is written at least once an interval:
{"attempt", "time", "stage", "step", "seconds": {kind: s}}. What an attempt did past the checkpoint that the next one
went on from is lost; the time from a process's last line to the next one's first is "down".
"""

import contextlib
import json
import time
from collections import defaultdict
from typing import Any

import jax
from etils import epath

PRODUCTIVE = ("step", "work")  # training steps, and what the stages without steps do
KINDS = (
    *PRODUCTIVE,
    "start",
    "compile",
    "data_wait",
    "evaluation",
    "save",
    "restore",
    "lost",
    "down",
)


class Ledger:
    """Sorts this process's time; writes on process 0 only."""

    def __init__(self, path: epath.PathLike, began: float | None = None):
        """began: time.time() when the process began, where that was before now."""
        self.path = epath.Path(path)
        lines = read(self.path) if jax.process_index() == 0 else []
        self.attempt = 1 + max((line["attempt"] for line in lines), default=0)
        cut = bool(lines) and not self.path.read_bytes().endswith(b"\n")
        self._newline = "\n" if cut else ""  # ends a line that was cut
        self._seconds: dict[str, float] = defaultdict(float)
        self._since = time.monotonic() - (max(0.0, time.time() - began) if began else 0.0)

    def mark(self, kind: str) -> float:
        """Everything since the last mark was of this kind; returns its seconds."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        self._seconds[kind] += seconds
        return seconds

    def write(self, stage: str, step: int = 0, **more: Any) -> None:
        """Write what was marked since the last line."""
        seconds = {kind: round(s, 4) for kind, s in self._seconds.items()}
        self._seconds.clear()
        line = {
            "attempt": self.attempt,
            "time": round(time.time(), 3),
            "stage": stage,
            "step": step,
            **more,
        }
        if jax.process_index() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._newline + json.dumps({**line, "seconds": seconds}) + "\n")
            self._newline = ""


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a ledger; none where there is no file. A line that was cut or is damaged is left out."""
    path, lines = epath.Path(path), []
    for text in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):
            value = json.loads(text.decode())
            if (
                isinstance(value, dict)
                and {"attempt", "time", "stage", "step", "seconds"} <= value.keys()
            ):
                lines.append(value)
    return lines


def totals(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by kind over all attempts, lost work and the time between attempts included."""
    seconds: dict[str, float] = {kind: 0.0 for kind in KINDS}
    restored: dict[tuple[int, str], int] = {}  # (attempt, stage) -> the step it went on from
    for line in lines:
        if "restored" in line:
            restored.setdefault((line["attempt"], line["stage"]), line["restored"])
    for before, line in zip([None, *lines], lines, strict=False):
        if before and before["attempt"] != line["attempt"]:
            seconds["down"] += max(
                0.0, line["time"] - sum(line["seconds"].values()) - before["time"]
            )
        later = (
            s
            for (a, stage), s in restored.items()
            if a > line["attempt"] and stage == line["stage"]
        )
        wasted = any(step < line["step"] for step in later)
        for kind, value in line["seconds"].items():
            seconds["lost" if wasted and kind != "start" else kind] += value
    return seconds


def summary(lines: list[dict[str, Any]]) -> str:
    """One line: the productive share of the wall time, and where the rest went."""
    seconds = totals(lines)
    wall = sum(seconds.values())
    share = lambda kind: f"{kind.replace('_', ' ')} {seconds[kind] / wall:.1%}"
    rest = sorted(
        (k for k in KINDS if k not in PRODUCTIVE and seconds[k] > 0.0005 * wall),
        key=lambda k: -seconds[k],
    )
    attempts = len({line["attempt"] for line in lines})
    productive = sum(seconds[kind] for kind in PRODUCTIVE) / wall
    return (
        f"goodput: {productive:.1%} of {wall:,.0f} s productive in {attempts} "
        f"attempt{'s' if attempts > 1 else ''}{'; ' if rest else ''}{', '.join(map(share, rest))}"
    )
