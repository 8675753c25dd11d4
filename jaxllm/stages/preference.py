"""Reward model and DPO: K responses to a prompt as one example, and a loss over their scores.

The reward model is the fine-tuned model with a scalar head. In DPO (Rafailov et al. 2023) the policy itself is one,
r = beta * log(policy / reference).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Lt

from jaxllm import losses, train
from jaxllm.config import InputError
from jaxllm.config.ranges import (
    FINITE,
    NOT_BOOL,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from jaxllm.data.loader import (
    RankedExample,
    fingerprint,
    load_ranked,
    make_ranked_batch_at,
    ranked_epoch,
)
from jaxllm.data.sources import DataConfig, Source
from jaxllm.evaluation import measures
from jaxllm.metrics import Work, held_out, peak_flops
from jaxllm.models import lora, scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.lora import LoRAConfig
from jaxllm.optim import OptimConfig, learning_rate, make_optimizer
from jaxllm.runtime.checkpoint import CheckpointConfig
from jaxllm.runtime.console import console
from jaxllm.runtime.files import read_json, write_json
from jaxllm.sharding import activation, check_batch, fetch, place_params, replicated, rows_like
from jaxllm.workspace import Workspace, load_model, write_model_card


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Training on rankings. One prompt with all its responses is one example (Ouyang et al. 2022, section 3.5)."""

    data: DataConfig = DataConfig()
    """Rankings; without sources those of the rank stage."""
    init_from: str = ""
    """Stage directory to start from; empty: sft."""
    loss: Literal["pairwise", "plackett_luce", "regression"] = "pairwise"
    """All pairs (Bradley-Terry), the whole order (Plackett-Luce), or the records' own scores by squared error."""
    margin_coef: NonNegativeFloat = 0.0
    """pairwise: the better score must lead by this times the difference in given scores, or in rank."""
    label_smoothing: Annotated[float, NOT_BOOL, FINITE, Ge(0), Lt(0.5)] = 0.0
    """pairwise: the chance that a label is wrong."""
    weighting: Literal["prompt", "pair"] = "prompt"
    """What counts once: a prompt, however many responses it has, or each of its pairs."""
    beta: PositiveFloat = 0.1
    """dpo: the implicit reward is beta * log(policy / reference)."""
    normalise: Literal["centre", "unit", "none"] = "centre"
    """reward: scores of the training responses are shifted to mean 0, also scaled to variance 1, or left alone."""
    num_epochs: NonNegativeFloat = 1.0
    """Passes over the rankings; more than one overfits soon."""
    num_steps: NonNegativeInt = 0
    """Updates; 0: as many as num_epochs takes."""
    batch_size: PositiveInt = 16
    """Prompts per update, over all devices and microbatches."""
    num_micro: PositiveInt = 1
    """Microbatches per update."""
    length: NonNegativeInt = 0
    """Longest prompt and response in tokens; 0: model.max_length."""
    log_every: PositiveInt = 5
    """Steps per logged interval."""
    eval_every: PositiveInt = 20
    """Steps between evaluations on held-out rankings."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-4, weight_decay=0.0)
    """Optimizer and schedule."""
    lora: LoRAConfig = LoRAConfig()
    """Train adapters in place of all parameters."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""

    def __post_init__(self) -> None:
        if self.batch_size % self.num_micro:
            raise ValueError(
                f"num_micro: {self.num_micro} does not divide batch_size {self.batch_size}"
            )
        if not self.num_steps and not self.num_epochs:
            raise ValueError("num_steps: must be positive, or 0 with num_epochs above 0")
        if self.loss != "pairwise" and (self.margin_coef or self.label_smoothing):
            raise ValueError("loss: margin_coef and label_smoothing belong to the pairwise loss")


DPO = PreferenceConfig(optim=OptimConfig(learning_rate=1e-5, weight_decay=0.0))


