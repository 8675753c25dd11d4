"""Does it fit, and what does it take: `jaxllm plan` for the shapes that people run, one row of a table each.

python tests/benchmarks/slices.py [--rows TEXT ...]          all rows, or those that have one of the texts in them

Rows of GPUs need the extra plan-gpu.
"""

import argparse
import json
from typing import Any, NamedTuple

from plan import planned


class Row(NamedTuple):
    config: str
    topology: str
    stage: str = "pretrain"
    slices: int = 1
    more: dict[str, Any] = {}  # over the config's fields  # noqa: RUF012


ROWS = [
    Row("llama3_8b", "v5e:16x16"),
    Row("llama3_8b", "v6e:16x16", more={"pretrain": {"batch_size": 512}}),
    Row("llama3_8b", "v5p:4x4x4"),
    Row("llama3_8b", "v5p:4x4x4", more={"mesh": {"pipeline": 4}}),
    Row("llama3_8b", "v5p:4x4x4", more={"model": {"remat": "offload"}}),
    Row("llama3_8b_long", "v5p:4x4x4"),
    Row("llama3_8b", "v5p:4x4x2", "sft"),
    Row("llama3_8b", "v5p:4x4x2", "reward"),
    Row("llama3_8b", "v5p:4x4x2", "ppo"),
    Row("llama3_70b", "v5p:4x8x8"),
    Row(
        "llama3_70b",
        "v5p:4x8x8",
        slices=2,
        more={"mesh": {"data": 2}, "pretrain": {"batch_size": 1024}},
    ),
    Row(
        "llama3_70b",
        "v5p:4x8x8",
        slices=2,
        more={"mesh": {"pipeline": 2}, "pretrain": {"batch_size": 1024}},
    ),
    Row("llama31_405b", "v5p:8x8x8"),
    Row("llama31_405b", "tpu7x:4x8x8"),
    Row("mixtral_8x7b", "v5p:4x4x4"),
    Row("deepseek_v3", "v5p:8x8x8"),
    Row("llama3_8b", "h100:8", more={"pretrain": {"batch_size": 32}}),
    Row("llama3_8b", "h100:64"),
    Row("llama3_8b", "a100:64"),
    Row("llama3_8b", "b200:64"),
    Row("llama3_8b_long", "h100:64"),
    Row("llama3_8b", "h200:2x8", "sft", more={"sft": {"batch_size": 64}}),
    Row("llama3_8b", "h200:2x8", "reward"),
    Row("llama3_8b", "h200:2x8", "ppo"),
    Row("llama3_70b", "h100:256"),
    Row("mixtral_8x7b", "h100:64"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=[""])
    wanted = parser.parse_args().rows
    print("| what | topology | mesh | state | temporaries | of | step s | MFU | command s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        if not any(text in str(row) for text in wanted):
            continue
        found = planned(
            row.config, row.more, row.topology, "--stage", row.stage, "--slices", str(row.slices)
        )
        more = f", {json.dumps(row.more)}" if row.more else ""
        where = row.topology + (f" x {row.slices}" if row.slices > 1 else "")
        mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
        names = ("state", "temp", "hbm")
        sizes = [
            found.get(f"{n}_bytes_per_device", found.get(f"{n}_bytes", 0)) / 1e9 for n in names
        ]
        figures = " | ".join(f"{size:.2f}" for size in sizes)
        step = f"{found['predicted_step_seconds']:.2f} | {found['predicted_mfu']:.1%}"
        print(
            f"| {row.config} {row.stage}{more} | {where} | {mesh} | {figures} | {step} | {found['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
