"""The losses of an update. Each returns (sum, weight, metrics), as `train.make_step` wants them."""

from typing import Any

import jax.numpy as jnp

from jaxllm import losses
from jaxllm.engine import rollouts
from jaxllm.models import lora, next_token, scalar
from jaxllm.rl.experience import Experience, response_values
from jaxllm.rl.roles import RunSpec


def actor_loss(
    params: Any, batch: Experience, key: Any, base: Any, *, spec: RunSpec
) -> losses.Loss:
    """The clipped surrogate (Schulman et al. 2017, eq. 7), a sum over response tokens.

    As configured also the entropy bonus, the k3 estimate of the KL to the reference, and the value loss of a shared
    trunk.
    """
    del key  # no dropout: the ratio of the first minibatch is exactly 1
    config, mask = spec.config, batch.mask
    policy = spec.policy(params, base)
    # Only positions that predict a response token are scored: prompts would cost as much and teach nothing.
    hidden = rollouts.response_hidden(policy, batch, spec.model)
    temperature = config.sampling.temperature
    stats = rollouts.hidden_logprobs(
        policy, hidden, batch, config=spec.model, temperature=temperature
    )
    loss, count, metrics = losses.policy(
        stats.logprob,
        batch.old_logprobs,
        batch.advantages,
        mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )
    # Subtracted: the loss is minimized, and entropy should be high.
    if config.entropy_coef:
        loss = loss - config.entropy_coef * jnp.where(mask, stats.entropy, 0.0).sum()
    if config.kl_loss_coef:
        # Masked before the exponential: padding may overflow it.
        log_ratio = jnp.where(mask, stats.logprob - batch.ref_logprobs, 0.0)
        loss = loss + config.kl_loss_coef * losses.kl_k3(log_ratio).sum()
    if config.shares_trunk:
        # The head reads the same hidden states: one pass through the trunk serves both losses.
        values = scalar.read(lora.join(base, params)["head"], hidden)
        value_loss, _, value_metrics = losses.value(
            values, batch.old_values, batch.returns, mask, clip=config.value_clip
        )
        loss = loss + config.value_coef * value_loss
        metrics = metrics | value_metrics
    return loss, count, metrics


def critic_loss(
    params: Any, batch: Experience, key: Any, base: Any, *, spec: RunSpec
) -> losses.Loss:
    """The clipped value loss of a separate critic, a sum over response tokens."""
    del key
    values = response_values(lora.join(base, params), batch, model=spec.reward_model)
    return losses.value(
        values, batch.old_values, batch.returns, batch.mask, clip=spec.config.value_clip
    )


def ptx_loss(params: Any, batch: Any, key: Any, base: Any, *, spec: RunSpec) -> losses.Loss:
    """Next-token loss of the policy on rows of documents or conversations (PPO-ptx)."""
    return next_token.loss(spec.policy(params, base), batch, key, {}, model=spec.model)
