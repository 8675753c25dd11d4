"""Generation: prefill, then one jitted decode loop over a KV cache; batched and streaming fronts.

Prompts are left-padded, so that all rows write the same place of the cache. A row's random numbers depend on
(key, its prompt's index, its sample number, the token's place) and on nothing else in the batch.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import losses
from jaxllm.config import InputError
from jaxllm.config.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, PositiveProportion
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.runtime.transfer import fetch
from jaxllm.sharding import activation, batch_shards, constrain


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn."""

    max_new_tokens: PositiveInt = 64
    """Longest response in tokens, its end-of-turn token included."""
    temperature: NonNegativeFloat = 1.0
    """Logits are divided by it; 0, or less than 1e-5, takes the most likely token."""
    top_k: NonNegativeInt = 0
    """Draw from the k most likely tokens only; 0: from all."""
    top_p: PositiveProportion = 1.0
    """Draw from the smallest set of tokens with at least this probability (nucleus sampling)."""

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken: below this temperature float32 cannot tell the two apart."""
        return self.temperature < 1e-5

    @property
    def divisor(self) -> float:
        """What logits are divided by; log-probabilities of greedy decoding are those at temperature 1."""
        return 1.0 if self.greedy else self.temperature


_CHECK_EVERY = 8  # steps from one look at whether every row has ended to the next: a look makes the devices meet


class Rollout(NamedTuple):
    """What the policy did. Rows: prompt-major, a prompt's samples side by side."""

    tokens: jax.Array  # int32[B * K, P + R]: left-padded prompt, response, padding
    prompt_mask: jax.Array  # bool[B * K, P]
    mask: jax.Array  # bool[B * K, R]: response tokens up to and including the stop token
    logprobs: (
        jax.Array
    )  # float32[B * K, R]: the sampler's, at its temperature and before top-k and top-p
    finished: jax.Array  # bool[B * K]: ended by a stop token


class Completion(NamedTuple):
    """One sampled response."""

    ids: list[int]  # without the stop token
    finished: bool


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
    """Draw num_samples responses to each left-padded prompt (tokens int32[B, P], mask bool[B, P]).

    The prompt is prefilled once for all its samples. Decoding stops when every row has ended. index int32[B]
    identifies the prompts for the random numbers (default: their rows). Trace it under jax.jit.
    """
    B, P = tokens.shape
    R, rows = sampling.max_new_tokens, B * num_samples
    config = transformer.decoding(config)
    params = transformer.unstack(params, config)
    index = jnp.arange(B, dtype=jnp.int32) if index is None else index
    row_keys = _row_keys(key, index, num_samples)
    hidden, cache, segments, lengths = prefill(params, config, tokens, mask, P, num_samples)
    pick = functools.partial(_pick, params=params, sampling=sampling, cap=config.logit_softcap)
    stops = jnp.array(stop_ids, jnp.int32)

    def draw(hidden: jax.Array, place: jax.Array, finished: jax.Array):
        """(token, its log-probability, finished after it); finished rows get padding."""
        token, logprob = pick(hidden, jax.vmap(jax.random.fold_in, (0, None))(row_keys, place))
        token = jnp.where(finished, pad_id, token)
        return (
            token,
            jnp.where(finished, 0.0, logprob),
            finished | (token[:, None] == stops[None]).any(1),
        )

    def write(buffer: jax.Array, column: jax.Array, place: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, column[:, None], place, axis=1)

    def body(segments: jax.Array, _: jax.Array, carry: Any) -> Any:
        place, responses, masks, logprobs, finished, token, cache = carry
        hidden, cache = advance(
            params, config, token, lengths + place - 1, segments, cache, P + place - 1
        )
        alive = ~finished
        token, logprob, finished = draw(hidden, place, finished)
        buffers = (
            write(b, c, place) for b, c in ((responses, token), (masks, alive), (logprobs, logprob))
        )
        return (place + 1, *buffers, finished, token, cache)

    zero = jnp.zeros((), jnp.int32)
    token, logprob, finished = draw(hidden, zero, jnp.zeros(rows, bool))
    carry: Any = (
        zero + 1,
        write(jnp.full((rows, R), pad_id, jnp.int32), token, zero),
        write(jnp.zeros((rows, R), bool), jnp.ones(rows, bool), zero),
        write(jnp.zeros((rows, R), jnp.float32), logprob, zero),
        finished,
        token,
        cache,
    )
    for end in _cache_ends(R):
        more = P + end - segments.shape[1]
        segments = jnp.pad(segments, ((0, 0), (0, more)), constant_values=1)
        carry = (*carry[:-1], transformer.grow_cache(carry[-1], more))

        def some(carry: Any, end: int = end, segments: jax.Array = segments) -> Any:
            count = jnp.minimum(_CHECK_EVERY, end - carry[0])
            return jax.lax.fori_loop(0, count, functools.partial(body, segments), carry)

        carry = jax.lax.while_loop(
            lambda carry, end=end: (carry[0] < end) & ~carry[4].all(), some, carry
        )
    _, responses, masks, logprobs, finished, _, _ = carry
    prompts, prompt_mask = (jnp.repeat(x, num_samples, axis=0) for x in (tokens, mask))
    return Rollout(
        jnp.concatenate([prompts, responses], axis=1), prompt_mask, masks, logprobs, finished
    )


