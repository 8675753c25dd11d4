"""Reward model and DPO: one example is a prompt with its K responses, and the loss is over their scores.

The reward model is the fine-tuned model with a scalar head. In DPO (Rafailov et al. 2023) the policy itself is the
reward model: the score of a response is beta * log(policy / reference). Stage dpo has further objectives, each with its
own implicit reward, in `jaxllm.preference_losses`; some have no reference.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxllm import losses, train
from jaxllm.config import InputError
from jaxllm.data.config import Source
from jaxllm.data.loader import (
    RankedExample,
    examples_fingerprint,
    load_ranked,
    make_ranked_batch_at,
)
from jaxllm.metrics import Work, held_out, peak_flops
from jaxllm.model_store import load_model, read_model_card, write_model_card
from jaxllm.models import lora, scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.optim import learning_rate
from jaxllm.preference_losses import OBJECTIVES
from jaxllm.runtime.console import console
from jaxllm.runtime.files import read_json, write_json
from jaxllm.sharding import activation, place_params, replicated, rows_like
from jaxllm.stages import response_scores, training
from jaxllm.stages.config import DPOConfig, PreferenceConfig, RewardConfig
from jaxllm.stages.response_scores import (
    held_out_metrics,
    policy_responses,
    reward_scores,
    unrelated_kl,
)
from jaxllm.workspace import Workspace


def build(workspace: Workspace, life: Any, stage: str) -> train.Training:
    """The training of stage "reward" or "dpo"; its result holds `held_out_metrics` and `breakdown`.

    Those of DPO say how often the implicit reward orders held-out pairs correctly.

    Raises:
      InputError: unusable rankings, or a batch that the devices cannot share.
    """
    config: RewardConfig | DPOConfig = getattr(life, stage)
    is_dpo = stage == "dpo"
    mesh = workspace.mesh
    source = workspace.source(config.init_from, "sft", stage)
    model, _ = read_model_card(source)
    # A reference, and the weights under adapters, stay beside what is trained. Else the policy is only the start.
    stays = _has_reference(config) or config.lora.rank > 0
    policy = _load_policy(source, mesh) if stays else None
    directory = workspace.stage_dir(stage)
    kind = "policy" if is_dpo else "reward"
    write_model_card(directory, model, kind, ("params",), config.lora, source)
    rankings = _load_rankings(workspace, stage, config, model)
    training.check_batch(config, mesh, stage)
    # An epoch is over prompts, not pairs: all pairs of a prompt are in one batch, and are learned from once.
    num_steps = training.count_steps(config, len(rankings["train"]), stage)

    step, score, layout = _program(mesh, stage, config, model, num_steps, workspace.seed)
    # Fixed parameters are arguments of every step: in a closure, XLA would copy them as constants.
    frozen = _frozen_params(stage, config, policy)
    sharding = activation(mesh, "batch", None, None)
    score_split = functools.partial(
        response_scores.score_split,
        functools.partial(jax.jit(score), **frozen),
        batch_size=config.batch_size,
        sharding=sharding,
    )

    # Called only if there is no checkpoint to resume from.
    def init() -> train.TrainState:
        make = jax.jit(
            functools.partial(_initial_params, stage, config, model, seed=workspace.seed),
            out_shardings=layout.shardings.params,
            donate_argnums=() if stays else 0,
        )
        return layout.init(make(policy if stays else _load_policy(source, mesh)))

    def finalize(state: train.TrainState) -> train.TrainState:
        scores, ranks = score_split(state.params, rankings["train"])
        return response_scores.normalize_scores(state, scores[ranks > 0], config.normalize)

    batch_at = make_ranked_batch_at(
        rankings["train"], batch_size=config.batch_size, seed=workspace.seed, sharding=sharding
    )
    # All batches have the shape of the first: B prompts, the most responses K, the longest row T.
    tokens = math.prod(batch_at(0)["tokens"].shape)
    flops = _flops_per_token(config, model) * tokens
    return train.Training(
        data=examples_fingerprint([*rankings["train"], *rankings["held_out"]]),
        init=init,
        abstract=layout.abstract,
        step=functools.partial(step, **frozen),
        batch_at=batch_at,
        num_steps=num_steps,
        settings=config,
        work=Work(tokens, flops, peak_flops(mesh)),
        evaluate=_evaluation(directory, rankings["held_out"], score_split, num_steps),
        # Of accuracies: the loss rises with overconfidence while the order still improves.
        best=_best_metric(rankings["held_out"]),
        lower_is_better=False,
        # An implicit reward is a difference of log-probabilities, which has no bias to shift.
        finalize=None if is_dpo else finalize,
        schedules={"train/learning_rate": learning_rate(config.optim, num_steps)},
        shown=("loss", "accuracy", "eval/accuracy"),
        result=functools.partial(_result, directory, num_steps),
    )


def _evaluation(
    directory: epath.Path,
    examples: Sequence[RankedExample],
    score_split: Callable[..., tuple[np.ndarray, np.ndarray]],
    num_steps: int,
) -> Callable[[int, train.TrainState], dict[str, float]]:
    """(step, state) -> metrics of held-out rankings; those of the last step are also in held_out.json, by kind."""

    def evaluate(step: int, state: train.TrainState) -> dict[str, float]:
        scores, ranks = score_split(state.params, examples)
        # Here rather than in `_result`: a stage may rescale the scores after the last step.
        if step == num_steps and jax.process_index() == 0:
            report = response_scores.breakdown(scores, ranks, examples)
            write_json(directory / "held_out.json", report)
        found = held_out_metrics(scores, ranks, examples)
        return {f"eval/{name}": value for name, value in found.items()}

    return evaluate


def _result(
    directory: epath.Path, num_steps: int, state: train.TrainState, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """The stage's result.json; metrics: the newest value of every metric by name."""
    del state
    # From the file: a run that was interrupted after its last evaluation does not evaluate again.
    report = read_json(directory / "held_out.json") or {}
    return {"steps": num_steps, **held_out(metrics), **report}


