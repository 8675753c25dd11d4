"""Dynamic sampling: groups of responses whose scores are all equal give way to those of further prompts.

Such a group teaches nothing, so that a batch with many of them has a noisy gradient (Yu et al. 2025, section 3.2). With
two responses to each of three prompts, and one further round:

    round 0    a 1 0    b 1 1    c 0 0         b and c have no spread
    round 1    d 0 0    e 0 1    f 1 1         e takes the place of b
    batch      a        e        c             c stays: no round is left
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.loader import PromptExample
from jaxllm.engine.rollouts import Rollout
from jaxllm.losses import Metrics
from jaxllm.rl.config import PPOConfig
from jaxllm.rl.experience import StepRewards
from jaxllm.runtime.transfer import fetch


class Sampled(NamedTuple):
    """Responses of one round, or the batch that they make."""

    rollout: Rollout
    scores: jax.Array  # float32[B], before they are shaped
    prompts: Sequence[PromptExample]  # of each response
    steps: StepRewards | None = None  # the part of the scores that is paid where steps end


def fill(
    batch: Sampled,
    reward_metrics: Metrics,
    sample: Callable[[int], tuple[Sampled, Metrics]],
    exchange: Callable[[Any, np.ndarray], Any],
    config: PPOConfig,
) -> tuple[Sampled, Metrics]:
    """A batch in which groups have spread, as far as the rounds allow, and metrics of all responses.

    Groups without spread that are left when config.sampling_rounds have passed stay in the batch: their scores teach
    nothing, and their KL what it always does.

    Args:
      batch: responses of round 0.
      reward_metrics: of round 0.
      sample: round -> responses of as many other prompts, and the metrics of their rewards.
      exchange: (pair of batches, rows int32[B]) -> those rows of both; see `programs`.
    """
    K = config.num_responses
    scores = _scores(batch, config)
    seen = [scores]
    spread = _has_spread(scores)
    rounds = 1
    while not spread.all() and rounds < config.sampling_rounds:
        more, metrics = sample(rounds)
        rounds += 1
        scores = _scores(more, config)
        seen.append(scores)
        reward_metrics = jax.tree.map(jnp.add, reward_metrics, metrics)
        places = np.flatnonzero(~spread)
        groups = np.flatnonzero(_has_spread(scores))
        batch = _replace(batch, more, places, groups, K, exchange)
        spread[places[: len(groups)]] = True
    every = np.concatenate(seen)
    return batch, reward_metrics | {
        "sampling_rounds": (jnp.float32(rounds), jnp.ones(())),
        # Of all groups that were sampled, and of those in the batch.
        "no_spread": (jnp.float32((~_has_spread(every)).sum()), jnp.float32(len(every))),
        "no_spread_kept": (jnp.float32((~spread).sum()), jnp.float32(len(spread))),
        "sampled_score": (jnp.float32(every.sum()), jnp.float32(every.size)),
    }


def _scores(sampled: Sampled, config: PPOConfig) -> np.ndarray:
    """Scores float32[b, K] of the responses to each prompt, where a response without an end has its own."""
    finished, scores = fetch((sampled.rollout.finished, sampled.scores))
    ended = np.where(finished, scores, np.float32(config.missing_end_score))
    return ended.reshape(-1, config.num_responses)


def _has_spread(scores: np.ndarray) -> np.ndarray:
    """bool[b]: whether the scores float32[b, K] of a prompt's responses differ."""
    return scores.max(1) > scores.min(1)


def _replace(
    batch: Sampled,
    more: Sampled,
    places: np.ndarray,
    groups: np.ndarray,
    K: int,
    exchange: Callable[[Any, np.ndarray], Any],
) -> Sampled:
    """The batch with groups of `more` in these places, as many as there are of both; numbers of groups int[n]."""
    size = len(batch.prompts)
    rows = np.arange(size, dtype=np.int32).reshape(-1, K)
    # Rows of `more` are numbered after those of the batch.
    for place, group in zip(places, groups, strict=False):
        rows[place] = size + group * K + np.arange(K)
    rows = rows.reshape(-1)
    pair = [(each.rollout, each.scores, each.steps) for each in (batch, more)]
    rollout, scores, steps = exchange(tuple(pair), rows)
    prompts = [*batch.prompts, *more.prompts]
    return Sampled(rollout, scores, [prompts[row] for row in rows], steps)
