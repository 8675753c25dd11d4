"""Reward model and DPO: one example is a prompt with its K responses, and the loss is over their scores.

The reward model is the fine-tuned model with a scalar head. In DPO (Rafailov et al. 2023) the policy itself is the
reward model: the score of a response is beta * log(policy / reference).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
from jaxllm.model_store import load_model, write_model_card
from jaxllm.models import lora, scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.optim import learning_rate
from jaxllm.runtime.console import console
from jaxllm.runtime.files import read_json, write_json
from jaxllm.sharding import activation, place_params, replicated, rows_like
from jaxllm.stages import response_scores, training
from jaxllm.stages.config import PreferenceConfig
from jaxllm.stages.response_scores import held_out_metrics, implicit_rewards, reward_scores
from jaxllm.workspace import Workspace


def build(workspace: Workspace, life: Any, stage: str) -> train.Training:
    """The training of stage "reward" or "dpo"; its result holds `held_out_metrics` and `breakdown`.

    Those of DPO say how often the implicit reward orders held-out pairs correctly. DPO learns from all pairs of K
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
    policy = lora.merge(policy)  # new adapters are trained on plain weights
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

    def init() -> train.TrainState:
        make = functools.partial(_initial_params, stage, config, model, seed=workspace.seed)
        return layout.init(jax.jit(make, out_shardings=layout.shardings.params)(policy))

    def evaluate(step: int, state: train.TrainState) -> dict[str, float]:
        scores, ranks = score_split(state.params, rankings["held_out"])
        # Here rather than in `result`, since `finalize` rescales the scores after the last step.
        if step == num_steps and jax.process_index() == 0:
            report = response_scores.breakdown(scores, ranks, rankings["held_out"])
            write_json(directory / "held_out.json", report)
        return {f"eval/{name}": value for name, value in held_out_metrics(scores, ranks).items()}

    def finalize(state: train.TrainState) -> train.TrainState:
        scores, ranks = score_split(state.params, rankings["train"])
        return response_scores.normalize_scores(state, scores[ranks > 0], config.normalize)

    batch_at = make_ranked_batch_at(
        rankings["train"], batch_size=config.batch_size, seed=workspace.seed, sharding=sharding
    )
    # All batches have the shape of the first: B prompts, the most responses K, the longest row T.
    tokens = math.prod(batch_at(0)["tokens"].shape)
    flops = _flops_per_token(stage, config, model) * tokens
    return train.Training(
        data=examples_fingerprint([*rankings["train"], *rankings["held_out"]]),
        init=init,
        abstract=layout.abstract,
        step=functools.partial(step, **frozen),
        batch_at=batch_at,
        num_steps=num_steps,
        settings=config,
        work=Work(tokens, flops, peak_flops(mesh)),
        evaluate=evaluate,
        best="eval/accuracy",  # the loss rises with overconfidence while the order still improves
        lower_is_better=False,
        # An implicit reward is a difference of log-probabilities, which has no bias to shift.
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
    # From the file: a run that was interrupted after its last evaluation does not evaluate again.
    report = read_json(directory / "held_out.json") or {}
    return {"steps": num_steps, **held_out(metrics), **report}


def _load_rankings(
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
    # Held-out rankings need scores too, but may all be ties: they are only measured.
    if config.loss == "regression":
        _check_scores(stage, [*rankings["train"], *rankings["held_out"]])
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


def _program(
    mesh: jax.sharding.Mesh,
    stage: str,
    config: PreferenceConfig,
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
    # Two ways to score float32[B, K]; loss, step and measures are the same for both.
    if stage == "dpo":
        family = transformer
        score = functools.partial(implicit_rewards, model=model, beta=config.beta)
    else:
        family = scalar
        score = functools.partial(reward_scores, model=model)

    def loss(params: Any, batch: Any, key: Any, **frozen: Any) -> losses.Loss:
        del key  # no dropout
        return _ranking_loss(config, score(params, batch, **frozen), batch)

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


def _frozen_params(stage: str, config: PreferenceConfig, policy: Any) -> dict[str, Any]:
    """Arguments of the step that stay fixed: base, the weights under adapters, and DPO's reference `ref`."""
    # The reference is the policy before training, without adapters.
    if stage == "dpo":
        return {"base": lora.frozen(config.lora, policy), "ref": policy}
    return {"base": lora.frozen(config.lora, {"trunk": policy})}


def _ranking_loss(config: PreferenceConfig, scores: jax.Array, batch: Any) -> losses.Loss:
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
    # The loader writes zeros for a prompt without scores. Rank 1 is best, hence the sign.
    has_scores = (batch["scores"] != 0).any(1)[:, None]
    goodness = jnp.where(has_scores, batch["scores"], -batch["ranks"].astype(jnp.float32))
    return goodness[:, :, None] - goodness[:, None, :]


def plan(
    mesh: jax.sharding.Mesh, life: Any, stage: str
) -> tuple[list[train.Program], dict[str, Any]]:
    """What `jaxllm plan` compiles: ([the step], {role: shapes with shardings of what devices hold})."""
    config: PreferenceConfig = getattr(life, stage)
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
        "scores": jax.ShapeDtypeStruct(rows[:2], jnp.float32),
    }
    policy = place_params(mesh, transformer.abstract(model), transformer.axes(model))
    # The reward model's decoder is one branch of its parameters, next to the scalar head.
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
