"""Generation: prefill, then one jitted decode loop over a KV cache; for a batch of prompts, and for many.

Prompts are left-padded, so that all rows write the same position of the cache. Two prompts, of two and four tokens, and
their responses; row 0 has its first token at offset 2 of the cache, and positions 0 1 | 2 3 4:

    offset   0 1 2 3 | 4 5 6
    row 0    - - a b | c d e
    row 1    f g h i | j k -

A row's random numbers depend on (key, its prompt's index, its sample number, the number of the token) and on nothing
else in the batch.

Shapes: B prompts, P prompt positions, R response positions, D model width; rows = B * num_samples.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import InputError
from jaxllm.generation.config import SamplingConfig
from jaxllm.generation.rollouts import Completion, Rollout, completions, left_pad
from jaxllm.generation.sampling import row_keys, sample_token
from jaxllm.models import decode
from jaxllm.models.config import ModelConfig
from jaxllm.models.decode import KVCache
from jaxllm.runtime.transfer import fetch
from jaxllm.sharding import activation, batch_shards

# Steps between two checks whether every row has ended. A check makes all devices wait for each other.
_CHECK_EVERY = 8


class Prefill(NamedTuple):
    """The state after the prompts, one row per sample."""

    hidden: jax.Array  # [rows, D]: the last hidden state
    cache: KVCache  # keys and values of the prompts, with room for responses
    segment_ids: jax.Array  # int32[rows, length]: 0 where the cache holds padding, 1 elsewhere
    lengths: jax.Array  # int32[rows]: number of prompt tokens


class _DecodeState(NamedTuple):
    """The carry of the decode loop."""

    step: jax.Array  # int32[]: number of tokens sampled so far
    tokens: jax.Array  # int32[rows, R]: responses
    mask: jax.Array  # bool[rows, R]: response tokens up to and including the stop token
    logprobs: jax.Array  # float32[rows, R]
    finished: jax.Array  # bool[rows]: whether the stop token was sampled
    last: jax.Array  # int32[rows]: the token sampled last, which is not in the cache yet
    cache: KVCache  # keys and values of all other tokens


def generate(
    params: Any,
    config: ModelConfig,
    tokens: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    *,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    pad_id: int,
    num_samples: int = 1,
    index: jax.Array | None = None,
) -> Rollout:
    """Samples num_samples responses to each prompt; trace it under jax.jit.

    Each prompt is prefilled once for all its samples. Decoding stops when every row has ended.

    Args:
      params: of the decoder.
      config: of the decoder.
      tokens: int32[B, P], left-padded prompts.
      mask: bool[B, P], True at their tokens.
      key: of the random numbers.
      sampling: the rules.
      stop_ids: tokens that end a response.
      pad_id: token after the end.
      num_samples: responses per prompt.
      index: int32[B], identifies the prompts for the random numbers; None: their rows.
    """
    B, P = tokens.shape
    R = sampling.max_new_tokens
    config = decode.decoding_config(config)
    params = decode.unstack(params, config)
    # A prompt keeps its random numbers whatever batch it is in, if the caller numbers it.
    index = jnp.arange(B, dtype=jnp.int32) if index is None else index
    keys = row_keys(key, index, num_samples)
    hidden, cache, segment_ids, lengths = prefill(params, config, tokens, mask, P, num_samples)
    stops = jnp.array(stop_ids, jnp.int32)  # may be empty: then no row ever finishes
    decoder = _Decoder(params, config, sampling, keys, lengths, P, stops, pad_id)
    state = decoder.start(hidden, cache)
    # One compiled loop for each size of the cache. The segments of new positions are 1, as of every response token.
    for end in _cache_ends(R):
        growth = P + end - segment_ids.shape[1]
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, growth)), constant_values=1)
        state = state._replace(cache=decode.grow_cache(state.cache, growth))
        state = decoder.decode_until(end, segment_ids, state)
    prompts = jnp.repeat(tokens, num_samples, axis=0)
    return Rollout(
        tokens=jnp.concatenate([prompts, state.tokens], axis=1),
        prompt_mask=jnp.repeat(mask, num_samples, axis=0),
        mask=state.mask,
        logprobs=state.logprobs,
        finished=state.finished,
    )


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """What all steps of the decode loop share."""

    params: Any  # from `decode.unstack`
    config: ModelConfig  # from `decode.decoding_config`
    sampling: SamplingConfig
    keys: jax.Array  # of the rows, [rows]
    lengths: jax.Array  # int32[rows]: number of prompt tokens
    prompt_length: int  # P, padding included
    stops: jax.Array  # int32[number of stop tokens]
    pad_id: int

    def sample(
        self, hidden: jax.Array, step: jax.Array, finished: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(token, its log-probability, finished after it), each [rows]; finished rows get padding."""
        unembed = self.params["unembed"]
        token, logprob = sample_token(
            hidden, self.keys, step, unembed, self.sampling, self.config.logit_softcap
        )
        token = jnp.where(finished, self.pad_id, token)
        stopped = finished | (token[:, None] == self.stops[None]).any(1)
        return token, jnp.where(finished, 0.0, logprob), stopped

    def start(self, hidden: jax.Array, cache: KVCache) -> _DecodeState:
        """Samples the first token from the hidden states [rows, D] of the prefill."""
        rows = len(hidden)
        R = self.sampling.max_new_tokens
        first = jnp.zeros((), jnp.int32)
        token, logprob, finished = self.sample(hidden, first, jnp.zeros(rows, bool))
        return _DecodeState(
            step=first + 1,
            tokens=_write(jnp.full((rows, R), self.pad_id, jnp.int32), token, first),
            mask=_write(jnp.zeros((rows, R), bool), jnp.ones(rows, bool), first),
            logprobs=_write(jnp.zeros((rows, R), jnp.float32), logprob, first),
            finished=finished,
            last=token,
            cache=cache,
        )

    def decode_until(self, end: int, segment_ids: jax.Array, state: _DecodeState) -> _DecodeState:
        """Decodes until responses have `end` tokens or every row is finished."""

        def unfinished(state: _DecodeState) -> jax.Array:
            return (state.step < end) & ~state.finished.all()

        def decode_several(state: _DecodeState) -> _DecodeState:
            # The inner loop has no condition, so that devices need not agree after every step.
            count = jnp.minimum(_CHECK_EVERY, end - state.step)
            decode_one = lambda _, state: self.decode_one(segment_ids, state)
            return jax.lax.fori_loop(0, count, decode_one, state)

        return jax.lax.while_loop(unfinished, decode_several, state)

    def decode_one(self, segment_ids: jax.Array, state: _DecodeState) -> _DecodeState:
        """Feeds the last token of each row, and samples the next."""
        step = state.step
        # The token of step - 1 is fed. Before it are P positions of the cache, and `lengths` real prompt tokens.
        position = self.lengths + step - 1
        offset = self.prompt_length + step - 1
        hidden, cache = decode_step(
            self.params, self.config, state.last, position, segment_ids, state.cache, offset
        )
        # The stop token itself still counts as part of the response.
        alive = ~state.finished
        token, logprob, finished = self.sample(hidden, step, state.finished)
        return _DecodeState(
            step=step + 1,
            tokens=_write(state.tokens, token, step),
            mask=_write(state.mask, alive, step),
            logprobs=_write(state.logprobs, logprob, step),
            finished=finished,
            last=token,
            cache=cache,
        )


