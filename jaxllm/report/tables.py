"""What both templates of the report show: labels, numbers as text, tables and answers, made from report.json."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm import stages as stage_table

SIMULATED = "simulated annotator"

# What a reader looks for first. Shown in this order; a stage's other numbers follow in the order of its result.json.
_KEY_NUMBERS = (
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
# Parts of the names of numbers that depend on the annotator, in any stage.
_FROM_ANNOTATOR = ("annotator", "win_rate", "tie_fraction")
# In the reward stage these do as well, since its labels are the annotator's rankings.
_FROM_RANKINGS = ("accuracy", "top1", "calibration", "loss")
# They contain "annotator" too, but are not numbers that depend on one.
_NOT_NUMBERS = ("annotator", "annotators", "annotator_simulated")
_ABSENT = "–"


class Table(NamedTuple):
    """A titled table of formatted cells; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]


class StageRow(NamedTuple):
    """One stage in the overview."""

    name: str
    has_run: bool
    """False if its directory does not exist."""
    duration: str
    percent: float
    """Its share of the run's wall time."""
    numbers: list[tuple[str, str]]
    """(label, text) of each scalar result."""
    missing: str
    """Why there are no numbers: "not run" or "not finished"; empty if there are."""


class Answers(NamedTuple):
    """The models' answers to one prompt."""

    prompt: str
    by_model: dict[str, str]


def facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) for the head of the report; the text is empty if no stage has begun."""
    return [
        ("Date", report["date"]),
        ("Device", report["device"]),
        ("Code", report["code"]),
        ("Total wall time", _duration(report["wall_seconds"])),
    ]


def warning(report: Mapping[str, Any]) -> str:
    """A sentence saying that the annotator is simulated; empty if no stage used a simulated one."""
    is_simulated = False
    annotators = set()
    for stage in report["stages"].values():
        if stage["annotator_simulated"]:
            is_simulated = True
            annotators.add(str((stage["result"] or {}).get("annotator") or ""))
    if not is_simulated:
        return ""
    # Only the stages that asked an annotator name one; the others trained on its rankings.
    annotators.discard("")
    names = f" ({', '.join(sorted(annotators))})" if annotators else ""
    return f"The annotator is simulated{names}: a program, not a person, scored the responses."


def simulated_note(report: Mapping[str, Any], stage: str, metric: str) -> str:
    """The text " (simulated annotator)" if this number of this stage depends on one; empty if not."""
    last = metric.split("/")[-1]
    dependent = _FROM_ANNOTATOR
    if stage == "reward" and last != "train_loss":
        dependent += _FROM_RANKINGS
    if last in _NOT_NUMBERS or not any(part in last for part in dependent):
        return ""
    return f" ({SIMULATED})" if report["stages"][stage]["annotator_simulated"] else ""


def stage_row(report: Mapping[str, Any], name: str) -> StageRow:
    """A stage's line in the overview, whether or not it ran."""
    if name in report["absent"]:
        return StageRow(name, False, _ABSENT, 0.0, [], "not run")
    result = report["stages"][name]["result"]
    if result is None:
        return StageRow(name, True, _ABSENT, 0.0, [], "not finished")
    seconds = result.get("wall_seconds")
    percent = 0.0
    if isinstance(seconds, int | float):
        percent = 100 * seconds / (report["wall_seconds"] or 1)
    numbers = []
    for metric in _scalar_names(result):
        text = _quantity(metric, result[metric])
        numbers.append((_label(report, name, metric), text))
    return StageRow(name, True, _duration(seconds), percent, numbers, "")


def _scalar_names(result: Mapping[str, Any]) -> list[str]:
    """Key numbers first, then the others in their own order; wall time has a separate column."""
    names = []
    for name, value in result.items():
        if not isinstance(value, dict | list) and name != "wall_seconds":
            names.append(name)
    # The sort is stable, so that all others stay in their order.
    return sorted(names, key=_key_rank)


def _key_rank(name: str) -> int:
    return _KEY_NUMBERS.index(name) if name in _KEY_NUMBERS else len(_KEY_NUMBERS)


def stage_tables(report: Mapping[str, Any], stage: str) -> list[Table]:
    """Every nested value of a stage's result as a table, then the last responses of its rollouts.

    The samples of the evaluation are left out: `answers` shows them side by side.
    """
    tables = []
    for name, value in (report["stages"][stage]["result"] or {}).items():
        rows = _rows_by_name(name, value)
        if rows:
            tables.append(_table(report, stage, name, rows))
    # Not in result.json: the table shows what a policy says before the stage ends.
    rollouts = report["stages"][stage]["rollouts"]
    if rollouts:
        tables.append(_rollout_table(rollouts))
    return tables


