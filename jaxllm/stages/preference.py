"""Reward model and DPO: one example is a prompt with its K responses, and the loss is over their scores.

The reward model is the fine-tuned model with a scalar head. In DPO (Rafailov et al. 2023) the policy itself is the
reward model: the score of a response is beta * log(policy / reference).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Lt
from etils import epath

from jaxllm import losses, train
from jaxllm.config import InputError, require
from jaxllm.config.ranges import FINITE, NOT_BOOL, NonNegativeFloat, PositiveFloat, PositiveInt
from jaxllm.data.loader import (
    RankedExample,
    fingerprint,
    load_ranked,
    make_ranked_batch_at,
    ranked_epoch,
)
from jaxllm.data.sources import Source
from jaxllm.evaluation import measures
from jaxllm.metrics import Work, held_out, peak_flops
from jaxllm.models import lora, scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.optim import OptimConfig, learning_rate, make_optimizer
from jaxllm.runtime.console import console
from jaxllm.runtime.files import read_json, write_json
from jaxllm.sharding import activation, fetch, place_params, replicated, rows_like
from jaxllm.stages.training_config import TrainingConfig
from jaxllm.workspace import Workspace, load_model, write_model_card


@dataclasses.dataclass(frozen=True)
class PreferenceConfig(TrainingConfig):
    """Training on rankings. One prompt with all its responses is one example (Ouyang et al. 2022, section 3.5)."""

    loss: Literal["pairwise", "plackett_luce", "regression"] = "pairwise"
    """All pairs (Bradley-Terry), the whole order (Plackett-Luce), or squared error to the records' own scores."""
    margin_coef: NonNegativeFloat = 0.0
    """pairwise: the better score must lead by this times the difference in given scores, or in rank."""
    label_smoothing: Annotated[float, NOT_BOOL, FINITE, Ge(0), Lt(0.5)] = 0.0
    """pairwise: the probability that a label is wrong."""
    weighting: Literal["prompt", "pair"] = "prompt"
    """What counts once: a prompt, however many responses it has, or each of its pairs."""
    beta: PositiveFloat = 0.1
    """dpo: the implicit reward is beta * log(policy / reference)."""
    normalise: Literal["centre", "unit", "none"] = "centre"
    """reward: scores of the training responses are shifted to mean 0, also scaled to variance 1, or left unchanged."""
    log_every: PositiveInt = 5
    """Steps per logged interval."""
    eval_every: PositiveInt = 20
    """Steps between evaluations on held-out rankings."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-4, weight_decay=0.0)
    """Optimizer and schedule."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.loss == "pairwise" or not (self.margin_coef or self.label_smoothing),
            "loss: margin_coef and label_smoothing belong to the pairwise loss",
        )


DPO = PreferenceConfig(optim=OptimConfig(learning_rate=1e-5, weight_decay=0.0))


