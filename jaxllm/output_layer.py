"""The output layer: from hidden states to log-probabilities, with a gradient written by hand.

Shapes: B rows, T positions, D model width, V vocabulary.

With logits l = softcap(hidden @ head.T) / temperature, p = softmax(l) and t the target of a position,

    logprob = l_t - logsumexp(l)           its gradient by l_i:  [i = t] - p_i
    logsumexp(l)                                                 p_i
    entropy = -sum p log p                                       -p_i (log p_i + entropy)

so that the gradient of the logits follows from the logits and their logsumexp. What `jax.grad` derives instead goes back
through every reduction, in float32, and writes arrays of the size of the logits several times.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jaxllm.runtime.products import contract
from jaxllm.sharding import (
    constrain_scored,
    constrain_weights,
    in_blocks,
    memories,
    mesh_size,
    on_one_cpu,
)

# Logits of one block, float32 elements in one memory: 256 MiB. Larger batches are scored in more blocks.
_BLOCK_ELEMENTS = 1 << 26


class TokenStats(NamedTuple):
    """What losses need of the logits at every position, each float32[B, T]."""

    logprob: Array  # log p(target)
    logsumexp: Array  # log of the partition function
    entropy: Array  # in nats
    # log p of the most likely token; greedy decoding takes the target where logprob equals it. It has no gradient.
    top: Array


class _BlockStats(NamedTuple):
    """Statistics of one block of the vocabulary, each float32[B, T]."""

    top: Array  # the largest logit
    total: Array  # sum of exp(logits - top)
    weighted: Array  # sum of exp(logits - top) * (logits - top)
    target: Array  # the target's logit; 0 where the target is in another block


class Softmax(NamedTuple):
    """How the softmax is computed; the same for all positions."""

    temperature: float
    cap: float  # soft cap of the logits; 0: none
    count: int  # blocks of the vocabulary
    length: int  # rows of the head, with padding that makes all blocks equal


def token_logprobs(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    temperature: float = 1.0,
    cap: float = 0.0,
    block_elements: int = 0,
) -> TokenStats:
    """Log-probabilities of targets under softmax(softcap(hidden @ head.T, cap) / temperature).

    The vocabulary is processed in blocks whose logits are recomputed in the backward pass, so that [B, T, V] never
    exists. On a mesh each block of the head is gathered once per pass, and its gradient reduced once. A single block is
    not recomputed: its exponentials are kept in the dtype of `hidden`. This is the only code for log-probabilities:
    training, evaluation, the reference's KL and PPO's ratio all call it.

    hidden: [B, T, D]; head: float32[V, D]; targets: int32[B, T]; block_elements: most logits in a block over all devices,
    0: _BLOCK_ELEMENTS for each memory. Products are in the dtype of `hidden`, logits and all else in float32.
    """
    B, T, _ = hidden.shape
    softmax = softmax_in_blocks(B * T, head.shape[0], temperature, cap, block_elements)
    return _token_stats(constrain_scored(hidden), head, targets, softmax)


def softmax_in_blocks(
    num_rows: int, vocab_size: int, temperature: float, cap: float, block_elements: int = 0
) -> Softmax:
    """A softmax of so many rows of logits, in as many blocks of the vocabulary as memory asks for.

    block_elements: most logits in a block over all devices, 0: _BLOCK_ELEMENTS for each memory.
    """
    limit = block_elements or _BLOCK_ELEMENTS * memories()
    # The vocabulary is padded to `length` entries in `count` blocks.
    count, length = count_blocks(vocab_size, -(-num_rows * vocab_size // limit))
    return Softmax(temperature, cap, count, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_stats(hidden: Array, head: Array, targets: Array, softmax: Softmax) -> TokenStats:
    """`token_logprobs`, whose gradient is `_backward`."""
    if softmax.count == 1:
        return _at_once(hidden, head, targets, softmax)[0]

    def score(_: None, block: tuple[Array, Array]) -> tuple[None, _BlockStats]:
        weights, ids = block
        logits = logits_of(hidden, weights, ids, head.shape[0], softmax)
        return None, _block_stats(logits, ids, targets)[0]

    _, stats = jax.lax.scan(score, None, (cut(head, softmax), cut_ids(softmax)))
    return _combine(stats)


def _at_once(
    hidden: Array, head: Array, targets: Array, softmax: Softmax
) -> tuple[TokenStats, Array]:
    """Statistics of a vocabulary of one block, and exp(logits - their maximum), float32[B, T, V]."""
    ids = jnp.arange(head.shape[0], dtype=jnp.int32)
    logits = logits_of(hidden, head, ids, head.shape[0], softmax)
    stats, exponentials = _block_stats(logits, ids, targets)
    return _combine(jax.tree.map(lambda x: x[None], stats)), exponentials


def _forward(hidden: Any, head: Any, targets: Any, softmax: Softmax) -> tuple[TokenStats, Any]:
    """The statistics, and what `_backward` needs. Arguments are wrapped, since it asks for symbolic zeros."""
    hidden, head, targets = hidden.value, head.value, targets.value
    exponentials = None
    if softmax.count == 1:
        stats, exponentials = _at_once(hidden, head, targets, softmax)
        exponentials = exponentials.astype(hidden.dtype)
    else:
        stats = _token_stats(hidden, head, targets, softmax)
    return stats, (hidden, head, targets, stats, exponentials)


def _backward(softmax: Softmax, residuals: Any, gradient: TokenStats) -> tuple[Array, Array, None]:
    """Gradients of hidden and head, from those of the statistics, of which most are zero and known to be."""
    hidden, head, targets, stats, exponentials = residuals
    # Nearly every loss does without the gradient of the entropy and without a cap. Then p is all one needs of the logits.
    if exponentials is not None and isinstance(gradient.entropy, SymbolicZero) and not softmax.cap:
        p = _Probabilities(exponentials, jnp.exp(stats.top))
        d_hidden, d_head = _of_probabilities(p, hidden, head, targets, softmax, gradient)
        return d_hidden.astype(hidden.dtype), d_head, None

    def of_block(block: tuple[Array, Array]) -> tuple[Array, Array]:
        weights, ids = block
        logits = logits_of(hidden, weights, ids, head.shape[0], softmax)
        log_p = logits - stats.logsumexp[..., None]
        return _of_softmax(log_p, _is_target(ids, targets), stats, gradient), logits

    return *back_in_blocks(of_block, hidden, head, (cut_ids(softmax),), softmax), None


_token_stats.defvjp(_forward, _backward, symbolic_zeros=True)


class _Probabilities(NamedTuple):
    """p = exponentials * factor."""

    exponentials: Array  # [B, T, V], in the dtype of the hidden states
    factor: Array  # float32[B, T]


def _of_probabilities(
    p: _Probabilities,
    hidden: Array,
    head: Array,
    targets: Array,
    softmax: Softmax,
    gradient: TokenStats,
) -> tuple[Array, Array]:
    """Gradients of hidden and head from the probabilities, float32[B, T, D] and [V, D].

    The gradient of the logits is p a + b at the target, with numbers a and b of a position. Both products are linear in
    it, so that a goes to the smaller operand, and b to the target's row of the head: no array [B, T, V] is computed.
    """
    b = _given(gradient.logprob, p.factor) / softmax.temperature
    a = _given(gradient.logsumexp, p.factor) / softmax.temperature - b
    a = a * p.factor[..., None]
    if not on_one_cpu():
        # Elsewhere a fused product is as fast, and rows of a sharded head are slow to look up.
        ids = jnp.arange(head.shape[0], dtype=jnp.int32)
        d_logits = p.exponentials.astype(jnp.float32) * a
        d_logits = d_logits + jnp.where(_is_target(ids, targets), b, 0.0)
        return of_product(d_logits.astype(hidden.dtype), hidden, head)
    wide = hidden.astype(jnp.float32)
    d_hidden, d_head = of_product(p.exponentials, (wide * a).astype(hidden.dtype), head)
    d_hidden = d_hidden * a + head[targets] * b
    return d_hidden, d_head.at[targets].add(wide * b)


def _given(g: Any, like: Array) -> Array:
    """A gradient [B, T] that may be a symbolic zero, as float32[B, T, 1]."""
    return (jnp.zeros_like(like) if isinstance(g, SymbolicZero) else g)[..., None]


def _of_softmax(log_p: Array, is_target: Array, stats: TokenStats, gradient: TokenStats) -> Array:
    """The gradient of the logits, float32[B, T, V / count] as log_p and is_target; see the module's text."""
    p = jnp.exp(log_p)
    d_logprob = _given(gradient.logprob, stats.logprob)
    d_logits = p * (_given(gradient.logsumexp, stats.logprob) - d_logprob)
    if not isinstance(gradient.entropy, SymbolicZero):
        # 0 log 0 = 0: log p of padding is about -1e30, not -inf.
        d_logits = d_logits - p * (log_p + stats.entropy[..., None]) * gradient.entropy[..., None]
    return d_logits + jnp.where(is_target, d_logprob, 0.0)


