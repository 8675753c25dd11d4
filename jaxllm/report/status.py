"""`jaxllm status`: where a run is, how fast it goes, and what of it would survive now. It only reads.

goodput.jsonl            the stage and step it is at, its attempts, the share of productive time
STAGE/metrics.jsonl      the newest numbers
STAGE/checkpoints/       the newest save
.lock, or the lease      whether somebody works in the run directory
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table

from jaxllm import stages
from jaxllm.config import InputError
from jaxllm.report.status_config import StatusArgs
from jaxllm.runtime import goodput
from jaxllm.runtime.files import is_remote, read_json, read_jsonl_tail
from jaxllm.runtime.seal import committed_steps, read_seal
from jaxllm.runtime.store import working
from jaxllm.runtime.store.lease import newest_beat

# Of a stage's numbers the ends of those that say most, in this order; then what was measured on held-out data.
_SHOWN = ("/loss", "/score", "/kl", "/accuracy", "throughput/tokens_per_second", "throughput/mfu")
# Of a stage's numbers: far more than lie between two evaluations.
_TAIL_BYTES = 2**20
# Lines of the ledger over which the rate of steps is taken.
_RATE_LINES = 6


def command(args: StatusArgs) -> None:
    """Prints the status once, or with --watch again and again.

    Raises:
        InputError: it is not a run directory.
    """
    while True:
        status = read_status(args.run_dir)
        if args.json:
            print(json.dumps(status), flush=True)
        else:
            show(status, clear=args.watch)
        if not args.watch or status["state"] == "finished":
            return
        time.sleep(args.every)


def read_status(run_dir: epath.PathLike) -> dict[str, Any]:
    """What is known of a run, as plain JSON types; what is not known is null.

    Raises:
        InputError: it is not a run directory.
    """
    now = time.time()
    folder = working.local_run(run_dir)
    lines = goodput.read(folder / "goodput.jsonl")
    if not lines:
        raise InputError(
            f"{run_dir}: is not a run directory, or nothing has run there yet (no goodput.jsonl)"
        )
    last = lines[-1]
    stage = last["stage"]
    alive = _alive_in_store(str(run_dir), now) if is_remote(run_dir) else _alive_here(folder)
    finished = read_json(folder / stage / "result.json") is not None
    step, rate, total = _step(lines), _steps_per_second(lines), _num_steps(lines)
    left = (total - step) / rate if rate and total and not finished else None
    seconds = goodput.totals(lines)
    return {
        "run": str(run_dir),
        "state": _state(folder, stage, finished, alive["alive"]),
        "stages": _finished_stages(folder),
        "stage": stage,
        "step": step,
        "num_steps": total,
        "steps_per_second": rate,
        "seconds_left": left,
        "age_seconds": max(0.0, now - last["time"]),
        "metrics": _metrics(folder / stage),
        "save": _newest_save(folder / stage, now),
        "attempts": last["attempt"],
        "goodput": sum(seconds[kind] for kind in goodput.PRODUCTIVE)
        / (sum(seconds.values()) or 1.0),
        **alive,
    }


def _state(folder: epath.Path, stage: str, finished: bool, alive: bool | None) -> str:
    """finished: its last stage is; running or stopped, where that can be seen; else begun."""
    recorded = read_json(folder / stage / "config.json") or {}
    wanted = recorded.get("stages") or [stage]
    if finished and all(read_json(folder / name / "result.json") for name in wanted):
        return "finished"
    return {True: "running", False: "stopped", None: "begun"}[alive]


def _finished_stages(folder: epath.Path) -> list[str]:
    return [name for name in stages.names() if (folder / name / "result.json").exists()]


def _step(lines: Sequence[Mapping[str, Any]]) -> int:
    """The newest step of the current stage; 0: it has none."""
    stage = lines[-1]["stage"]
    # The line that says that a stage is finished has no step.
    steps = [line["step"] for line in lines if line["stage"] == stage]
    return steps[-1] or (steps[-2] if len(steps) > 1 else 0)


def _num_steps(lines: Sequence[Mapping[str, Any]]) -> int | None:
    """Steps of the current stage in all; None: it has none, or an older version has begun it."""
    stage = lines[-1]["stage"]
    known = [line["num_steps"] for line in lines if line["stage"] == stage and "num_steps" in line]
    return known[-1] if known else None


def _steps_per_second(lines: Sequence[Mapping[str, Any]]) -> float | None:
    last = lines[-1]
    same = []
    for line in lines:
        if (line["stage"], line["attempt"]) == (last["stage"], last["attempt"]) and line["step"]:
            same.append(line)
    same = same[-_RATE_LINES:]
    if len(same) < 2 or same[-1]["time"] <= same[0]["time"]:
        return None
    return (same[-1]["step"] - same[0]["step"]) / (same[-1]["time"] - same[0]["time"])


def _metrics(directory: epath.Path) -> dict[str, float]:
    """The newest value of the numbers that say most."""
    newest: dict[str, float] = {}
    # Its end: the page that watches a run asks every few seconds, and the file of a long one is large.
    for line in read_jsonl_tail(Path(directory / "metrics.jsonl"), _TAIL_BYTES):
        newest |= line
    shown = {}
    for end in _SHOWN:
        shown |= {name: value for name, value in newest.items() if name.endswith(end)}
    return shown | {name: value for name, value in newest.items() if name.startswith("eval/")}


def _newest_save(directory: epath.Path, now: float) -> dict[str, Any] | None:
    """{step, age_seconds} of the newest checkpoint."""
    checkpoints = directory / "checkpoints"
    steps = committed_steps(checkpoints) if checkpoints.exists() else []
    if not steps:
        return None
    seal = checkpoints / str(steps[-1])
    # A seal of an older version does not say when it was written.
    written = read_seal(seal).get("time", os.path.getmtime(seal / "seal.json"))
    return {"step": steps[-1], "age_seconds": max(0.0, now - written)}


def _alive_here(folder: epath.Path) -> dict[str, Any]:
    """Whether a process of this machine has locked the run directory. Asked without touching the lock."""
    nobody = {"alive": False, "holder": None}
    lock, table = Path(folder) / ".lock", Path("/proc/locks")
    if not table.exists():  # not Linux
        return {"alive": None, "holder": None}
    if not lock.exists():
        return nobody
    state = lock.stat()
    place = f"{os.major(state.st_dev):02x}:{os.minor(state.st_dev):02x}:{state.st_ino}"
    # "1: FLOCK  ADVISORY  WRITE 4711 08:01:393 0 EOF"
    for line in table.read_text().splitlines():
        words = line.split()
        if "FLOCK" in words and place in words:
            return {"alive": True, "holder": f"process {words[words.index(place) - 1]}"}
    return nobody


def _alive_in_store(url: str, now: float) -> dict[str, Any]:
    """What the newest lease says, whose holder renews it every few seconds."""
    beat = newest_beat(url)
    if beat is None:
        return {"alive": None, "holder": None}
    alive = not beat["free"] and now - beat["time"] < beat["seconds"]
    return {"alive": alive, "holder": f"{beat['host']}, process {beat['pid']}"}


# --- For people.


def show(status: Mapping[str, Any], clear: bool = False) -> None:
    """Prints a status as a table."""
    console = Console(markup=False, emoji=False)
    if clear:
        console.clear()
    table = Table(title=f"{status['run']}: {status['state']}", show_header=False)
    for name, text in _rows(status):
        table.add_row(name, text)
    console.print(table)


def _rows(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    total = f" of {status['num_steps']:,}" if status["num_steps"] else ""
    rows = [("stage", status["stage"])]
    if status["step"]:
        rows.append(("step", f"{status['step']:,}{total}"))
    if status["steps_per_second"]:
        rows.append(("steps per second", f"{status['steps_per_second']:.3g}"))
    if status["seconds_left"] is not None:
        rows.append(("left in this stage", duration(status["seconds_left"])))
    rows.append(("last sign of life", f"{duration(status['age_seconds'])} ago"))
    if status["alive"]:
        rows.append(("works there", status["holder"]))
    if save := status["save"]:
        rows.append(("last save", f"step {save['step']:,}, {duration(save['age_seconds'])} ago"))
    rows += [(name, f"{value:,.4g}") for name, value in status["metrics"].items()]
    rows.append(("attempts", str(status["attempts"])))
    rows.append(("productive", f"{status['goodput']:.1%}"))
    rows.append(("finished", ", ".join(status["stages"]) or "no stage yet"))
    return rows


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = round(seconds)
    for unit, size, smaller, part in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"
