"""Responses to lists of prompts, and one response token by token, from an engine made for them.

A response's random numbers depend on (seed, the index of its prompt, its sample number, the number of the token) and on
nothing else.

Shapes: B prompts, P prompt positions, R response positions; rows = B * num_samples.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import InputError
from jaxllm.engine import inputs
from jaxllm.engine.config import EngineConfig, SamplingConfig
from jaxllm.engine.engine import Engine, Response
from jaxllm.engine.request import Request
from jaxllm.engine.rollouts import Completion, Rollout, left_pad
from jaxllm.engine.sampling import row_keys
from jaxllm.models.config import ModelConfig
from jaxllm.runtime.transfer import place
from jaxllm.sharding import activation, batch_shards


def complete(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    mesh: jax.sharding.Mesh,
    seed: int,
    num_samples: int = 1,
    batch_size: int = 0,
    start: int = 0,
    engine: EngineConfig | None = None,
) -> Iterator[list[Completion]]:
    """Yields the num_samples completions of each prompt, in order.

    Args:
      params: of the decoder.
      config: of the decoder.
      prompts: lists of token ids.
      sampling: the rules.
      stop_ids: tokens that end a response.
      mesh: that the rows are sharded over.
      seed: of the random numbers.
      num_samples: responses per prompt.
      batch_size: prompts that are in the engine together; 0: all.
      start: index of the prompt to resume from, a multiple of the batch size; results are those of a run from 0.
      engine: how much is decoded together.

    Raises:
      InputError: a prompt is empty, or does not fit the context with its response.
    """
    check_prompts(config, prompts, sampling)
    batch_size = batch_size or max(len(prompts), 1)
    keys = row_key_words(jax.random.key(seed), np.arange(len(prompts), dtype=np.int32), num_samples)
    requests = requests_for(prompts, keys, sampling, stop_ids, num_samples)
    # Prompts of all batches: the longest one may be in any of them.
    running = engine_for(params, config, mesh, requests, engine, batch_size * num_samples)
    for begin in range(start, len(prompts), batch_size):
        batch = requests[begin * num_samples : (begin + batch_size) * num_samples]
        # A batch is drawn as if there were no other: so it is the same after a restart.
        running.forget_prompts()
        responses = in_order(running, batch)
        for _ in range(len(batch) // num_samples):
            yield [completion_of(next(responses), stop_ids) for _ in range(num_samples)]


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
    batch_size: int = 64,
    multiple: int = 1,
    engine: EngineConfig | None = None,
) -> Iterator[tuple[Rollout, int]]:
    """One response to each prompt, as arrays on the mesh; yields (rollout, number of its prompts).

    The last batch is filled up with copies of its first row. Arguments as for `complete`, and

    Args:
      pad_id: token of the padding.
      batch_size: rows of an array, rounded up by `whole_batch`.
      multiple: the rows must be divisible by this, for other meshes that use them.
    """
    check_prompts(config, prompts, sampling)
    longest = max(map(len, prompts), default=1)
    batch_size = whole_batch(mesh, min(batch_size, len(prompts)), multiple)
    length = min(-(-longest // 16) * 16, config.max_length - sampling.max_new_tokens)
    keys = row_key_words(jax.random.key(seed), np.arange(len(prompts), dtype=np.int32), 1)
    requests = requests_for(prompts, keys, sampling, stop_ids, 1)
    # All prompts are in the engine from the start: no batch waits for the longest response of another.
    responses = in_order(engine_for(params, config, mesh, requests, engine), requests)
    for begin in range(0, len(prompts), batch_size):
        batch = list(prompts[begin : begin + batch_size])
        found = [next(responses) for _ in batch]
        missing = batch_size - len(batch)
        rows = rollout_of(
            [*batch, *[batch[0]] * missing],
            [*found, *[found[0]] * missing],
            length,
            sampling.max_new_tokens,
            pad_id,
        )
        yield place(rows, activation(mesh, "batch")), len(batch)


def stream_engine(params: Any, config: ModelConfig, mesh: jax.sharding.Mesh) -> Engine:
    """An engine for `stream`: one response at a time, of any length that the context has room for."""
    return Engine(params, config, mesh, settings=EngineConfig(slots=1, steps=2))


def stream(
    engine: Engine,
    prompt: Sequence[int],
    *,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    seed: int,
) -> Iterator[int]:
    """Yields the ids of one response as they are sampled, without the stop token; arguments as for `complete`."""
    [key] = row_key_words(jax.random.key(seed), np.zeros(1, np.int32), 1)
    ticket = engine.submit(Request(prompt, sampling, key, stop_ids))
    try:
        while engine.num_unfinished:
            for event in engine.step():
                yield from (draw.id for draw in event.draws if draw.id not in stop_ids)
    finally:
        engine.cancel(ticket)


# --- Parts of these.


def engine_for(
    params: Any,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    requests: Sequence[Request],
    settings: EngineConfig | None = None,
    most_together: int = 0,
) -> Engine:
    """An engine that is no larger than these requests need; most_together: how many are in it at a time, 0: all."""
    settings = settings or EngineConfig()
    longest = max(
        (len(request.prompt) + request.sampling.max_new_tokens for request in requests), default=1
    )
    rows = min(most_together or len(requests), len(requests))
    settings = settings.for_rows(rows, batch_shards(mesh))
    return Engine(params, config, mesh, longest=longest, settings=settings)


def in_order(engine: Engine, requests: Sequence[Request]) -> Iterator[Response]:
    """The responses in the order of the requests, each as soon as it and those before it have ended."""
    ended: dict[int, Response] = {}
    number = 0
    for i, response in engine.run(requests):
        ended[i] = response
        while number in ended:
            yield ended.pop(number)
            number += 1


def requests_for(
    prompts: Sequence[Sequence[int]],
    keys: Sequence[tuple[int, int]],
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    num_samples: int,
) -> list[Request]:
    """The requests of num_samples responses to each prompt, prompt-major; keys: one for each request."""
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    return [
        Request(prompt, sampling, key, tuple(stop_ids))
        for prompt, key in zip(repeated, keys, strict=True)
    ]


def row_key_words(key: jax.Array, index: np.ndarray, num_samples: int) -> list[tuple[int, int]]:
    """The words of the keys of num_samples responses to the prompts with these indices int32[B], prompt-major."""
    # Of few shapes: each is compiled.
    samples = inputs.room_for(num_samples, least=1)
    padded = np.zeros(inputs.room_for(len(index), least=1), np.int32)
    padded[: len(index)] = index
    words = np.asarray(jax.random.key_data(row_keys(key, jnp.asarray(padded), samples)))
    wanted = words.reshape(len(padded), samples, 2)[: len(index), :num_samples]
    return [(int(first), int(second)) for first, second in wanted.reshape(-1, 2)]


def completion_of(response: Response, stop_ids: Sequence[int]) -> Completion:
    """A response without its stop token."""
    ids = [draw.id for draw in response.draws]
    if ids and ids[-1] in stop_ids:
        ids.pop()
    return Completion(ids, response.end == "stop")


def rollout_of(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Response],
    prompt_length: int,
    response_length: int,
    pad_id: int,
) -> Rollout:
    """Prompts and their responses as arrays on the host."""
    tokens, prompt_mask = left_pad(prompts, prompt_length, pad_id)
    drawn = np.full((len(responses), response_length), pad_id, np.int32)
    mask = np.zeros(drawn.shape, bool)
    logprobs = np.zeros(drawn.shape, np.float32)
    for i, response in enumerate(responses):
        length = len(response.draws)
        drawn[i, :length] = [draw.id for draw in response.draws]
        logprobs[i, :length] = [draw.logprob for draw in response.draws]
        mask[i, :length] = True
    finished = np.array([response.end == "stop" for response in responses])
    rows = np.concatenate([tokens, drawn], axis=1)
    arrays: Any = (rows, prompt_mask, mask, logprobs, finished)
    return Rollout(*arrays)


def whole_batch(mesh: jax.sharding.Mesh, batch_size: int, multiple: int = 1) -> int:
    """batch_size rounded up to a multiple of the devices that share a batch, and of `multiple`."""
    shards = math.lcm(batch_shards(mesh), multiple)
    return -(-batch_size // shards) * shards


def check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], sampling: SamplingConfig
) -> None:
    """Raises InputError if a prompt has no tokens, or does not fit the context with its response."""
    if not all(map(len, prompts)):
        raise InputError(
            "prompt: has no tokens; begin it with the tokenizer's start_id, as `Tokenizer.prompt` does"
        )
    check_lengths(config, max(map(len, prompts), default=0), sampling)


def check_lengths(config: ModelConfig, prompt_length: int, sampling: SamplingConfig) -> None:
    """Raises InputError if prompt and response do not fit the context."""
    if prompt_length + sampling.max_new_tokens > config.max_length:
        raise InputError(
            f"prompt: {prompt_length} tokens and max_new_tokens {sampling.max_new_tokens} do not fit the context of "
            f"{config.max_length} (model.max_length); shorten the prompt or lower max_new_tokens"
        )
