"""A decoder with a scalar head instead of the vocabulary: the reward model and the critic."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import InputError
from jaxllm.models import scaling, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.parameters import Axes

_LENGTH_STEP = 32  # rows to score are padded to a multiple of it, so that few lengths are compiled


def init(trunk: Any, config: ModelConfig, key: jax.Array) -> Any:
    """{"trunk", "head": {"kernel" float32[D], "bias" float32[]}} on a copy of a decoder's parameters.

    The kernel is sampled from N(0, 1 / (D + 1)), the bias is 0 (Stiennon et al. 2020; Huang et al. 2024, detail 8). With
    `model.scaling` this D is the base's, and the rest is that of an output matrix.
    """
    width = config.embed_dim / config.width_growth
    kernel = jax.random.normal(key, (config.embed_dim,)) / jnp.sqrt(width + 1.0)
    kernel = kernel * scaling.of_scalar_head(config).init
    return {
        # A copy, so that the decoder's own parameters survive the donation of these.
        "trunk": jax.tree.map(jnp.copy, trunk),
        "head": {"kernel": kernel, "bias": jnp.zeros(())},
    }


def axes(config: ModelConfig) -> Any:
    """The `Axes` of every parameter, a tree like that of `init`."""
    # "norm", which no rule shards: the head is small.
    scale = scaling.of_scalar_head(config)
    head = {"kernel": Axes(("norm",), decays=True, scale=scale), "bias": Axes((), decays=False)}
    return {"trunk": transformer.axes(config), "head": head}


def abstract(config: ModelConfig) -> Any:
    """Shapes and dtypes of the parameters, without computing them."""

    def create() -> Any:
        return init(transformer.init(config, jax.random.key(0)), config, jax.random.key(0))

    return jax.eval_shape(create)


def apply(
    params: Any,
    config: ModelConfig,
    tokens: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array | None = None,
) -> jax.Array:
    """A value for every position: tokens, segment_ids, positions int32[B, T] -> float32[B, T]."""
    hidden = transformer.apply(params["trunk"], config, tokens, segment_ids, positions)
    return read(params["head"], hidden)


def read(head: Any, hidden: jax.Array) -> jax.Array:
    """The head's values float32[B, T] of hidden states [B, T, D]."""
    # In float32: differences of scores are what counts.
    return hidden.astype(jnp.float32) @ head["kernel"] + head["bias"]


def last_value(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The value at each row's last real token: values float32[B, T], segment_ids int32[B, T] -> float32[B].

    Padding may be on either side:

        segments   0 1 1 1 0
        read             ^
    """
    positions = jnp.arange(values.shape[1], dtype=jnp.int32)[None]
    # -1 for a row of padding only, which then reads position 0.
    last = jnp.where(segment_ids > 0, positions, -1).max(1, keepdims=True)
    return jnp.take_along_axis(values, jnp.maximum(last, 0), axis=1)[:, 0]


def score_rows(params: Any, config: ModelConfig, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Scores float32[N] of N rows of token ids, read at the last token of each.

    Raises:
      InputError: a row is longer than the context.
    """
    longest = max(map(len, rows))
    if longest > config.max_length:
        raise InputError(
            f"reward model: {longest} tokens exceed its context of {config.max_length}; shorten the prompt or the response"
        )
    # Right-padded; padding never beyond the context, which a learned table of positions ends at.
    length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, config.max_length)
    tokens = np.zeros((len(rows), length), np.int32)
    segment_ids = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        segment_ids[i, : len(row)] = 1

    @jax.jit
    def score(params: Any, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        return last_value(apply(params, config, tokens, segment_ids), segment_ids)

    return np.asarray(score(params, tokens, segment_ids))
