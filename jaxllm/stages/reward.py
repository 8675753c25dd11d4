"""Reward model: the fine-tuned model with a scalar head, trained on the rankings of K responses per prompt."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import evaluate, losses, train
from jaxllm.checkpoint import CheckpointConfig
from jaxllm.data import DataConfig, RankedExample, Source, load_ranked, make_ranked_batch_at, ranked_epoch
from jaxllm.metrics import LoggingConfig, Work, console, peak_flops
from jaxllm.models import scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.optim import OptimConfig, learning_rate, make_optimizer
from jaxllm.sharding import activation, check_batch
from jaxllm.workspace import Workspace, describe_model, load_model


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Training on rankings. One prompt with all its responses is one example (Ouyang et al. 2022, section 3.5)."""

    data: DataConfig = DataConfig()
    """Rankings; without sources those of the rank stage."""
    init_from: str = ""
    """Stage directory to start from; empty: sft."""
    num_epochs: float = 1.0
    """Passes over the rankings; more than one overfits soon."""
    num_steps: int = 0
    """Updates; 0: as many as num_epochs takes."""
    batch_size: int = 16
    """Prompts per update, over all devices and microbatches."""
    num_micro: int = 1
    """Microbatches per update."""
    length: int = 0
    """Longest prompt and response in tokens; 0: model.max_length."""
    log_every: int = 5
    """Steps per logged interval."""
    eval_every: int = 20
    """Steps between evaluations on held-out rankings."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-4, weight_decay=0.0)
    """Optimiser and schedule."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_micro", "log_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1")
        if self.batch_size % self.num_micro:
            raise ValueError(f"num_micro: {self.num_micro} does not divide batch_size {self.batch_size}")
        if self.num_steps < 0 or (self.num_steps == 0 and self.num_epochs <= 0):
            raise ValueError("num_steps: must be positive, or 0 with num_epochs above 0")


def run(workspace: Workspace, config: RewardConfig, logging: LoggingConfig) -> dict[str, float]:
    """Train and return held-out pairwise accuracy, top-1 accuracy and calibration error."""
    mesh, directory, data = workspace.mesh, workspace.stage_dir("reward"), config.data
    check_batch(mesh, config.batch_size // config.num_micro, "reward.batch_size / reward.num_micro")
    if not data.sources:
        workspace.require("rank", "reward")
        data = dataclasses.replace(data, sources=(Source(str(workspace.stage_dir("rank") / "rankings.jsonl")),))
    if not config.init_from:
        workspace.require("sft", "reward")
    trunk, model = load_model(config.init_from or str(workspace.stage_dir("sft")), mesh)
    tokenizer, length = workspace.tokenizer(), config.length or model.max_length
    rankings = {split: load_ranked(data, split, tokenizer, length) for split in ("train", "held_out")}
    num_steps = config.num_steps or math.ceil(config.num_epochs * len(rankings["train"]) / config.batch_size)
    console.print(f"reward: {len(rankings['train'])} training and {len(rankings['held_out'])} held-out prompts")
    tx = make_optimizer(config.optim, num_steps)
    placed = train.place_state(mesh, scalar.abstract(model), scalar.axes(model), tx)
    sharding = activation(mesh, "batch", None, None)
    batches = {"batch_size": config.batch_size, "sharding": sharding}
    measure = jax.jit(lambda params, batch: scores(params, batch, model))

    def evaluation(step: int, state: train.TrainState) -> dict[str, float]:
        del step
        return held_out_numbers(measure, state.params, rankings["held_out"], batches)

    def centre(state: train.TrainState) -> train.TrainState:
        """Shift the scores to mean zero on the training responses (Ouyang et al. 2022, section 3.5)."""
        every, ranks = all_scores(measure, state.params, rankings["train"], batches)
        head = state.params["head"]
        bias = head["bias"] - jnp.float32(every[ranks > 0].mean())
        return state._replace(params={**state.params, "head": {**head, "bias": bias}})

    def first_params() -> Any:
        key = jax.random.fold_in(jax.random.key(workspace.seed), 1)
        make = jax.jit(lambda trunk: scalar.init(trunk, model, key), out_shardings=placed.shardings.params)
        return make(trunk)

    describe_model(directory, model, "reward", ("params",))
    batch_at = make_ranked_batch_at(rankings["train"], seed=workspace.seed, **batches)
    rows = math.prod(batch_at(0)["tokens"].shape)
    _, metrics = train.run_stage(
        directory,
        "reward",
        init=lambda: placed.init(first_params()),
        abstract=placed.abstract,
        step=train.make_step(
            lambda params, batch, key: loss(params, batch, key, model=model),
            tx,
            num_micro=config.num_micro,
            seed=workspace.seed,
            state_shardings=placed.shardings,
        ),
        batch_at=batch_at,
        num_steps=num_steps,
        settings=config,
        logging=logging,
        work=Work(rows, transformer.flops_per_token(model, length) * rows, peak_flops(mesh)),
        evaluate=evaluation,
        best="eval/accuracy",
        lower_is_better=False,
        finalize=centre,
        schedules={"train/learning_rate": learning_rate(config.optim, num_steps)},
        shown=("loss", "accuracy", "eval/accuracy"),
    )
    return {"steps": num_steps, **{k.removeprefix("eval/"): v for k, v in metrics.items() if k.startswith("eval/")}}


def scores(params: Any, batch: Any, model: ModelConfig) -> jax.Array:
    """Scores float32[B, K] of a batch {tokens, segment_ids int32[B, K, T], ranks int32[B, K]}: K rows of one forward."""
    B, K, T = batch["tokens"].shape
    tokens, segment_ids = (batch[name].reshape(B * K, T) for name in ("tokens", "segment_ids"))
    values = scalar.apply(params, model, tokens, segment_ids)
    return scalar.last_value(values, segment_ids).reshape(B, K)


def loss(params: Any, batch: Any, key: Any, *, model: ModelConfig) -> losses.Loss:
    del key  # no dropout
    return losses.ranking(scores(params, batch, model), batch["ranks"])


def all_scores(measure, params: Any, examples: list[RankedExample], batches: dict[str, Any]):
    """(scores float32[N, K], ranks int32[N, K]) over a split; rank 0 where there is no response."""
    pairs = [(measure(params, b), b["ranks"]) for b in ranked_epoch(examples, **batches)]
    every, ranks = (np.concatenate([np.asarray(p[i]) for p in pairs]) for i in range(2))
    return every, ranks


def held_out_numbers(measure, params: Any, examples: list[RankedExample], batches: dict[str, Any]) -> dict[str, float]:
    every, ranks = all_scores(measure, params, examples, batches)
    metrics = {
        k: float(s) / max(float(w), 1.0) for k, (s, w) in losses.ranking(jnp.array(every), jnp.array(ranks))[2].items()
    }
    margins = evaluate.pair_margins(every, ranks)
    numbers = {"loss": metrics["loss"], "accuracy": metrics["accuracy"], "top1_accuracy": metrics["top1"]}
    numbers |= {"calibration_error": evaluate.calibration_error(margins), "pairs": float(len(margins))}
    return {f"eval/{name}": value for name, value in numbers.items()}