def load_rankings(
    workspace: Workspace, stage: str, config: PreferenceConfig, model: ModelConfig
) -> dict[str, list[RankedExample]]:
    """Both splits. Raises InputError for too long a conversation, or scores that are missing where they are needed."""
    data = config.data
    if not data.sources:
        workspace.require("rank", stage)
        data = dataclasses.replace(
            data, sources=(Source(str(workspace.stage_dir("rank") / "rankings.jsonl")),)
        )
    tokenizer, length = workspace.tokenizer(), model.row_length(config.length, f"{stage}.length")
    rankings = {s: load_ranked(data, s, tokenizer, length) for s in ("train", "held_out")}
    if config.loss == "regression":
        for example in (e for split in rankings.values() for e in split if not e.scores):
            raise InputError(
                f'{stage}.loss: regression needs "scores" in every record, and one of {len(example.rows)} responses '
                f"has only ranks; give scores, or set {stage}.loss to pairwise"
            )
    if config.loss != "regression" and all(
        len({*example.ranks}) == 1 for example in rankings["train"]
    ):
        raise InputError(
            f"{stage}.data: every training prompt ranks all of its responses the same; nothing can be learned"
        )
    console.print(
        f"{stage}: {len(rankings['train'])} training and {len(rankings['held_out'])} held-out prompts"
    )
    return rankings


def ranking_loss(config: PreferenceConfig, scores: jax.Array, batch: Any) -> losses.Loss:
    """The configured loss of scores float32[B, K] on a batch of rankings."""
    per_prompt, ranks = config.weighting == "prompt", batch["ranks"]
    if config.loss == "regression":
        return losses.score_regression(scores, batch["scores"], ranks, per_prompt=per_prompt)
    if config.loss == "plackett_luce":
        return losses.plackett_luce(scores, ranks, per_prompt=per_prompt)
    margins = config.margin_coef * _distance(batch) if config.margin_coef else None
    smoothing = config.label_smoothing
    return losses.pairwise(
        scores, ranks, margins=margins, label_smoothing=smoothing, per_prompt=per_prompt
    )


def _distance(batch: Any) -> jax.Array:
    """float32[B, K, K]: how much better i is than j, in given scores, or in rank where a prompt has none."""
    scored = (batch["scores"] != 0).any(1)[:, None]
    good = jnp.where(scored, batch["scores"], -batch["ranks"].astype(jnp.float32))
    return good[:, :, None] - good[:, None, :]


def build(workspace: Workspace, life: Any, stage: str) -> train.Training:
    """The training of stage "reward" or "dpo"; its result: held-out pairwise and top-1 accuracy, calibration error.

    Of DPO they say how often its implicit reward orders held-out pairs right. It learns from all pairs of K responses,
    or the Plackett-Luce likelihood of their order (Rafailov et al. 2023, appendix A.3).
    """
    config: PreferenceConfig = getattr(life, stage)
    is_dpo, mesh, directory = stage == "dpo", workspace.mesh, workspace.stage_dir(stage)
    if is_dpo and config.loss == "regression":
        raise InputError(
            "dpo.loss: regression needs a reward model; set it to pairwise or plackett_luce"
        )
    source = workspace.source(config.init_from, "sft", stage)
    policy, model = load_model(source, mesh)
    policy = lora.merge(policy)
    write_model_card(
        directory, model, "policy" if is_dpo else "reward", ("params",), config.lora, source
    )
    rankings = load_rankings(workspace, stage, config, model)
    check_batch(
        mesh, config.batch_size // config.num_micro, f"{stage}.batch_size / {stage}.num_micro"
    )
    per_epoch = len(rankings["train"]) / config.batch_size
    num_steps = train.count_steps(
        config.num_steps, config.num_epochs, per_epoch, f"{stage}.num_epochs"
    )
    step, scores, place = program(mesh, stage, config, model, num_steps, workspace.seed)
    fixed = frozen_parts(stage, config, policy)
    batches = {"batch_size": config.batch_size, "sharding": activation(mesh, "batch", None, None)}
    measure = functools.partial(jax.jit(scores), **fixed)
    axes = (transformer if is_dpo else scalar).axes(model)

    def first(policy: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(workspace.seed), 1)
        if is_dpo:
            return lora.init(
                config.lora, jax.tree.map(jnp.copy, policy), key, axes
            )  # a copy: the reference stays
        head, adapters = jax.random.split(key)
        return lora.init(config.lora, scalar.init(policy, model, head), adapters, axes)

    def evaluation(step: int, state: train.TrainState) -> dict[str, float]:
        every, ranks = all_scores(measure, state.params, rankings["held_out"], batches)
        if step == num_steps and jax.process_index() == 0:  # before the scores are normalised
            write_json(directory / "held_out.json", breakdown(every, ranks, rankings["held_out"]))
        return {f"eval/{name}": value for name, value in held_out_numbers(every, ranks).items()}

    def finish(state: train.TrainState) -> train.TrainState:
        every, ranks = all_scores(measure, state.params, rankings["train"], batches)
        return normalise(state, every[ranks > 0], config.normalise)

    batch_at = make_ranked_batch_at(rankings["train"], seed=workspace.seed, **batches)
    rows = math.prod(batch_at(0)["tokens"].shape)

    def result(state: train.TrainState, metrics: Mapping[str, float]) -> dict[str, Any]:
        del state
        return {
            "steps": num_steps,
            **held_out(metrics),
            **(read_json(directory / "held_out.json") or {}),
        }

    return train.Training(
        data=fingerprint([*rankings["train"], *rankings["held_out"]]),
        init=lambda: place.init(jax.jit(first, out_shardings=place.shardings.params)(policy)),
        abstract=place.abstract,
        step=functools.partial(step, **fixed),
        batch_at=batch_at,
        num_steps=num_steps,
        settings=config,
        work=Work(rows, flops_per_token(stage, config, model) * rows, peak_flops(mesh)),
        evaluate=evaluation,
        best="eval/accuracy",
        lower_is_better=False,
        finalize=None if is_dpo else finish,
        schedules={"train/learning_rate": learning_rate(config.optim, num_steps)},
        shown=("loss", "accuracy", "eval/accuracy"),
        result=result,
    )


