"""Experience: what one update learns from, computed once from a batch of responses.

A row is a prompt, padded on the left, and its response, padded on the right. With P = 3, R = 4, and a response of
three tokens of which the last one ends it:

    tokens        _   p1  p2 | r1  r2  end  _
    prompt_mask   0   1   1  |
    mask                     | 1   1   1    0
    log-probs                | l1  l2  l3   .     of each response token, given everything before it
    values                   | v1  v2  v3   .     of the state *before* each token: v1 sees p1 p2 only
    rewards                  | -k1 -k2 -k3+score  k = kl_coef * (log-prob - reference log-prob)

The score of the whole response is paid at its last token, except for rewards of steps, which are paid where the steps
end; every token pays for moving away from the reference. The rest of this file turns that into one advantage a token:
with a critic by GAE (PPO), without one by comparing the responses to the same prompt (RLOO, GRPO) or all of the batch
(REINFORCE++).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm import losses, output_layer, policy_losses
from jaxllm.engine import rollouts
from jaxllm.engine.rollouts import Rollout
from jaxllm.losses import Metrics, Moments
from jaxllm.models import lora, scalar
from jaxllm.models.config import ModelConfig
from jaxllm.rl.config import PPOConfig
from jaxllm.rl.roles import RunSpec


class StepRewards(NamedTuple):
    """The part of the scores that is paid where steps end."""

    paid: jax.Array  # float32[B, R]; 0 where no step ends
    ends: jax.Array  # bool[B, R]


class Experience(NamedTuple):
    """A batch of B responses of at most R tokens to prompts of at most P tokens; padding is masked."""

    tokens: jax.Array  # int32[B, P + R]
    prompt_mask: jax.Array  # bool[B, P]
    mask: jax.Array  # bool[B, R]: the tokens of the response, its end included
    old_logprobs: jax.Array  # float32[B, R], under the policy that sampled them
    ref_logprobs: jax.Array  # float32[B, R], under the reference
    old_values: jax.Array  # float32[B, R]; zero without a critic
    advantages: jax.Array  # float32[B, R]
    returns: jax.Array  # float32[B, R]: what values are trained towards; zero without a critic
    sampler_weights: Any = None  # float32[B, R]: corrects for the sampler; None where that is off
    teacher_hidden: Any = ()  # of each teacher [B, R, D]: its states in which the response tokens were chosen


def shape_scores(
    scores: jax.Array, finished: jax.Array, moments: Moments, *, config: PPOConfig
) -> tuple[jax.Array, Moments, Metrics]:
    """Normalizes and clips scores, and replaces those of responses that did not end.

    Args:
      scores: float32[B], the weighted sum of all reward terms.
      finished: bool[B], whether the response ended.
      moments: of all scores of finished responses so far.

    Returns:
      (scores float32[B] to learn from, moments including these scores, metrics).
    """
    if not config.rewards:
        return scores, moments, {}
    # Metrics show what the rewards said, before anything is normalized.
    reported = jnp.where(finished, scores, config.missing_end_score)
    metrics = {
        "score": (reported.sum(), jnp.float32(scores.shape[0])),
        "score_std": (reported.std(), jnp.ones(())),
    }
    if config.normalize_scores:
        moments = losses.update_moments(moments, scores, finished)
        std = jnp.sqrt(moments.m2 / jnp.maximum(moments.count, 1.0))
        scores = (scores - moments.mean) / jnp.maximum(std, 1e-6)
    if config.score_clip:
        scores = jnp.clip(scores, -config.score_clip, config.score_clip)
    # Last, so that neither normalizing nor clipping can make a response without an end attractive.
    return jnp.where(finished, scores, config.missing_end_score), moments, metrics


def make_experience(
    actor: Any,
    base: Any,
    rollout: Rollout,
    ref_logprobs: jax.Array,
    values: Any,
    scores: jax.Array,
    kl_coef: jax.Array,
    steps: StepRewards | None = None,
    *,
    spec: RunSpec,
) -> tuple[Experience, Metrics]:
    """Per-token rewards and advantages of a batch of responses.

    Args:
      actor: trainable parameters of the policy.
      base: frozen parameters under its adapters, {} without adapters.
      rollout: prompts and responses.
      ref_logprobs: float32[B, R], under the reference.
      values: float32[B, R] from a separate critic; not read without one.
      scores: float32[B], one for each response.
      kl_coef: float32[].
      steps: the part of the scores that is paid where steps end; None where there is none.
    """
    config, mask = spec.config, rollout.mask
    # Recomputed rather than taken from sampling: the decoding program rounds differently from the one that learns, and
    # the probability ratio of the first minibatch should be exactly 1.
    policy = spec.logprobs(spec.policy(actor, base), rollout)
    rewards = _rewards(scores, steps, policy.logprob, ref_logprobs, mask, kl_coef, config)
    if config.shares_trunk:
        values = response_values(lora.join(base, actor), rollout, model=spec.reward_model)
    elif not config.has_values:
        values = jnp.zeros_like(rewards)
    advantages, returns = _advantages(rewards, values, steps, mask, config)

    metrics = rollout_metrics(rollout, policy, ref_logprobs, advantages)
    if config.has_values:
        metrics |= value_metrics(values, returns, mask)
    if config.normalizes_advantages:
        advantages = losses.whiten(advantages, mask)
    weights, weight_metrics = _sampler_weights(policy.logprob, rollout, config)
    experience = Experience(
        tokens=rollout.tokens,
        prompt_mask=rollout.prompt_mask,
        mask=mask,
        old_logprobs=policy.logprob,
        ref_logprobs=ref_logprobs,
        old_values=values,
        advantages=advantages,
        returns=returns,
        sampler_weights=weights,
    )
    return experience, metrics | weight_metrics


def _rewards(
    scores: jax.Array,
    steps: StepRewards | None,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
    kl_coef: jax.Array,
    config: PPOConfig,
) -> jax.Array:
    """What each token is paid, float32[B, R]: the KL, the rewards of steps, and the rest of the score at the end."""
    if steps is None:
        rewards = losses.token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)
    else:
        # The last token is paid what is left of the score, also of a response without an end, which has another one: were
        # its steps not paid, a reward would depend on later tokens, which then would not learn from it.
        paid = jnp.where(mask, steps.paid, 0.0)
        rest = scores - paid.sum(1)
        rewards = losses.token_rewards(rest, logprobs, ref_logprobs, mask, kl_coef) + paid
    if config.whiten_rewards:
        # The mean stays: shifting rewards would pay for the length of a response.
        rewards = losses.whiten(rewards, mask, center=False)
    return rewards


def _sampler_weights(
    logprobs: jax.Array, rollout: Rollout, config: PPOConfig
) -> tuple[jax.Array | None, Metrics]:
    """(weights float32[B, R] that correct for the sampler, their metrics); None where that is off."""
    if config.sampler_correction == "off":
        return None, {}
    return policy_losses.truncated_weights(
        logprobs,
        rollout.logprobs,
        rollout.mask,
        level=config.sampler_correction,
        cap=config.sampler_cap,
    )


def _advantages(
    rewards: jax.Array,
    values: jax.Array,
    steps: StepRewards | None,
    mask: jax.Array,
    config: PPOConfig,
) -> tuple[jax.Array, jax.Array]:
    """(advantages, returns), float32[B, R] each; returns are zero without a critic, and both where nothing is rewarded."""
    if config.has_values:
        discount, lam = config.discount, config.gae_lambda
        return losses.gae(rewards, values, mask, discount=discount, lam=lam)
    zeros = jnp.zeros_like(rewards)
    if not config.rewards:
        return zeros, zeros
    return _compare_responses(rewards, steps, mask, config), zeros


def _compare_responses(
    rewards: jax.Array, steps: Any, mask: jax.Array, config: PPOConfig
) -> jax.Array:
    """Advantages float32[B, R] from the other responses to the same prompt.

    Rows of one prompt are adjacent: with two responses to each, rows 0 and 1 answer prompt 0, rows 2 and 3 prompt 1.
    Every token of a response has the advantage of the whole response; in REINFORCE++ and in GRPO of steps, of what follows.
    """
    if config.advantages == "grpo_steps":
        ends = steps.ends & mask
        if config.scores_responses:
            # What the whole response is paid counts like one more step, which ends with it.
            ends = ends | losses.last_tokens(mask)
        return policy_losses.step_advantages(rewards, ends, config.num_responses)
    if config.advantages == "reinforce_pp":
        return policy_losses.rewards_to_go(rewards, mask, config.num_responses)
    by_prompt = rewards.sum(1).reshape(-1, config.num_responses)
    by_response = policy_losses.group_advantages(by_prompt, config.advantages).reshape(-1, 1)
    return jnp.where(mask, by_response, 0.0)


def rollout_metrics(
    rollout: Rollout,
    policy: output_layer.TokenStats,
    ref_logprobs: jax.Array,
    advantages: jax.Array,
) -> Metrics:
    """{name: (sum, weight)} of a batch of responses; ref_logprobs and advantages float32[B, R]."""
    mask = rollout.mask
    log_ratio = policy.logprob - ref_logprobs
    drift = jnp.abs(policy.logprob - rollout.logprobs)
    rows = jnp.float32(mask.shape[0])
    tokens = mask.astype(jnp.float32).sum()
    return {
        "kl": (_masked_sum(losses.kl_k1(log_ratio), mask), rows),  # nats per response
        "kl_k3": (_masked_sum(losses.kl_k3(log_ratio), mask), rows),
        "entropy": (_masked_sum(policy.entropy, mask), tokens),
        "advantage_size": (_masked_sum(jnp.abs(advantages), mask), tokens),
        "response_length": (tokens, rows),
        "finished": (rollout.finished.astype(jnp.float32).sum(), rows),
        # How far sampling and learning disagree: large where a mask, a position or a temperature differs.
        "sampler_drift": (_masked_sum(drift, mask), tokens),
    }


def value_metrics(values: jax.Array, returns: jax.Array, mask: jax.Array) -> Metrics:
    """{name: (sum, weight)} of a critic: values and returns float32[B, R], mask bool[B, R].

    explained_variance is 1 for a perfect critic and 0 for one that says the mean return everywhere.
    """
    tokens = mask.astype(jnp.float32).sum()
    mean_return = _masked_sum(returns, mask) / tokens
    spread = _masked_sum(jnp.square(returns - mean_return), mask)
    unexplained = _masked_sum(jnp.square(returns - values), mask) / jnp.maximum(spread, 1e-8)
    return {
        "value": (_masked_sum(values, mask), tokens),
        "explained_variance": (1.0 - unexplained, jnp.ones(())),
    }


def _masked_sum(x: jax.Array, mask: jax.Array) -> jax.Array:
    # `where`, not a product: what lies under the mask may be infinite.
    return jnp.where(mask, x, 0.0).sum()


def response_values(params: Any, batch: Rollout | Experience, *, model: ModelConfig) -> jax.Array:
    """The critic's value float32[B, R] of the state before each response token."""
    hidden = rollouts.response_hidden(params["trunk"], batch, model)
    return scalar.read(params["head"], hidden)


def step_scores(params: Any, rollout: Rollout, ends: jax.Array, *, model: ModelConfig) -> jax.Array:
    """The reward model's score float32[B, R] at the tokens that end a step, bool[B, R]; 0 elsewhere."""
    values = scalar.apply(params, model, rollout.tokens, *rollouts.row_inputs(rollout))
    return jnp.where(ends, values[:, -ends.shape[1] :], 0.0)


def reward_scores(params: Any, rollout: Rollout, *, model: ModelConfig) -> jax.Array:
    """The reward model's score float32[B] of each response, read at its last token."""
    segments, positions = rollouts.row_inputs(rollout)
    values = scalar.apply(params, model, rollout.tokens, segments, positions)
    return scalar.last_value(values, segments)
