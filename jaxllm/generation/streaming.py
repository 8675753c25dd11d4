"""Generation of a single response, token by token, for a chat."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.generation.config import SamplingConfig
from jaxllm.generation.generate import (
    check_lengths,
    check_not_empty,
    decode_step,
    padded_length,
    prefill,
)
from jaxllm.generation.rollouts import left_pad
from jaxllm.generation.sampling import row_keys, sample_token
from jaxllm.models import decode
from jaxllm.models.config import ModelConfig


def stream(
    params: Any,
    config: ModelConfig,
    prompt: Sequence[int],
    *,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    pad_id: int,
    seed: int,
) -> Iterator[int]:
    """Yields the ids of one response as they are sampled, without the stop token.

    params: from `decode.unstack` with `decode.decoding_config(config)`; the other arguments as for `roll_out`.
    """
    check_not_empty([prompt])
    check_lengths(config, len(prompt), sampling)
    config = decode.decoding_config(config)
    start, step = _stream_steps(config, sampling)
    # A multiple of 32, so that prompts of similar length share a compilation.
    length = padded_length(len(prompt), 32, config, sampling)
    tokens, mask = left_pad([prompt], length, pad_id)
    key = row_keys(jax.random.key(seed), jnp.zeros(1, jnp.int32), 1)
    token, cache, segment_ids, lengths = start(params, tokens, mask, key)
    for number in range(1, sampling.max_new_tokens + 1):
        sampled = int(token[0])
        if sampled in stop_ids:
            return
        yield sampled
        # The last token needs no step after it.
        if number < sampling.max_new_tokens:
            token, cache = step(
                params,
                token,
                lengths,
                segment_ids,
                cache,
                key,
                jnp.int32(number),
                jnp.int32(length),
            )


@functools.lru_cache(maxsize=4)
def _stream_steps(
    config: ModelConfig, sampling: SamplingConfig
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled first step of a stream, with the prompt, and its other steps."""

    def sample(params: Any, hidden: jax.Array, keys: jax.Array, number: jax.Array) -> jax.Array:
        cap = config.logit_softcap
        return sample_token(hidden, keys, number, params["unembed"], sampling, cap)[0]

    # The cache has the size of the context from the start, so that no step is compiled again.
    @jax.jit
    def start(params, tokens, mask, keys):
        hidden, cache, segment_ids, lengths = prefill(
            params, config, tokens, mask, config.max_length
        )
        return sample(params, hidden, keys, jnp.int32(0)), cache, segment_ids, lengths

    # The old cache is donated, so that there is only one of this size.
    @functools.partial(jax.jit, donate_argnames="cache")
    def step(params, token, lengths, segment_ids, cache, keys, number, prompt_length):
        offset = prompt_length + number - 1
        position = lengths + number - 1
        hidden, cache = decode_step(params, config, token, position, segment_ids, cache, offset)
        return sample(params, hidden, keys, number), cache

    return start, step
