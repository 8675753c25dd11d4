"""Soft targets: a teacher's most likely tokens at every position, and a student's divergence from them.

Of a teacher's distribution t only K tokens are kept. All others are one outcome, "another token", which has the
probability r = 1 - sum_k t_k, and 1 - sum_k s_k in the student's distribution s. The divergence is the KL of these K + 1
outcomes,

    sum_k t_k log(t_k / s_k)  +  r log(r / (1 - sum_k s_k))

which by the log sum inequality is at most KL(t || s), and equal to it where all tokens are kept. Learning from a teacher's
probabilities is from Hinton et al. 2015, "Distilling the knowledge in a neural network"; this is without their temperature,
which would need the logits of the tokens that are not kept.

The gradient by a logit of the student is s_i sum_j q_j - q_i, with

    q_i = t_i                        of a token that is kept
    q_i = r s_i / (1 - sum_k s_k)    of another one: r is spread as the student spreads its own

Logits are made in blocks of the vocabulary, as in `output_layer`. Shapes: B rows, T positions, D model width, V vocabulary,
K tokens kept.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.output_layer import (
    Softmax,
    back_in_blocks,
    cut,
    cut_ids,
    logits_of,
    softmax_in_blocks,
)
from jaxllm.sharding import (
    ACT_RULES,
    constrain_scored,
    mesh_size,
    on_each_device,
    scored_rows,
    spec,
)

# The logit of a token that is left out. Not -inf, of which a block without other tokens would make NaN.
_LEFT_OUT = -1e30


class SoftTargets(NamedTuple):
    """What is kept of a teacher's distribution at every position."""

    ids: Array  # int32[B, T, K], its most likely tokens
    logprobs: Array  # float32[B, T, K], their log-probabilities


class SoftStats(NamedTuple):
    """What losses need of the student's logits at every position, each float32[B, T]."""

    logprob: Array  # log p(target)
    logsumexp: Array  # log of the partition function
    divergence: Array  # from the soft targets, in nats


def top_tokens(
    hidden: Array, head: Array, top_k: int, *, cap: float = 0.0, block_elements: int = 0
) -> SoftTargets:
    """The `top_k` most likely tokens under softmax(softcap(hidden @ head.T, cap)), the likeliest first.

    hidden: [B, T, D]; head: float32[V, D]; top_k: at most V; block_elements: as in `output_layer.token_logprobs`. Arrays
    [B, T, V] never exist where they would be large.
    """
    hidden = constrain_scored(hidden)
    softmax = _softmax(hidden, head, cap, block_elements)
    of_block, of_both = _choosers(hidden.shape[0], top_k)

    def choose(best: SoftTargets, block: tuple[Array, Array]) -> tuple[SoftTargets, Array]:
        weights, ids = block
        logits = logits_of(hidden, weights, ids, head.shape[0], softmax)
        # The best of this block against the best of those before it.
        best = of_both(best, of_block(logits, ids))
        return best, jax.nn.logsumexp(logits, axis=-1)

    shape = (*hidden.shape[:2], top_k)
    none = SoftTargets(jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf))
    best, parts = jax.lax.scan(choose, none, (cut(head, softmax), cut_ids(softmax)))
    logsumexp = jax.nn.logsumexp(parts, axis=0)
    return SoftTargets(best.ids, best.logprobs - logsumexp[..., None])


