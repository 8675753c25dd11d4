"""The stages that learn from the policy's own responses: ppo, rloo, grpo and distill. How is told in `jaxllm.rl`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import train
from jaxllm.data.loader import (
    PromptExample,
    examples_fingerprint,
    load_prompts,
    load_rows,
    make_batch_at,
    make_prompt_batch_at,
)
from jaxllm.data.store import kind_of
from jaxllm.metrics import Work, held_out
from jaxllm.model_store import write_model_card
from jaxllm.optim import learning_rate
from jaxllm.rl import planned, rewards
from jaxllm.rl.config import PPOConfig
from jaxllm.rl.held_out import HeldOut
from jaxllm.rl.layouts import role_meshes
from jaxllm.rl.programs import build_programs
from jaxllm.rl.roles import PPOState, RunSpec, abstract_state, initial_state, load_models
from jaxllm.rl.rollout_log import RolloutLog
from jaxllm.rl.scoring import end_at_strings, make_scorer
from jaxllm.rl.update import HostWork, Scorer, make_step, passes_kl_limit
from jaxllm.runtime.console import console
from jaxllm.sharding import activation, check_batch
from jaxllm.tokenizers.trained import Tokenizer
from jaxllm.workspace import Workspace


def build(workspace: Workspace, life: Any, stage: str) -> train.Training:
    """The training of the policy. Its result has score, divergence and KL on held-out prompts."""
    config: PPOConfig = getattr(life, stage)
    mesh = workspace.mesh
    # Checked before models are loaded: a wrong batch size should not take minutes to find.
    _check_batches(mesh, config, stage)
    meshes = role_meshes(config, mesh)
    tokenizer = workspace.tokenizer()
    models = load_models(workspace, config, stage, meshes, tokenizer.stop_ids, tokenizer.pad_id)
    spec, frozen = models.spec, models.frozen
    prompts = _load_prompts(stage, config, tokenizer)
    _write_card(workspace, spec, stage)
    # Nothing is compiled yet; a program compiles when it first runs.
    programs, layouts = build_programs(spec, meshes)
    score = make_scorer(spec, programs, frozen, tokenizer.decode, mesh, f"{stage}.rewards")
    prompts_at = make_prompt_batch_at(
        prompts["train"],
        batch_size=config.num_prompts,
        seed=workspace.seed,
        length=config.max_prompt_length,
        pad_id=tokenizer.pad_id,
        sharding=activation(mesh, "batch", None),
    )
    host = _host_work(workspace, spec, tokenizer, score, prompts["train"], prompts_at, stage)
    return train.Training(
        data=examples_fingerprint([*prompts["train"], *prompts["held_out"]]),
        # Copies: making a state donates its parameters, and reference and reward model may share them.
        init=lambda: initial_state(
            layouts, config, mesh, *jax.tree.map(jnp.copy, (models.actor, models.critic))
        ),
        abstract=abstract_state(layouts, config, mesh),
        step=make_step(spec, programs, frozen, host, stage),
        batch_at=lambda step: prompts_at(step * config.sampling_rounds),
        num_steps=config.num_steps,
        settings=config,
        work=Work(config.batch_size * config.sampling.max_new_tokens),
        evaluate=HeldOut(
            spec, programs, frozen, score, prompts["held_out"], tokenizer.decode, mesh
        ),
        best="eval/score" if config.rewards else "eval/divergence",
        lower_is_better=not config.rewards,
        schedules={f"{stage}/learning_rate": _schedule(config)},
        shown=(
            f"{stage}/score",
            f"{stage}/divergence",
            f"{stage}/kl",
            f"{stage}/entropy",
            f"{stage}/response_length",
            "eval/score",
            "eval/divergence",
            "eval/kl",
        ),
        result=functools.partial(_result, config, stage),
    )


def plan(
    mesh: jax.sharding.Mesh, life: Any, stage: str
) -> tuple[list[train.Program], dict[str, Any]]:
    """(the programs of an update, {role: its state}), as shapes with their shardings."""
    config: PPOConfig = getattr(life, stage)
    _check_batches(mesh, config, stage)
    return planned.planned_update(mesh, stage, config, life.model, life.seed)


def _check_batches(mesh: jax.sharding.Mesh, config: PPOConfig, stage: str) -> None:
    microbatch = config.minibatch_size // config.num_micro
    check_batch(mesh, microbatch, f"{stage} minibatch")
    check_batch(mesh, config.num_prompts, f"{stage}.batch_size / {stage}.num_responses")


def _load_prompts(
    stage: str, config: PPOConfig, tokenizer: Tokenizer
) -> dict[str, list[PromptExample]]:
    """Prompts by split. Raises InputError where a reward needs answers that they do not have."""
    prompts = {}
    for split in ("train", "held_out"):
        prompts[split] = load_prompts(config.data, split, tokenizer, config.max_prompt_length)
    # The first ones, always the same: evaluations have to be comparable.
    prompts["held_out"] = prompts["held_out"][: config.eval_prompts]
    console.print(
        f"{stage}: {len(prompts['train'])} training prompts, "
        f"{len(prompts['held_out'])} held-out prompts for evaluation"
    )
    answers = [prompt.answer for prompt in (*prompts["train"], *prompts["held_out"])]
    rewards.check_answers(config.rewards, answers, f"{stage}.rewards")
    return prompts


def _write_card(workspace: Workspace, spec: RunSpec, stage: str) -> None:
    """Says where in a checkpoint the policy is, so that the stage's directory can be used as a model."""
    config = spec.config
    path = ("ema",) if config.ema_decay else ("actor", "params")
    if config.shares_trunk:
        path = (*path, "trunk")
    source = workspace.source(config.init_from, "sft", stage)
    directory = workspace.stage_dir(stage)
    write_model_card(directory, spec.model, "policy", path, config.lora, source)


