"""How the next token of every row is drawn, where each row has rules of its own.

Shapes: R rows, V vocabulary, D model width, A alternatives.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.request import Alternative, Draw
from jaxllm.engine.sampling import (
    inverse_transform,
    keep_likely,
    next_logits,
    uniform_numbers,
)


class RowRules(NamedTuple):
    """`SamplingConfig` of each row, as arrays [R]."""

    temperature: Any  # float32; 0: greedy
    top_k: Any  # int32; V: all
    top_p: Any  # float32
    min_p: Any  # float32
    repetition: Any  # float32
    presence: Any  # float32
    frequency: Any  # float32


class History(NamedTuple):
    """The tokens of each row so far, where some of them are penalized."""

    tokens: Any  # int32[R, H], by their position; -1: none. H is 0 if no row has a penalty
    num_prompt: Any  # int32[R]: how many of them are the prompt's


class Drawn(NamedTuple):
    """What `draw` returns."""

    token: jax.Array  # int32[R]
    logprob: jax.Array  # float32[R]: at the temperature, before tokens are left out
    alternatives: jax.Array  # int32[R, A]: the likeliest tokens
    alternative_logprobs: jax.Array  # float32[R, A]


def draw_of(drawn: Drawn, index: int, num_alternatives: int) -> Draw:
    """One of the tokens in arrays on the host, [any, ...], with the first of its alternatives."""
    alternatives = zip(
        drawn.alternatives[index, :num_alternatives].tolist(),
        drawn.alternative_logprobs[index, :num_alternatives].tolist(),
        strict=True,
    )
    return Draw(
        int(drawn.token[index]),
        float(drawn.logprob[index]),
        tuple(Alternative(*pair) for pair in alternatives),
    )


def row_rules(configs: Sequence[SamplingConfig | None], vocab_size: int) -> RowRules:
    """The rules of rows; None: an empty row."""

    # What an empty row draws is dropped.
    rules = [config or SamplingConfig() for config in configs]

    def column(dtype: type, value_of: Callable[[SamplingConfig], float]) -> np.ndarray:
        return np.array([value_of(config) for config in rules], dtype)

    return RowRules(
        column(np.float32, lambda c: 0.0 if c.greedy else c.temperature),
        column(np.int32, lambda c: c.top_k or vocab_size),
        column(np.float32, lambda c: c.top_p),
        column(np.float32, lambda c: c.min_p),
        column(np.float32, lambda c: c.repetition_penalty),
        column(np.float32, lambda c: c.presence_penalty),
        column(np.float32, lambda c: c.frequency_penalty),
    )


def draw(
    hidden: jax.Array,
    keys: jax.Array,
    number: jax.Array,
    unembed: jax.Array,
    softcap: float,
    rules: RowRules,
    history: History,
    common: SamplingConfig | None,
    num_alternatives: int = 0,
    some_greedy: bool = False,
) -> Drawn:
    """Draws a token for each row.

    Args:
      hidden: [R, D] hidden states.
      keys: of the rows, [R].
      number: int32[R], number of the token in its response.
      unembed: [D, V] output matrix.
      softcap: of the logits; 0: none.
      rules: of the rows.
      history: of the rows.
      common: the settings that all rows share, if they do: then nothing is computed that they do not need.
      num_alternatives: how many of the likeliest tokens are returned.
      some_greedy: whether rows may have a temperature of 0 where `common` has not.
    """
    logits = next_logits(hidden, unembed, softcap)
    is_greedy = rules.temperature == 0
    divisor = jnp.where(is_greedy, 1.0, rules.temperature)
    logprobs = likely = jax.nn.log_softmax(logits / divisor[:, None], axis=-1)
    if history.tokens.shape[1]:
        logits = _penalize(logits, history, rules)
        likely = jax.nn.log_softmax(logits / divisor[:, None], axis=-1)
    # Computed once: XLA may compute it again for a comparison, and round it another way. A bound that was found among these
    # numbers would then leave out the very token that it was taken from.
    likely = jax.lax.optimization_barrier(likely)
    if common is not None and common.greedy:
        token = jnp.argmax(logits, axis=-1)
    else:
        if common is None:
            kept = _keep_likely(likely, rules)
        else:
            kept = keep_likely(likely, common.top_k, common.top_p, common.min_p)
        token = inverse_transform(jnp.exp(kept), uniform_numbers(keys, number))
        if common is None or some_greedy:
            token = jnp.where(is_greedy, jnp.argmax(logits, axis=-1), token)
    token = token.astype(jnp.int32)
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
    return Drawn(token, logprob, *likeliest(logprobs, num_alternatives))


def _penalize(logits: jax.Array, history: History, rules: RowRules) -> jax.Array:
    """Logits float32[R, V] with the penalties for tokens that a row has already.

    Repetition: Keskar et al. 2019, section 4.1, with the sign of the logit heeded. Presence and frequency count the
    response alone, as in OpenAI's interface.
    """
    R, V = logits.shape
    rows = jnp.arange(R)[:, None]
    tokens = history.tokens
    # Positions without a token count for one that does not exist.
    column = jnp.where(tokens < 0, V, tokens)
    is_response = jnp.arange(tokens.shape[1])[None] >= history.num_prompt[:, None]
    nothing = jnp.zeros((R, V + 1))
    seen = nothing.at[rows, column].set(1.0)[:, :V] > 0
    count = nothing.at[rows, column].add(is_response.astype(jnp.float32))[:, :V]
    factor = rules.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(seen, repeated, logits)
    return (
        logits - rules.presence[:, None] * jnp.minimum(count, 1) - rules.frequency[:, None] * count
    )


def likeliest(logprobs: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens int32[R, count], and their log-probabilities."""
    if not count:  # XLA would sort the vocabulary for nothing
        return jnp.zeros((len(logprobs), 0), jnp.int32), jnp.zeros((len(logprobs), 0))
    values, ids = jax.lax.top_k(logprobs, count)
    return ids.astype(jnp.int32), values


def _keep_likely(logprobs: jax.Array, rules: RowRules) -> jax.Array:
    """`keep_likely` with rules of its own for each row of float32[R, V]."""
    ordered = -jnp.sort(-logprobs, axis=-1)
    last = jnp.clip(rules.top_k - 1, 0, logprobs.shape[-1] - 1)
    floor = jnp.take_along_axis(ordered, last[:, None], axis=-1)
    kept = jnp.where(logprobs < floor, -jnp.inf, logprobs)
    ordered = jnp.where(ordered < floor, -jnp.inf, ordered)
    # The nucleus, among those that top-k has left.
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    count = (before < rules.top_p[:, None]).astype(jnp.int32).sum(-1, keepdims=True)
    floor = jnp.take_along_axis(ordered, jnp.maximum(count - 1, 0), axis=-1)
    kept = jnp.where((rules.top_p < 1)[:, None] & (kept < floor), -jnp.inf, kept)
    floor = ordered[:, :1] + jnp.log(rules.min_p)[:, None]
    return jnp.where(kept < floor, -jnp.inf, kept)
