"""The report of a run directory: every stage's numbers and curves, and its models' answers side by side.

report.json has all numbers, report.md the tables and answers, report.html also the curves in a single file that loads
nothing else. They are made from result.json, provenance.json, metrics.jsonl and rollouts.jsonl alone.

    result.json, ... -> _collect -> report.json -> tables.py, figures.py -> report.md.j2, report.html.j2

Prompts and answers are text that nobody checked: both templates escape every value unless told not to.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import jinja2
from etils import epath

from jaxllm.config import InputError
from jaxllm.report import figures, tables
from jaxllm.runtime.files import read_json, read_jsonl, write_json, write_whole


def write_report(run_dir: epath.PathLike, stages: Sequence[str]) -> dict[str, Any]:
    """Write report.json, report.md and report.html into a run directory.

    Stages that are absent or unfinished are shown as such. A number that is not finite is null in report.json.

    Returns:
        The content of report.json.

    Raises:
        InputError: one of the files it reads is damaged. A half-written last line is only left out.
    """
    run_dir = epath.Path(run_dir)  # may be on an object store
    report = _collect(run_dir, stages)
    write_json(run_dir / "report.json", report)
    write_whole(run_dir / "report.md", _render("report.md.j2", report))
    write_whole(run_dir / "report.html", _render("report.html.j2", report))
    return report


def _collect(run_dir: epath.Path, stages: Sequence[str]) -> dict[str, Any]:
    """The content of report.json."""
    contents: dict[str, dict[str, Any]] = {}
    provenances: list[dict[str, Any]] = []
    seconds: list[float] = []
    newest = ""
    for stage in stages:
        directory = run_dir / stage
        if not directory.exists():
            continue
        contents[stage] = _read_stage(directory)
        stage_seconds = (contents[stage]["result"] or {}).get("wall_seconds")
        if isinstance(stage_seconds, int | float):
            seconds.append(stage_seconds)
        provenance = read_json(directory / "provenance.json") or {}
        provenances.append(provenance)
        # Times are in UTC and in one format, so that they compare as texts.
        newest = max(newest, str(provenance.get("time", "")))
    _mark_simulated(contents)
    return {
        "name": run_dir.name or str(run_dir),
        "date": newest[:16].replace("T", " "),
        "device": _distinct_values(provenances, "devices"),
        "code": _distinct_values(provenances, "code"),
        "wall_seconds": sum(seconds),
        "stages": contents,
        "absent": [stage for stage in stages if stage not in contents],
        "order": list(stages),
    }


def _read_stage(directory: epath.Path) -> dict[str, Any]:
    """A stage's result (None if it is unfinished), its curves, and the rollouts of its last update."""
    rollouts = _read_steps(directory / "rollouts.jsonl")
    return {
        "result": _finite(read_json(directory / "result.json")),
        "series": _series(_read_steps(directory / "metrics.jsonl")),
        "rollouts": [_finite(line) for line in rollouts if line["step"] == rollouts[-1]["step"]],
    }


def _read_steps(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, each of which must name its step."""
    # The file still grows while a stage trains: `read_jsonl` leaves a half-written last line out.
    lines = read_jsonl(path)
    for number, line in enumerate(lines, start=1):
        if not isinstance(line.get("step"), int):
            raise InputError(f'{path}:{number}: has no whole number as "step"; remove that line')
    return lines


def _series(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float | None]]]:
    """{metric: (step, value) in order}; what is not a number is left out."""
    series: dict[str, list[tuple[int, float | None]]] = {}
    for line in lines:
        for name, value in line.items():
            # A bool is an int to Python.
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and name not in ("step", "time"):
                series.setdefault(name, []).append((line["step"], _finite(value)))
    return series


def _finite(value: Any) -> Any:
    """The value with None for each number in it that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mark_simulated(contents: Mapping[str, dict[str, Any]]) -> None:
    """Set each stage's "annotator_simulated": its own flag decides, without one that of the rank stage."""
    flags: dict[str, Any] = {}
    for stage, content in contents.items():
        result = content["result"] or {}
        flags[stage] = result.get("annotator_simulated", result.get("simulated"))
    # A reward model or policy has no flag, but learned from the rankings.
    for stage, content in contents.items():
        flag = flags.get("rank") if flags[stage] is None else flags[stage]
        content["annotator_simulated"] = bool(flag)


def _distinct_values(provenances: Iterable[Mapping[str, Any]], key: str) -> str:
    """The values of a key, each once, in the order of the stages: a run may move to another machine."""
    values: dict[str, None] = {}
    for provenance in provenances:
        if key in provenance:
            values[str(provenance[key])] = None
    return ", ".join(values)


def _render(template: str, report: Mapping[str, Any]) -> str:
    """A template filled in; "report" and the functions of `tables` and `figures` are its variables."""
    is_html = template == "report.html.j2"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        # A misspelled name is an error; by default it would be an empty cell.
        undefined=jinja2.StrictUndefined,
        # HTML has Jinja's own escaping. It would be wrong in Markdown, whose values all pass through `finalize`.
        autoescape=is_html,
        finalize=None if is_html else _escape_markdown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code_block"] = _code_block
    return environment.get_template(template).render(report=report, tables=tables, figures=figures)


# A separate type, so that a value is escaped unless a template asked for a code block.
class _CodeBlock(str):
    """An indented code block of Markdown, in which no character has a meaning."""


def _escape_markdown(value: Any) -> str:
    """Text that neither ends its table cell nor acts as HTML."""
    if isinstance(value, _CodeBlock):
        return value
    return escape(str(value), quote=False).replace("|", "\\|").replace("\n", "<br>")


def _code_block(text: str) -> _CodeBlock:
    lines = (text or "(empty)").splitlines()
    return _CodeBlock("\n".join(f"    {line}" for line in lines))
