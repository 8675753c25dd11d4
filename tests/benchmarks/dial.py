"""Where the best learning rate is at 1 and 4 times the width and the depth, with the rules of `model.scaling` and without.

    python tests/benchmarks/dial.py --out runs/dial                                25 runs of 500 steps; about an hour of a core
    python tests/benchmarks/dial.py --out runs/small --width 32 --steps 400 --batch-size 8 --length 64 \\
        --held-out 2 --rates=-9,-8,-7,-6,-5,-4,-3 --sizes 1x1,4x1,1x4              35 short runs, 10 minutes of 2 cores

The text is the quickstart's, in a package of the extra [demo]. Learning rates are powers of 2. A size AxB is A times as wide
and B times as deep as the base. At 1x1 the rules change nothing, so it is run once. Runs are appended to OUT/losses.jsonl;
the same command goes on after the last one (--minutes: begin none after them). OUT/dial.svg is the picture.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

matplotlib.use("svg")
from matplotlib import pyplot

import jaxllm.__main__ as cli
from jaxllm.config import load
from jaxllm.data.loader import epoch_batches, load_rows, make_batch_at
from jaxllm.life import Config
from jaxllm.models import next_token, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.parts_config import ScalingConfig
from jaxllm.optim import make_optimizer
from jaxllm.optim_config import OptimConfig
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import activation
from jaxllm.tokenizers.published import load_tokenizer

CONFIG = "configs/quickstart.yaml"
HEAD_DIM = 16
Size = tuple[int, int]  # times the base's width, times its depth


class Text:
    """Batches of training text, and all of the held-out text."""

    def __init__(self, args: argparse.Namespace, out: Path):
        if not (out / "tokenizer" / "result.json").exists():
            # Rare characters are spelled in bytes: a small vocabulary keeps the layers in view.
            flags = [f"--tokenizer.vocab-size={args.vocab}", "--tokenizer.character-coverage=0.98"]
            cli.main(["tokenizer", CONFIG, "--run-dir", str(out), *flags])
        self.tokenizer = load_tokenizer(out / "tokenizer" / "tokenizer")
        data = load(Config, CONFIG).pretrain.data
        rows = {
            split: load_rows(data, "document", split, self.tokenizer, args.length, out / "cache")
            for split in ("train", "held_out")
        }
        sharding = activation(make_mesh(MeshConfig()), "batch", None)
        self.batch_at = make_batch_at(
            rows["train"], batch_size=args.batch_size, seed=0, sharding=sharding
        )
        self.held_out = list(
            epoch_batches(
                rows["held_out"], batch_size=64, sharding=sharding, max_batches=args.held_out
            )
        )


def model(args: argparse.Namespace, vocab: int, size: Size, rules: bool) -> ModelConfig:
    width, depth = args.width * size[0], args.depth * size[1]
    scaling = ScalingConfig(args.width, args.depth) if rules else ScalingConfig()
    return ModelConfig(
        vocab_size=vocab,
        max_length=args.length,
        num_layers=depth,
        embed_dim=width,
        num_heads=width // HEAD_DIM,
        mlp_dim=3 * width,
        dtype="float32",
        init_std=args.init_std,
        scaling=scaling,
    )


def trainer(args: argparse.Namespace, config: ModelConfig, text: Text) -> Any:
    """log2 of a learning rate -> the held-out loss in nats per token. Compiled once for all rates."""
    optim = OptimConfig(
        kind=args.kind,
        schedule="linear",
        final_fraction=0.0,
        warmup_steps=args.steps // 10,
        weight_decay=0.0,
    )
    axes = transformer.axes(config)
    loss = functools.partial(next_token.loss, model=config)

    def optimizer(rate: Any) -> Any:
        # The rate may be traced: a schedule only calculates with it.
        return make_optimizer(dataclasses.replace(optim, learning_rate=rate), args.steps, axes)

    def mean(params: Any, batch: Any) -> Any:
        total, weight, _ = loss(params, batch, None, {})
        return total / weight

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any, rate: Any) -> Any:
        grads = jax.grad(mean)(params, batch)
        moves, state = optimizer(rate).update(grads, state, params)
        return optax.apply_updates(params, moves), state

    init = jax.jit(functools.partial(transformer.init, config))
    measure = jax.jit(lambda params, batch: loss(params, batch, None, {})[:2])

    def run(power: float) -> float:
        params = init(jax.random.key(args.seed))
        state = optimizer(1.0).init(params)
        for number in range(args.steps):
            params, state = step(params, state, text.batch_at(number), jnp.float32(2.0**power))
        sums = [measure(params, batch) for batch in text.held_out]
        return float(sum(total for total, _ in sums) / sum(weight for _, weight in sums))

    return run


def sweep(args: argparse.Namespace, out: Path) -> dict[tuple[bool, Size], dict[float, float]]:
    """{(with the rules, size): {log2 of the learning rate: loss}}, of what is finished."""
    ends = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    file = out / "losses.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    known = {
        (one["rules"], *one["size"], one["rate"]): one["loss"] for one in map(json.loads, lines)
    }
    text = Text(args, out)
    found: dict[tuple[bool, Size], dict[float, float]] = {}
    for size in args.sizes:
        for rules in (True, False):
            config = model(args, text.tokenizer.vocab_size, size, rules)
            run = trainer(args, config, text)
            losses = found.setdefault((rules, size), {})
            for rate in args.rates:
                # The base is the same with the rules as without.
                key = (rules or size == (1, 1), *size, rate)
                if key not in known and time.monotonic() < ends:
                    began = time.monotonic()
                    known[key] = run(rate)
                    line = {"rules": key[0], "size": size, "rate": rate, "loss": known[key]}
                    with open(file, "a") as log:
                        log.write(json.dumps(line) + "\n")
                    print(f"{line} {time.monotonic() - began:.0f} s", flush=True)
                if key in known:
                    losses[rate] = known[key]
    return found


def best(losses: dict[float, float]) -> float:
    finite = {rate: loss for rate, loss in losses.items() if np.isfinite(loss)}
    return min(finite, key=lambda rate: finite[rate])


def report(args: argparse.Namespace, found: dict[tuple[bool, Size], dict[float, float]]) -> None:
    """A table of losses, the best in bold, and how far the best rate moves."""
    print(f"| rules | width | depth | {' | '.join(f'2^{rate:g}' for rate in args.rates)} | best |")
    print("|" + "---|" * (len(args.rates) + 4))
    for rules in (True, False):
        moved = {}
        for size in args.sizes:
            losses = found.get((rules, size), {})
            if len(losses) < len(args.rates):
                continue
            top = best(losses)
            mark = lambda rate, top=top, losses=losses: (
                f"**{losses[rate]:.3f}**" if rate == top else f"{losses[rate]:.3f}"
            )
            cells = " | ".join(map(mark, args.rates))
            width, depth = args.width * size[0], args.depth * size[1]
            print(f"| {'yes' if rules else 'no'} | {width} | {depth} | {cells} | 2^{top:g} |")
            moved[size] = top
        if (1, 1) in moved:
            steps = max(abs(top - moved[1, 1]) for top in moved.values())
            name = "with the rules" if rules else "without"
            print(f"\n{name}, the best rate moves by up to {steps:g} steps of 2x\n", flush=True)


def draw(
    args: argparse.Namespace, found: dict[tuple[bool, Size], dict[float, float]], path: Path
) -> None:
    """Loss over learning rate: width and depth side by side, with the rules above and without below."""
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True, sharey=True)
    for row, rules in enumerate((True, False)):
        for column, name in enumerate(("width", "depth")):
            axis = axes[row, column]
            for size in args.sizes:
                losses = found.get((rules, size), {})
                if size[1 - column] != 1 or not losses:
                    continue
                points = sorted(losses.items())
                value = (args.width * size[0], args.depth * size[1])[column]
                (line,) = axis.plot(*zip(*points, strict=True), "o-", ms=3, label=f"{name} {value}")
                top = best(losses)
                axis.plot(top, losses[top], "*", ms=14, color=line.get_color())
            axis.set_title(f"{name}, {'with the rules' if rules else 'without'}")
            axis.set(xlabel="log2 of the learning rate", ylabel="held-out loss, nats per token")
            axis.grid(alpha=0.3)
            axis.legend()
    # A loss that has diverged would flatten the others.
    values = [loss for losses in found.values() for loss in losses.values() if np.isfinite(loss)]
    low = min(values)
    axes[0, 0].set_ylim(low - 0.1, min(max(values), low + 2.5) + 0.1)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    def powers(text: str) -> list[float]:
        return sorted(map(float, text.split(",")))

    def sizes(text: str) -> list[Size]:
        pairs = [one.split("x") for one in text.split(",")]
        return [(int(width), int(depth)) for width, depth in pairs]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", required=True, help="where losses, tokenizer and picture go")
    parser.add_argument("--width", type=int, default=64, help="of the base")
    parser.add_argument("--depth", type=int, default=2, help="of the base")
    parser.add_argument(
        "--init-std",
        type=float,
        default=0.08,
        help="standard deviation of the base's initial weights",
    )
    parser.add_argument("--sizes", type=sizes, default=sizes("1x1,4x1,1x4"))
    parser.add_argument(
        "--rates", type=powers, default=powers("-10,-9,-8,-7,-6"), help="log2 of them"
    )
    parser.add_argument("--kind", choices=("adamw", "muon"), default="adamw", help="the optimizer")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=16, help="rows")
    parser.add_argument("--length", type=int, default=96, help="tokens of a row")
    parser.add_argument("--vocab", type=int, default=3072)
    parser.add_argument("--held-out", type=int, default=8, help="batches of 64 rows to measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0, help="begin no run after; 0: no limit")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found = sweep(args, out)
    report(args, found)
    draw(args, found, out / "dial.svg")


if __name__ == "__main__":
    main()
