"""What the policy is judged by, on held-out prompts: the reward and the teachers that it learns from, and its KL."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import losses
from jaxllm.data.loader import PromptExample
from jaxllm.engine import rollouts
from jaxllm.engine.responses import roll_out
from jaxllm.engine.rollouts import Rollout
from jaxllm.evaluation import measures
from jaxllm.rl import distillation
from jaxllm.rl.layouts import ROWS, travel
from jaxllm.rl.programs import UpdatePrograms
from jaxllm.rl.roles import FrozenModels, PPOState, RunSpec
from jaxllm.rl.scoring import end_at_strings
from jaxllm.rl.update import Scorer, call, teacher_hidden
from jaxllm.runtime.transfer import fetch
from jaxllm.sharding import batch_shards


def make_evaluation(
    spec: RunSpec,
    programs: UpdatePrograms,
    frozen: FrozenModels,
    score: Scorer,
    prompts: Sequence[PromptExample],
    decode: Callable[[Sequence[int]], str],
    mesh: jax.sharding.Mesh,
) -> Callable[[int, PPOState], dict[str, float]]:
    """(step, state) -> score, divergence from teachers in nats per token, KL to the reference in nats per response, length
    and distinct-2. Without rewards there is no score, without teachers no divergence."""
    config = spec.config
    # Compiled once for all evaluations.
    logprobs = jax.jit(functools.partial(RunSpec.logprobs, spec))

    def kl_of(params: Any, rollout: Rollout) -> np.ndarray:
        """KL float32[B] of each response: the sum over its tokens of the log-probability ratio."""
        ref_logprobs = programs.reference(frozen.ref, rollout)
        log_ratio = logprobs(params, rollout).logprob - ref_logprobs
        return fetch(jnp.where(rollout.mask, losses.kl_k1(log_ratio), 0.0).sum(1))

    diverge = jax.jit(functools.partial(distillation.measured, spec=spec))

    def divergence_of(params: Any, rollout: Rollout) -> np.ndarray:
        """Divergence from the teachers float32[B] of each response, summed over its tokens."""
        hidden = teacher_hidden(call, programs, frozen, rollout)
        return fetch(diverge(params, rollout, hidden, frozen.teacher_heads).sum(1))

    def sample(trained: Any) -> list[tuple[Rollout, int]]:
        """Responses to every prompt, in batches: (rollout, how many of its rows are not padding)."""
        sampler_mesh = programs.rollout.mesh
        teachers = (teacher.mesh for teacher in programs.teachers)
        judges = (mesh, programs.reference.mesh, programs.reward.mesh, *teachers)
        weights = programs.weights(trained, frozen.actor_base)
        with jax.set_mesh(sampler_mesh):
            batches = list(
                roll_out(
                    weights,
                    spec.model,
                    [prompt.ids for prompt in prompts],
                    mesh=sampler_mesh,
                    seed=spec.seed,
                    # A batch goes to every judge, so it has to divide over the shards of each of them.
                    multiple=math.lcm(*map(batch_shards, judges)),
                    **spec.sampling,
                )
            )
        if sampler_mesh is mesh:
            return batches
        return [(travel(rollout, ROWS, mesh), count) for rollout, count in batches]

    def evaluate(step: int, state: PPOState) -> dict[str, float]:
        del step
        # The model that the stage leaves is the one that is measured.
        trained = state.ema if config.ema_decay else state.actor.params
        params = spec.policy(trained, frozen.actor_base)
        scores: list[float] = []
        kls: list[float] = []
        divergences: list[float] = []
        num_tokens = 0
        responses: list[rollouts.Completion] = []
        for sampled, count in sample(trained):
            rollout = end_at_strings(sampled, spec, decode)
            begin, rows = len(scores), rollout.mask.shape[0]
            # Rows of padding repeat a prompt; their scores are dropped.
            asked = [*prompts[begin : begin + count], *[prompts[begin]] * (rows - count)]
            raw = fetch(score(call, rollout, asked)[0])
            # The same rule as in training, without normalizing or clipping.
            ended = np.where(fetch(rollout.finished), raw, config.missing_end_score)
            scores += ended[:count].tolist()
            kls += kl_of(params, rollout)[:count].tolist()
            if config.teachers:
                divergences += divergence_of(params, rollout)[:count].tolist()
                num_tokens += int(fetch(rollout.mask)[:count].sum())
            responses += rollouts.completions(fetch(rollout), spec.stop_ids)[:count]
        found = {}
        if config.rewards:
            found["eval/score"] = float(np.mean(scores))
        if config.teachers:
            found["eval/divergence"] = float(np.sum(divergences)) / num_tokens
        return found | {
            "eval/kl": float(np.mean(kls)),
            "eval/response_length": float(np.mean([len(r.ids) for r in responses])),
            "eval/finished": float(np.mean([r.finished for r in responses])),
            "eval/distinct_2": measures.distinct(r.ids for r in responses),
        }

    return evaluate
