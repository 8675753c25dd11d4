"""Log-probabilities of given tokens, and generated answers, for rows and prompts of any length.

The conventions by which texts become rows are those of EleutherAI's lm-evaluation-harness (Gao et al. 2021), so that
numbers can be compared.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import output_layer
from jaxllm.config import InputError
from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.responses import roll_out, whole_batch
from jaxllm.engine.rollouts import Completion, Rollout, completions, cut_at_strings
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.runtime.transfer import fetch
from jaxllm.sharding import activation
from jaxllm.tokenizers.trained import Tokenizer

# Rows are padded to this, twice this, ..., the context's length: few shapes to compile.
_SHORTEST = 32


class Model(NamedTuple):
    """A model to be measured."""

    params: Any
    """Parameters of `transformer`, sharded over `mesh`."""
    config: ModelConfig
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh


class Row(NamedTuple):
    """A context and the text to be scored after it."""

    #     ids     <|bos|> the sky is blue .        count  2
    #     scored     .     .   .  .   1   1
    ids: list[int]
    count: int
    """The last `count` ids are scored; at least one context id precedes them."""


def score_rows(model: Model, rows: Sequence[Row], batch_size: int = 32) -> list[tuple[float, bool]]:
    """(nats, is_greedy) for the scored tokens of each row, in the order of `rows`.

    nats is the sum of their log-probabilities; is_greedy is true if greedy decoding of the context gives exactly them.

    Raises:
        ValueError: a row has no context, no scored token, or more than max_length + 1 ids. The last id is only a
            target, so it takes no room in the context.
    """
    limit = model.config.max_length
    for row in rows:
        if not 0 < row.count < len(row.ids) <= limit + 1:
            sizes = f"{row.count} scored of {len(row.ids)} ids"
            raise ValueError(f"row: {sizes}, and the context holds {limit}")
    scores = [(0.0, False)] * len(rows)
    # Longest first: if memory does not suffice, it fails at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    for length, group in itertools.groupby(order, key=lambda i: _padded_length(rows[i], limit)):
        numbers = list(group)
        # A small group gets a smaller batch, of a power of two: again few shapes.
        size = whole_batch(model.mesh, min(batch_size, _power_of_two(len(numbers))))
        for batch in itertools.batched(numbers, size):
            batch_scores = _score_batch(model, [rows[i] for i in batch], size, length)
            for number, score in zip(batch, batch_scores, strict=True):
                scores[number] = score
    return scores


def _padded_length(row: Row, limit: int) -> int:
    """The context length that a row is padded to."""
    return min(max(_SHORTEST, _power_of_two(len(row.ids) - 1)), limit)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _score_batch(
    model: Model, rows: Sequence[Row], size: int, length: int
) -> list[tuple[float, bool]]:
    """`score_rows` for at most `size` rows, padded to [size, length + 1]."""
    tokens = np.zeros((size, length + 1), np.int32)
    lengths = np.zeros(size, np.int32)
    counts = np.zeros(size, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.ids)] = row.ids
        lengths[i] = len(row.ids)
        counts[i] = row.count
    by_row = activation(model.mesh, "batch")
    with jax.set_mesh(model.mesh):
        sums = _row_sums(
            model.params,
            jax.device_put(tokens, activation(model.mesh, "batch", None)),
            jax.device_put(lengths, by_row),
            jax.device_put(counts, by_row),
            config=model.config,
        )
    nats, greedy = fetch(sums)
    # Rows that only fill the batch are dropped.
    return list(zip(nats[: len(rows)].tolist(), greedy[: len(rows)].tolist(), strict=True))


@functools.partial(jax.jit, static_argnames="config")
def _row_sums(
    params: Any, tokens: jax.Array, lengths: jax.Array, counts: jax.Array, *, config: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """(nats float32[B], is_greedy bool[B]) of tokens int32[B, T + 1], padded on the right.

    lengths, counts: int32[B], as in `Row`.
    """
    # A row of length 4 and count 2, T = 5. The masks are bool[B, T], over the targets tokens[:, 1:]:
    #
    #     tokens   a b c d - -
    #     real       1 1 1 . .
    #     scored     . 1 1 . .
    positions = jnp.arange(1, tokens.shape[1], dtype=jnp.int32)[None]  # of the targets
    real = positions < lengths[:, None]
    hidden = transformer.apply(params, config, tokens[:, :-1], real.astype(jnp.int32))
    stats = output_layer.token_logprobs(
        hidden, transformer.head(params), tokens[:, 1:], cap=config.logit_softcap
    )
    scored = real & (positions >= (lengths - counts)[:, None])
    # Padding has log-probabilities as well; they are garbage.
    nats = jnp.where(scored, stats.logprob, 0.0).sum(1)
    return nats, (~scored | (stats.logprob >= stats.top)).all(1)


def split(
    encode: Callable[[str], list[int]], context: str, text: str
) -> tuple[list[int], list[int]]:
    """Token ids of a context and of the text that continues it (at least one id), encoded together."""
    # Encoded apart, the two would have tokens at the boundary that the model never saw in training. Spaces at the end of
    # the context become part of the text, since tokenizers put a space in front of a word:
    #
    #     "the sky is " + "blue"   ->   the sky is | ▁blue
    ids = encode(context + text)
    boundary = min(len(encode(context.rstrip())), len(ids) - 1)
    return ids[:boundary], ids[boundary:]


def fit(context: Sequence[int], text: Sequence[int], config: ModelConfig, origin: str) -> Row:
    """A row that scores the text; a context that is too long is cut as in `shorten`.

    Raises:
        InputError: the text alone does not fit. The message begins with `origin`.
    """
    room = config.max_length + 1 - len(text)
    if room < 1:
        sizes = f"the answer takes {len(text)} tokens and the context holds {config.max_length}"
        raise InputError(f"{origin}: {sizes}; shorten the answer")
    return Row([*shorten(context, room), *text], len(text))


def shorten(ids: Sequence[int], room: int) -> list[int]:
    """The first id and the newest ones, `room` in all."""
    # The first one is <|bos|>, which models are trained with. Room for 3:
    #
    #     <|bos|> a b c d   ->   <|bos|> c d
    return [*ids] if len(ids) <= room else [ids[0], *ids[len(ids) - room + 1 :]]


def windows(ids: Sequence[int], bos_id: int, max_length: int) -> list[Row]:
    """Rows that score each of a text's ids once, at most max_length in each."""
    # The last window starts earlier than it must, so that its context is as long as possible. Six ids, max_length 4:
    #
    #     <|bos|> 0 1 2 3          scores  0 1 2 3
    #               1 2 3 4 5      scores  4 5
    all_ids = [bos_id, *ids]
    rows = []
    for begin in range(0, len(ids), max_length):
        end = min(begin + max_length, len(ids))
        rows.append(Row(all_ids[max(0, end - max_length) : end + 1], end - begin))
    return rows