def _cache_ends(R: int) -> list[int]:
    """Response places the cache has room for as it grows, so that the first steps do not read the last one's places.

    At most four sizes, 32 places apart or more: each compiles the step again.
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
):
    """Run left-padded prompts [B, P] once; params from `transformer.unstack`.

    Returns, for B * num_samples rows: the last hidden state [rows, D], the cache of `length` places, which of its
    places may be read (int32[rows, length]), and the number of prompt tokens (int32[rows]).
    """
    B, P = tokens.shape
    segments = jnp.concatenate(
        [mask.astype(jnp.int32), jnp.ones((B, length - P), jnp.int32)], axis=1
    )
    positions = jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)
    cache = transformer.empty_cache(config, B, length)
    hidden, cache = transformer.apply_cached(params, config, tokens, positions, segments, cache, 0)
    lengths = mask.astype(jnp.int32).sum(1)
    hidden, segments, lengths = (
        jnp.repeat(x, num_samples, axis=0) for x in (hidden[:, -1], segments, lengths)
    )
    return (
        hidden,
        jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=x.ndim - 4), cache),
        segments,
        lengths,
    )


def advance(params: Any, config: ModelConfig, token, position, segments, cache, place):
    """One token further: token, position int32[rows], written at `place` of the cache -> (hidden [rows, D], cache)."""
    one = (token[:, None], position[:, None])
    hidden, cache = transformer.apply_cached(params, config, *one, segments, cache, place)
    return hidden[:, 0], cache


def _pick(
    hidden: jax.Array, keys: jax.Array, *, params: Any, sampling: SamplingConfig, cap: float
) -> tuple[jax.Array, jax.Array]:
    """Draw a token from each row: hidden [rows, D], keys [rows] -> (int32[rows], float32[rows] log-probability)."""
    logits = jnp.einsum("bd,dv->bv", hidden, params["unembed"], preferred_element_type=jnp.float32)
    logits = constrain(logits, "batch", "vocab")  # or XLA gathers the matrix, for each token
    logits = losses.softcap(constrain(logits, "batch", None), cap) / sampling.divisor
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    if sampling.greedy:
        token = jnp.argmax(logits, axis=-1)
    else:
        uniform = jax.vmap(jax.random.uniform)(keys)
        token = inverse_transform(
            jnp.exp(keep_likely(logprobs, sampling.top_k, sampling.top_p)), uniform
        )
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]


def inverse_transform(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index int32[B] drawn in proportion to weights float32[B, V] by inverse transform; uniform: float32[B] in [0, 1).

    First a block of 128, then a place in it: one random number for a row, where Gumbel noise takes one for each of
    V tokens, and sums in float32 stay short. An index without weight is never drawn.
    """
    blocks = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % 128))).reshape(
        weights.shape[0], -1, 128
    )
    ends = jnp.cumsum(blocks.sum(-1), axis=-1)
    target = (uniform * ends[:, -1])[:, None]
    block, before = _first_above(ends, target, blocks.sum(-1))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place, _ = _first_above(jnp.cumsum(inside, axis=-1), target - before[:, None], inside)
    return (block * 128 + place).astype(jnp.int32)


