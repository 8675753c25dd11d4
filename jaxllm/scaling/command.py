"""`jaxllm fit-scaling`: a law of finished runs, how well it predicts the largest of them, and what it says of others."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxllm.config import InputError
from jaxllm.scaling import law as laws
from jaxllm.scaling.config import FitScalingArgs
from jaxllm.scaling.law import FORMS, Budget, Law
from jaxllm.scaling.picture import draw
from jaxllm.scaling.runs import Run, read_runs

# The intervals hold 90% of the samples.
_BOUNDS = (5, 95)


def command(args: FitScalingArgs) -> None:
    """Fits, prints, and writes if it is told where.

    Raises:
        InputError: the runs do not tell a law, or no model reaches a target.
    """
    runs = read_runs(args.runs, args.stage, args.metric, FORMS[args.form].counts_embeddings)
    fitted, held_out = split(runs, args.hold_out)
    try:
        law = laws.fit([run.point for run in fitted], args.form)
    except ValueError as error:
        where = f" ({args.hold_out} held out)" if args.hold_out else ""
        raise InputError(f"{args.runs[0]}: {error}{where}") from None
    points = [run.point for run in fitted]
    samples = laws.bootstrap(points, law, args.samples, args.seed, args.form)
    report = report_of(args, fitted, held_out, law, samples)
    if args.out:
        _write(Path(args.out), report, fitted, held_out, law, args.metric)
    if args.json:
        print(json.dumps(report), flush=True)
    else:
        show(report, args)


def split(runs: Sequence[Run], hold_out: int) -> tuple[list[Run], list[Run]]:
    """(runs that are fitted, runs of the `hold_out` largest sizes)."""
    sizes = sorted({run.point.parameters for run in runs})
    held = set(sizes[len(sizes) - hold_out :]) if hold_out else set()
    fitted = [run for run in runs if run.point.parameters not in held]
    return fitted, [run for run in runs if run.point.parameters in held]


def report_of(
    args: FitScalingArgs,
    fitted: Sequence[Run],
    held_out: Sequence[Run],
    law: Law,
    samples: Sequence[Law],
) -> dict[str, Any]:
    """Everything that is said, as plain JSON types. Intervals are [low, high]."""
    counts_embeddings = FORMS[args.form].counts_embeddings
    rate = _flops_per_second(args.plan, counts_embeddings) if args.plan else None

    def budgets(values: Sequence[float], of: Callable[[Law], Callable[[float], Budget]]) -> Any:
        return [_budget(of, law, samples, value, rate) for value in values]

    return {
        "metric": args.metric,
        "form": args.form,
        "counts_embeddings": counts_embeddings,
        "law": law._asdict(),
        "intervals": {
            name: _interval([getattr(each, name) for each in samples]) for name in law._fields
        },
        "runs": [{"directory": run.directory, **run.point._asdict()} for run in fitted],
        "relative_error": laws.relative_error(law, [run.point for run in fitted]),
        "held_out": [_prediction(run, law, samples) for run in held_out],
        "for_flops": budgets(args.flops, lambda each: each.best_for_flops),
        "for_target": budgets(args.target, lambda each: each.best_for_loss),
        "flops_per_device_second": rate,
    }


def _prediction(run: Run, law: Law, samples: Sequence[Law]) -> dict[str, Any]:
    """What the law says of a run that it has not seen."""
    N, D, measured = run.point
    predicted = law.loss(N, D)
    return {
        "directory": run.directory,
        **run.point._asdict(),
        "predicted": predicted,
        "interval": _interval([each.loss(N, D) for each in samples]),
        "error": predicted - measured,
    }


def _budget(
    of: Callable[[Law], Callable[[float], Budget]],
    law: Law,
    samples: Sequence[Law],
    value: float,
    rate: float | None,
) -> dict[str, Any]:
    """The best model for FLOPs or for a loss, with intervals, and its device-hours at `rate` FLOP/s."""
    try:
        best = of(law)(value)
    except ValueError as error:
        raise InputError(f"--target: {error}; no model of this law reaches it") from None
    others = []
    for each in samples:
        try:
            others.append(of(each)(value))
        except ValueError:  # out of reach by this sample's E: it counts as without end
            others.append(Budget(math.inf, math.inf, math.inf, value))
    intervals = {
        name: _interval([getattr(other, name) for other in others]) for name in Budget._fields
    }
    hours = best.flops / rate / 3600 if rate else None
    return {**best._asdict(), "intervals": intervals, "device_hours": hours}


def _interval(values: Sequence[float]) -> list[float | None]:
    """[low, high]; null where it has no end."""
    low, high = np.percentile(values, _BOUNDS, method="nearest")
    return [float(each) if np.isfinite(each) else None for each in (low, high)]


def _flops_per_second(path: str, counts_embeddings: bool) -> float:
    """6 N D per second of one device, by a plan."""
    try:
        plan = json.loads(Path(path).read_text())
        tokens = plan["predicted_tokens_per_second"]
        parameters = plan["parameters"]
        if not counts_embeddings:
            parameters -= plan["embedding_parameters"]
        return 6 * parameters * tokens / plan["devices"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"--plan {path}: is not what `jaxllm plan --json` prints ({error})"
        ) from None


def _write(
    folder: Path,
    report: dict[str, Any],
    fitted: Sequence[Run],
    held_out: Sequence[Run],
    law: Law,
    metric: str,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "law.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(folder / "law.png", fitted, held_out, law, metric)


# --- For people.


def show(report: dict[str, Any], args: FitScalingArgs) -> None:
    """Prints the report as tables."""
    console = Console(soft_wrap=True)
    law, runs = report["law"], report["runs"]
    sizes = sorted({run["parameters"] for run in runs})
    counted = "parameters" if report["counts_embeddings"] else "parameters without embeddings"
    console.print(
        f"{report['metric']} = {FORMS[args.form].text.format(**law)}",
        f"from {len(runs)} runs of {len(sizes)} sizes, {_short(sizes[0])} to {_short(sizes[-1])} {counted}; "
        f"off by {report['relative_error']:.2%}",
        sep="\n",
    )
    free = {
        name: interval
        for name, interval in report["intervals"].items()
        if name not in FORMS[args.form].fixed
    }
    console.print("90% of samples: " + ", ".join(_intervals_of(free)))
    if report["held_out"]:
        console.print(_held_out_table(report["held_out"]))
    beyond = max(run["parameters"] * run["tokens"] for run in runs) * 6
    for title, key in (("Best for FLOPs", "for_flops"), ("Fewest FLOPs for a loss", "for_target")):
        if report[key]:
            console.print(_budget_table(title, report[key], beyond))
    if args.out:
        console.print(f"{args.out}/law.json, law.png")


def _intervals_of(intervals: dict[str, list[float]]) -> list[str]:
    return [f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in intervals.items()]


def _held_out_table(predictions: Sequence[dict[str, Any]]) -> Table:
    table = Table("parameters", "tokens", "predicted", "90%", "measured", "error", title="Held out")
    for each in predictions:
        low, high = each["interval"]
        table.add_row(
            _short(each["parameters"]),
            _short(each["tokens"]),
            f"{each['predicted']:.4f}",
            f"{low:.4f} to {high:.4f}",
            f"{each['loss']:.4f}",
            f"{each['error']:+.4f}",
        )
    return table


def _budget_table(title: str, budgets: Sequence[dict[str, Any]], largest: float) -> Table:
    """largest: FLOPs of the largest run."""
    table = Table(
        "loss", "parameters", "tokens", "tokens each", "FLOPs", "beyond the runs", title=title
    )
    hours = any(each["device_hours"] for each in budgets)
    if hours:
        table.add_column("device-hours")
    for each in budgets:
        cells = [
            f"{each['loss']:.4f}",
            _with_interval(each, "parameters"),
            _with_interval(each, "tokens"),
            f"{each['tokens'] / each['parameters']:.1f}",
            _with_interval(each, "flops"),
            f"{each['flops'] / largest:,.3g}x",
        ]
        table.add_row(*cells, *([f"{each['device_hours']:,.3g}"] if hours else []))
    return table


def _with_interval(budget: dict[str, Any], name: str) -> str:
    low, high = budget["intervals"][name]
    shown = "no end" if high is None else _short(high)
    return f"{_short(budget[name])} ({_short(low) if low is not None else 'no end'} to {shown})"


def _short(value: float) -> str:
    """3.1M, 27.3B, 2.5e+20."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if unit <= value < 1e15:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
