"""The report of a run directory: every stage's numbers and curves, and its models' answers side by side.

report.json has all numbers, report.md the tables and answers, report.html also the curves; it is one file that loads
nothing from elsewhere. They are made from result.json, provenance.json and metrics.jsonl alone.
"""

import base64
import functools
import importlib.resources
import io
import json
import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from jaxllm import stages as stage_table
from jaxllm.config import InputError
from jaxllm.runtime.files import read_json, read_jsonl, write_json, write_whole

SIMULATED = "simulated annotator"

# Metric names by their last part, in the order of the panels; what is not here follows by name.
PANELS = {
    "loss": "Loss",
    "bits_per_byte": "Bits per byte",
    "bpb": "Bits per byte",
    "accuracy": "Pairwise accuracy",
    "top1": "Top-1 accuracy",
    "top1_accuracy": "Top-1 accuracy",
    "calibration_error": "Calibration error",
    "score": "Score",
    "kl": "KL to the reference, nats per response",
    "entropy": "Entropy, nats per token",
    "clip_fraction": "Clip fraction",
    "response_length": "Response length, tokens",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOP utilisation",
}
KEY_NUMBERS = (
    "bits_per_byte",
    "accuracy",
    "score",
    "kl",
    "train_loss",
    "loss",
    "vocab_size",
    "parameters",
    "tokens",
)
# Numbers that depend on the annotator: by a part of their name anywhere, and by name in the reward stage.
OF_ANNOTATOR = ("annotator", "win_rate", "tie_fraction")
OF_RANKINGS = ("accuracy", "top1", "calibration", "loss")
NAMES = ("annotator", "annotator_simulated")  # not numbers
LINES = {
    "light": ("#2563b8", "#d9601a", "#16876a", "#8a4fbf"),
    "dark": ("#6aa9f4", "#f49a5c", "#4fc7a3", "#c79af0"),
}
INK = {"light": ("#4b5563", "#d8dce2"), "dark": ("#aab2bf", "#373d48")}  # text, grid

Series = dict[str, list[tuple[int, float | None]]]


class Table(NamedTuple):
    """A titled table of formatted cells; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]


def _titled(stage: str) -> str:
    """How a stage's model is called; another name stays as it is."""
    return next((row.title for row in stage_table.TABLE if row.name == stage and row.title), stage)


def write_report(run_dir: epath.PathLike, stages: Sequence[str]) -> dict[str, Any]:
    """Write report.json, report.md and report.html into a run directory; returns what report.json holds.

    Stages that are absent or unfinished are shown as such. A number that is not finite is null in report.json. Raises
    InputError where result.json, provenance.json or metrics.jsonl is damaged; a half-written last line is left out.
    """
    run_dir = epath.Path(run_dir)
    report = _collect(run_dir, stages)
    write_json(run_dir / "report.json", report)
    write_whole(run_dir / "report.md", _markdown(report))
    write_whole(run_dir / "report.html", _html(report))
    return report


def _collect(run_dir: epath.Path, stages: Sequence[str]) -> dict[str, Any]:
    read = {stage: _read_stage(run_dir / stage) for stage in stages if (run_dir / stage).exists()}
    origins = [p for stage in read.values() if isinstance(p := stage.pop("provenance"), dict)]
    flags = {name: _simulated(stage) for name, stage in read.items()}
    for (
        name,
        stage,
    ) in read.items():  # a stage's own flag decides, without one that of the rank stage
        stage["annotator_simulated"] = bool(
            flags.get("rank") if flags[name] is None else flags[name]
        )
    seconds = [(stage["result"] or {}).get("wall_seconds") for stage in read.values()]
    named = lambda key: ", ".join(dict.fromkeys(str(p[key]) for p in origins if key in p))
    return {
        "name": run_dir.name or str(run_dir),
        "date": max((str(p.get("time", "")) for p in origins), default="")[:16].replace("T", " "),
        "device": named("devices"),
        "code": named("code"),
        "wall_seconds": sum(s for s in seconds if isinstance(s, int | float)),
        "stages": read,
        "absent": [stage for stage in stages if stage not in read],
        "order": list(stages),
    }


def _read_stage(directory: epath.Path) -> dict[str, Any]:
    result = read_json(directory / "result.json")
    if result is not None and not isinstance(result, dict):
        raise InputError(
            f"{directory / 'result.json'}: must hold a JSON object; remove the file to redo the stage"
        )
    return {
        "result": _finite(result),
        "series": _read_lines(directory / "metrics.jsonl", _series),
        "rollouts": _read_lines(directory / "rollouts.jsonl", _last_rollouts),
        "provenance": read_json(directory / "provenance.json"),
    }


