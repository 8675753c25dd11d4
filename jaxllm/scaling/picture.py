"""The picture of a scaling law: the loss over tokens, a curve for each size."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from jaxllm.scaling.law import Law
from jaxllm.scaling.runs import Run


def draw(path: Path, fitted: Sequence[Run], held_out: Sequence[Run], law: Law, metric: str) -> None:
    """Writes a PNG: filled points were fitted, open ones predicted; lines are the law."""
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    runs = [*fitted, *held_out]
    sizes = sorted({run.point.parameters for run in runs})
    colors = colormaps["viridis"](np.linspace(0.85, 0.1, len(sizes)))
    tokens = [run.point.tokens for run in runs]
    line = np.geomspace(min(tokens), max(tokens), 100)
    for size, color in zip(sizes, colors, strict=True):
        axes.plot(line, law.loss(size, line), color=color, lw=1.2, label=f"{size:,.0f} parameters")
        for group, face in ((fitted, color), (held_out, "white")):
            points = [run.point for run in group if run.point.parameters == size]
            axes.plot(
                [point.tokens for point in points],
                [point.loss for point in points],
                "o",
                color=color,
                markerfacecolor=face,
            )
    axes.set(xscale="log", xlabel="tokens", ylabel=metric)
    axes.grid(color="#d8dce2", lw=0.6)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})
