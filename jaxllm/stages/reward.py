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
from jaxllm.stages.preference import PreferenceConfig, load_rankings, train_on_rankings
from jaxllm.workspace import Workspace, describe_model, load_model


def run(workspace: Workspace, config: PreferenceConfig, logging: LoggingConfig) -> dict[str, Any]:
    """Train and return held-out pairwise accuracy, top-1 accuracy and calibration error."""
    mesh, source = workspace.mesh, config.init_from or str(workspace.stage_dir("sft"))
    if not config.init_from:
        workspace.require("sft", "reward")
    trunk, model = load_model(source, mesh)
    trunk = lora.merge(trunk)
    shapes, axes = lora.trained(config.lora, scalar.abstract(model), scalar.axes(model))

    def init_params(placed: train.Placed) -> Any:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(workspace.seed), 1))
        make = lambda trunk: lora.init(config.lora, scalar.init(trunk, model, keys[0]), keys[1])
        return jax.jit(make, out_shardings=placed.shardings.params)(trunk)

    describe_model(workspace.stage_dir("reward"), model, "reward", ("params",), config.lora, source)
    return train_on_rankings(
        workspace,
        "reward",
        config,
        logging,
        rankings=load_rankings(workspace, "reward", config, model),
        model=model,
        placed=lambda tx: train.place_state(mesh, shapes, axes, tx),
        init_params=init_params,
        scores=lambda params, batch, base: scores(lora.join(base, params), batch, model),
        frozen={"base": lora.frozen(config.lora, {"trunk": trunk})},
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
