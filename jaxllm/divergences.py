"""Divergences of a student from a teacher over the whole vocabulary, in blocks, with a gradient written by hand.

Shapes: B rows, T positions, D model width, V vocabulary. With s and t the two softmaxes at a position, each divergence is
a sum over the vocabulary,

    divergence = sum_v term(log s_v, log t_v)
    its gradient by the student's logit l_i:  slope_i - s_i sum_v slope_v

where slope is the derivative of term by log s, up to a multiple of s, which cancels:

    name         divergence                             term                                        slope
    reverse_kl   KL(s || t)                             s log(s / t)                                term
    forward_kl   KL(t || s)                             t log(t / s)                                -t
    jsd          b KL(t || m) + (1 - b) KL(s || m),     b t log(t / m) + (1 - b) s log(s / m)       (1 - b) s log(s / m)
                 m = b t + (1 - b) s

Agarwal et al. 2024, "On-policy distillation of language models", section 2, has all three; jsd is their generalized
Jensen-Shannon divergence of teacher and student, with b their beta. Only the student has a gradient.
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
from jaxllm.sharding import constrain_scored


class Output(NamedTuple):
    """What makes a model's distribution at every position."""

    hidden: Array  # [B, T, D]
    head: Array  # float32[V, D]
    cap: float = 0.0  # soft cap of the logits; 0: none


class _How(NamedTuple):
    """What is compared, and how; the same for all positions."""

    kind: str
    beta: float
    student: Softmax
    teacher: Softmax


def _reverse_kl(log_s: Array, log_t: Array, beta: float) -> tuple[Array, Array]:
    del beta
    term = jnp.exp(log_s) * (log_s - log_t)
    return term, term


def _forward_kl(log_s: Array, log_t: Array, beta: float) -> tuple[Array, Array]:
    del beta
    t = jnp.exp(log_t)
    return t * (log_t - log_s), -t


def _jsd(log_s: Array, log_t: Array, beta: float) -> tuple[Array, Array]:
    log_m = jnp.logaddexp(jnp.log(beta) + log_t, jnp.log1p(-beta) + log_s)
    slope = (1.0 - beta) * jnp.exp(log_s) * (log_s - log_m)
    return beta * jnp.exp(log_t) * (log_t - log_m) + slope, slope


# (log s, log t, beta) -> (term, slope), arrays of any one shape.
DIVERGENCES: dict[str, Callable[[Array, Array, float], tuple[Array, Array]]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "jsd": _jsd,
}


def token_divergences(
    student: Output,
    teacher: Output,
    *,
    kind: str,
    temperature: float = 1.0,
    beta: float = 0.5,
    block_elements: int = 0,
) -> Array:
    """The divergence of two softmaxes at every position, float32[B, T], in nats.

    The vocabulary is processed in blocks whose logits are recomputed in the backward pass, so that [B, T, V] never exists
    where that would be large. student and teacher may differ in width, not in vocabulary. kind: a name in DIVERGENCES;
    temperature: of both; beta: of jsd, between 0 and 1; block_elements: as in `output_layer.token_logprobs`.
    """
    B, T, _ = student.hidden.shape
    # Logits of both models live at the same time.
    sizes = (2 * B * T, student.head.shape[0], temperature)
    how = _How(
        kind,
        beta,
        softmax_in_blocks(*sizes, student.cap, block_elements),
        softmax_in_blocks(*sizes, teacher.cap, block_elements),
    )
    arrays = [(constrain_scored(each.hidden), each.head) for each in (student, teacher)]
    return _divergence(*arrays, how)


# Of a model: (hidden [B, T, D], head float32[V, D]).
_Model = tuple[Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _divergence(student: _Model, teacher: _Model, how: _How) -> Array:
    """`token_divergences`, whose gradient is `_backward`."""
    return _forward(student, teacher, how)[0]


def _forward(student: _Model, teacher: _Model, how: _How) -> tuple[Array, Any]:
    """The divergence, and what `_backward` needs."""

    def normalize(_: None, block: Any) -> tuple[None, tuple[Array, Array]]:
        s, t = _logits(student, teacher, block, how)
        return None, (jax.nn.logsumexp(s, -1), jax.nn.logsumexp(t, -1))

    def compare(sums: tuple[Array, Array], block: Any) -> tuple[tuple[Array, Array], None]:
        s, t = _logits(student, teacher, block, how)
        term, slope = _term(s, t, normalizers, how)
        return (sums[0] + term.sum(-1), sums[1] + slope.sum(-1)), None

    blocks = _blocks(student, teacher, how)
    _, parts = jax.lax.scan(normalize, None, blocks)
    normalizers = tuple(jax.nn.logsumexp(part, 0) for part in parts)
    zero = jnp.zeros_like(normalizers[0])
    (divergence, slope), _ = jax.lax.scan(compare, (zero, zero), blocks)
    return divergence, (student, teacher, normalizers, slope)


def _backward(how: _How, residuals: Any, gradient: Array) -> tuple[_Model, None]:
    """Gradients of the student's hidden states and head; the teacher has none."""
    student, teacher, normalizers, slope_sum = residuals
    hidden, head = student

    def of_block(block: Any) -> tuple[Array, Array]:
        s, t = _logits(student, teacher, block, how)
        _, slope = _term(s, t, normalizers, how)
        probability = jnp.exp(s - normalizers[0][..., None])
        return (slope - probability * slope_sum[..., None]) * gradient[..., None], s

    _, *beside = _blocks(student, teacher, how)
    return back_in_blocks(of_block, hidden, head, tuple(beside), how.student), None


_divergence.defvjp(_forward, _backward)


def _blocks(student: _Model, teacher: _Model, how: _How) -> tuple[Array, Array, Array]:
    """The two heads and the token ids in blocks, [count, V / count, ...] each."""
    return cut(student[1], how.student), cut(teacher[1], how.teacher), cut_ids(how.student)


def _logits(student: _Model, teacher: _Model, block: Any, how: _How) -> tuple[Array, Array]:
    """Logits of both models in a block, float32[B, T, V / count] each."""
    weights, teacher_weights, ids = block
    vocab_size = student[1].shape[0]
    return (
        logits_of(student[0], weights, ids, vocab_size, how.student),
        logits_of(teacher[0], teacher_weights, ids, vocab_size, how.teacher),
    )


def _term(s: Array, t: Array, normalizers: Any, how: _How) -> tuple[Array, Array]:
    """(term, slope) of a block's logits."""
    log_s, log_t = s - normalizers[0][..., None], t - normalizers[1][..., None]
    return DIVERGENCES[how.kind](log_s, log_t, how.beta)
