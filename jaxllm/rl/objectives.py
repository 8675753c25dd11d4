"""The losses of an update. Each returns (sum, weight, metrics), as `train.make_step` wants them."""

from typing import Any

import jax.numpy as jnp

from jaxllm import losses, policy_losses
from jaxllm.engine import rollouts
from jaxllm.models import lora, next_token, scalar
from jaxllm.rl import distillation
from jaxllm.rl.experience import Experience, response_values
from jaxllm.rl.roles import RunSpec

_KL_LOSSES = {"k2": losses.kl_k2, "k3": losses.kl_k3}


def actor_loss(
    params: Any, batch: Experience, key: Any, base: Any, teacher_heads: Any = (), *, spec: RunSpec
) -> losses.Loss:
    """The objective that the config is made of (`policy_losses`), a sum over response tokens.

    As configured also the divergence from teachers (`distillation`), the entropy bonus, an estimate of the KL to the
    reference, and the value loss of a shared trunk. teacher_heads: float32[V, D] of each teacher.
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
    loss, weight, metrics = policy_losses.policy(
        stats.logprob,
        batch.old_logprobs,
        batch.advantages,
        mask,
        ratio=config.ratio,
        surrogate=config.surrogate,
        loss_mean=config.loss_mean,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        sampler_weights=batch.sampler_weights,
    )
    if not config.rewards:
        loss = jnp.zeros(())  # every advantage is 0, and so is the policy loss
    if config.teachers:
        nats = distillation.divergence(
            policy, hidden, batch.teacher_hidden, teacher_heads, spec=spec
        )
        loss = loss + policy_losses.total(nats, mask, config.loss_mean)
        tokens = mask.astype(jnp.float32).sum()
        metrics["divergence"] = (policy_losses.total(nats, mask, "token"), tokens)
    # Subtracted: the loss is minimized, and entropy should be high.
    if config.entropy_coef:
        entropy = policy_losses.total(stats.entropy, mask, config.loss_mean)
        loss = loss - config.entropy_coef * entropy
    if config.kl_loss_coef:
        # Masked before the exponential: padding may overflow it.
        log_ratio = jnp.where(mask, stats.logprob - batch.ref_logprobs, 0.0)
        kl = _KL_LOSSES[config.kl_loss](log_ratio)
        # Like the gain, an estimate at samples of the trainer's policy.
        if batch.sampler_weights is not None:
            kl = kl * batch.sampler_weights
        loss = loss + config.kl_loss_coef * policy_losses.total(kl, mask, config.loss_mean)
    if config.shares_trunk:
        # The head reads the same hidden states: one pass through the trunk serves both losses.
        values = scalar.read(lora.join(base, params)["head"], hidden)
        value_loss, _, value_metrics = losses.value(
            values, batch.old_values, batch.returns, mask, clip=config.value_clip
        )
        loss = loss + config.value_coef * value_loss
        metrics = metrics | value_metrics
    return loss, weight, metrics


def critic_loss(
    params: Any, batch: Experience, key: Any, base: Any, *, spec: RunSpec
) -> losses.Loss:
    """The clipped value loss of a separate critic, a sum over response tokens."""
    del key
    values = response_values(lora.join(base, params), batch, model=spec.reward_model)
    return losses.value(
        values, batch.old_values, batch.returns, batch.mask, clip=spec.config.value_clip
    )


def ptx_loss(
    params: Any, batch: Any, key: Any, base: Any, teacher_heads: Any = (), *, spec: RunSpec
) -> losses.Loss:
    """Next-token loss of the policy on rows of documents or conversations (PPO-ptx)."""
    del teacher_heads
    return next_token.loss(spec.policy(params, base), batch, key, {}, model=spec.model)
