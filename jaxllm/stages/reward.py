"""Reward model: the fine-tuned model with a scalar head, trained on the rankings of K responses per prompt."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import train
from jaxllm.metrics import LoggingConfig
from jaxllm.models import lora, scalar
from jaxllm.models.config import ModelConfig
from jaxllm.stages.preference import PreferenceConfig, train_on_rankings
from jaxllm.workspace import Workspace


def run(workspace: Workspace, config: PreferenceConfig, logging: LoggingConfig) -> dict[str, Any]:
    """Train and return held-out pairwise accuracy, top-1 accuracy and calibration error."""

    def init(policy: Any, model: ModelConfig, key: jax.Array) -> Any:
        head, adapters = jax.random.split(key)
        return lora.init(config.lora, scalar.init(policy, model, head), adapters)

    return train_on_rankings(
        workspace,
        "reward",
        config,
        logging,
        kind="reward",
        init=init,
        frozen=lambda policy: {"base": lora.frozen(config.lora, {"trunk": policy})},
        scores=lambda params, batch, base, model: scores(lora.join(base, params), batch, model),
        finalize=functools.partial(normalise, how=config.normalise),
    )


def scores(params: Any, batch: Any, model: ModelConfig) -> jax.Array:
    """Scores float32[B, K] of a batch {tokens, segment_ids int32[B, K, T]}: K rows of one forward."""
    B, K, T = batch["tokens"].shape
    tokens, segment_ids = (batch[name].reshape(B * K, T) for name in ("tokens", "segment_ids"))
    values = scalar.apply(params, model, tokens, segment_ids)
    return scalar.last_value(values, segment_ids).reshape(B, K)


def normalise(state: train.TrainState, scores: np.ndarray, how: str) -> train.TrainState:
    """Shift the scores to mean zero (Ouyang et al. 2022, section 3.5), "unit": and scale them to variance one.

    Both keep the order of any two responses; "none" changes nothing. scores float[N]: of the training responses.
    """
    head = state.params["head"]
    shift = 0.0 if how == "none" else float(scores.mean())
    gain = 1.0 / max(float(scores.std()), 1e-6) if how == "unit" else 1.0
    bias = (head["bias"] - jnp.float32(shift)) * jnp.float32(gain)
    new = {"kernel": head["kernel"] * jnp.float32(gain), "bias": bias}
    return state._replace(params={**state.params, "head": new})
