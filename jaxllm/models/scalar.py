"""A decoder with a scalar head in place of the vocabulary: the reward model and the critic."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import InputError
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig


def init(trunk: Any, config: ModelConfig, key: jax.Array) -> Any:
    """{"trunk", "head": {"kernel" [D], "bias" []}} on a copy of a decoder's parameters.

    The kernel is drawn from N(0, 1 / (D + 1)), the bias is 0 (Stiennon et al. 2020; Huang et al. 2024, detail 8).
    """
    kernel = jax.random.normal(key, (config.embed_dim,)) / jnp.sqrt(config.embed_dim + 1.0)
    return {
        "trunk": jax.tree.map(jnp.copy, trunk),
        "head": {"kernel": kernel, "bias": jnp.zeros(())},
    }


def axes(config: ModelConfig) -> Any:
    return {"trunk": transformer.axes(config), "head": {"kernel": ("norm",), "bias": ()}}


def abstract(config: ModelConfig) -> Any:
    return jax.eval_shape(
        lambda: init(transformer.init(config, jax.random.key(0)), config, jax.random.key(0))
    )


def apply(params: Any, config: ModelConfig, tokens, segment_ids, positions=None) -> jax.Array:
    """A value for every position: tokens, segment_ids int32[B, T] -> float32[B, T]."""
    return read(
        params["head"], transformer.apply(params["trunk"], config, tokens, segment_ids, positions)
    )


def read(head: Any, hidden: jax.Array) -> jax.Array:
    """The head's value float32[B, T] of hidden states [B, T, D]."""
    return hidden.astype(jnp.float32) @ head["kernel"] + head["bias"]


def last_value(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The value at each row's last real token: values float32[B, T], segment_ids int32[B, T] -> float32[B].

    Padding may stand on either side: with segments 0 1 1 1 0 the fourth place is read.
    """
    places = jnp.arange(values.shape[1], dtype=jnp.int32)[None]
    last = jnp.where(segment_ids > 0, places, -1).max(1, keepdims=True)
    return jnp.take_along_axis(values, jnp.maximum(last, 0), axis=1)[:, 0]


def score_rows(params: Any, config: ModelConfig, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Scores float32[N] of N rows of token ids, read at the last one of each. Raises InputError past the context."""
    longest = max(map(len, rows))
    if longest > config.max_length:
        raise InputError(
            f"reward model: {longest} tokens are more than its context of {config.max_length}; use shorter"
        )
    tokens, segments = (
        np.zeros((len(rows), min(-(-longest // 32) * 32, config.max_length)), np.int32)
        for _ in "ts"
    )
    for i, row in enumerate(rows):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    values = jax.jit(lambda p, t, s: last_value(apply(p, config, t, s), s))(
        params, tokens, segments
    )
    return np.asarray(values)
