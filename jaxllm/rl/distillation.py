"""On-policy distillation: the policy's distribution over each token of its own responses is moved towards teachers'.

A teacher makes one pass over the responses of an update, on a mesh of its own, and leaves its hidden states. The actor's
step multiplies them with the teacher's output matrix, block by block of the vocabulary, next to the policy's own. As the
responses are the policy's samples, and nothing flows back through the sampling, the loss is for each state s that the
policy visits

    sum over teachers of weight * divergence(policy(. | s), teacher(. | s))        Agarwal et al. 2024, section 3

at the temperature that responses are sampled at. With several teachers and reverse_kl it is smallest at their normalized
geometric mean, with forward_kl at their mean.

Shapes: B rows, R response positions, D a teacher's width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.divergences import Output, token_divergences
from jaxllm.engine import rollouts
from jaxllm.models import transformer
from jaxllm.rl.roles import RunSpec


def divergence(
    policy: Any, hidden: jax.Array, teacher_hidden: Any, teacher_heads: Any, *, spec: RunSpec
) -> jax.Array:
    """The weighted sum of the divergences from all teachers, float32[B, R], in nats; garbage beyond the responses.

    Args:
      policy: the decoder that learns.
      hidden: [B, R, D], its states in which the response tokens were chosen.
      teacher_hidden: those of every teacher.
      teacher_heads: float32[V, D], the output matrix of every teacher.
    """
    config = spec.config
    student = Output(hidden, transformer.head(policy), spec.model.logit_softcap)
    total = jnp.zeros(hidden.shape[:2])
    for teacher, model, states, head in zip(
        config.teachers, spec.teachers, teacher_hidden, teacher_heads, strict=True
    ):
        total = total + teacher.weight * token_divergences(
            student,
            Output(states, head, model.logit_softcap),
            kind=config.divergence,
            temperature=config.sampling.temperature,
            beta=config.jsd_beta,
        )
    return total


def measured(
    policy: Any, rollout: Any, teacher_hidden: Any, teacher_heads: Any, *, spec: RunSpec
) -> jax.Array:
    """`divergence` of the policy's own pass over the responses; 0 beyond them."""
    hidden = rollouts.response_hidden(policy, rollout, spec.model)
    nats = divergence(policy, hidden, teacher_hidden, teacher_heads, spec=spec)
    return jnp.where(rollout.mask, nats, 0.0)
