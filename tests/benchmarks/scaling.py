"""Weak and strong scaling of Llama 3 8B's pre-training from 64 to 4,096 TPU v5p, as `jaxllm plan` predicts it.

    python tests/benchmarks/scaling.py          two tables, and tests/benchmarks/scaling.svg; 10 to 15 minutes on 2 cores

Every point is compiled for its topology; step times are plan's roofline, not measurements.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from plan import planned

from jaxllm.runtime.hardware import EFFICIENCY

SLICES = {
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
    4096: "16x16x16",
}
SHARDS, LENGTH, MICRO = (
    256,
    8192,
    4,
)  # devices of a replica; tokens of a row; rows of a device in a microbatch, at most
ROWS = 512  # of a step in the strong series: with more chips than rows, several share a row
JOINED = 256  # chips of a slice in the series of several slices


def report(chips: int, slices: int, rows: int) -> dict[str, Any]:
    """plan's report of a step of so many rows."""
    context = max(chips // rows, 1)
    mesh = {"data": -1, "fsdp": min(chips, SHARDS) // context, "context": context}
    section = {"batch_size": rows, "length": LENGTH, "num_micro": max(rows // chips // MICRO, 1)}
    over = {"mesh": mesh, "pretrain": section}
    return planned("llama3_8b", over, f"v5p:{SLICES[chips // slices]}", "--slices", str(slices))


def bare(found: dict[str, Any]) -> float:
    """Seconds of a step that computes nothing while it sends."""
    return found["compute_seconds"] / EFFICIENCY + found["ici_seconds"] + found["dcn_seconds"]


def main() -> None:
    series = {
        "weak, one slice": [(chips, 1, chips * MICRO) for chips in SLICES],
        f"weak, slices of {JOINED}": [(n, n // JOINED, n * MICRO) for n in SLICES if n > JOINED],
        "strong, one slice": [(chips, 1, ROWS) for chips in SLICES],
    }
    print(
        "| series | chips | slices | rows a step | GB a device | step s | ICI s | DCN s | tokens/s | MFU | nothing hidden |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    _, (rates, mfus) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, points in series.items():
        chips, speed, mfu, low = [], [], [], []
        for count, slices, rows in points:
            found = report(count, slices, rows)
            times = " | ".join(
                f"{found[f'{kind}_seconds']:.3g}" for kind in ("predicted_step", "ici", "dcn")
            )
            rate, share = found["predicted_tokens_per_second"], found["predicted_mfu"]
            worst = share * found["predicted_step_seconds"] / bare(found)
            size = f"{found['total_bytes_per_device'] / 1e9:.1f}"
            print(
                f"| {name} | {count} | {slices} | {rows} | {size} | {times} | {rate:,.0f} | {share:.1%} | {worst:.1%} |",
                flush=True,
            )
            chips, speed, mfu, low = [*chips, count], [*speed, rate], [*mfu, share], [*low, worst]
        rates.loglog(chips, speed, "o-", base=2, label=name)
        (line,) = mfus.semilogx(chips, mfu, "o-", base=2, label=name)
        mfus.semilogx(chips, low, "o:", base=2, color=line.get_color())
    rates.set(
        xlabel="chips",
        ylabel="tokens/s, predicted",
        title="Llama 3 8B, 8,192 tokens a row, TPU v5p",
    )
    title = "dotted: nothing sent while anything is computed"
    mfus.set(xlabel="chips", ylabel="MFU, predicted", ylim=(0, 0.7), title=title)
    rates.legend()
    pyplot.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