def plan(
    mesh: jax.sharding.Mesh, life: Any, stage: str
) -> tuple[list[train.Program], dict[str, Any]]:
    """`programs` of a stage of this config."""
    return programs(
        mesh, stage, getattr(life, stage), life.model, life.sample.num_responses, life.seed
    )


def program(
    mesh: jax.sharding.Mesh,
    stage: str,
    config: PreferenceConfig,
    model: ModelConfig,
    num_steps: int,
    seed: int,
) -> tuple[Any, Callable[..., jax.Array], train.StateLayout]:
    """(the step: state, batch, **frozen_parts -> state, metrics; its scores; where its state is placed)."""
    family = transformer if stage == "dpo" else scalar
    scores = functools.partial(reward_scores, model=model)
    if stage == "dpo":
        scores = functools.partial(implicit_rewards, model=model, beta=config.beta)
    shapes, axes = lora.trained(config.lora, family.abstract(model), family.axes(model))
    tx = make_optimizer(config.optim, num_steps, axes)
    place = train.state_layout(mesh, shapes, axes, tx)

    def loss(params: Any, batch: Any, key: Any, **frozen: Any) -> losses.Loss:
        del key  # no dropout
        return ranking_loss(config, scores(params, batch, **frozen), batch)

    settings: dict[str, Any] = {
        "num_micro": config.num_micro,
        "seed": seed,
        "spike_factor": config.optim.spike_factor,
    }
    return train.make_step(loss, tx, state_shardings=place.shardings, **settings), scores, place


def flops_per_token(stage: str, config: PreferenceConfig, model: ModelConfig) -> float:
    """Of a token of a response; DPO's reference goes forward only."""
    passes = 4 / 3 if stage == "dpo" else 1.0
    return passes * transformer.flops_per_token(
        model, config.length or model.max_length, scored=stage == "dpo"
    )


def frozen_parts(stage: str, config: PreferenceConfig, policy: Any) -> dict[str, Any]:
    """What does not move, of the decoder that the stage starts from."""
    if stage == "dpo":
        return {"base": lora.frozen(config.lora, policy), "ref": policy}
    return {"base": lora.frozen(config.lora, {"trunk": policy})}


def programs(
    mesh: jax.sharding.Mesh,
    stage: str,
    config: PreferenceConfig,
    model: ModelConfig,
    num_responses: int,
    seed: int,
) -> tuple[list[train.Program], dict[str, Any]]:
    """(what an update runs, {role: its state}), as shapes with their shardings."""
    step, _, place = program(mesh, stage, config, model, max(config.num_steps, 1), seed)
    B, K, T = config.batch_size, num_responses, model.row_length(config.length, f"{stage}.length")
    types = {"tokens": jnp.int32, "segment_ids": jnp.int32, "loss_mask": jnp.bool_}
    batch = {name: jax.ShapeDtypeStruct((B, K, T), dtype) for name, dtype in types.items()}
    batch |= {
        name: jax.ShapeDtypeStruct((B, K), dtype)
        for name, dtype in (("ranks", jnp.int32), ("scores", jnp.float32))
    }
    policy = place_params(mesh, transformer.abstract(model), transformer.axes(model))
    base = lora.place_frozen(
        config.lora, policy if stage == "dpo" else {"trunk": policy}, replicated(mesh)
    )
    fixed = {"base": base, "ref": policy} if stage == "dpo" else {"base": base}
    flops = B * K * T * flops_per_token(stage, config, model)
    return [train.Program("step", step, (place.abstract, rows_like(mesh, batch)), fixed, flops)], {
        **{"policy" if stage == "dpo" else "reward": place.abstract, "base": base},
        **({"reference": policy} if stage == "dpo" else {}),
    }


