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
import jax.numpy as jnp
import optax

from jaxllm import evaluate, losses, train
from jaxllm.checkpoint import CheckpointConfig, compare
from jaxllm.data import DataConfig, Rows, epoch_batches, epoch_rows, epochs_of, fingerprint, load_rows, make_batch_at
from jaxllm.metrics import LoggingConfig, Work, console, peak_flops
from jaxllm.models import lora, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.lora import LoRAConfig
from jaxllm.optim import OptimConfig, learning_rate, make_optimizer
from jaxllm.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from jaxllm.sharding import activation, check_batch, param_shardings, place_params, replicated, rows_like
from jaxllm.workspace import Workspace, describe_model, load_model


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Training on next tokens."""

    data: DataConfig = DataConfig()
    """What to train on; a share of it is held out."""
    init_from: str = ""
    """Stage directory to start from; empty: the stage before (pre-training: fresh parameters)."""
    num_steps: NonNegativeInt = 0
    """Optimiser updates; 0: as many as num_epochs takes."""
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
    """Optimiser and schedule."""
    lora: LoRAConfig = LoRAConfig()
    """Train adapters on the model started from, in place of all parameters."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""

    def __post_init__(self) -> None:
        if self.batch_size % self.num_micro:
            raise ValueError(f"num_micro: {self.num_micro} does not divide batch_size {self.batch_size}")
        if not self.num_steps and not self.num_epochs:
            raise ValueError("num_steps: must be positive, or 0 with num_epochs above 0")


