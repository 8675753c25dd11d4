"""The plot of a sweep, and the scaling law in it."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

LOSSES = ("loss", "train_loss", "bits_per_byte")


def fit(sizes: np.ndarray, losses: np.ndarray) -> tuple[float, float, float]:
    """(E, A, alpha) of the least squares fit of E + A / N^alpha, E not negative.

    For a given alpha it is linear in E and A, so one search over alpha finds the best of all.
    """
    middle, best = np.exp(np.log(sizes).mean()), (np.inf, 0.0, 0.0, 0.0)
    for alpha in np.geomspace(0.01, 4.0, 4000):
        power = (sizes / middle) ** -alpha
        slope = np.cov(power, losses, bias=True)[0, 1] / power.var()
        floor = losses.mean() - slope * power.mean()
        if floor < 0:
            floor, slope = 0.0, (power @ losses) / (power @ power)
        error = ((floor + slope * power - losses) ** 2).sum()
        best = min(best, (error, floor, slope * middle**alpha, alpha))
    return best[1], best[2], best[3]


def plot(rows: list[dict[str, Any]], fields: list[str], metric: str, path: Path) -> list[str]:
    """The metric over the first field, and over the model's size with its law; returns what there is to say."""
    best: dict[float, float] = {}
    for one in rows:
        size = one.get("parameters", 0)
        best[size] = min(best.get(size, np.inf), one[metric])
    scaling = metric in LOSSES and len(best) > 1
    figure = Figure(figsize=(6 * (1 + scaling), 4.5))
    axes = figure.subplots(1, 1 + scaling, squeeze=False)
    draw_field(axes[0, 0], rows, fields, metric)
    said = draw_law(axes[0, 1], best, metric) if scaling else []
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return said


def draw_field(axis: Any, rows: list[dict[str, Any]], fields: list[str], metric: str) -> None:
    """The metric over the first field; one line for each combination of the others."""
    first, *others = fields
    with contextlib.suppress(ValueError):  # words stay words
        rows = [{**one, first: float(one[first])} for one in rows]
        axis.set_xscale("log" if min(one[first] for one in rows) > 0 else "linear")
    lines: dict[str, list[tuple[Any, float]]] = {}
    for one in rows:
        name = ", ".join(f"{field.rpartition('.')[2]} {one[field]}" for field in others)
        lines.setdefault(name, []).append((one[first], one[metric]))
    for name, pairs in lines.items():
        axis.plot(*zip(*pairs, strict=True), "o-", label=name or None)
    axis.set(xlabel=first, ylabel=metric)
    if others:
        axis.legend()


def draw_law(axis: Any, best: dict[float, float], metric: str) -> list[str]:
    sizes = np.array(sorted(best), float)
    losses = np.array([best[size] for size in sizes])
    axis.plot(sizes, losses, "o")
    axis.set(xscale="log", xlabel="parameters", ylabel=f"{metric}, best of each size")
    if len(sizes) < 3:
        return [f"{len(sizes)} sizes: a law with three unknowns needs at least 3"]
    floor, scale, alpha = fit(sizes, losses)
    law = f"L = {floor:.4g} + {scale:.4g} / N^{alpha:.3g}"
    line = np.geomspace(sizes[0], sizes[-1], 100)
    axis.plot(line, floor + scale * line**-alpha, "-", label=law)
    axis.legend()
    off = np.sqrt(((floor + scale * sizes**-alpha - losses) ** 2).mean())
    known = (
        f"{len(sizes)} sizes, off by {off:.2g}"
        if len(sizes) > 3
        else "3 sizes: nothing is left to check it with"
    )
    bound = "" if floor else "; E is at its bound 0: these sizes do not tell it"
    return [f"{law} ({known}{bound})"]
