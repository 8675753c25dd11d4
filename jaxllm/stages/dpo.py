"""DPO (Rafailov et al. 2023): the policy itself as the reward model, r = beta * log(policy / reference), on rankings."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import losses
from jaxllm.config import InputError
from jaxllm.metrics import LoggingConfig
from jaxllm.models import lora, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.stages.preference import PreferenceConfig, train_on_rankings
from jaxllm.workspace import Workspace


def run(workspace: Workspace, config: PreferenceConfig, logging: LoggingConfig) -> dict[str, Any]:
    """Train a policy on the rankings; returns how often its implicit reward orders held-out pairs right.

    All pairs of K responses, or the Plackett-Luce likelihood of their order (Rafailov et al. 2023, appendix A.3).
    """
    if config.loss == "regression":
        raise InputError("dpo.loss: regression needs a reward model; set it to pairwise or plackett_luce")
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # the reference stays
    return train_on_rankings(
        workspace,
        "dpo",
        config,
        logging,
        kind="policy",
        init=lambda ref, model, key: lora.init(config.lora, copy(ref), key),
        frozen=lambda ref: {"base": lora.frozen(config.lora, ref), "ref": ref},
        scores=functools.partial(implicit_rewards, beta=config.beta),
    )


def implicit_rewards(params: Any, batch: Any, *, base: Any, ref: Any, model: ModelConfig, beta: float) -> jax.Array:
    """beta * (log policy - log reference) of each reply, float32[B, K] (Rafailov et al. 2023, eq. 5)."""
    policy = reply_logprobs(lora.join(base, params), batch, model)
    return beta * (policy - jax.lax.stop_gradient(reply_logprobs(ref, batch, model)))


def reply_logprobs(params: Any, batch: Any, model: ModelConfig) -> jax.Array:
    """Log-probability float32[B, K] of each reply, its end of turn included, summed over tokens."""
    B, K, T = batch["tokens"].shape
    tokens, segments, mask = (batch[name].reshape(B * K, T) for name in ("tokens", "segment_ids", "loss_mask"))
    targets, on = losses.next_token_targets(tokens, segments, mask)
    hidden = transformer.apply(params, model, tokens, segments)
    logprobs = losses.token_logprobs(hidden, transformer.head(params), targets).logprob
    return jnp.where(on, logprobs, 0.0).sum(1).reshape(B, K)