def build(workspace: Workspace, life: Any, stage: str) -> train.Training:
    """The training of stage "reward" or "dpo"; its result holds what `_held_out_metrics` and `_breakdown` measure.

    For DPO they measure how often the implicit reward orders held-out pairs correctly. DPO learns from all pairs of K
    responses, or from the Plackett-Luce likelihood of their order (Rafailov et al. 2023, appendix A.3).

    Raises:
      InputError: DPO with the regression loss, unusable rankings, or a batch that the devices cannot share.
    """
    config: PreferenceConfig = getattr(life, stage)
    is_dpo = stage == "dpo"
    mesh = workspace.mesh
    if is_dpo and config.loss == "regression":
        raise InputError(
            "dpo.loss: regression needs a reward model; set it to pairwise or plackett_luce"
        )
    source = workspace.source(config.init_from, "sft", stage)
    policy, model = load_model(source, mesh)
    policy = lora.merge(policy)
    directory = workspace.stage_dir(stage)
    kind = "policy" if is_dpo else "reward"
    write_model_card(directory, model, kind, ("params",), config.lora, source)
    rankings = load_rankings(workspace, stage, config, model)
    config.check_batch(mesh, stage)
    num_steps = config.count_steps(len(rankings["train"]), stage)

    step, score, layout = program(mesh, stage, config, model, num_steps, workspace.seed)
    frozen = _frozen_params(stage, config, policy)
    sharding = activation(mesh, "batch", None, None)
    score_split = functools.partial(
        _score_split,
        functools.partial(jax.jit(score), **frozen),
        batch_size=config.batch_size,
        sharding=sharding,
    )

    def init() -> train.TrainState:
        make = functools.partial(_initial_params, stage, config, model, seed=workspace.seed)
        return layout.init(jax.jit(make, out_shardings=layout.shardings.params)(policy))

    def evaluate(step: int, state: train.TrainState) -> dict[str, float]:
        scores, ranks = score_split(state.params, rankings["held_out"])
        # `finalize` shifts and scales the scores after the last step; this breakdown is of the scores before that.
        if step == num_steps and jax.process_index() == 0:
            report = _breakdown(scores, ranks, rankings["held_out"])
            write_json(directory / "held_out.json", report)
        return {f"eval/{name}": value for name, value in _held_out_metrics(scores, ranks).items()}

    def finalize(state: train.TrainState) -> train.TrainState:
        scores, ranks = score_split(state.params, rankings["train"])
        return _normalize_scores(state, scores[ranks > 0], config.normalise)

    batch_at = make_ranked_batch_at(
        rankings["train"], batch_size=config.batch_size, seed=workspace.seed, sharding=sharding
    )
    tokens = math.prod(batch_at(0)["tokens"].shape)  # B * K * T
    flops = _flops_per_token(stage, config, model) * tokens
    return train.Training(
        data=fingerprint([*rankings["train"], *rankings["held_out"]]),
        init=init,
        abstract=layout.abstract,
        step=functools.partial(step, **frozen),
        batch_at=batch_at,
        num_steps=num_steps,
        settings=config,
        work=Work(tokens, flops, peak_flops(mesh)),
        evaluate=evaluate,
        best="eval/accuracy",
        lower_is_better=False,
        finalize=None if is_dpo else finalize,
        schedules={"train/learning_rate": learning_rate(config.optim, num_steps)},
        shown=("loss", "accuracy", "eval/accuracy"),
        result=functools.partial(_result, directory, num_steps),
    )