def _rows_by_name(name: str, value: Any) -> dict[str, Any]:
    """A nested value as {row name: row}; rows of a list are numbered from 1; empty if it is not a table."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, list) or name == "samples":
        return {}
    if not _are_rows(value):
        return {}
    return {str(number): row for number, row in enumerate(value, start=1)}


def _are_rows(values: Iterable[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _table(report: Mapping[str, Any], stage: str, name: str, rows: Mapping[str, Any]) -> Table:
    """A column for each key of the rows, or a single column if they are plain values."""
    # The two kinds:
    #
    #     {"sft": {"a": 1}, "ppo": {"a": 2, "b": 3}}          {"a": 1, "b": 2}
    #
    #            a    b                                          value
    #     SFT    1    –                                     a    1
    #     PPO    2    3                                     b    2
    title = _label(report, stage, name)
    cells = []
    if not _are_rows(rows.values()):
        for key, value in rows.items():
            cells.append([_label(report, stage, key), _quantity(key, value)])
        return Table(title, ["", "value"], cells)
    # A dict and not a set: columns keep the order in which the rows name them.
    columns: dict[str, str] = {}
    for row in rows.values():
        for column in row:
            columns[column] = _label(report, stage, column)
    for key, row in rows.items():
        cells.append([_model_title(key), *(_quantity(c, row.get(c)) for c in columns)])
    return Table(title, ["", *columns.values()], cells)


def _rollout_table(rollouts: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for rollout in rollouts:
        prompt = str(rollout.get("prompt", ""))
        rows.append([prompt, str(rollout.get("response", "")), _number(rollout.get("score"))])
    return Table("Responses sampled in the last update", ["prompt", "response", "score"], rows)


def curve_table(report: Mapping[str, Any], stage: str) -> Table:
    """A row for each curve: its number of points, and the first, last, smallest and largest value."""
    rows = []
    for metric, points in report["stages"][stage]["series"].items():
        # NaN for a curve without a finite value: such a stage diverged, which its row must show.
        values = [value for _, value in points if value is not None] or [math.nan]
        ends = (values[0], values[-1], min(values), max(values))
        label = metric + simulated_note(report, stage, metric)
        rows.append([label, str(len(points)), *map(_number, ends)])
    return Table("curves", ["metric", "points", "first", "last", "min", "max"], rows)


def answers(report: Mapping[str, Any]) -> Iterator[Answers]:
    """The answers in every stage whose result has samples."""
    for stage in report["stages"].values():
        # Any stage's function may put anything there; only samples of the known form are shown.
        samples = (stage["result"] or {}).get("samples")
        if not isinstance(samples, list):
            continue
        for sample in samples:
            by_stage = sample.get("answers") if isinstance(sample, dict) else None
            if isinstance(by_stage, dict):
                by_model = {_model_title(name): _number(text) for name, text in by_stage.items()}
                yield Answers(str(sample.get("prompt", "")), by_model)


def _model_title(stage: str) -> str:
    """The name of a stage's model; other names are returned unchanged."""
    # The table's `named` would refuse names that are not stages, such as the groups of a metric.
    for row in stage_table.TABLE:
        if row.name == stage and row.title:
            return row.title
    return stage


def _label(report: Mapping[str, Any], stage: str, metric: str) -> str:
    return metric.replace("_", " ") + simulated_note(report, stage, metric)


def _quantity(name: str, value: Any) -> str:
    """A value as text, in the unit that its name ends with."""
    if name.endswith("_seconds"):
        return _duration(value)
    if name.endswith("_bytes") and isinstance(value, int | float):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    return _number(value)


def _number(value: Any) -> str:
    """A value as text. Fractions get four significant digits, whole and large numbers all of theirs."""
    if value is None:
        return _ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        # Above 1e15 a float64 has no exact digits to spell out.
        spelled_out = (value.is_integer() or abs(value) >= 1e4) and abs(value) < 1e15
        return f"{value:,.0f}" if spelled_out else f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return _ABSENT
    minutes, rest = divmod(round(seconds), 60)  # rounded first: 59.7 s is 1 min 00 s
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
