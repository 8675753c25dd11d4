"""In how many steps another optimizer reaches AdamW's final loss, on the quickstart's text and both tuned alike.

    python tests/benchmarks/optimizers.py --out runs/optimizers                  4.5M parameters: 26 runs of up to 2,000 steps
    python tests/benchmarks/optimizers.py --out runs/optimizers --size 14m       14M parameters: as many
    python tests/benchmarks/optimizers.py --out runs/small --steps 150 --seeds 2 --rates 2e-3,8e-3 --fractions 0.5,0.75,1
                                                                                 10 short runs

First a sweep: both optimizers with every learning rate of the same list, seed 0 and all steps; the lowest held-out loss
decides. Then, with its best rate, AdamW with all steps, and the other one with fractions of them, each with a whole
schedule of its own, for every seed. The fraction at which its loss is AdamW's is interpolated for each seed by itself.

The text is in a package of the extra [demo]. Finished runs are skipped and interrupted ones resume: with --minutes it
stops beginning runs, and the same command goes on.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SIZES = {
    "5m": {},
    "14m": {"num-layers": 6, "embed-dim": 384, "num-heads": 6, "num-kv-heads": 6, "head-dim": 64, "mlp-dim": 1152},
}  # fmt: skip
# Of a t distribution with one degree of freedom less than there are seeds: 95% of it is within.
T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


class OutOfTime(Exception):
    """--minutes are over."""


class Runs:
    """Runs of `jaxllm pretrain` below one directory, with one tokenizer."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.root = Path(args.out) / args.size
        self.ends = time.monotonic() + 60 * args.minutes if args.minutes else math.inf

    def loss(self, kind: str, rate: str, steps: int, seed: int) -> float:
        """The held-out loss in nats per token after all steps."""
        directory = self.root / f"{kind}-{rate}-{steps}-{seed}"
        path = directory / "pretrain" / "result.json"
        if not path.exists():
            self.run(directory, kind, rate, steps, seed)
        return json.loads(path.read_text())["loss"]

    def run(self, directory: Path, kind: str, rate: str, steps: int, seed: int) -> None:
        """Raises OutOfTime instead of beginning."""
        if time.monotonic() > self.ends:
            raise OutOfTime
        if not directory.exists():
            shutil.copytree(self.prepared(), directory)
        fields = {
            "seed": seed,
            "pretrain.num-steps": steps,
            "pretrain.eval-every": steps,
            "pretrain.optim.kind": kind,
            "pretrain.optim.learning-rate": rate,
            # A tenth of the steps, so that a shorter run is the same schedule in less time.
            "pretrain.optim.warmup-steps": steps // 10,
        }
        began = time.monotonic()
        self.jaxllm("pretrain", directory, fields)
        print(f"{directory.name}: {time.monotonic() - began:.0f} s", flush=True)

    def prepared(self) -> Path:
        """A run directory with the tokenizer that all runs share."""
        directory = self.root / "prepared"
        if not (directory / "tokenizer" / "result.json").exists():
            self.jaxllm("tokenizer", directory, {})
        return directory

    def jaxllm(self, stage: str, directory: Path, fields: dict[str, object]) -> None:
        fields = {f"model.{name}": size for name, size in SIZES[self.args.size].items()} | fields
        flags = [f"--{name}={value}" for name, value in fields.items()]
        directory.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{directory}.log", "ab") as log:
            command = [
                sys.executable,
                "-m",
                "jaxllm",
                stage,
                self.args.config,
                "--run-dir",
                str(directory),
            ]
            subprocess.run([*command, *flags], stdout=log, stderr=log, check=True)


def tuned(runs: Runs, kind: str) -> str:
    """The learning rate with the lowest loss; prints the sweep."""
    args = runs.args
    losses = {rate: runs.loss(kind, rate, args.steps, 0) for rate in args.rates}
    best = min(losses, key=lambda rate: losses[rate])
    for rate, loss in losses.items():
        print(f"| {kind} | {rate}{' (best)' * (rate == best)} | {loss:.4f} |", flush=True)
    if best in (args.rates[0], args.rates[-1]) and len(losses) > 2:
        print(f"note: the best rate of {kind} is at the end of the list; extend --rates")
    return best


def fraction_to_reach(target: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """Where a falling curve of (fraction, loss) first reaches a loss, between its points in log(fraction).

    None: nowhere. A first point that is already below counts as it is, which is too high.
    """
    previous = None
    for fraction, loss in curve:
        if loss <= target:
            if previous is None:
                return fraction
            before, higher = previous
            part = (higher - target) / (higher - loss)
            return before * (fraction / before) ** part
        previous = fraction, loss
    return None


def compare(runs: Runs) -> None:
    args = runs.args
    print(f"| {args.size} | learning rate | held-out loss, seed 0 |\n|---|---|---|")
    base, other = tuned(runs, "adamw"), tuned(runs, args.kind)
    heads = [f"{args.kind} {fraction:g}x" for fraction in args.fractions]
    print(
        f"\n| seed | adamw | {' | '.join(heads)} | steps to reach it |\n|{'---|' * (len(heads) + 3)}"
    )
    reached = []
    for seed in range(args.seeds):
        target = runs.loss("adamw", base, args.steps, seed)
        curve = [
            (fraction, runs.loss(args.kind, other, round(fraction * args.steps), seed))
            for fraction in args.fractions
        ]
        found = fraction_to_reach(target, curve)
        shown = f"{found:.3f}x" if found else f"more than {args.fractions[-1]:g}x"
        cells = " | ".join(f"{loss:.4f}" for _, loss in curve)
        print(f"| {seed} | {target:.4f} | {cells} | {shown} |", flush=True)
        reached.append(found)
    numbers = [found for found in reached if found]
    if len(numbers) < len(reached) or len(numbers) < 2:
        print(f"{args.kind} reached AdamW's loss with {len(numbers)} of {len(reached)} seeds")
        return
    mean = statistics.mean(numbers)
    half = T[len(numbers)] * statistics.stdev(numbers) / len(numbers) ** 0.5
    print(f"{args.kind} reaches AdamW's loss in {mean:.3f}x the steps, +- {half:.3f} (95%)")


def main() -> None:
    def several(text: str) -> list[str]:
        return text.split(",")

    def rising(text: str) -> list[float]:
        return sorted(map(float, several(text)))

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", required=True, help="where the runs go")
    parser.add_argument(
        "--config", default="configs/quickstart.yaml", help="the text and the smaller model"
    )
    parser.add_argument("--size", choices=SIZES, default="5m", help="of the model")
    parser.add_argument("--kind", default="muon", help="the optimizer beside AdamW")
    parser.add_argument("--steps", type=int, default=2000, help="of AdamW")
    parser.add_argument("--seeds", type=int, choices=T, default=3)
    parser.add_argument(
        "--rates",
        type=several,
        default=several("5e-4,1e-3,2e-3,4e-3,8e-3"),
        help="learning rates, rising",
    )
    parser.add_argument(
        "--fractions", type=rising, default=rising("0.4,0.5,0.6,0.75,1"), help="of the steps"
    )
    parser.add_argument(
        "--minutes", type=float, default=0, help="begin no run after them; 0: no limit"
    )
    runs = Runs(parser.parse_args())
    try:
        compare(runs)
    except OutOfTime:
        print(f"{runs.args.minutes:g} minutes are over; the same command goes on")


if __name__ == "__main__":
    main()