def _write(buffer: jax.Array, column: jax.Array, step: jax.Array) -> jax.Array:
    """Writes column [rows] into buffer [rows, R] at a step."""
    return jax.lax.dynamic_update_slice_in_dim(buffer, column[:, None], step, axis=1)


def _cache_ends(R: int) -> list[int]:
    """Numbers of response tokens for which the cache has room as it grows, so that early steps read a short cache.

    There are at most four, 32 or more tokens apart: each compiles the step again. For R = 80: 32, 64, 80.
    """
    stride = max(32, -(-R // 4))
    return [*range(stride, R, stride), R]


def prefill(
    params: Any,
    config: ModelConfig,
    tokens: jax.Array,
    mask: jax.Array,
    length: int,
    num_samples: int = 1,
) -> Prefill:
    """Runs left-padded prompts once, and repeats the result for num_samples rows per prompt.

    Args:
      params: from `decode.unstack`.
      config: from `decode.decoding_config`.
      tokens: int32[B, P].
      mask: bool[B, P].
      length: positions of the cache.
      num_samples: rows per prompt.
    """
    B, P = tokens.shape
    prompt_ids = mask.astype(jnp.int32)
    # New tokens are of the prompt's segment, 1; causality hides positions that are not written yet.
    segment_ids = jnp.concatenate([prompt_ids, jnp.ones((B, length - P), jnp.int32)], axis=1)
    # - - a b has positions 0 0 0 1; those of padding do not matter.
    positions = jnp.maximum(jnp.cumsum(prompt_ids, axis=1) - 1, 0)
    cache = decode.empty_cache(config, B, length)
    hidden, cache = decode.apply_cached(params, config, tokens, positions, segment_ids, cache, 0)

    def repeat(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, num_samples, axis=0)

    return Prefill(
        # Left-padded prompts all end at the last position.
        hidden=repeat(hidden[:, -1]),
        # The dimension of rows is the fourth from the end, with or without stacked layers before it.
        cache=jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=x.ndim - 4), cache),
        segment_ids=repeat(segment_ids),
        lengths=repeat(prompt_ids.sum(1)),
    )


