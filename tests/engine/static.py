"""The slow reference of the engine: a batch that nobody joins, whose every step runs the whole rows again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.engine.rollouts import Rollout, left_pad, row_inputs
from jaxllm.engine.sampling import (
    inverse_transform,
    keep_likely,
    next_logits,
    row_keys,
    uniform_numbers,
)
from jaxllm.models import transformer


def roll_out(
    params,
    model,
    prompts,
    sampling,
    *,
    stop_ids,
    pad_id,
    seed=0,
    num_samples=1,
    length=0,
    index=None,
):
    """`Rollout` of num_samples responses to each prompt, prompt-major."""
    tokens, mask = left_pad(prompts, length or max(map(len, prompts)), pad_id)
    index = jnp.arange(len(prompts)) if index is None else jnp.array(index)
    keys = row_keys(jax.random.key(seed), index, num_samples)
    repeat = functools.partial(np.repeat, repeats=num_samples, axis=0)
    return _run(params, keys, repeat(tokens), repeat(mask), model, sampling, stop_ids, pad_id)


def sample_token(hidden, keys, step, unembed, sampling, softcap):
    """(tokens int32[B], their log-probabilities float32[B] at the temperature, before top-k and top-p)."""
    logits = next_logits(hidden, unembed, softcap) / sampling.divisor
    logprobs = jax.lax.optimization_barrier(jax.nn.log_softmax(logits, axis=-1))
    if sampling.greedy:
        token = jnp.argmax(logits, axis=-1)
    else:
        kept = keep_likely(logprobs, sampling.top_k, sampling.top_p, sampling.min_p)
        token = inverse_transform(jnp.exp(kept), uniform_numbers(keys, step))
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "sampling", "stop_ids", "pad_id"))
def _run(params, keys, tokens, mask, model, sampling, stop_ids, pad_id):
    rows, P = tokens.shape
    R = sampling.max_new_tokens
    stops = jnp.array(stop_ids, jnp.int32)
    empty = Rollout(
        jnp.concatenate([tokens, jnp.full((rows, R), pad_id, jnp.int32)], axis=1),
        mask,
        jnp.zeros((rows, R), bool),
        jnp.zeros((rows, R)),
        jnp.zeros(rows, bool),
    )

    def step(number, rollout):
        segments, positions = row_inputs(rollout)
        hidden = transformer.apply(params, model, rollout.tokens, segments, positions)
        last = jax.lax.dynamic_index_in_dim(hidden, P + number - 1, axis=1, keepdims=False)
        token, logprob = sample_token(
            last, keys, number, transformer.head(params).T, sampling, model.logit_softcap
        )
        alive = ~rollout.finished
        return Rollout(
            rollout.tokens.at[:, P + number].set(jnp.where(alive, token, pad_id)),
            rollout.prompt_mask,
            rollout.mask.at[:, number].set(alive),
            rollout.logprobs.at[:, number].set(jnp.where(alive, logprob, 0.0)),
            rollout.finished | (token[:, None] == stops[None]).any(1),
        )

    return jax.lax.fori_loop(0, R, step, empty)