def all_scores(measure, params: Any, examples: list[RankedExample], batches: dict[str, Any]):
    """(scores float32[N, K], ranks int32[N, K]) over a split; rank 0 where there is no response."""
    pairs = [(measure(params, b), b["ranks"]) for b in ranked_epoch(examples, **batches)]
    every, ranks = (np.concatenate([fetch(p[i]) for p in pairs])[: len(examples)] for i in range(2))
    return every, ranks


def held_out_numbers(every: np.ndarray, ranks: np.ndarray) -> dict[str, float]:
    """Loss, pairwise and top-1 accuracy, calibration error of scores float[N, K]."""
    _, _, metrics = losses.pairwise(jnp.array(every), jnp.array(ranks))
    means = {
        name: float(total) / max(float(weight), 1.0) for name, (total, weight) in metrics.items()
    }
    margins = measures.pair_margins(every, ranks)
    numbers = {"loss": means["loss"], "accuracy": means["accuracy"], "top1_accuracy": means["top1"]}
    return numbers | {
        "calibration_error": measures.calibration_error(margins),
        "pairs": float(len(margins)),
    }


def breakdown(
    every: np.ndarray, ranks: np.ndarray, examples: list[RankedExample]
) -> dict[str, Any]:
    """Accuracy by K and by distance in rank, the reliability curve, and how far annotators agree with one another."""
    margins, agreed = measures.pair_margins(every, ranks), measures.annotator_agreement(examples)
    return {
        "accuracy_by_k": measures.accuracy_by(every, ranks, "k"),
        "accuracy_by_distance": measures.accuracy_by(every, ranks, "distance"),
        "reliability": measures.reliability(margins),
        **(
            {"annotator_agreement": agreed[0], "annotator_agreement_pairs": agreed[1]}
            if agreed
            else {}
        ),
    }


def reward_scores(params: Any, batch: Any, *, base: Any, model: ModelConfig) -> jax.Array:
    """Scores float32[B, K] of a batch {tokens, segment_ids int32[B, K, T]}: K rows of one forward."""
    B, K, T = batch["tokens"].shape
    tokens, segment_ids = (batch[name].reshape(B * K, T) for name in ("tokens", "segment_ids"))
    values = scalar.apply(lora.join(base, params), model, tokens, segment_ids)
    return scalar.last_value(values, segment_ids).reshape(B, K)


def normalise(state: train.TrainState, scores: np.ndarray, how: str) -> train.TrainState:
    """Shift the scores to mean zero (Ouyang et al. 2022, section 3.5), "unit": and scale them to variance one.

    Both keep the order of any two responses; "none" changes nothing. scores float[N]: of the training responses.
    """
    head = state.params["head"]
    shift = 0.0 if how == "none" else float(scores.mean())
    gain = 1.0 / max(float(scores.std()), 1e-6) if how == "unit" else 1.0
    bias = (head["bias"] - jnp.float32(shift)) * jnp.float32(gain)
    new = {"kernel": head["kernel"] * jnp.float32(gain), "bias": bias}
    return state._replace(params={**state.params, "head": new})


def implicit_rewards(
    params: Any, batch: Any, *, base: Any, ref: Any, model: ModelConfig, beta: float
) -> jax.Array:
    """beta * (log policy - log reference) of each reply, float32[B, K] (Rafailov et al. 2023, eq. 5)."""
    policy = reply_logprobs(lora.join(base, params), batch, model)
    return beta * (policy - jax.lax.stop_gradient(reply_logprobs(ref, batch, model)))


def reply_logprobs(params: Any, batch: Any, model: ModelConfig) -> jax.Array:
    """Log-probability float32[B, K] of each reply, its end of turn included, summed over tokens."""
    B, K, T = batch["tokens"].shape
    tokens, segments, mask = (
        batch[name].reshape(B * K, T) for name in ("tokens", "segment_ids", "loss_mask")
    )
    targets, on = losses.next_token_targets(tokens, segments, mask)
    hidden = transformer.apply(params, model, tokens, segments)
    logprobs = losses.token_logprobs(
        hidden, transformer.head(params), targets, cap=model.logit_softcap
    ).logprob
    return jnp.where(on, logprobs, 0.0).sum(1).reshape(B, K)