def decode_step(
    params: Any,
    config: ModelConfig,
    token: jax.Array,
    position: jax.Array,
    segment_ids: jax.Array,
    cache: KVCache,
    offset: jax.Array | int,
) -> tuple[jax.Array, KVCache]:
    """Feeds one token per row: (hidden state [rows, D] that predicts the next token, the cache with this one).

    Args:
      params: from `decode.unstack`.
      config: from `decode.decoding_config`.
      token: int32[rows].
      position: int32[rows], of the token in its row.
      segment_ids: int32[rows, S], 0 where the cache holds padding.
      cache: of the tokens before.
      offset: position in the cache that the token is written to.
    """
    hidden, cache = decode.apply_cached(
        params, config, token[:, None], position[:, None], segment_ids, cache, offset
    )
    return hidden[:, 0], cache


@functools.lru_cache(maxsize=16)
def jitted(
    config: ModelConfig,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    pad_id: int,
    num_samples: int,
) -> Callable[..., Rollout]:
    """`generate` compiled for these settings: (params, tokens, mask, key, index) -> Rollout."""

    @jax.jit
    def run(params: Any, tokens: Any, mask: Any, key: Any, index: Any) -> Rollout:
        return generate(
            params,
            config,
            tokens,
            mask,
            key,
            sampling=sampling,
            stop_ids=stop_ids,
            pad_id=pad_id,
            num_samples=num_samples,
            index=index,
        )

    return run


def roll_out(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    pad_id: int,
    mesh: jax.sharding.Mesh,
    seed: int,
    num_samples: int = 1,
    batch_size: int = 64,
    start: int = 0,
    multiple: int = 1,
) -> Iterator[tuple[Rollout, int]]:
    """Samples responses to many prompts, batch by batch; yields (rollout, number of its prompts).

    The last batch is filled up with copies of its first prompt. All batches share one compilation.

    Args:
      params: of the decoder.
      config: of the decoder.
      prompts: lists of token ids.
      sampling: the rules.
      stop_ids: tokens that end a response.
      pad_id: token of the padding.
      mesh: that the rows are sharded over.
      seed: of the random numbers.
      num_samples: responses per prompt.
      batch_size: prompts per batch, rounded up by `whole_batch`.
      start: index of the prompt to resume from, a multiple of the batch size; results are those of a run from 0.
      multiple: the batch size must be divisible by this, for other meshes that use the rows.

    Raises:
      InputError: a prompt is empty, or does not fit the context with its response.
    """
    check_not_empty(prompts)
    longest = max(map(len, prompts), default=1)
    check_lengths(config, longest, sampling)
    batch_size = whole_batch(mesh, min(batch_size, len(prompts)), multiple)
    length = padded_length(longest, 16, config, sampling)
    run = jitted(config, sampling, tuple(stop_ids), pad_id, num_samples)
    for begin in range(start, len(prompts), batch_size):
        batch = list(prompts[begin : begin + batch_size])
        filling = [batch[0]] * (batch_size - len(batch))
        tokens, mask = left_pad(batch + filling, length, pad_id)
        # Numbered over all batches, so that responses do not depend on the batch size.
        index = begin + np.arange(batch_size, dtype=np.int32)
        matrices = activation(mesh, "batch", None)
        yield (
            run(
                params,
                jax.device_put(tokens, matrices),
                jax.device_put(mask, matrices),
                jax.random.key(seed),
                jax.device_put(index, activation(mesh, "batch")),
            ),
            len(batch),
        )


def whole_batch(mesh: jax.sharding.Mesh, batch_size: int, multiple: int = 1) -> int:
    """batch_size rounded up to a multiple of the devices that share a batch, and of `multiple`."""
    shards = math.lcm(batch_shards(mesh), multiple)
    return -(-batch_size // shards) * shards


def complete(
    params: Any, config: ModelConfig, prompts: Sequence[Sequence[int]], **settings: Any
) -> Iterator[list[Completion]]:
    """Yields the num_samples completions of each prompt, in order; settings as for `roll_out`."""
    num_samples = settings.get("num_samples", 1)
    for rollout, count in roll_out(params, config, prompts, **settings):
        responses = completions(fetch(rollout), settings["stop_ids"])
        for i in range(count):
            yield responses[i * num_samples : (i + 1) * num_samples]


def padded_length(length: int, multiple: int, config: ModelConfig, sampling: SamplingConfig) -> int:
    """A prompt length rounded up, so that few lengths are compiled, but not beyond the context."""
    rounded = -(-length // multiple) * multiple
    return min(rounded, config.max_length - sampling.max_new_tokens)


def check_not_empty(prompts: Sequence[Sequence[int]]) -> None:
    """Raises InputError if a prompt has no tokens: there is nothing to continue."""
    if not all(map(len, prompts)):
        raise InputError(
            "prompt: has no tokens; begin it with the tokenizer's start_id, as `Tokenizer.prompt` does"
        )


def check_lengths(config: ModelConfig, prompt_length: int, sampling: SamplingConfig) -> None:
    """Raises InputError if prompt and response do not fit the context."""
    if prompt_length + sampling.max_new_tokens > config.max_length:
        raise InputError(
            f"prompt: {prompt_length} tokens and max_new_tokens {sampling.max_new_tokens} do not fit the context of "
            f"{config.max_length} (model.max_length); shorten the prompt or lower max_new_tokens"
        )