def _first_above(
    ends: jax.Array, target: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(the first index with weight whose running sum is above target, the sum before it); rounding may leave none:
    then the heaviest."""
    above = (ends > target) & (weights > 0)
    index = jnp.where(above.any(-1), jnp.argmax(above, axis=-1), jnp.argmax(weights, axis=-1))
    at = lambda x: jnp.take_along_axis(x, index[:, None], axis=-1)[:, 0]
    return index, at(ends) - at(weights)


def keep_likely(logprobs: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Log-probabilities float32[B, V] with all but the top-k, then the nucleus (Holtzman et al. 2020), at -inf.

    The nucleus is the smallest set of most likely tokens whose probability, among those left by top-k, reaches
    top_p; it always holds the most likely one.
    """
    if top_k and top_k < logprobs.shape[-1]:
        floor = jax.lax.top_k(logprobs, top_k)[0][:, -1:]
        logprobs = jnp.where(logprobs < floor, -jnp.inf, logprobs)
    if top_p < 1.0:
        ordered = -jnp.sort(-jax.nn.softmax(logprobs, axis=-1), axis=-1)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        last = (before < top_p).astype(jnp.int32).sum(-1, keepdims=True) - 1
        # At least the first: float32 has no number for a top_p below 1e-45.
        floor = jnp.take_along_axis(ordered, jnp.maximum(last, 0), axis=-1)
        logprobs = jnp.where(jax.nn.softmax(logprobs, axis=-1) < floor, -jnp.inf, logprobs)
    return logprobs


def _row_keys(key: jax.Array, index: jax.Array, num_samples: int) -> jax.Array:
    by_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    samples = jnp.arange(num_samples, dtype=jnp.int32)
    return jax.vmap(lambda k: jax.vmap(jax.random.fold_in, (None, 0))(k, samples))(
        by_prompt
    ).reshape(-1)


@functools.lru_cache(maxsize=16)
def jitted(
    config: ModelConfig,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    pad_id: int,
    num_samples: int,
) -> Callable:
    """`generate` compiled for these settings: (params, tokens, mask, key, index=...) -> Rollout."""
    settings = {
        "sampling": sampling,
        "stop_ids": stop_ids,
        "pad_id": pad_id,
        "num_samples": num_samples,
    }
    return jax.jit(
        lambda params, tokens, mask, key, index: generate(
            params, config, tokens, mask, key, index=index, **settings
        )
    )


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
    """Rollouts of a list of prompts (token ids), batch by batch, each with its number of real prompts.

    The last batch is filled up with copies of its first prompt. One compilation serves all batches. start: where
    to resume in the list, a multiple of `whole_batch(...)`; the batches are then those of a run from 0. multiple: the
    batch size must be divisible by this, for other meshes that the rows go to.
    """
    check_not_empty(prompts)
    check_lengths(config, max(map(len, prompts), default=1), sampling)
    batch_size = whole_batch(mesh, min(batch_size, len(prompts)), multiple)
    P = min(
        -(-max(map(len, prompts), default=1) // 16) * 16,
        config.max_length - sampling.max_new_tokens,
    )
    run = jitted(config, sampling, tuple(stop_ids), pad_id, num_samples)
    for begin in range(start, len(prompts), batch_size):
        rows = [*prompts[begin : begin + batch_size]]
        tokens, mask = left_pad([*rows, *[rows[0]] * (batch_size - len(rows))], P, pad_id)
        index = begin + np.arange(batch_size, dtype=np.int32)
        placed = [
            jax.device_put(x, activation(mesh, "batch", *[None] * (x.ndim - 1)))
            for x in (tokens, mask, index)
        ]
        yield run(params, placed[0], placed[1], jax.random.key(seed), placed[2]), len(rows)


def whole_batch(mesh: jax.sharding.Mesh, batch_size: int, multiple: int = 1) -> int:
    """batch_size rounded up to what the devices can share, and to a multiple."""
    shards = math.lcm(batch_shards(mesh), multiple)
    return -(-batch_size // shards) * shards


def complete(
    params: Any, config: ModelConfig, prompts: Sequence[Sequence[int]], **settings: Any
) -> Iterator[list[Completion]]:
    """For each prompt, in order, its num_samples completions; settings as for `roll_out`."""
    num_samples = settings.get("num_samples", 1)
    for rollout, count in roll_out(params, config, prompts, **settings):
        done = completions(fetch(rollout), settings["stop_ids"])
        for i in range(count):
            yield done[i * num_samples : (i + 1) * num_samples]


def completions(rollout: Rollout, stop_ids: Sequence[int]) -> list[Completion]:
    """The rows of a fetched rollout as lists of ids, the stop token left out."""
    done = []
    for row, mask, finished in zip(rollout.tokens, rollout.mask, rollout.finished, strict=True):
        ids = np.asarray(row)[-len(mask) :][: int(mask.sum())].tolist()
        done.append(Completion(ids[:-1] if ids and ids[-1] in stop_ids else ids, bool(finished)))
    return done


def cut_at_strings(
    rollout: Rollout, strings: Sequence[str], decode: Callable[[list[int]], str]
) -> Rollout:
    """End each response with the token that completes the first of `strings` in it; a fetched rollout.

    What follows is masked, and the response counts as finished.
    """
    mask, finished = np.array(rollout.mask), np.array(rollout.finished)
    for b, row in enumerate(np.asarray(rollout.tokens)[:, -mask.shape[1] :]):
        ids = row[: mask[b].sum()].tolist()
        if any(s in decode(ids) for s in strings):
            length = next(
                n for n in range(1, len(ids) + 1) if any(s in decode(ids[:n]) for s in strings)
            )
            mask[b, length:], finished[b] = False, True
    return rollout._replace(mask=mask, finished=finished)


def row_inputs(rollout: Any) -> tuple[jax.Array, jax.Array]:
    """segment_ids and positions int32[B, P+R] of left-padded prompts with responses: padding is segment 0.

    rollout: anything with tokens, prompt_mask and mask.

    tokens     - - p p r r -      (P = 4, R = 3, a response of two tokens)
    segments   0 0 1 1 1 1 0
    positions  0 0 0 1 2 3 3
    """
    segments = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1).astype(jnp.int32)
    return segments, jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)


def response_hidden(params: Any, rollout: Any, config: ModelConfig) -> jax.Array:
    """Hidden states [B, R, D] of the states the response tokens were chosen in: each at the place before its token."""
    R = rollout.mask.shape[1]
    return transformer.apply(params, config, rollout.tokens, *row_inputs(rollout))[:, -R - 1 : -1]


def response_logprobs(
    params: Any, rollout: Any, *, config: ModelConfig, temperature: float
) -> losses.TokenStats:
    """Log-probabilities and entropies float32[B, R] of the response tokens under softmax(logits / temperature)."""
    R, hidden = rollout.mask.shape[1], response_hidden(params, rollout, config)
    head, cap = transformer.head(params), config.logit_softcap
    return losses.token_logprobs(
        hidden, head, rollout.tokens[:, -R:], temperature=temperature, cap=cap
    )


def left_pad(
    rows: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token lists -> (int32[B, length], bool[B, length]), padded on the left."""
    tokens = np.full((len(rows), length), pad_id, np.int32)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
    mask = np.arange(length)[None] >= length - np.array([len(row) for row in rows])[:, None]
    return tokens, mask


def check_not_empty(prompts: Sequence[Sequence[int]]) -> None:
    """Raise InputError where a prompt has no tokens: there is nothing to go on from."""
    if not all(map(len, prompts)):
        raise InputError(
            "prompt: has no tokens; begin it with the tokenizer's start_id, as `Tokenizer.prompt` does"
        )


def check_lengths(config: ModelConfig, prompt_length: int, sampling: SamplingConfig) -> None:
    """Raise InputError where prompt and response do not fit the context."""
    if prompt_length + sampling.max_new_tokens > config.max_length:
        raise InputError(
            f"prompt: {prompt_length} tokens and max_new_tokens {sampling.max_new_tokens} do not fit the context of "
            f"{config.max_length} (model.max_length); shorten the prompt or lower max_new_tokens"
        )


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
    """Yield the ids of one response as they are drawn, the stop token left out. params from `transformer.unstack` with `transformer.decoding(config)`."""
    check_not_empty([prompt])
    check_lengths(config, len(prompt), sampling)
    config = transformer.decoding(config)
    start, step = _stream_steps(config, sampling)
    P = min(-(-len(prompt) // 32) * 32, config.max_length - sampling.max_new_tokens)
    tokens, mask = left_pad([prompt], P, pad_id)
    key = _row_keys(jax.random.key(seed), jnp.zeros(1, jnp.int32), 1)
    token, cache, segments, lengths = start(params, tokens, mask, key)
    for place in range(1, sampling.max_new_tokens + 1):
        if (drawn := int(token[0])) in stop_ids:
            return
        yield drawn
        if place < sampling.max_new_tokens:
            token, cache = step(
                params, token, lengths, segments, cache, key, jnp.int32(place), jnp.int32(P)
            )


@functools.lru_cache(maxsize=4)
def _stream_steps(config: ModelConfig, sampling: SamplingConfig):
    def draw(params, hidden, key, place):
        keys = jax.vmap(jax.random.fold_in, (0, None))(key, place)
        return _pick(hidden, keys, params=params, sampling=sampling, cap=config.logit_softcap)[0]

    @jax.jit
    def start(params, tokens, mask, key):
        hidden, cache, segments, lengths = prefill(params, config, tokens, mask, config.max_length)
        return draw(params, hidden, key, jnp.int32(0)), cache, segments, lengths

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(params, token, lengths, segments, cache, key, place, prompt_length):
        at = prompt_length + place - 1
        hidden, cache = advance(params, config, token, lengths + place - 1, segments, cache, at)
        return draw(params, hidden, key, place), cache

    return start, step