def _read_lines(path: epath.Path, use: Callable[[list[dict[str, Any]]], Any]) -> Any:
    lines = read_jsonl(path)
    try:
        return use(lines)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: a line is damaged ({error}); remove that line") from None


def _last_rollouts(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The responses kept of the last update, if the stage draws any."""
    return [_finite(line) for line in lines if line["step"] == lines[-1]["step"]]


def _series(lines: Iterable[Mapping[str, Any]]) -> Series:
    series: Series = {}
    for line in lines:
        for name, value in line.items():
            if (
                name not in ("step", "time")
                and isinstance(value, int | float)
                and not isinstance(value, bool)
            ):
                series.setdefault(name, []).append((int(line["step"]), _finite(value)))
    return series


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _simulated(stage: Mapping[str, Any]) -> Any:
    result = stage["result"] or {}
    return result.get("annotator_simulated", result.get("simulated"))


def _note(report: Mapping[str, Any], stage: str, name: str) -> str:
    """The words " (simulated annotator)" where this number of this stage comes from one."""
    last = name.split("/")[-1]
    parts = OF_ANNOTATOR + (OF_RANKINGS if stage == "reward" and last != "train_loss" else ())
    of_annotator = last not in NAMES and any(part in last for part in parts)
    return (
        f" ({SIMULATED})" if of_annotator and report["stages"][stage]["annotator_simulated"] else ""
    )


def _label(report: Mapping[str, Any], stage: str, name: str) -> str:
    return name.replace("_", " ") + _note(report, stage, name)


# numbers as text


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        whole = (value.is_integer() or abs(value) >= 1e4) and abs(value) < 1e15
        return f"{value:,.0f}" if whole else f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _quantity(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, int | float):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    return _duration(value) if name.endswith("_seconds") else _number(value)


def _scalars(result: Mapping[str, Any]) -> dict[str, Any]:
    """Key numbers first, then the others in their own order; wall time has its own column."""
    names = [n for n, v in result.items() if not isinstance(v, dict | list) and n != "wall_seconds"]
    names.sort(key=lambda n: KEY_NUMBERS.index(n) if n in KEY_NUMBERS else len(KEY_NUMBERS))
    return {name: result[name] for name in names}


def _tables(report: Mapping[str, Any], stage: str) -> list[Table]:
    """Every nested value of a stage's result as a table, but for the answers shown side by side."""
    result, tables = report["stages"][stage]["result"] or {}, []
    for name, value in result.items():
        if (
            isinstance(value, list)
            and value
            and all(isinstance(row, dict) for row in value)
            and name != "samples"
        ):
            value = {str(i): row for i, row in enumerate(value, 1)}
        if isinstance(value, dict) and value:
            tables.append(_table(report, stage, name, value))
    if rollouts := report["stages"][stage]["rollouts"]:
        rows = [
            [str(r.get("prompt", "")), str(r.get("response", "")), _number(r.get("score"))]
            for r in rollouts
        ]
        tables.append(
            Table("Responses drawn in the last update", ["prompt", "response", "score"], rows)
        )
    return tables


def _table(report: Mapping[str, Any], stage: str, name: str, value: Mapping[str, Any]) -> Table:
    title = _label(report, stage, name)
    if not all(isinstance(row, dict) for row in value.values()):
        return Table(
            title,
            ["", "value"],
            [[_label(report, stage, k), _quantity(k, v)] for k, v in value.items()],
        )
    columns = list(dict.fromkeys(column for row in value.values() for column in row))
    rows = [[_titled(k), *(_quantity(c, row.get(c)) for c in columns)] for k, row in value.items()]
    return Table(title, ["", *(_label(report, stage, c) for c in columns)], rows)


def _samples(report: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """(prompt, {model: answer}) of every stage whose result has samples."""
    found = []
    for stage in report["stages"].values():
        samples = (stage["result"] or {}).get("samples")
        for sample in samples if isinstance(samples, list) else ():
            answers = sample.get("answers") if isinstance(sample, dict) else None
            if isinstance(answers, dict):
                shown = {_titled(k): _number(v) for k, v in answers.items()}
                found.append((str(sample.get("prompt", "")), shown))
    return found


def _progress(report: Mapping[str, Any], name: str) -> tuple[Any, list[tuple[str, str]], str]:
    """(wall seconds, numbers as (label, text), what is shown where the stage has none) of a stage."""
    if name in report["absent"]:
        return None, [], "not run"
    if (result := report["stages"][name]["result"]) is None:
        return None, [], "not finished"
    numbers = [(_label(report, name, k), _quantity(k, v)) for k, v in _scalars(result).items()]
    return result.get("wall_seconds"), numbers, ""


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [("Date", report["date"]), ("Device", report["device"]), ("Code", report["code"])]
    return [
        (k, v) for k, v in [*facts, ("Total wall time", _duration(report["wall_seconds"]))] if v
    ]


def _warning(report: Mapping[str, Any]) -> str:
    stages = [name for name, stage in report["stages"].items() if stage["annotator_simulated"]]
    who = {(report["stages"][s]["result"] or {}).get("annotator") for s in stages} - {None, ""}
    names = f" ({', '.join(sorted(map(str, who)))})" if who else ""
    return (
        f"The annotator is simulated{names}: a program scored the responses, no person did."
        if stages
        else ""
    )


# Markdown


def _markdown(report: Mapping[str, Any]) -> str:
    lines = [
        f"# {_cell(report['name'])}",
        "",
        *(f"- {k}: {_cell(v)}" for k, v in _facts(report)),
        "",
    ]
    lines += [f"**{_cell(_warning(report))}**", ""] if _warning(report) else []
    rows = [_markdown_stage(report, name) for name in report["order"]]
    lines += _markdown_table(Table("Stages", ["stage", "wall time", "numbers"], rows))
    for name, stage in report["stages"].items():
        for table in _tables(report, name):
            lines += _markdown_table(table._replace(title=f"{name}: {table.title}"))
        if stage["series"]:
            header = ["metric", "points", "first", "last", "least", "most"]
            curves = [
                [n + _note(report, name, n), *_curve(points)]
                for n, points in stage["series"].items()
            ]
            lines += _markdown_table(Table(f"{name}: curves", header, curves))
    for i, (prompt, answers) in enumerate(_samples(report), 1):
        lines += [f"## Answers {i}", "", "Prompt:", "", *_indented(prompt)]
        for model, answer in answers.items():
            lines += [f"{_cell(model)}:", "", *_indented(answer)]
    return "\n".join(lines) + "\n"


def _markdown_stage(report: Mapping[str, Any], name: str) -> list[str]:
    seconds, numbers, missing = _progress(report, name)
    return [
        name,
        _duration(seconds),
        missing or ", ".join(f"{label} {text}" for label, text in numbers),
    ]


def _markdown_table(table: Table) -> list[str]:
    rows = [table.header, ["---"] * len(table.header), *table.rows]
    return [
        f"## {_cell(table.title)}",
        "",
        *(f"| {' | '.join(map(_cell, row))} |" for row in rows),
        "",
    ]


def _cell(text: str) -> str:
    """Text that neither ends its table cell nor acts as HTML."""
    return escape(text, quote=False).replace("|", "\\|").replace("\n", "<br>")


def _indented(text: str) -> list[str]:
    """A code block, in which no character has a meaning."""
    return [*(f"    {line}" for line in (text or "(empty)").splitlines()), ""]


def _curve(points: Sequence[tuple[int, float | None]]) -> list[str]:
    """Number of points; the first, last, least and greatest value."""
    values = [v for _, v in points if v is not None] or [math.nan]
    return [str(len(points)), *map(_number, (values[0], values[-1], min(values), max(values)))]


# HTML


def _html(report: Mapping[str, Any]) -> str:
    name, warning = escape(report["name"]), _warning(report)
    facts = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in _facts(report)
    )
    parts = [
        f"<header><p class=kicker>jaxllm run</p><h1>{name}</h1><dl class=facts>{facts}</dl></header>"
    ]
    parts += [f"<p class=warning>{escape(warning)}</p>"] if warning else []
    stages = _html_table(
        "stages",
        ["Stage", "Wall time", "Numbers"],
        (_html_stage(report, n) for n in report["order"]),
    )
    parts += [f"<h2>Stages</h2><div class=scroll>{stages}</div>"]
    for stage in report["stages"]:
        tables = _tables(report, stage)
        parts += [f"<h2>{escape(stage.capitalize())}</h2>"] if tables else []
        for table in tables:
            numbers = _html_table("numbers", table.header, map(_html_row, table.rows))
            parts += [f"<h3>{escape(table.title)}</h3><div class='scroll fit'>{numbers}</div>"]
    if samples := _samples(report):
        parts += [
            "<h2>The same prompts, answered by each model</h2>",
            *(_html_sample(*s) for s in samples),
        ]
    for stage in report["stages"]:
        if panels := _panels(report, stage):
            parts += [f"<h2>Curves: {escape(stage)}</h2><div class=panels>{''.join(panels)}</div>"]
    page = string.Template(
        importlib.resources.files("jaxllm.report").joinpath("report.html").read_text("utf-8")
    )
    return page.substitute(title=name, body="".join(parts))


def _html_table(kind: str, header: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    return (
        f"<table class={kind}><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _html_row(row: Sequence[str]) -> str:
    name, *cells = map(escape, row)
    return f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _html_stage(report: Mapping[str, Any], name: str) -> str:
    seconds, numbers, missing = _progress(report, name)
    width = 100 * seconds / (report["wall_seconds"] or 1) if isinstance(seconds, int | float) else 0
    bar = f'<span class=bar><i style="width:{width:.1f}%"></i></span>'
    chips = "".join(
        f"<li><span>{escape(label)}</span> <b>{escape(text)}</b></li>" for label, text in numbers
    )
    if name in report["absent"]:
        return f"<tr class=absent><th>{escape(name)}</th><td>–</td><td><em>{missing}</em></td></tr>"
    cell = f"<em>{missing}</em>" if missing else f"<ul class=chips>{chips}</ul>"
    return f"<tr><th>{escape(name)}</th><td class=time>{_duration(seconds)}{bar}</td><td>{cell}</td></tr>"


def _html_sample(prompt: str, answers: Mapping[str, str]) -> str:
    columns = "".join(
        f"<div><h4>{escape(model)}</h4><p class=text>{escape(answer) or '<em>empty</em>'}</p></div>"
        for model, answer in answers.items()
    )
    asked = f'<p class="prompt text">{escape(prompt)}</p>'
    return f"<section class=sample>{asked}<div class=answers>{columns}</div></section>"


def _panels(report: Mapping[str, Any], stage: str) -> list[str]:
    """A picture for each kind of metric, with one line for each series of that kind, and the reliability curve."""
    content, groups = report["stages"][stage], {}
    for name, points in content["series"].items():
        if any(value is not None for _, value in points):
            last = name.split("/")[-1]
            groups.setdefault(PANELS.get(last, last[:1].upper() + last[1:].replace("_", " ")), {})[
                name
            ] = points
    order = list(dict.fromkeys(PANELS.values()))
    figures = []
    for title in sorted(groups, key=lambda t: (order.index(t) if t in order else len(order), t)):
        text = title + next((n for name in groups[title] if (n := _note(report, stage, name))), "")
        figures.append(_figure(text, stage, functools.partial(_curves, groups[title])))
    if bins := (content["result"] or {}).get("reliability"):
        text = "Reliability: share of pairs right by confidence" + _note(report, stage, "accuracy")
        figures.append(_figure(text, stage, functools.partial(_reliability, bins)))
    return figures


def _figure(text: str, stage: str, draw: Callable[[Any, str], None]) -> str:
    """A captioned picture, one for each theme: draw(axes, theme) fills it. It stands in the page as a data: URL."""
    urls = {}
    for theme, (ink, grid) in INK.items():
        figure, buffer = Figure(figsize=(4.6, 2.6), dpi=150, layout="constrained"), io.BytesIO()
        axes = figure.add_subplot()
        axes.grid(color=grid, lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=ink, labelsize=8, length=0)
        draw(axes, theme)
        figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
        urls[theme] = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{urls["dark"]}">'
    shown = f'<picture>{source}<img src="{urls["light"]}" alt="{escape(stage)}: {escape(text)}"></picture>'
    return f"<figure><figcaption>{escape(text)}</figcaption>{shown}</figure>"


def _reliability(bins: Sequence[Sequence[float]], axes: Any, theme: str) -> None:
    """Confidence against the share right, point sizes by the number of pairs; on the diagonal is calibrated."""
    confidence, right, count = zip(*bins, strict=True)
    axes.plot([0.5, 1], [0.5, 1], color=INK[theme][0], lw=0.8, ls="--")
    axes.plot(confidence, right, color=LINES[theme][0], lw=1.2)
    axes.scatter(
        confidence, right, s=[8 + 120 * c / max(count) for c in count], color=LINES[theme][0], lw=0
    )
    axes.set_xlabel("confidence", color=INK[theme][0], size=8)


def _curves(series: Series, axes: Any, theme: str) -> None:
    """One line for each series over the steps."""
    text = INK[theme][0]
    for (name, points), color in zip(
        sorted(series.items(), reverse=True), LINES[theme] * len(series), strict=False
    ):
        values = [math.nan if v is None else v for _, v in points]
        marker = "o" if len(points) < 25 else ""
        label = (
            (name.rpartition("/")[0] or name)
            .encode("ascii", "replace")
            .decode()
            .replace("$", r"\$")
            .lstrip("_")
        )
        axes.plot(
            [step for step, _ in points],
            values,
            color=color,
            lw=1.5,
            marker=marker,
            ms=3,
            label=label,
        )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.get_offset_text().set(color=text, size=8)
    axes.set_xlabel("step", color=text, size=8)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=text, fontsize=8)