def back_in_blocks(
    of_block: Callable[[Any], tuple[Array, Array]],
    hidden: Array,
    head: Array,
    beside: tuple[Array, ...],
    softmax: Softmax,
) -> tuple[Array, Array]:
    """Gradients of hidden [B, T, D] and head [V, D], from those of logits that are made again block by block.

    Args:
      of_block: (weights of a block, *its parts of `beside`) -> (gradient of its logits, the logits), float32[B, T, V / count]
        each. The logits are those of `logits_of`, and so is what the gradient is taken by.
      beside: arrays [count, ...].
    """

    def back(d_hidden: Array, block: Any) -> tuple[Array, Array]:
        d_logits, logits = of_block(block)
        d_logits = of_softcap(d_logits / softmax.temperature, logits, softmax)
        more, d_weights = of_product(d_logits.astype(hidden.dtype), hidden, block[0])
        return constrain_scored(d_hidden + more), d_weights

    # In float32, since it is a sum over blocks.
    zero = jnp.zeros(hidden.shape, jnp.float32)
    blocks, join = jax.vjp(lambda head: cut(head, softmax), head)
    d_hidden, d_blocks = jax.lax.scan(back, zero, (blocks, *beside))
    return d_hidden.astype(hidden.dtype), join(d_blocks)[0]


