"""The options of `jaxllm fit-scaling`."""

import dataclasses
from typing import Annotated, Literal

import tyro
from annotated_types import Gt, Le

from jaxllm.config.ranges import (
    FINITE,
    NOT_BOOL,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
)

FormName = Literal["chinchilla", "kaplan"]

# Other numbers of configs end at 1e12.
Flops = Annotated[float, NOT_BOOL, FINITE, Gt(0), Le(1e35)]


@dataclasses.dataclass(frozen=True)
class FitScalingArgs:
    """Fit a scaling law to finished runs, and say what larger ones will reach and cost."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
    """Run directories, or folders of them, such as a sweep's, on a disk or in a store (gs://, s3://). Of runs alike in size and tokens the best counts."""
    form: FormName = "chinchilla"
    """chinchilla: L = E + A / N^alpha + B / D^beta, N all parameters. kaplan: L = (A / N^alpha + B / D)^power, N without embeddings; it knows that larger models gain more from tokens, as they do in short runs."""
    stage: str = "pretrain"
    """Whose results are read: a stage that trains on tokens."""
    metric: str = "loss"
    """Number of the result: loss, in nats per token, or bits_per_byte, where tokenizers differ."""
    hold_out: NonNegativeInt = 1
    """How many of the largest sizes are predicted instead of fitted; 0: none."""
    flops: Annotated[tuple[Flops, ...], tyro.conf.arg(metavar="FLOPS")] = ()
    """Budgets to split between parameters and tokens, such as 1e21."""
    target: Annotated[tuple[NonNegativeFloat, ...], tyro.conf.arg(metavar="LOSS")] = ()
    """Losses to reach with the fewest FLOPs."""
    plan: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """What `jaxllm plan --json` printed: with its speed FLOPs become device-hours."""
    samples: PositiveInt = 100
    """Samples of the runs for the intervals, which hold 90% of them (bootstrap)."""
    seed: Seed = 0
    """Random seed of these samples."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """Where law.json and law.png go; empty: nowhere."""
    json: bool = False
    """Print one JSON object instead of tables."""
