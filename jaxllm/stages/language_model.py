"""Pre-training and supervised fine-tuning: the next-token loss over packed rows.

Pre-training goes over documents, from fresh parameters; fine-tuning over conversations, from the pre-trained ones,
where the loss falls on the assistant's tokens only, its end included.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from jaxllm import train
from jaxllm.config import InputError
from jaxllm.config.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from jaxllm.data.loader import (
    Rows,
    epoch_batches,
    epoch_rows,
    epochs_of,
    fingerprint,
    load_rows,
    make_batch_at,
)
from jaxllm.data.sources import DataConfig
from jaxllm.evaluation import measures
from jaxllm.metrics import Work, held_out, peak_flops
from jaxllm.models import lora, next_token, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.lora import LoRAConfig
from jaxllm.optim import OptimConfig, learning_rate, make_optimizer
from jaxllm.runtime import tree_shapes
from jaxllm.runtime.checkpoint import CheckpointConfig
from jaxllm.runtime.console import console
from jaxllm.sharding import activation, check_batch, param_shardings, place_params, replicated
from jaxllm.workspace import Workspace, load_model, read_model_card, write_model_card


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Training on next tokens."""

    data: DataConfig = DataConfig()
    """What to train on; a share of it is held out."""
    init_from: str = ""
    """Stage directory to start from; empty: the stage before (pre-training: fresh parameters)."""
    num_steps: NonNegativeInt = 0
    """Optimizer updates; 0: as many as num_epochs takes."""
    num_epochs: NonNegativeFloat = 1.0
    """Passes over the data, where num_steps is 0."""
    batch_size: PositiveInt = 16
    """Rows per update, over all devices and microbatches."""
    num_micro: PositiveInt = 1
    """Microbatches per update (gradient accumulation)."""
    length: NonNegativeInt = 0
    """Tokens per row; 0: model.max_length."""
    z_loss_coef: NonNegativeFloat = 0.0
    """Coefficient of logsumexp^2 (PaLM)."""
    mtp_coef: NonNegativeFloat = 0.3
    """Weight of the losses of model.mtp_modules, together (DeepSeek-V3, eq. 25)."""
    log_every: PositiveInt = 10
    """Steps per logged interval."""
    eval_every: PositiveInt = 200
    """Steps between evaluations on the held-out split."""
    eval_batches: PositiveInt = 16
    """Batches of an evaluation during training; the final one takes all of the held-out split."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    lora: LoRAConfig = LoRAConfig()
    """Train adapters on the model started from, in place of all parameters."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""

    def __post_init__(self) -> None:
        if self.batch_size % self.num_micro:
            raise ValueError(
                f"num_micro: {self.num_micro} does not divide batch_size {self.batch_size}"
            )
        if not self.num_steps and not self.num_epochs:
            raise ValueError("num_steps: must be positive, or 0 with num_epochs above 0")


def build(workspace: Workspace, life: Any, stage: str) -> train.Training:
    """The training of the decoder in stage "pretrain" or "sft"; the result has its held-out bits per byte."""
    config: LanguageModelConfig = getattr(life, stage)
    model = resolve_model(life.model, workspace.tokenizer().vocab_size, config.init_from)
    kind = "document" if stage == "pretrain" else "chat"
    fresh = stage == "pretrain" and not config.init_from
    source = "" if fresh else workspace.source(config.init_from, "pretrain", stage)
    mesh, directory = workspace.mesh, workspace.stage_dir(stage)
    check_batch(
        mesh, config.batch_size // config.num_micro, f"{stage}.batch_size / {stage}.num_micro"
    )
    tokenizer, length = workspace.tokenizer(), model.row_length(config.length, f"{stage}.length")
    cache = workspace.run_dir / "cache"
    rows = {
        split: load_rows(config.data, kind, split, tokenizer, length, cache)
        for split in ("train", "held_out")
    }
    per_epoch = epoch_rows(rows["train"]) / config.batch_size
    num_steps = train.count_steps(
        config.num_steps, config.num_epochs, per_epoch, f"{stage}.num_epochs"
    )
    describe(stage, rows, model, num_steps, config.batch_size)
    step, placed = program(mesh, config, model, num_steps, workspace.seed)
    whole, axes = transformer.abstract(model), transformer.axes(model)
    seed, sharding = workspace.seed, activation(mesh, "batch", None)

    def first() -> Any:
        if not source:
            init = jax.jit(
                functools.partial(transformer.init, model),
                out_shardings=param_shardings(mesh, whole, axes),
            )
            return init(jax.random.key(seed))
        params = transformer.grow_vocab(lora.merge(load_model(source, mesh)[0]), model.vocab_size)
        tree_shapes.compare(params, whole, source)
        return params

    base = lora.frozen(config.lora, first()) if config.lora.rank else {}
    measure = jax.jit(
        lambda params, batch, base: next_token.loss(params, batch, None, base, model=model)[2]
    )

    def evaluation(step: int, state: train.TrainState) -> dict[str, float]:
        limit = 0 if step >= num_steps else config.eval_batches
        batches = epoch_batches(
            rows["held_out"], batch_size=config.batch_size, sharding=sharding, max_batches=limit
        )
        nats = measures.run(functools.partial(measure, base=base), state.params, batches)["loss"]
        counts = (
            sum(getattr(r, name) for r, _ in rows["held_out"])
            for name in ("num_tokens", "num_bytes")
        )
        return {"eval/loss": nats, "eval/bits_per_byte": measures.bits_per_byte(nats, *counts)}

    def start() -> train.TrainState:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        make = jax.jit(
            functools.partial(lora.init, config.lora, axes=axes),
            out_shardings=placed.shardings.params,
        )
        return placed.init(make(base, key) if base else first())

    write_model_card(directory, model, "policy", ("params",), config.lora, source)
    tokens = config.batch_size * length

    def result(state: train.TrainState, metrics: Mapping[str, float]) -> dict[str, Any]:
        return {
            "parameters": transformer.num_params(model),
            "steps": num_steps,
            "tokens": num_steps * tokens,
            "train_loss": metrics["train/loss"],
            **held_out(metrics),
            "tokens_per_second": metrics.get("throughput/tokens_per_second", 0.0),
            "mfu": metrics.get("throughput/mfu", 0.0),
            "norm": float(optax.tree.norm(state.params)),
        }

    return train.Training(
        data=fingerprint([*rows["train"], *rows["held_out"]]),
        init=start,
        abstract=placed.abstract,
        step=functools.partial(step, base=base),
        batch_at=make_batch_at(
            rows["train"], batch_size=config.batch_size, seed=seed, sharding=sharding
        ),
        num_steps=num_steps,
        settings=config,
        work=Work(tokens, transformer.flops_per_token(model, length) * tokens, peak_flops(mesh)),
        evaluate=evaluation,
        best="eval/bits_per_byte",
        result=result,
        schedules={"train/learning_rate": learning_rate(config.optim, num_steps)},
        shown=("loss", "eval/bits_per_byte"),
    )