def of_softcap(d_logits: Array, logits: Array, softmax: Softmax) -> Array:
    """Back through cap * tanh(x / cap), whose derivative is 1 - tanh(x / cap)^2; logits: after cap and temperature."""
    if not softmax.cap:
        return d_logits
    # Clipped, since padding has logits far beyond the cap, and 0 * inf is NaN.
    tanh = jnp.clip(logits * softmax.temperature / softmax.cap, -1.0, 1.0)
    return d_logits * (1.0 - jnp.square(tanh))


def of_product(d_logits: Array, hidden: Array, weights: Array) -> tuple[Array, Array]:
    """Gradients of hidden, float32[B, T, D], and of weights, float32[V / count, D]."""
    d_hidden = contract(d_logits, weights.astype(hidden.dtype), ((2,), (0,)), float32_if_free=True)
    d_weights = contract(d_logits, hidden, ((0, 1), (0, 1)), float32_if_free=True)
    return d_hidden.astype(jnp.float32), d_weights.astype(weights.dtype)


def logits_of(
    hidden: Array, weights: Array, ids: Array, vocab_size: int, softmax: Softmax
) -> Array:
    """float32[B, T, V / count], of a block's weights [V / count, D] and token ids int32[V / count]."""
    logits = contract(hidden, weights.astype(hidden.dtype), ((2,), (1,)), dtype=jnp.float32)
    logits = softcap(logits, softmax.cap) / softmax.temperature
    if softmax.length > vocab_size:
        # Rows of padding get probability 0. Not -inf, of which a block of padding alone would make NaN.
        logits = jnp.where(ids[None, None] < vocab_size, logits, -1e30)
    return logits