def _host_work(
    workspace: Workspace,
    spec: RunSpec,
    tokenizer: Tokenizer,
    score: Scorer,
    prompts: list[PromptExample],
    prompts_at: Callable[[int], Any],
    stage: str,
) -> HostWork:
    config = spec.config
    # Each update appends a few of its responses.
    log = RolloutLog(workspace.stage_dir(stage) / "rollouts.jsonl", config.num_logged, tokenizer)
    return HostWork(
        prompts_of=lambda batch: prompts_of_rows(batch, prompts, config.num_responses),
        more_prompts=further_prompts(config, prompts_at),
        score=score,
        end_responses=lambda rollout: end_at_strings(rollout, spec, tokenizer.decode),
        ptx_rows_at=_ptx_rows(workspace, spec, tokenizer, stage),
        ends_early=lambda metrics: passes_kl_limit(metrics, config.max_approx_kl),
        log=log,
    )


def further_prompts(
    config: PPOConfig, prompts_at: Callable[[int], Any]
) -> Callable[[int, int], Any] | None:
    """(number of the update, round of sampling) -> batch of prompts; None where each update has one round.

    Each update has its own sampling_rounds batches, used or not, so that a resumed run finds the same ones. With 3
    rounds, update 0 has batches 0 1 2 of the order, update 1 has 3 4 5.
    """
    rounds = config.sampling_rounds
    if rounds == 1:
        return None
    return lambda number, round_: prompts_at(number * rounds + round_)


def prompts_of_rows(
    batch: Any, prompts: list[PromptExample], num_responses: int
) -> list[PromptExample]:
    """The prompt of each response: with two responses to each prompt, prompts 7 and 3 become 7 7 3 3."""
    return [prompts[i] for i in np.repeat(batch["prompt"], num_responses)]


def _ptx_rows(
    workspace: Workspace, spec: RunSpec, tokenizer: Tokenizer, stage: str
) -> Callable[[Any], Any] | None:
    """Number of the optimizer update -> rows to learn next tokens from; None without PPO-ptx."""
    config = spec.config.ptx
    if not config.coef:
        return None
    microbatch = config.batch_size // spec.config.num_micro
    check_batch(workspace.mesh, microbatch, f"{stage}.ptx.batch_size / num_micro")
    rows = load_rows(
        config.data,
        kind_of(config.data, f"{stage}.ptx.data"),
        "train",
        tokenizer,
        config.length or spec.model.max_length,
        workspace.run_dir / "cache",
    )
    batch_at = make_batch_at(
        rows,
        batch_size=config.batch_size,
        seed=workspace.seed,
        sharding=activation(workspace.mesh, "batch", None),
    )
    return lambda step: batch_at(int(step))


def _schedule(config: PPOConfig) -> Callable[[int], Any]:
    """Number of the update -> learning rate of its first minibatch."""
    # The optimizer counts minibatches, the log counts updates.
    updates = config.updates_per_step
    rate = learning_rate(config.actor, config.num_steps * updates)
    return lambda number: rate(number * updates)


def _result(
    config: PPOConfig, stage: str, state: PPOState, metrics: Mapping[str, float]
) -> dict[str, Any]:
    del state
    # Held-out numbers first: they are what the stage is judged by.
    result = {"steps": config.num_steps, **held_out(metrics)}
    for name in ("entropy", "clip_fraction", "sampler_drift"):
        result[name] = metrics[f"{stage}/{name}"]
    return result