def resolve_model(model: ModelConfig, vocab_size: int, init_from: str = "") -> ModelConfig:
    """The model with the tokenizer's vocabulary; a larger one given in the config is padding and stays.

    Where the config gives no model, it is that of init_from, with as many more rows as the tokenizer needs.
    """
    how = {name: getattr(model, name) for name in ("remat", "scan_unroll")}
    if init_from and model == ModelConfig(**how):
        model = dataclasses.replace(read_model_card(init_from)[0], **how)
        return dataclasses.replace(model, vocab_size=max(model.vocab_size, vocab_size))
    if model.vocab_size and model.vocab_size < vocab_size:
        raise InputError(
            f"model.vocab_size: {model.vocab_size} is below the tokenizer's {vocab_size}; set it to 0 to take the tokenizer's"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size or vocab_size)


def plan(
    mesh: jax.sharding.Mesh, life: Any, stage: str
) -> tuple[list[train.Program], dict[str, Any]]:
    """`programs` of a stage of this config."""
    return programs(mesh, stage, getattr(life, stage), life.model, life.seed)


def program(
    mesh: jax.sharding.Mesh,
    config: LanguageModelConfig,
    model: ModelConfig,
    num_steps: int,
    seed: int,
) -> tuple[Any, train.StateLayout]:
    """(the step: state, batch, base -> state, metrics; where its state is placed), on real devices or planned ones."""
    shapes, axes = lora.trained(config.lora, transformer.abstract(model), transformer.axes(model))
    tx = make_optimizer(config.optim, num_steps, axes, model.moe.bias_rate)
    placed = train.state_layout(mesh, shapes, axes, tx)
    learn = functools.partial(
        next_token.loss, model=model, z_loss_coef=config.z_loss_coef, mtp_coef=config.mtp_coef
    )
    settings: dict[str, Any] = {
        "num_micro": config.num_micro,
        "seed": seed,
        "spike_factor": config.optim.spike_factor,
    }
    return train.make_step(learn, tx, state_shardings=placed.shardings, **settings), placed


def programs(
    mesh: jax.sharding.Mesh, stage: str, config: LanguageModelConfig, model: ModelConfig, seed: int
) -> tuple[list[train.Program], dict[str, Any]]:
    """(what an update runs, {role: its state}), as shapes with their shardings."""
    step, placed = program(mesh, config, model, max(config.num_steps, 1), seed)
    shape = (config.batch_size, length := model.row_length(config.length, f"{stage}.length"))
    batch = next_token.planned_rows(mesh, *shape)
    whole = place_params(mesh, transformer.abstract(model), transformer.axes(model))
    base = lora.place_frozen(config.lora, whole, replicated(mesh))
    flops = transformer.flops_per_token(model, length) * math.prod(shape)
    update = train.Program("step", step, (placed.abstract, batch), {"base": base}, flops)
    return [update], {"policy": placed.abstract, "base": base}


def describe(
    stage: str,
    rows: Mapping[str, Sequence[tuple[Rows, float]]],
    model: ModelConfig,
    num_steps: int,
    batch: int,
):
    """Say what is about to happen, before the first compilation."""
    train_rows = sum(r.num_rows for r, _ in rows["train"])
    passes = " + ".join(f"{passes:.2f}" for passes in epochs_of(rows["train"], num_steps, batch))
    dropped = sum(r.num_dropped for split in rows.values() for r, _ in split)
    examples = {split: sum(r.num_examples for r, _ in rows[split]) for split in rows}
    console.print(
        f"{stage}: {examples['train']:,} training and {examples['held_out']:,} held-out examples in {train_rows:,} rows"
        f"{f', {dropped} too long and dropped' if dropped else ''}; {transformer.num_params(model):,} parameters, "
        f"{num_steps} steps = {passes} epochs{' of the sources' if len(rows['train']) > 1 else ''}"
    )
