"""Pre-training and supervised fine-tuning (SFT): the next-token loss over packed rows.

Pre-training starts from fresh parameters and reads documents. Fine-tuning starts from the pre-trained model and reads
conversations, in which only the assistant's tokens, the end of turn included, are targets.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jaxllm import train
from jaxllm.config import InputError
from jaxllm.data.loader import (
    Mixture,
    epoch_batches,
    epoch_rows,
    epochs_of,
    load_rows,
    make_batch_at,
    rows_fingerprint,
)
from jaxllm.evaluation import measures
from jaxllm.metrics import Work, held_out, peak_flops
from jaxllm.model_store import load_model, read_model_card, write_model_card
from jaxllm.models import lora, next_token, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.optim import learning_rate
from jaxllm.runtime import tree_shapes
from jaxllm.runtime.console import console
from jaxllm.sharding import activation, param_shardings, place_params, replicated
from jaxllm.stages import teacher, training
from jaxllm.stages.config import LanguageModelConfig
from jaxllm.workspace import Workspace


def build(workspace: Workspace, life: Any, stage: str) -> train.Training:
    """The training of the decoder in stage "pretrain" or "sft"; its result holds the held-out bits per byte."""
    config: LanguageModelConfig = getattr(life, stage)
    mesh = workspace.mesh
    # The tokenizer decides the size of the vocabulary, so it comes before the model.
    model = resolve_model(life.model, workspace.tokenizer().vocab_size, config.init_from)
    # Documents alone can be learned from nothing; conversations need a model that knows the language.
    source = ""
    if stage != "pretrain" or config.init_from:
        source = workspace.source(config.init_from, "pretrain", stage)
    training.check_batch(config, mesh, stage)  # before the data, whose preparation may take hours
    length = model.row_length(config.length, f"{stage}.length")
    rows = _load_rows(workspace, stage, config, length)
    if config.teacher.stage_dir:
        rows = teacher.with_soft_targets(workspace, stage, config, model, rows)
    num_steps = training.count_steps(config, epoch_rows(rows["train"]), stage)
    _print_plan(stage, rows, model, num_steps, config.batch_size)

    step, layout = program(mesh, config, model, num_steps, workspace.seed)
    load_params = functools.partial(_initial_params, workspace, model, source)
    # The weights under adapters are an argument of every step: in a closure, XLA would copy them as constants.
    base = lora.frozen(config.lora, load_params()) if config.lora.rank else {}
    directory = workspace.stage_dir(stage)
    write_model_card(directory, model, "policy", ("params",), config.lora, source)

    # Called only if there is no checkpoint to resume from.
    def init() -> train.TrainState:
        if not base:
            return layout.init(load_params())
        make = jax.jit(
            functools.partial(lora.init, config.lora, axes=transformer.axes(model)),
            out_shardings=layout.shardings.params,
        )
        # Fresh parameters are made from the seed's own key; adapters take the next one.
        key = jax.random.fold_in(jax.random.key(workspace.seed), 1)
        return layout.init(make(base, key))

    sharding = activation(mesh, "batch", None)
    # A student that comes closer to its teacher may come no closer to the text.
    best = "eval/divergence" if config.teacher.stage_dir else "eval/bits_per_byte"
    # Work counts every position of the rows, padding included: that is what the devices compute.
    tokens = config.batch_size * length
    flops = transformer.flops_per_token(model, length) * tokens
    return train.Training(
        data=rows_fingerprint([*rows["train"], *rows["held_out"]]),
        init=init,
        abstract=layout.abstract,
        step=functools.partial(step, base=base),
        batch_at=make_batch_at(
            rows["train"], batch_size=config.batch_size, seed=workspace.seed, sharding=sharding
        ),
        num_steps=num_steps,
        settings=config,
        work=Work(tokens, flops, peak_flops(mesh)),
        evaluate=_evaluation(config, model, rows["held_out"], sharding, num_steps, base),
        best=best,
        result=functools.partial(_result, model, num_steps, tokens),
        schedules={"train/learning_rate": learning_rate(config.optim, num_steps)},
        shown=("loss", "divergence", best) if config.teacher.stage_dir else ("loss", best),
    )


def resolve_model(model: ModelConfig, vocab_size: int, init_from: str = "") -> ModelConfig:
    """The model config with its vocabulary size filled in from the tokenizer.

    A larger vocabulary in the config is kept, as padding. If the config describes no model and `init_from` names a
    stage directory, that stage's model is taken, with the rows that the tokenizer needs added to its vocabulary.

    Raises:
      InputError: the config's vocabulary is smaller than the tokenizer's.
    """
    # These two fields say how to compute, not which model it is: they may be set along with init_from.
    remat = model.remat
    scan_unroll = model.scan_unroll
    if init_from and model == ModelConfig(remat=remat, scan_unroll=scan_unroll):
        recorded, _ = read_model_card(init_from)
        rows = max(recorded.vocab_size, vocab_size)
        return dataclasses.replace(recorded, remat=remat, scan_unroll=scan_unroll, vocab_size=rows)
    if model.vocab_size and model.vocab_size < vocab_size:
        raise InputError(
            f"model.vocab_size: {model.vocab_size} is below the tokenizer's {vocab_size}; "
            "set it to 0 to take the tokenizer's"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size or vocab_size)


def _load_rows(
    workspace: Workspace, stage: str, config: LanguageModelConfig, length: int
) -> dict[str, Mixture]:
    """The packed rows of `length` tokens of both splits: {"train", "held_out"}."""
    kind = "document" if stage == "pretrain" else "chat"
    tokenizer = workspace.tokenizer()
    cache = workspace.run_dir / "cache"
    rows = {}
    for split in ("train", "held_out"):
        rows[split] = load_rows(config.data, kind, split, tokenizer, length, cache)
    return rows


def _initial_params(workspace: Workspace, model: ModelConfig, source: str) -> Any:
    """Parameters that training starts from: those of stage directory `source`, or fresh ones if it is empty.

    Raises:
      InputError: the source's model has other shapes than `model`.
    """
    shapes = transformer.abstract(model)
    if not source:
        # Jitted with shardings, so that no device ever holds all of the parameters.
        shardings = param_shardings(workspace.mesh, shapes, transformer.axes(model))
        init = jax.jit(functools.partial(transformer.init, model), out_shardings=shardings)
        return init(jax.random.key(workspace.seed))
    # Adapters of the source are merged, since new ones are trained on plain weights. Tokens that the source does not
    # know get the mean embedding, so that at first they are as likely as an average token.
    params, _ = load_model(source, workspace.mesh)
    params = transformer.grow_vocab(lora.merge(params), model.vocab_size)
    # Here the error names the source; in the step it would name an operation of the compiler's.
    tree_shapes.compare(params, shapes, source)
    return params


def _evaluation(
    config: LanguageModelConfig,
    model: ModelConfig,
    rows: Mixture,
    sharding: jax.sharding.Sharding,
    num_steps: int,
    base: Any,
) -> Callable[[int, train.TrainState], dict[str, float]]:
    """(step, state) -> nats per target token and bits per UTF-8 byte on held-out rows, and a teacher's divergence."""
    # base is an argument here too, for the same reason as in the step. The key is None: no dropout.
    measure = jax.jit(
        lambda params, batch, base: next_token.loss(params, batch, None, base, model=model)[2]
    )
    # Of targets only, and the UTF-8 bytes of text that these stand for: bits per byte compare tokenizers.
    num_tokens = sum(packed.num_tokens for packed, _ in rows)
    num_bytes = sum(packed.num_bytes for packed, _ in rows)

    def evaluate(step: int, state: train.TrainState) -> dict[str, float]:
        # The last evaluation gives the stage's result, so it takes all rows.
        limit = 0 if step >= num_steps else config.eval_batches
        batches = epoch_batches(
            rows, batch_size=config.batch_size, sharding=sharding, max_batches=limit
        )
        found = measures.run(functools.partial(measure, base=base), state.params, batches)
        nats = found["loss"]
        of_teacher = {"eval/divergence": found["divergence"]} if "divergence" in found else {}
        return {
            "eval/loss": nats,
            "eval/bits_per_byte": measures.bits_per_byte(nats, num_tokens, num_bytes),
            **of_teacher,
        }

    return evaluate