def run(
    workspace: Workspace, stage: str, config: LanguageModelConfig, model: ModelConfig, logging: LoggingConfig
) -> dict[str, float]:
    """Train the decoder of stage "pretrain" or "sft"; the result has its held-out bits per byte."""
    kind = "document" if stage == "pretrain" else "chat"
    fresh = stage == "pretrain" and not config.init_from
    source = "" if fresh else workspace.source(config.init_from, "pretrain", stage)
    mesh, directory = workspace.mesh, workspace.stage_dir(stage)
    check_batch(mesh, config.batch_size // config.num_micro, f"{stage}.batch_size / {stage}.num_micro")
    tokenizer, length = workspace.tokenizer(), model.row_length(config.length, f"{stage}.length")
    cache = workspace.run_dir / "cache"
    rows = {split: load_rows(config.data, kind, split, tokenizer, length, cache) for split in ("train", "held_out")}
    per_epoch = epoch_rows(rows["train"]) / config.batch_size
    num_steps = train.count_steps(config.num_steps, config.num_epochs, per_epoch, f"{stage}.num_epochs")
    describe(stage, rows, model, num_steps, config.batch_size)
    step, placed = program(mesh, config, model, num_steps, workspace.seed)
    whole, axes = transformer.abstract(model), transformer.axes(model)
    seed, sharding = workspace.seed, activation(mesh, "batch", None)

    def first() -> Any:
        if not source:
            init = jax.jit(functools.partial(transformer.init, model), out_shardings=param_shardings(mesh, whole, axes))
            return init(jax.random.key(seed))
        params = transformer.grow_vocab(lora.merge(load_model(source, mesh)[0]), model.vocab_size)
        compare(params, whole, source)
        return params

    base = lora.frozen(config.lora, first()) if config.lora.rank else {}
    measure = jax.jit(lambda params, batch, base: loss(params, batch, None, base, model=model)[2])

    def evaluation(step: int, state: train.TrainState) -> dict[str, float]:
        limit = 0 if step >= num_steps else config.eval_batches
        batches = epoch_batches(rows["held_out"], batch_size=config.batch_size, sharding=sharding, max_batches=limit)
        nats = evaluate.run(functools.partial(measure, base=base), state.params, batches)["loss"]
        counts = (sum(getattr(r, name) for r, _ in rows["held_out"]) for name in ("num_tokens", "num_bytes"))
        return {"eval/loss": nats, "eval/bits_per_byte": evaluate.bits_per_byte(nats, *counts)}

    def start() -> train.TrainState:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        make = jax.jit(functools.partial(lora.init, config.lora), out_shardings=placed.shardings.params)
        return placed.init(make(base, key) if base else first())

    describe_model(directory, model, "policy", ("params",), config.lora, source)
    tokens = config.batch_size * length
    state, metrics = train.run_stage(
        directory,
        stage,
        keeping=workspace.keeping(stage, fingerprint([*rows["train"], *rows["held_out"]])),
        init=start,
        abstract=placed.abstract,
        step=functools.partial(step, base=base),
        batch_at=make_batch_at(rows["train"], batch_size=config.batch_size, seed=seed, sharding=sharding),
        num_steps=num_steps,
        settings=config,
        logging=logging,
        work=Work(tokens, transformer.flops_per_token(model, length) * tokens, peak_flops(mesh)),
        evaluate=evaluation,
        best="eval/bits_per_byte",
        schedules={"train/learning_rate": learning_rate(config.optim, num_steps)},
        shown=("loss", "eval/bits_per_byte"),
    )
    numbers = {k.removeprefix("eval/"): v for k, v in metrics.items() if k.startswith("eval/")}
    return {
        **{"parameters": transformer.num_params(model), "steps": num_steps, "tokens": num_steps * tokens},
        **{"train_loss": metrics["train/loss"], **numbers},
        **{"tokens_per_second": metrics.get("throughput/tokens_per_second", 0.0)},
        **{"mfu": metrics.get("throughput/mfu", 0.0), "norm": float(optax.tree.norm(state.params))},
    }


def program(
    mesh: jax.sharding.Mesh, config: LanguageModelConfig, model: ModelConfig, num_steps: int, seed: int
) -> tuple[Any, train.Placed]:
    """(the step: state, batch, base -> state, metrics; where its state is placed), on real devices or planned ones."""
    tx = make_optimizer(config.optim, num_steps, model.moe.bias_rate)
    placed = train.place_state(
        mesh, *lora.trained(config.lora, transformer.abstract(model), transformer.axes(model)), tx
    )
    learn = functools.partial(loss, model=model, z_loss_coef=config.z_loss_coef, mtp_coef=config.mtp_coef)
    settings: dict[str, Any] = {"num_micro": config.num_micro, "seed": seed, "spike_factor": config.optim.spike_factor}
    return train.make_step(learn, tx, state_shardings=placed.shardings, **settings), placed


def programs(
    mesh: jax.sharding.Mesh, stage: str, config: LanguageModelConfig, model: ModelConfig, seed: int
) -> tuple[list[train.Program], dict[str, Any]]:
    """(what an update runs, {role: its state}), as shapes with their shardings."""
    step, placed = program(mesh, config, model, max(config.num_steps, 1), seed)
    shape = (config.batch_size, length := model.row_length(config.length, f"{stage}.length"))
    batch = planned_rows(mesh, *shape)
    whole = place_params(mesh, transformer.abstract(model), transformer.axes(model))
    base = lora.place_frozen(config.lora, whole, replicated(mesh))
    flops = transformer.flops_per_token(model, length) * math.prod(shape)
    update = train.Program("step", step, (placed.abstract, batch), {"base": base}, flops)
    return [update], {"policy": placed.abstract, "base": base}


def planned_rows(mesh: jax.sharding.Mesh, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of packed rows, as shapes with their shardings."""
    types = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32, "loss_mask": jnp.bool_}
    return rows_like(mesh, {name: jax.ShapeDtypeStruct((batch_size, length), dtype) for name, dtype in types.items()})


def loss(
    params: Any,
    batch: Any,
    key: Any,
    base: Any,
    *,
    model: ModelConfig,
    z_loss_coef: float = 0.0,
    mtp_coef: float = 0.0,
) -> losses.Loss:
    """Next-token loss of packed rows {tokens, segment_ids, positions, loss_mask}, each [B, T].

    base: the frozen parameters under adapters, {} where `params` are all (`lora.join`).
    """
    del key  # no dropout
    params = lora.join(base, params)
    tokens, segment_ids, positions = (batch[name] for name in ("tokens", "segment_ids", "positions"))
    hidden, load = transformer.apply_routed(params, model, tokens, segment_ids, positions)
    targets, mask = losses.next_token_targets(tokens, segment_ids, batch["loss_mask"])
    score = lambda hidden: losses.token_logprobs(hidden, transformer.head(params), targets, cap=model.logit_softcap)
    total, weight, metrics = losses.language_model(score(hidden), mask, z_loss_coef)
    if load:
        balance, routing = transformer.routing_loss(params["layers"], model, load)
        total, metrics = total + balance * weight, {**metrics, **routing}
    if not (model.mtp_modules and mtp_coef):
        return total, weight, metrics
    nats, count, load = _further(params, model, hidden, batch)
    if load:
        total = total + transformer.routing_loss(params["mtp"]["block"], model, load)[0] * weight
    return total + mtp_coef / model.mtp_modules * nats, weight, {**metrics, "mtp_loss": (nats, count)}


def _further(params: Any, model: ModelConfig, hidden: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array, Any]:
    """(sum of -log p of the tokens after the next, their number, the experts' loads) of all of the model's modules."""
    tokens, segment_ids, positions = (batch[name] for name in ("tokens", "segment_ids", "positions"))
    further, load = transformer.ahead(params, model, hidden, tokens, segment_ids, positions)
    found = []
    for k, states in enumerate(further):
        targets, mask = losses.next_token_targets(tokens, segment_ids, batch["loss_mask"], ahead=k + 2)
        stats = losses.token_logprobs(states, transformer.head(params), targets, cap=model.logit_softcap)
        found.append(losses.language_model(stats, mask)[:2])
    return sum(nats for nats, _ in found), sum(count for _, count in found), load  # pyright: ignore[reportReturnType]


def describe(
    stage: str, rows: Mapping[str, Sequence[tuple[Rows, float]]], model: ModelConfig, num_steps: int, batch: int
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
