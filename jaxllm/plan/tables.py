"""How reports of `jaxllm plan` are printed."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show_report(report: Mapping[str, Any], title: str) -> None:
    """Prints the report of a stage: a table of totals, one of programs, one of collectives."""
    console = Console(markup=False, emoji=False)
    totals = Table(title=title, show_header=False)
    for name, value in report.items():
        if name not in ("collectives", "leaves", "programs"):
            totals.add_row(name, _readable(name, value))
    console.print(totals)
    if report.get("programs"):
        console.print(_programs(report["programs"]))
    if report["collectives"]:
        console.print(_collectives(report["collectives"]))
    for name, sharding in report.get("leaves", {}).items():
        console.print(f"{name}: {sharding}")


def _programs(programs: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(
        "program",
        "times",
        "temporaries",
        "FLOPs",
        "seconds",
        title="An update, on one device",
    )
    for name, figures in programs.items():
        table.add_row(
            name,
            str(figures["times"]),
            in_bytes(figures.get("temp_bytes_per_device", 0)),
            f"{figures['flops_per_device']:,.3g}",
            f"{figures.get('predicted_seconds', 0):.3g}",
        )
    return table


def _collectives(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        "collective", "axes", "times", "bytes per device", title="Collectives of one step"
    )
    for row in rows:
        axes = "+".join(row["axes"])
        table.add_row(row["kind"], axes, f"{row['count']:,}", in_bytes(row["bytes"]))
    return table


def show_ranking(ranked: Sequence[Mapping[str, Any]]) -> None:
    """Prints the candidates of a search, the best first."""
    table = Table(
        "mesh",
        "remat",
        "batch",
        "fits",
        "bytes per device",
        "tokens/s",
        "MFU",
        title="Best first",
    )
    for row in ranked:
        table.add_row(
            ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items()),
            row["remat"],
            str(row["batch_size"]),
            str(row["fits"]),
            in_bytes(row.get("total_bytes_per_device", 0)),
            f"{row.get('predicted_tokens_per_second', 0):,.0f}",
            f"{row.get('predicted_mfu', 0):.1%}",
        )
    Console(markup=False, emoji=False).print(table)


def _readable(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if "bytes" in name:
        return in_bytes(value)
    if isinstance(value, float):
        return f"{value:,.4g}"
    if type(value) is int:  # not a bool, which is an int as well
        return f"{value:,}"
    return str(value)


def in_bytes(size: float) -> str:
    """A number of bytes in MB or GB (powers of ten, as data sheets count)."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