def _load_policy(source: str, mesh: jax.sharding.Mesh) -> Any:
    policy, _ = load_model(source, mesh)
    return lora.merge(policy)  # new adapters are trained on plain weights


def _has_reference(config: RewardConfig | DPOConfig) -> bool:
    return isinstance(config, DPOConfig) and OBJECTIVES[config.loss].has_reference


def _load_rankings(
    workspace: Workspace, stage: str, config: RewardConfig | DPOConfig, model: ModelConfig
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
    # Held-out rankings need scores too, but may all be ties: they are only measured.
    if config.loss == "regression":
        _check_scores(stage, [*rankings["train"], *rankings["held_out"]])
    elif isinstance(config, DPOConfig) and config.loss == "kto":
        _check_labels(stage, config, rankings["train"])
    else:
        _check_preferences(stage, rankings["train"])
    num_train = len(rankings["train"])
    num_held_out = len(rankings["held_out"])
    console.print(f"{stage}: {num_train} training and {num_held_out} held-out prompts")
    return rankings


def _check_scores(stage: str, examples: Sequence[RankedExample]) -> None:
    # A missing score would be read as 0, which is a score.
    for example in examples:
        if not example.scores:
            raise InputError(
                f'{stage}.loss: regression needs "scores" in every record, and one of '
                f"{len(example.rows)} responses has only ranks; give scores, or set {stage}.loss to pairwise"
            )


def _check_preferences(stage: str, examples: Sequence[RankedExample]) -> None:
    # Tied pairs are dropped by the losses; with ties alone every gradient would be 0.
    if all(len(set(example.ranks)) == 1 for example in examples):
        raise InputError(
            f"{stage}.data: every training prompt ranks all of its responses the same, so nothing "
            "can be learned; give rankings that prefer a response"
        )


def _check_labels(stage: str, config: DPOConfig, examples: Sequence[RankedExample]) -> None:
    """Says how much desirable and undesirable responses weigh, since KTO's weights depend on it.

    Raises:
      InputError: there are none of one kind.
    """
    labels: list[int] = []
    for example in examples:
        if example.labels:
            labels += np.where(example.labels, 1, -1).tolist()
            continue
        better = np.subtract.outer(example.ranks, example.ranks) < 0  # [K, K]: i is better than j
        labels += np.sign(better.sum(1) - better.sum(0)).tolist()
    good, bad = labels.count(1), labels.count(-1)
    if not (good and bad):
        raise InputError(
            f"{stage}.data: {good} training responses are desirable and {bad} are undesirable; kto "
            "needs both: give labels, or rankings that prefer a response"
        )
    ratio = config.kto_desirable_weight * good / (config.kto_undesirable_weight * bad)
    console.print(
        f"{stage}: {good} desirable and {bad} undesirable responses, weighted {ratio:.2f} to 1 "
        "(1 to 1.5 is advised: Ethayarajh et al. 2024, eq. 9)"
    )


def _best_metric(examples: Sequence[RankedExample]) -> str:
    """By which the best checkpoint is found: of pairs of a prompt's responses, or of labels where there is no pair."""
    has_pairs = any(len(set(example.ranks)) > 1 for example in examples)
    labels = {label for example in examples for label in example.labels}
    return "eval/accuracy" if has_pairs or len(labels) < 2 else "eval/label_accuracy"


def _program(
    mesh: jax.sharding.Mesh,
    stage: str,
    config: RewardConfig | DPOConfig,
    model: ModelConfig,
    num_steps: int,
    seed: int,
) -> tuple[Any, Callable[..., jax.Array], train.StateLayout]:
    """The jitted step, its score function and the layout of its state. The mesh may be a planned one.

    Returns:
      step: (state, batch, **frozen) -> (state, metrics); frozen: `_frozen_params`. Metrics: the loss and those of
        `losses.ranking_metrics`, each as (sum, weight).
      score: (params, batch, **frozen) -> scores float32[B, K].
      layout: how the state is made and sharded.
    """
    if isinstance(config, DPOConfig):
        family = transformer
        score, loss = _policy_functions(config, model)
    else:
        family = scalar
        score, loss = _reward_functions(config, model)

    step, layout = training.make_step(
        config,
        mesh,
        loss,
        family.abstract(model),
        family.axes(model),
        num_steps=num_steps,
        seed=seed,
    )
    return step, score, layout


def _policy_functions(config: DPOConfig, model: ModelConfig) -> tuple[Any, Any]:
    """Stage dpo: (params, batch, **frozen) -> implicit rewards float32[B, K], and its loss for `training.make_step`."""
    objective = OBJECTIVES[config.loss]

    def score(params: Any, batch: Any, **frozen: Any) -> jax.Array:
        return objective.reward(policy_responses(params, batch, model=model, **frozen), config)

    def loss(params: Any, batch: Any, key: Any, **frozen: Any) -> losses.Loss:
        del key  # no dropout
        responses = policy_responses(params, batch, model=model, **frozen)
        if config.margin_coef:
            responses = responses._replace(margins=config.margin_coef * _distance(batch))
        if objective.needs_kl:
            responses = responses._replace(kl=unrelated_kl(params, batch, model=model, **frozen))
        return objective.loss(responses, config)

    return score, loss


def _reward_functions(config: RewardConfig, model: ModelConfig) -> tuple[Any, Any]:
    """Stage reward: (params, batch, **frozen) -> scores float32[B, K], and its loss for `training.make_step`."""
    score = functools.partial(reward_scores, model=model)

    def loss(params: Any, batch: Any, key: Any, **frozen: Any) -> losses.Loss:
        del key  # no dropout
        return _ranking_loss(config, score(params, batch, **frozen), batch)

    return score, loss


def _initial_params(
    stage: str, config: PreferenceConfig, model: ModelConfig, policy: Any, *, seed: int
) -> Any:
    """Trainable parameters, made from the policy's: DPO's policy or the reward model, or their adapters."""
    # Not the seed's own key, from which pretrain makes its parameters.
    key = jax.random.fold_in(jax.random.key(seed), 1)
    if stage == "dpo":
        # A copy: the optimizer updates its parameters in place, and the reference must keep the old ones.
        return lora.init(config.lora, jax.tree.map(jnp.copy, policy), key, transformer.axes(model))
    head_key, adapter_key = jax.random.split(key)
    return lora.init(
        config.lora, scalar.init(policy, model, head_key), adapter_key, scalar.axes(model)
    )


def _frozen_params(stage: str, config: RewardConfig | DPOConfig, policy: Any) -> dict[str, Any]:
    """Arguments of the step that stay fixed: base, the weights under adapters, and the reference `ref`, if any."""
    base = lora.frozen(config.lora, policy if stage == "dpo" else {"trunk": policy})
    # The reference is the policy before training, without adapters.
    return {"base": base, "ref": policy} if _has_reference(config) else {"base": base}


def _ranking_loss(config: RewardConfig, scores: jax.Array, batch: Any) -> losses.Loss:
    """The configured loss of the reward model's scores float32[B, K] on a batch of `make_ranked_batch_at`."""
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
    # The loader writes zeros for a prompt without scores. Rank 1 is best, hence the sign.
    has_scores = (batch["scores"] != 0).any(1)[:, None]
    goodness = jnp.where(has_scores, batch["scores"], -batch["ranks"].astype(jnp.float32))
    return goodness[:, :, None] - goodness[:, None, :]


def plan(
    mesh: jax.sharding.Mesh, life: Any, stage: str
) -> tuple[list[train.Program], dict[str, Any]]:
    """What `jaxllm plan` compiles: ([the step], {role: shapes with shardings of what devices hold})."""
    config: RewardConfig | DPOConfig = getattr(life, stage)
    training.check_batch(config, mesh, stage)
    # Sizes come from the config alone: planning reads no data, which would decide the steps, K and T.
    model: ModelConfig = life.model
    step, _, layout = _program(mesh, stage, config, model, max(config.num_steps, 1), life.seed)
    length = model.row_length(config.length, f"{stage}.length")
    rows = (config.batch_size, life.sample.num_responses, length)
    batch = {
        "tokens": jax.ShapeDtypeStruct(rows, jnp.int32),
        "segment_ids": jax.ShapeDtypeStruct(rows, jnp.int32),
        "loss_mask": jax.ShapeDtypeStruct(rows, jnp.bool_),
        "ranks": jax.ShapeDtypeStruct(rows[:2], jnp.int32),
        "labels": jax.ShapeDtypeStruct(rows[:2], jnp.int32),
        "scores": jax.ShapeDtypeStruct(rows[:2], jnp.float32),
    }
    policy = place_params(mesh, transformer.abstract(model), transformer.axes(model))
    # The reward model's decoder is one branch of its parameters, next to the scalar head.
    under_adapters = policy if stage == "dpo" else {"trunk": policy}
    base = lora.place_frozen(config.lora, under_adapters, replicated(mesh))
    frozen = {"base": base}
    held = {"policy" if stage == "dpo" else "reward": layout.abstract, "base": base}
    if _has_reference(config):
        frozen["ref"] = held["reference"] = policy
    flops = math.prod(rows) * _flops_per_token(config, model)
    arguments = (layout.abstract, rows_like(mesh, batch))
    return [train.Program("step", step, arguments, frozen, flops)], held


def _flops_per_token(config: RewardConfig | DPOConfig, model: ModelConfig) -> float:
    """Model FLOPs of a token of a response, forward and backward."""
    length = config.length or model.max_length
    if not isinstance(config, DPOConfig):
        return transformer.flops_per_token(model, length, scored=False)
    # These FLOPs are those of a step, 3 forward passes' worth of work. What is frozen has no backward pass.
    passes = OBJECTIVES[config.loss].passes
    return passes / 3 * transformer.flops_per_token(model, length, scored=True)