def _is_target(ids: Array, targets: Array) -> Array:
    """bool[B, T, V / count]."""
    return ids[None, None] == targets[..., None]


def cut(head: Array, softmax: Softmax) -> Array:
    """The head in blocks, [count, V / count, D], with padding at the end."""
    padding = softmax.length - head.shape[0]
    head = constrain_weights(jnp.pad(head, ((0, padding), (0, 0))), "vocab", "embed")
    return in_blocks(head, 0, softmax.count)


def cut_ids(softmax: Softmax) -> Array:
    """The token ids of the rows of each block, int32[count, V / count]."""
    return in_blocks(jnp.arange(softmax.length, dtype=jnp.int32), 0, softmax.count)


def count_blocks(vocab_size: int, wanted: int) -> tuple[int, int]:
    """(number of blocks: as wanted, or up to twice as many if those divide the vocabulary evenly; padded vocabulary)."""
    shards = mesh_size("tensor")
    wanted = min(max(wanted, 1), vocab_size)
    even = (n for n in range(wanted, 2 * wanted + 1) if vocab_size % (n * shards) == 0)
    count = next(even, wanted)
    return count, -(-vocab_size // (count * shards)) * count * shards


def _target_logits(logits: Array, ids: Array, targets: Array) -> Array:
    """The logit of each target, float32[B, T]; 0 where it is in another block."""
    if not on_one_cpu():
        return jnp.where(_is_target(ids, targets), logits, 0.0).sum(-1)
    # A lookup instead of a pass over all logits. The ids of a block on one device are consecutive.
    row = targets - ids[0]
    inside = (row >= 0) & (row < ids.size)
    row = jnp.clip(row, 0, ids.size - 1)
    found = jnp.take_along_axis(logits, row[..., None], axis=-1)[..., 0]
    return jnp.where(inside, found, 0.0)


def _block_stats(logits: Array, ids: Array, targets: Array) -> tuple[_BlockStats, Array]:
    """The statistics of a block, and exp(logits - top); logits: float32[B, T, V / count], ids: their tokens."""
    top = logits.max(-1)
    below = logits - top[..., None]  # at most 0, so that exp cannot overflow
    exp = jnp.exp(below)
    stats = _BlockStats(
        top=top,
        total=exp.sum(-1),
        weighted=(exp * below).sum(-1),
        target=_target_logits(logits, ids, targets),
    )
    return stats, exp


def _combine(blocks: _BlockStats) -> TokenStats:
    """Statistics of the softmax over all blocks, from arrays [count, B, T].

    With z the logits less their maximum: entropy = log sum exp(z) - sum exp(z) z / sum exp(z).
    """
    top = blocks.top.max(0)
    # Each block's sums are relative to its own largest logit; `share` makes them relative to the largest of all.
    below = blocks.top - top[None]
    share = jnp.exp(below)
    total = (share * blocks.total).sum(0)
    mean = (share * (blocks.weighted + blocks.total * below)).sum(0) / total
    log_total = jnp.log(total)
    target = blocks.target.sum(0)
    return TokenStats(
        logprob=target - top - log_total,
        logsumexp=log_total + top,
        entropy=log_total - mean,
        top=-log_total,
    )


def softcap(logits: Array, cap: float) -> Array:
    """cap * tanh(logits / cap) (Gemma 2, section 2), for logits of any shape; cap 0: unchanged."""
    return cap * jnp.tanh(logits / cap) if cap else logits