def _choosers(num_rows: int, top_k: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(logits, ids of a block -> its likeliest tokens; two sets of tokens -> the likeliest of both), by their logits.

    Each device chooses among the logits it has: XLA would gather those of all before it compares any.
    """

    def of_block(logits: Array, ids: Array) -> SoftTargets:
        values, columns = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
        return SoftTargets(ids[columns], values)

    def of_both(one: SoftTargets, other: SoftTargets) -> SoftTargets:
        values = jnp.concatenate([one.logprobs, other.logprobs], axis=-1)
        ids = jnp.concatenate([one.ids, other.ids], axis=-1)
        values, order = jax.lax.top_k(values, top_k)
        return SoftTargets(jnp.take_along_axis(ids, order, axis=-1), values)

    rows = scored_rows(num_rows)
    sharded, whole = (spec((rows, "seq", last), ACT_RULES) for last in ("vocab", None))
    return (
        on_each_device(of_block, (sharded, spec(("vocab",), ACT_RULES)), sharded),
        on_each_device(of_both, whole, whole),
    )


def soft_stats(
    hidden: Array,
    head: Array,
    targets: Array,
    kept: SoftTargets,
    *,
    cap: float = 0.0,
    block_elements: int = 0,
) -> SoftStats:
    """The divergence of softmax(softcap(hidden @ head.T, cap)) from soft targets, and the statistics of the targets.

    hidden: [B, T, D]; head: float32[V, D]; targets: int32[B, T]; kept: of a teacher with the same vocabulary, different
    tokens at each position; block_elements: as in `output_layer.token_logprobs`. The vocabulary is processed in blocks,
    whose logits are recomputed in the backward pass. hidden and head have gradients, the soft targets have none.
    """
    hidden = constrain_scored(hidden)
    softmax = _softmax(hidden, head, cap, block_elements)
    return _soft_stats(hidden, head, targets, kept, softmax)


def _softmax(hidden: Array, head: Array, cap: float, block_elements: int) -> Softmax:
    B, T, _ = hidden.shape
    # Logits and what is made of them live at the same time.
    return softmax_in_blocks(2 * B * T, head.shape[0], 1.0, cap, block_elements)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _soft_stats(
    hidden: Array, head: Array, targets: Array, kept: SoftTargets, softmax: Softmax
) -> SoftStats:
    """`soft_stats`, whose gradient is `_backward`."""
    return _forward(hidden, head, targets, kept, softmax)[0]


def _forward(
    hidden: Array, head: Array, targets: Array, kept: SoftTargets, softmax: Softmax
) -> tuple[SoftStats, Any]:
    """The statistics, and what `_backward` needs."""

    def score(found: Array, block: Any) -> tuple[Array, tuple[Array, Array]]:
        columns, logits, others = _logits(hidden, head, targets, kept, block, softmax)
        # Each token is in one block, and 0 in the others.
        found = found + jnp.take_along_axis(logits, columns, axis=-1, mode="fill", fill_value=0.0)
        return found, (jax.nn.logsumexp(logits, axis=-1), jax.nn.logsumexp(others, axis=-1))

    zero = jnp.zeros((*targets.shape, kept.ids.shape[-1] + 1))
    found, parts = jax.lax.scan(score, zero, _blocks(head, softmax))
    logsumexp, of_others = (jax.nn.logsumexp(part, axis=0) for part in parts)
    log_s = found - logsumexp[..., None]
    probabilities, remainder = _outcomes(kept, head.shape[0])
    divergence = (probabilities * (kept.logprobs - log_s[..., :-1])).sum(-1)
    # x log x is 0 at 0.
    log_remainder = jnp.log(jnp.where(remainder > 0, remainder, 1.0))
    rest = remainder * (log_remainder - (of_others - logsumexp))
    stats = SoftStats(log_s[..., -1], logsumexp, divergence + rest)
    return stats, (hidden, head, targets, kept, logsumexp, of_others)


def _backward(
    softmax: Softmax, residuals: Any, gradient: SoftStats
) -> tuple[Array, Array, None, None]:
    """Gradients of hidden and head; see the module's text."""
    hidden, head, targets, kept, logsumexp, of_others = residuals
    probabilities, remainder = _outcomes(kept, head.shape[0])
    # Of every token by its probability, of the others by their share of the remainder, of some tokens themselves.
    of_all = gradient.divergence * (probabilities.sum(-1) + remainder)
    of_all = of_all - gradient.logprob + gradient.logsumexp
    of_each = -gradient.divergence[..., None] * probabilities
    of_each = jnp.concatenate([of_each, gradient.logprob[..., None]], axis=-1)

    def of_block(block: Any) -> tuple[Array, Array]:
        columns, logits, others = _logits(hidden, head, targets, kept, block, softmax)
        share = jnp.exp(others - of_others[..., None])
        d_logits = of_all[..., None] * jnp.exp(logits - logsumexp[..., None])
        d_logits = d_logits - (gradient.divergence * remainder)[..., None] * share
        return _add(d_logits, columns, of_each), logits

    _, *beside = _blocks(head, softmax)
    return *back_in_blocks(of_block, hidden, head, tuple(beside), softmax), None, None


_soft_stats.defvjp(_forward, _backward)


def _outcomes(kept: SoftTargets, vocab_size: int) -> tuple[Array, Array]:
    """The teacher's probabilities of the kept tokens, float32[B, T, K], and of another token, float32[B, T]."""
    probabilities = jnp.exp(kept.logprobs)
    # Where nothing is left but rounding, it may be below 0. Above 0 it is as harmless as it is small, unless there is no
    # other token: then the student's probability of one is 0.
    remainder = jnp.maximum(1.0 - probabilities.sum(-1), 0.0)
    all_kept = kept.ids.shape[-1] == vocab_size
    return probabilities, jnp.zeros_like(remainder) if all_kept else remainder


def _blocks(head: Array, softmax: Softmax) -> tuple[Array, Array, Array]:
    """The head, the token ids and the numbers of the blocks, [count, ...] each."""
    return cut(head, softmax), cut_ids(softmax), jnp.arange(softmax.count, dtype=jnp.int32)


def _logits(
    hidden: Array, head: Array, targets: Array, kept: SoftTargets, block: Any, softmax: Softmax
) -> tuple[Array, Array, Array]:
    """(columns of the kept tokens and the target, logits, logits without those of the kept tokens) in a block."""
    weights, ids, number = block
    logits = logits_of(hidden, weights, ids, head.shape[0], softmax)
    asked = jnp.concatenate([kept.ids, targets[..., None]], axis=-1)
    columns = _columns(asked, number, softmax)
    return columns, logits, _set(logits, columns[..., :-1], _LEFT_OUT)


def _columns(ids: Array, number: Array, softmax: Softmax) -> Array:
    """Where tokens are in block `number` of `output_layer.cut`; beyond its end where they are in another block."""
    on_device = softmax.length // mesh_size("tensor")
    width = on_device // softmax.count
    device, position = ids // on_device, ids % on_device
    # A block has a share of what every device holds (`sharding.in_blocks`).
    columns = device * width + position % width
    return jnp.where(position // width == number, columns, width * mesh_size("tensor"))


def _set(x: Array, columns: Array, value: float) -> Array:
    """x float32[B, T, N] with a value at columns int32[B, T, K] of its last dimension; columns beyond its end are none."""

    def in_row(row: Array, at: Array) -> Array:
        return row.at[at].set(value, mode="drop")

    return jax.vmap(jax.vmap(in_row))(x, columns)


def _add(x: Array, columns: Array, values: Array) -> Array:
    """As `_set`, with values float32[B, T, K] added to what is there."""

    def in_row(row: Array, at: Array, more: Array) -> Array:
        return row.at[at].add(more, mode="drop")

    return jax.vmap(jax.vmap(in_row))(x, columns, values)
