"""How the next token of every row is drawn, where each row has rules of its own.

Shapes: R rows, V vocabulary, D model width, A alternatives.
"""

import functools
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


class Asked(NamedTuple):
    """What any row asks for, bool[] each, where programs are compiled for all kinds of rows."""

    rules: Any  # filters or penalties
    alternatives: Any


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
    asked: Asked | None = None,
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
      asked: decides on the device what is computed, if given; then there is no `common`.
    """
    logits = next_logits(hidden, unembed, softcap)
    logprobs = _logprobs(logits, rules)
    choose = functools.partial(_choose, rules=rules, keys=keys, number=number)
    by_rules = functools.partial(choose, history=history)
    freely = functools.partial(choose, history=None, common=_FREE, some_greedy=True)
    if asked is None:
        token = by_rules(logits, logprobs, common=common)
        others = likeliest(logprobs, num_alternatives)
    else:
        token = jax.lax.cond(asked.rules, by_rules, freely, logits, logprobs)
        others = _likeliest_if(asked.alternatives, logprobs, num_alternatives)
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
    return Drawn(token, logprob, *others)


_FREE = SamplingConfig(max_new_tokens=1)


def _choose(
    logits: jax.Array,
    logprobs: jax.Array,
    *,
    rules: RowRules,
    keys: jax.Array,
    number: jax.Array,
    history: History | None,
    common: SamplingConfig | None = None,
    some_greedy: bool = False,
) -> jax.Array:
    """A token int32[R] for each row, from logits and log-probabilities float32[R, V].

    history: None where nothing is penalized. some_greedy: whether rows may be greedy where `common` is not.
    """
    likely = logprobs
    if history is not None and history.tokens.shape[1]:
        logits = _penalize(logits, history, rules)
        likely = _logprobs(logits, rules)
    if common is not None and common.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Computed once: XLA may compute it again for a comparison, and round it another way. A bound that was found among these
    # numbers would then leave out the very token that it was taken from.
    likely = jax.lax.optimization_barrier(likely)
    if common is None:
        kept = _keep_likely(likely, rules)
    else:
        kept = keep_likely(likely, common.top_k, common.top_p, common.min_p)
    token = inverse_transform(jnp.exp(kept), uniform_numbers(keys, number))
    if common is None or some_greedy:
        token = jnp.where(rules.temperature == 0, jnp.argmax(logits, axis=-1), token)
    return token.astype(jnp.int32)


def _logprobs(logits: jax.Array, rules: RowRules) -> jax.Array:
    """Log-probabilities float32[R, V] at the rows' temperatures; of greedy rows at temperature 1."""
    divisor = jnp.where(rules.temperature == 0, 1.0, rules.temperature)
    return jax.nn.log_softmax(logits / divisor[:, None], axis=-1)


def _likeliest_if(asked: jax.Array, logprobs: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`likeliest` if somebody asked, bool[]; zeros if not."""
    shape = (len(logprobs), count)
    return jax.lax.cond(
        asked,
        lambda: likeliest(logprobs, count),
        lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape)),
    )


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