def rollouts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    seed: int,
    batch_size: int = 64,
) -> Iterator[tuple[Rollout, int]]:
    """`responses.roll_out` of one response to each prompt. Iterate under `jax.set_mesh(model.mesh)`."""
    return roll_out(
        model.params,
        model.config,
        prompts,
        sampling=sampling,
        stop_ids=model.tokenizer.stop_ids,
        pad_id=model.tokenizer.pad_id,
        mesh=model.mesh,
        seed=seed,
        batch_size=batch_size,
    )


def generate_texts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stops: Sequence[str],
    *,
    seed: int,
    batch_size: int = 64,
) -> list[tuple[str, Completion]]:
    """(text up to the first of the stop texts, completion) for each prompt, which `shorten` makes fit."""
    room = model.config.max_length - sampling.max_new_tokens
    prompts = [shorten(ids, room) for ids in prompts]
    answers = []
    with jax.set_mesh(model.mesh):
        for rollout, count in rollouts(model, prompts, sampling, seed=seed, batch_size=batch_size):
            rollout = cut_at_strings(fetch(rollout), stops, model.tokenizer.decode)
            for completion in completions(rollout, model.tokenizer.stop_ids)[:count]:
                text = model.tokenizer.decode(completion.ids)
                # The token that completes a stop text may contain characters before and after it.
                ends = [text.index(stop) for stop in stops if stop in text]
                answers.append((text[: min(ends, default=len(text))], completion))
    return answers


def response_numbers(responses: Sequence[Completion]) -> dict[str, float]:
    """Mean number of response tokens, and the share of responses that ended by themselves."""
    num_tokens = 0
    num_finished = 0
    for response in responses:
        num_tokens += len(response.ids)
        num_finished += response.finished
    return {
        "response_tokens": num_tokens / len(responses),
        "finished": num_finished / len(responses),
    }
