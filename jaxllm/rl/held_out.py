"""What the policy is judged by, on held-out prompts: the reward and the teachers that it learns from, and its KL."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


class _Judged(NamedTuple):
    """What was found of n responses."""

    scores: np.ndarray  # float32[n]; of a response without an end the configured one
    kls: np.ndarray  # float32[n], in nats
    divergences: (
        np.ndarray
    )  # float32[n], from the teachers, summed over its tokens; 0 without a teacher
    num_tokens: np.ndarray  # int[n], with the token that ends it
    responses: Sequence[rollouts.Completion]


class HeldOut:
    """Judges the policy by its responses to held-out prompts."""

    def __init__(
        self,
        spec: RunSpec,
        programs: UpdatePrograms,
        frozen: FrozenModels,
        score: Scorer,
        prompts: Sequence[PromptExample],
        decode: Callable[[Sequence[int]], str],
        mesh: jax.sharding.Mesh,
    ):
        self._spec = spec
        self._programs = programs
        self._frozen = frozen
        self._score = score
        self._prompts = prompts
        self._decode = decode
        self._mesh = mesh
        # Compiled once for all evaluations.
        self._logprobs = jax.jit(functools.partial(RunSpec.logprobs, spec))
        self._diverge = jax.jit(functools.partial(distillation.measured, spec=spec))

    def __call__(self, step: int, state: PPOState) -> dict[str, float]:
        """Score, divergence from teachers in nats per token, KL to the reference in nats per response, length, distinct-2.

        Without rewards there is no score, without teachers no divergence.
        """
        del step
        # The model that the stage leaves is the one that is measured.
        trained = state.ema if self._spec.config.ema_decay else state.actor.params
        params = self._spec.policy(trained, self._frozen.actor_base)
        judged = []
        begin = 0
        for sampled, count in self._sample(trained):
            rollout = end_at_strings(sampled, self._spec, self._decode)
            judged.append(self._judge(params, rollout, self._prompts[begin : begin + count]))
            begin += count
        return self._metrics(judged)

    def _sample(self, trained: Any) -> list[tuple[Rollout, int]]:
        """Responses to every prompt, in batches: (rollout, how many of its rows are not padding)."""
        programs = self._programs
        mesh = programs.rollout.mesh
        teachers = (teacher.mesh for teacher in programs.teachers)
        judges = (self._mesh, programs.reference.mesh, programs.reward.mesh, *teachers)
        weights = programs.weights(trained, self._frozen.actor_base)
        with jax.set_mesh(mesh):
            batches = list(
                roll_out(
                    weights,
                    self._spec.model,
                    [prompt.ids for prompt in self._prompts],
                    mesh=mesh,
                    seed=self._spec.seed,
                    # A batch goes to every judge, so it has to divide over the shards of each of them.
                    multiple=math.lcm(*map(batch_shards, judges)),
                    **self._spec.sampling,
                )
            )
        if mesh is self._mesh:
            return batches
        return [(travel(rollout, ROWS, self._mesh), count) for rollout, count in batches]

    def _judge(self, params: Any, rollout: Rollout, prompts: Sequence[PromptExample]) -> _Judged:
        """Of the responses to these prompts, which the first rows of the rollout are."""
        config = self._spec.config
        count, rows = len(prompts), rollout.mask.shape[0]
        # Rows of padding repeat a prompt; what they get is dropped.
        asked = [*prompts, *[prompts[0]] * (rows - count)]
        raw = fetch(self._score(call, rollout, asked)[0])
        fetched = fetch(rollout)
        # The same rule as in training, without normalizing or clipping.
        scores = np.where(fetched.finished, raw, config.missing_end_score)
        kls = self._kl(params, rollout)
        divergences = self._divergence(params, rollout) if config.teachers else np.zeros(rows)
        return _Judged(
            scores[:count],
            kls[:count],
            divergences[:count],
            fetched.mask[:count].sum(1),
            rollouts.completions(fetched, self._spec.stop_ids)[:count],
        )

    def _kl(self, params: Any, rollout: Rollout) -> np.ndarray:
        """KL float32[B] of each response: the sum over its tokens of the log-probability ratio."""
        ref_logprobs = self._programs.reference(self._frozen.ref, rollout)
        log_ratio = self._logprobs(params, rollout).logprob - ref_logprobs
        return fetch(jnp.where(rollout.mask, losses.kl_k1(log_ratio), 0.0).sum(1))

    def _divergence(self, params: Any, rollout: Rollout) -> np.ndarray:
        """Divergence from the teachers float32[B] of each response, summed over its tokens."""
        hidden = teacher_hidden(call, self._programs, self._frozen, rollout)
        heads = self._frozen.teacher_heads
        return fetch(self._diverge(params, rollout, hidden, heads).sum(1))

    def _metrics(self, judged: Sequence[_Judged]) -> dict[str, float]:
        # Sums in float64: there may be many responses.
        scores, kls, divergences, num_tokens = (
            np.concatenate(part).astype(np.float64)
            for part in zip(*(each[:4] for each in judged), strict=True)
        )
        responses = [response for each in judged for response in each.responses]
        found = {}
        if self._spec.config.rewards:
            found["eval/score"] = float(scores.mean())
        if self._spec.config.teachers:
            found["eval/divergence"] = float(divergences.sum() / num_tokens.sum())
        return found | {
            "eval/kl": float(kls.mean()),
            "eval/response_length": float(np.mean([len(r.ids) for r in responses])),
            "eval/finished": float(np.mean([r.finished for r in responses])),
            "eval/distinct_2": measures.distinct(r.ids for r in responses),
        }