def _result(
    directory: epath.Path, num_steps: int, state: train.TrainState, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """The stage's result.json; metrics: the newest value of every metric by name."""
    del state
    report = read_json(directory / "held_out.json") or {}
    return {"steps": num_steps, **held_out(metrics), **report}


def load_rankings(
    workspace: Workspace, stage: str, config: PreferenceConfig, model: ModelConfig
) -> dict[str, list[RankedExample]]:
    """The rankings of both splits: {"train", "held_out"}.

    Raises:
      InputError: a conversation is too long, scores are missing that the loss needs, or no ranking prefers anything.
    """
    data = config.data
    if not data.sources:
        workspace.require("rank", stage)
        path = workspace.stage_dir("rank") / "rankings.jsonl"
        data = dataclasses.replace(data, sources=(Source(str(path)),))
    tokenizer = workspace.tokenizer()
    length = model.row_length(config.length, f"{stage}.length")
    rankings = {}
    for split in ("train", "held_out"):
        rankings[split] = load_ranked(data, split, tokenizer, length)
    if config.loss == "regression":
        _check_scores(stage, [*rankings["train"], *rankings["held_out"]])
    else:
        _check_preferences(stage, rankings["train"])
    num_train = len(rankings["train"])
    num_held_out = len(rankings["held_out"])
    console.print(f"{stage}: {num_train} training and {num_held_out} held-out prompts")
    return rankings


def _check_scores(stage: str, examples: Sequence[RankedExample]) -> None:
    for example in examples:
        if not example.scores:
            raise InputError(
                f'{stage}.loss: regression needs "scores" in every record, and one of '
                f"{len(example.rows)} responses has only ranks; give scores, or set {stage}.loss to pairwise"
            )


def _check_preferences(stage: str, examples: Sequence[RankedExample]) -> None:
    if all(len(set(example.ranks)) == 1 for example in examples):
        raise InputError(
            f"{stage}.data: every training prompt ranks all of its responses the same, so nothing "
            "can be learned; give rankings that prefer a response"
        )


# The program: parameters, scores, loss and step.


def program(
    mesh: jax.sharding.Mesh,
    stage: str,
    config: PreferenceConfig,
    model: ModelConfig,
    num_steps: int,
    seed: int,
) -> tuple[Any, Callable[..., jax.Array], train.StateLayout]:
    """The jitted step, its score function and the layout of its state, on real devices or on a planned mesh.

    Returns:
      step: (state, batch, **frozen) -> (state, metrics); frozen: `_frozen_params`. Metrics: the loss and those of
        `losses.ranking_metrics`, each as (sum, weight).
      score: (params, batch, **frozen) -> scores float32[B, K].
      layout: how the state is made and sharded.
    """
    if stage == "dpo":
        family = transformer
        score = functools.partial(implicit_rewards, model=model, beta=config.beta)
    else:
        family = scalar
        score = functools.partial(reward_scores, model=model)
    tx = make_optimizer(config.optim, num_steps)
    shapes, axes = lora.trained(config.lora, family.abstract(model), family.axes(model))
    layout = train.state_layout(mesh, shapes, axes, tx)

    def loss(params: Any, batch: Any, key: Any, **frozen: Any) -> losses.Loss:
        del key  # no dropout
        return ranking_loss(config, score(params, batch, **frozen), batch)

    step = train.make_step(
        loss,
        tx,
        num_micro=config.num_micro,
        seed=seed,
        state_shardings=layout.shardings,
        spike_factor=config.optim.spike_factor,
    )
    return step, score, layout


def _initial_params(
    stage: str, config: PreferenceConfig, model: ModelConfig, policy: Any, *, seed: int
) -> Any:
    """Trainable parameters, made from the policy's: DPO's policy or the reward model, or their adapters."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    if stage == "dpo":
        # A copy: the optimizer updates its parameters in place, and the reference must keep the old ones.
        return lora.init(config.lora, jax.tree.map(jnp.copy, policy), key)
    head_key, adapter_key = jax.random.split(key)
    return lora.init(config.lora, scalar.init(policy, model, head_key), adapter_key)


def _frozen_params(stage: str, config: PreferenceConfig, policy: Any) -> dict[str, Any]:
    """Arguments of the step that stay fixed: base, the weights under adapters, and DPO's reference `ref`."""
    if stage == "dpo":
        return {"base": lora.frozen(config.lora, policy), "ref": policy}
    return {"base": lora.frozen(config.lora, {"trunk": policy})}


def ranking_loss(config: PreferenceConfig, scores: jax.Array, batch: Any) -> losses.Loss:
    """The configured loss of scores float32[B, K] on a batch of `make_ranked_batch_at`."""
    per_prompt = config.weighting == "prompt"
    ranks = batch["ranks"]
    if config.loss == "regression":
        return losses.score_regression(scores, batch["scores"], ranks, per_prompt=per_prompt)
    if config.loss == "plackett_luce":
        return losses.plackett_luce(scores, ranks, per_prompt=per_prompt)
    return losses.pairwise(
        scores,
        ranks,
        margins=config.margin_coef * _distance(batch) if config.margin_coef else None,
        label_smoothing=config.label_smoothing,
        per_prompt=per_prompt,
    )


def _distance(batch: Any) -> jax.Array:
    """How much better response i is than j, float32[B, K, K]: in given scores, or in rank if a prompt has no scores.

    Ranks 1 2 2 of three responses without scores give

            j  A  B  C
        i A    0  1  1
          B   -1  0  0
          C   -1  0  0
    """
    has_scores = (batch["scores"] != 0).any(1)[:, None]  # prompts without scores have zeros
    goodness = jnp.where(has_scores, batch["scores"], -batch["ranks"].astype(jnp.float32))
    return goodness[:, :, None] - goodness[:, None, :]


def reward_scores(params: Any, batch: Any, *, base: Any, model: ModelConfig) -> jax.Array:
    """Scores float32[B, K] of the reward model, read at the last token of each response.

    Args:
      params: trainable parameters: {"trunk", "head"}, the trunk's or its adapters.
      batch: {tokens, segment_ids}, each int32[B, K, T]; the K responses are rows of one forward pass.
      base: frozen parameters under adapters, or {}.
      model: config of the decoder.
    """
    B, K, T = batch["tokens"].shape
    tokens = batch["tokens"].reshape(B * K, T)
    segment_ids = batch["segment_ids"].reshape(B * K, T)
    values = scalar.apply(lora.join(base, params), model, tokens, segment_ids)
    return scalar.last_value(values, segment_ids).reshape(B, K)


def implicit_rewards(
    params: Any, batch: Any, *, base: Any, ref: Any, model: ModelConfig, beta: float
) -> jax.Array:
    """beta * (log policy - log reference) of each response, float32[B, K] (Rafailov et al. 2023, eq. 5).

    Args:
      params: trainable parameters of the policy, all or its adapters.
      batch: {tokens, segment_ids int32[B, K, T], loss_mask bool[B, K, T]}.
      base: frozen parameters under adapters, or {}.
      ref: parameters of the reference policy.
      model: config of both.
      beta: strength of the implicit KL penalty.
    """
    policy = reply_logprobs(lora.join(base, params), batch, model)
    return beta * (policy - jax.lax.stop_gradient(reply_logprobs(ref, batch, model)))


def reply_logprobs(params: Any, batch: Any, model: ModelConfig) -> jax.Array:
    """Log-probability float32[B, K] of each response, its end of turn included, summed over tokens.

    loss_mask is True on the response. With a prompt of two tokens, a response of three and padding, position t
    predicts token t + 1:

        tokens     p p a b e -      targets    p a b e - -
        loss_mask  . . 1 1 1 .      summed     . 1 1 1 . .
    """
    B, K, T = batch["tokens"].shape
    tokens = batch["tokens"].reshape(B * K, T)
    segment_ids = batch["segment_ids"].reshape(B * K, T)
    loss_mask = batch["loss_mask"].reshape(B * K, T)
    targets, mask = losses.next_token_targets(tokens, segment_ids, loss_mask)
    hidden = transformer.apply(params, model, tokens, segment_ids)
    stats = losses.token_logprobs(
        hidden, transformer.head(params), targets, cap=model.logit_softcap
    )
    return jnp.where(mask, stats.logprob, 0.0).sum(1).reshape(B, K)


def _normalize_scores(state: train.TrainState, scores: np.ndarray, how: str) -> train.TrainState:
    """The state with a head whose scores have mean zero (Ouyang et al. 2022, section 3.5).

    Args:
      state: of the reward model.
      scores: float[N] of all training responses under that state.
      how: "centre" shifts; "unit" also scales to variance one; "none" changes nothing. None of them changes the order
        of two responses.
    """
    head = state.params["head"]
    shift = 0.0 if how == "none" else float(scores.mean())
    gain = 1.0 / max(float(scores.std()), 1e-6) if how == "unit" else 1.0
    # The head is kernel . hidden + bias, so that (score - shift) * gain has this kernel and this bias.
    kernel = head["kernel"] * jnp.float32(gain)
    bias = (head["bias"] - jnp.float32(shift)) * jnp.float32(gain)
    return state._replace(params={**state.params, "head": {"kernel": kernel, "bias": bias}})


# Evaluation.


def _score_split(
    score: Callable[[Any, Any], jax.Array],
    params: Any,
    examples: Sequence[RankedExample],
    *,
    batch_size: int,
    sharding: jax.sharding.Sharding,
) -> tuple[np.ndarray, np.ndarray]:
    """(scores float32[N, K], ranks int32[N, K]) of N examples; rank 0 marks an absent response."""
    scores = []
    ranks = []
    for batch in ranked_epoch(examples, batch_size=batch_size, sharding=sharding):
        scores.append(score(params, batch))
        ranks.append(batch["ranks"])
    # The last batch is filled up with empty prompts, which are cut off here.
    count = len(examples)
    return np.concatenate(fetch(scores))[:count], np.concatenate(fetch(ranks))[:count]


def _held_out_metrics(scores: np.ndarray, ranks: np.ndarray) -> dict[str, float]:
    """Pairwise loss, pairwise and top-1 accuracy, calibration error, and the number of pairs.

    Args:
      scores: float32[N, K].
      ranks: int32[N, K], 1 = best, equal = tie, 0 = absent.
    """
    _, _, sums = losses.pairwise(jnp.array(scores), jnp.array(ranks))
    means = {}
    for name, (total, weight) in sums.items():
        means[name] = float(total) / max(float(weight), 1.0)
    margins = measures.pair_margins(scores, ranks)
    return {
        "loss": means["loss"],
        "accuracy": means["accuracy"],
        "top1_accuracy": means["top1"],
        "calibration_error": measures.calibration_error(margins),
        "pairs": float(len(margins)),
    }


def _breakdown(
    scores: np.ndarray, ranks: np.ndarray, examples: Sequence[RankedExample]
) -> dict[str, Any]:
    """Accuracy by K and by difference in rank, the reliability curve, and the annotators' agreement if several ranked.

    scores, ranks: [N, K] as in `_held_out_metrics`.
    """
    report: dict[str, Any] = {
        "accuracy_by_k": measures.accuracy_by(scores, ranks, "k"),
        "accuracy_by_distance": measures.accuracy_by(scores, ranks, "distance"),
        "reliability": measures.reliability(measures.pair_margins(scores, ranks)),
    }
    agreement = measures.annotator_agreement(examples)
    if agreement:
        report["annotator_agreement"], report["annotator_agreement_pairs"] = agreement
    return report


# What `jaxllm plan` compiles.


def plan(
    mesh: jax.sharding.Mesh, life: Any, stage: str
) -> tuple[list[train.Program], dict[str, Any]]:
    """What `jaxllm plan` compiles: ([the step], {role: shapes with shardings of what devices hold})."""
    config: PreferenceConfig = getattr(life, stage)
    model: ModelConfig = life.model
    step, _, layout = program(mesh, stage, config, model, max(config.num_steps, 1), life.seed)
    length = model.row_length(config.length, f"{stage}.length")
    rows = (config.batch_size, life.sample.num_responses, length)
    batch = {
        "tokens": jax.ShapeDtypeStruct(rows, jnp.int32),
        "segment_ids": jax.ShapeDtypeStruct(rows, jnp.int32),
        "loss_mask": jax.ShapeDtypeStruct(rows, jnp.bool_),
        "ranks": jax.ShapeDtypeStruct(rows[:2], jnp.int32),
        "scores": jax.ShapeDtypeStruct(rows[:2], jnp.float32),
    }
    policy = place_params(mesh, transformer.abstract(model), transformer.axes(model))
    under_adapters = policy if stage == "dpo" else {"trunk": policy}
    base = lora.place_frozen(config.lora, under_adapters, replicated(mesh))
    if stage == "dpo":
        frozen = {"base": base, "ref": policy}
        held = {"policy": layout.abstract, "base": base, "reference": policy}
    else:
        frozen = {"base": base}
        held = {"reward": layout.abstract, "base": base}
    flops = math.prod(rows) * _flops_per_token(stage, config, model)
    arguments = (layout.abstract, rows_like(mesh, batch))
    return [train.Program("step", step, arguments, frozen, flops)], held


def _flops_per_token(stage: str, config: PreferenceConfig, model: ModelConfig) -> float:
    """Model FLOPs of a token of a response, forward and backward."""
    length = config.length or model.max_length
    if stage != "dpo":
        return transformer.flops_per_token(model, length, scored=False)
    # A step is 3 forward passes' worth of work, and the reference adds one: it has no backward pass.
    return 4 / 3 * transformer.flops_per_token(model, length, scored=True)
