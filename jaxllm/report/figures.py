"""The pictures of the report: a panel for each kind of metric of a stage, and the reliability diagram.

Each panel is drawn twice, for light and for dark pages, as a PNG inside a data: URL, so that the page loads nothing.
"""

import base64
import functools
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from jaxllm.report.tables import simulated_note

# Names with the same title share a panel. Titles of panels by the last part of a metric's name, in the order of the panels; other metrics follow by title.
TITLES = {
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
    "mfu": "Model FLOPs utilization",
}

# A curve: (step, value) in order; the value is None where it is not finite.
Points = Sequence[tuple[int, float | None]]


# The colors are those of report.html.j2.
class Theme(NamedTuple):
    """Colors of a picture; the background is transparent."""

    text: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Theme("#4b5563", "#d8dce2", ("#2563b8", "#d9601a", "#16876a", "#8a4fbf"))
DARK = Theme("#aab2bf", "#373d48", ("#6aa9f4", "#f49a5c", "#4fc7a3", "#c79af0"))

Draw = Callable[[Axes, Theme], None]


class Panel(NamedTuple):
    """A captioned picture."""

    caption: str
    light: str
    """data: URL of the picture for light pages."""
    dark: str
    """data: URL of the same picture for dark pages."""


def panels(report: Mapping[str, Any], stage: str) -> list[Panel]:
    """One panel for each kind of metric that has a finite value, then the reliability diagram if there is one."""
    content = report["stages"][stage]
    pictures = []
    groups = _by_title(content["series"])
    for title in sorted(groups, key=_panel_order):
        # All metrics of a panel end in the same word, on which the note depends.
        caption = title + simulated_note(report, stage, next(iter(groups[title])))
        pictures.append(_panel(caption, functools.partial(_draw_curves, groups[title])))
    bins = (content["result"] or {}).get("reliability")
    if bins:
        caption = "Reliability: share of pairs right by confidence"
        caption += simulated_note(report, stage, "accuracy")
        pictures.append(_panel(caption, functools.partial(_draw_reliability, bins)))
    return pictures


def _by_title(series: Mapping[str, Points]) -> dict[str, dict[str, Points]]:
    """{title of a panel: {metric: points}}: train/loss and eval/loss share the panel "Loss"."""
    groups: dict[str, dict[str, Points]] = {}
    for metric, points in series.items():
        last = metric.split("/")[-1]
        title = TITLES.get(last) or last[:1].upper() + last[1:].replace("_", " ")
        if any(value is not None for _, value in points):
            groups.setdefault(title, {})[metric] = points
    return groups


def _panel_order(title: str) -> tuple[int, str]:
    titles = list(dict.fromkeys(TITLES.values()))
    return (titles.index(title) if title in titles else len(titles), title)


def _panel(caption: str, draw: Draw) -> Panel:
    return Panel(caption, _picture(draw, LIGHT), _picture(draw, DARK))


def _picture(draw: Draw, theme: Theme) -> str:
    """The data: URL of a picture whose axes `draw` fills."""
    # Not pyplot: it keeps every figure and may look for a display. Inches; the page shows them about 330 pixels wide, and
    # the rest is for screens with two pixels to one.
    figure = Figure(figsize=(4.6, 2.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color=theme.grid, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=theme.text, labelsize=8, length=0)
    draw(axes, theme)
    buffer = io.BytesIO()
    # Without the version of Matplotlib in it, the same report has the same bytes everywhere.
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _draw_reliability(bins: Sequence[Sequence[float]], axes: Axes, theme: Theme) -> None:
    """Confidence against the share right; a point's area grows with its number of pairs.

    bins: as `measures.reliability` returns them. A calibrated model is on the dashed diagonal.
    """
    confidence, right, counts = zip(*bins, strict=True)
    color = theme.lines[0]
    areas = 8 + 120 * np.array(counts) / max(counts)
    axes.plot([0.5, 1], [0.5, 1], color=theme.text, lw=0.8, ls="--")
    axes.plot(confidence, right, color=color, lw=1.2)
    axes.scatter(confidence, right, s=areas, color=color, lw=0)
    axes.set_xlabel("confidence", color=theme.text, size=8)


def _draw_curves(series: Mapping[str, Points], axes: Axes, theme: Theme) -> None:
    """One line over the steps for each series."""
    colors = itertools.cycle(theme.lines)
    # In reverse, so that train/ comes before eval/ and has the first color in every panel.
    for metric, points in sorted(series.items(), reverse=True):
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps,
            np.array(values, np.float64),  # None becomes NaN, which leaves a gap in the line
            color=next(colors),
            lw=1.5,
            # Few points, as those of an evaluation, would be lost without marks; a single one would show nothing.
            marker="o" if len(points) < 25 else "",
            ms=3,
            label=_legend_label(metric),
        )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20000 steps are 20k
    axes.yaxis.get_offset_text().set(color=theme.text, size=8)
    axes.set_xlabel("step", color=theme.text, size=8)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=theme.text, fontsize=8)


def _legend_label(metric: str) -> str:
    """A metric's name without its last part, made safe for Matplotlib.

    Its font lacks most scripts, $ begins a formula, and a label that begins with _ is hidden.
    """
    name = metric.rpartition("/")[0] or metric
    return name.encode("ascii", "replace").decode().replace("$", r"\$").lstrip("_")