def _result(
    model: ModelConfig,
    num_steps: int,
    tokens_per_step: int,
    state: train.TrainState,
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """The stage's result.json; metrics: the newest value of every metric by name."""
    return {
        "parameters": transformer.num_params(model),
        "steps": num_steps,
        "tokens": num_steps * tokens_per_step,
        "train_loss": metrics["train/loss"],
        **held_out(metrics),
        "tokens_per_second": metrics.get("throughput/tokens_per_second", 0.0),
        "mfu": metrics.get("throughput/mfu", 0.0),
        # A number that is almost surely different if any parameter is: it tells two runs apart at a glance.
        "norm": float(optax.tree.norm(state.params)),
    }


def program(
    mesh: jax.sharding.Mesh,
    config: LanguageModelConfig,
    model: ModelConfig,
    num_steps: int,
    seed: int,
) -> tuple[Any, train.StateLayout]:
    """The jitted step (state, batch, base) -> (state, metrics), and the layout of its state.

    base: the frozen parameters under adapters, or {}. The mesh may be a planned one.
    """
    loss = functools.partial(
        next_token.loss,
        model=model,
        z_loss_coef=config.z_loss_coef,
        mtp_coef=config.mtp_coef,
        teacher_weight=config.teacher.weight,
    )
    return training.make_step(
        config,
        mesh,
        loss,
        transformer.abstract(model),
        transformer.axes(model),
        num_steps=num_steps,
        seed=seed,
        bias_rate=model.moe.bias_rate,
    )


def programs(
    mesh: jax.sharding.Mesh, stage: str, config: LanguageModelConfig, model: ModelConfig, seed: int
) -> tuple[list[train.Program], dict[str, Any]]:
    """What `jaxllm plan` compiles: ([the step], {role: shapes with shardings of what devices hold})."""
    # Without num_steps the data decides, which is not read here; the number changes a schedule, not a shape.
    step, layout = program(mesh, config, model, max(config.num_steps, 1), seed)
    length = model.row_length(config.length, f"{stage}.length")
    top_k = config.teacher.top_k if config.teacher.stage_dir else 0
    batch = next_token.planned_rows(mesh, config.batch_size, length, top_k)
    params = place_params(mesh, transformer.abstract(model), transformer.axes(model))
    base = lora.place_frozen(config.lora, params, replicated(mesh))
    flops = transformer.flops_per_token(model, length) * math.prod((config.batch_size, length))
    update = train.Program("step", step, (layout.abstract, batch), {"base": base}, flops)
    return [update], {"policy": layout.abstract, "base": base}


def plan(
    mesh: jax.sharding.Mesh, life: Any, stage: str
) -> tuple[list[train.Program], dict[str, Any]]:
    """`programs` of a stage of this config."""
    config: LanguageModelConfig = getattr(life, stage)
    training.check_batch(config, mesh, stage)
    teacher.check_top_k(config, life.model, stage)
    return programs(mesh, stage, config, life.model, life.seed)


def _print_plan(
    stage: str, rows: Mapping[str, Mixture], model: ModelConfig, num_steps: int, batch_size: int
) -> None:
    """Print the amount of data, parameters and steps; the first compilation, which follows, may take minutes."""
    num_examples = {}
    num_dropped = 0
    for split, mixture in rows.items():
        num_examples[split] = sum(packed.num_examples for packed, _ in mixture)
        num_dropped += sum(packed.num_dropped for packed, _ in mixture)
    num_rows = sum(packed.num_rows for packed, _ in rows["train"])
    dropped = f", {num_dropped} too long and dropped" if num_dropped else ""
    # One number per source: weights may repeat a small source while a large one is read in part.
    epochs = epochs_of(rows["train"], num_steps, batch_size)
    passes = " + ".join(f"{count:.2f}" for count in epochs)
    sources = " of the sources" if len(epochs) > 1 else ""
    console.print(
        f"{stage}: {num_examples['train']:,} training and {num_examples['held_out']:,} held-out "
        f"examples in {num_rows:,} rows{dropped}; {transformer.num_params(model):,} parameters, "
        f"{num_steps} steps = {passes} epochs{sources}"
    )
