"""DPO (Rafailov et al. 2023): the policy itself as the reward model, r = beta * log(policy / reference), on rankings."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import losses, train
from jaxllm.config import InputError
from jaxllm.metrics import LoggingConfig
from jaxllm.models import lora, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.stages.preference import PreferenceConfig, load_rankings, train_on_rankings
from jaxllm.workspace import Workspace, describe_model, load_model


def run(workspace: Workspace, config: PreferenceConfig, logging: LoggingConfig) -> dict[str, Any]:
    """Train a policy on the rankings; returns how often its implicit reward orders held-out pairs right.

    All pairs of K responses, or the Plackett-Luce likelihood of their order (Rafailov et al. 2023, appendix A.3).
    """
    if config.loss == "regression":
        raise InputError("dpo.loss: regression needs a reward model; set it to pairwise or plackett_luce")
    mesh, source = workspace.mesh, config.init_from or str(workspace.stage_dir("sft"))
    if not config.init_from:
        workspace.require("sft", "dpo")
    ref, model = load_model(source, mesh)
    ref = lora.merge(ref)
    shapes, axes = lora.trained(config.lora, transformer.abstract(model), transformer.axes(model))

    def init_params(placed: train.Placed) -> Any:
        key = jax.random.fold_in(jax.random.key(workspace.seed), 1)
        start = lambda ref: lora.init(config.lora, jax.tree.map(jnp.copy, ref), key)  # a copy: the reference stays
        return jax.jit(start, out_shardings=placed.shardings.params)(ref)

    describe_model(workspace.stage_dir("dpo"), model, "policy", ("params",), config.lora, source)
    return train_on_rankings(
        workspace,
        "dpo",
        config,
        logging,
        rankings=load_rankings(workspace, "dpo", config, model),
        model=model,
        placed=lambda tx: train.place_state(mesh, shapes, axes, tx),
        init_params=init_params,
        scores=functools.partial(implicit_rewards, model=model, beta=config.beta),
        frozen={"base": lora.frozen(config.lora, ref), "ref": ref},
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
    logprobs = losses.token_logprobs(hidden, transformer.head(params), targets, cap=model.logit_softcap).logprob
    return jnp.where(on, logprobs, 0.0).sum(1).reshape(B, K)
