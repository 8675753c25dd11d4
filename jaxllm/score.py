"""Log-probabilities of given tokens: rows of any length in, a sum each out; and how texts become such rows.

The conventions are those of EleutherAI's lm-evaluation-harness (Gao et al. 2021), so that numbers can be compared.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import losses
from jaxllm.config import InputError
from jaxllm.generate import Completion, SamplingConfig, completions, cut_at_strings, roll_out, whole_batch
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.sharding import activation, fetch
from jaxllm.tokenizer import Tokenizer

_SHORTEST = 32  # rows are padded to this, twice this, ..., the context's length: few shapes to compile


class Model(NamedTuple):
    """A model to be measured. Its functions are called under `jax.set_mesh(mesh)`."""

    params: Any
    config: ModelConfig
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh


class Row(NamedTuple):
    """Token ids, of which the last `count` are scored and the ones before are their context (at least one)."""

    ids: list[int]
    count: int


class Score(NamedTuple):
    """What the model thinks of the scored tokens of a row."""

    logprob: float  # nats, summed
    count: int  # tokens
    greedy: bool  # greedy decoding would have given exactly these


def score_rows(
    params: Any, config: ModelConfig, rows: Sequence[Row], *, mesh: jax.sharding.Mesh, batch_size: int = 32
) -> list[Score]:
    """The scores of rows, in their order; a row's score does not depend on the others.

    Longest first, so that what does not fit the memory fails at once. Raises ValueError on a row without context or
    without scored tokens, or of more than max_length + 1 ids (`fit` and `windows` make none).
    """
    if bad := next((r for r in rows if not 0 < r.count < len(r.ids) <= config.max_length + 1), None):
        raise ValueError(f"row: {bad.count} scored of {len(bad.ids)} ids, and the context holds {config.max_length}")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    scores: dict[int, Score] = {}
    for length, group in itertools.groupby(order, key=lambda i: _padded(len(rows[i].ids) - 1, config.max_length)):
        numbers = [*group]
        size = whole_batch(mesh, min(batch_size, 1 << (len(numbers) - 1).bit_length()))
        for begin in range(0, len(numbers), size):
            batch = numbers[begin : begin + size]
            found = _score_batch(params, config, [rows[i] for i in batch], length, size, mesh)
            scores |= zip(batch, found, strict=True)
    return [scores[i] for i in range(len(rows))]


def _padded(length: int, limit: int) -> int:
    return min(max(_SHORTEST, 1 << (length - 1).bit_length()), limit)


def _score_batch(params: Any, config: ModelConfig, rows: list[Row], length: int, size: int, mesh) -> list[Score]:
    """Rows as one batch of `size`, filled up with empty ones, whose scores are dropped."""
    tokens, lengths, counts = np.zeros((size, length + 1), np.int32), *np.zeros((2, size), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.ids)], lengths[i], counts[i] = row.ids, len(row.ids), row.count
    placed = [jax.device_put(x, activation(mesh, "batch", *[None] * (x.ndim - 1))) for x in (tokens, lengths, counts)]
    sums, greedy = fetch(_compiled(config)(params, *placed))
    return [Score(float(sums[i]), row.count, bool(greedy[i])) for i, row in enumerate(rows)]


@functools.lru_cache(maxsize=16)
def _compiled(config: ModelConfig) -> Callable:
    return jax.jit(functools.partial(row_sums, config=config))


def row_sums(
    params: Any, tokens: jax.Array, lengths: jax.Array, counts: jax.Array, *, config: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """(summed log-probability float32[B], whether all were the likeliest bool[B]) of each row's last tokens.

    tokens int32[B, T + 1], padded on the right; lengths int32[B] of the rows; counts int32[B]: how many are scored.
    """
    places = jnp.arange(1, tokens.shape[1], dtype=jnp.int32)[None]  # of the targets
    real = places < lengths[:, None]
    hidden = transformer.apply(params, config, tokens[:, :-1], real.astype(jnp.int32))
    stats = losses.token_logprobs(hidden, transformer.head(params), tokens[:, 1:], cap=config.logit_softcap)
    scored = real & (places >= (lengths - counts)[:, None])
    return jnp.where(scored, stats.logprob, 0.0).sum(1), (~scored | (stats.logprob >= stats.top)).all(1)


def split(encode: Callable[[str], list[int]], context: str, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of the text that goes on from it, encoded as one, as the model has seen such texts.

    The context has as many of them as it has alone, without the spaces at its end (a token begins with its space);
    the text has the rest, and at least one.
    """
    cut = len(context.rstrip())
    ids = encode(context + text)
    boundary = min(len(encode(context[:cut])), len(ids) - 1)
    return ids[:boundary], ids[boundary:]


def fit(context: Sequence[int], text: Sequence[int], config: ModelConfig, origin: str) -> tuple[Row, bool]:
    """(the row, whether it was cut): context ids, the first one <|bos|>, and the ids that are scored.

    A context that is too long loses its oldest tokens but the first. Raises InputError where the text alone is.
    """
    room = config.max_length + 1 - len(text)
    if room < 1:
        raise InputError(
            f"{origin}: the answer takes {len(text)} tokens and the context of the model holds {config.max_length}; "
            "shorten it or leave the line out"
        )
    kept = shorten(context, room)
    return Row([*kept, *text], len(text)), len(kept) < len(context)


def shorten(ids: Sequence[int], room: int) -> list[int]:
    """The first id and the newest ones, `room` in all: models are trained with <|bos|> in front."""
    return [*ids] if len(ids) <= room else [ids[0], *ids[len(ids) - room + 1 :]]


def windows(ids: Sequence[int], bos_id: int, max_length: int, stride: int = 0) -> list[Row]:
    """Rows that score each of a long text's ids once, given as many before it as the window holds.

    The first window begins with <|bos|> and scores all it holds; each later one scores the next `stride` (0:
    max_length, the harness's rolling log-likelihood). With max_length 4, stride 2 and six tokens:

        <|bos|> 0 1 2 3    scores 0 1 2 3
        1 2 3 4 5          scores 4 5
    """
    whole, rows, done = [bos_id, *ids], [], 0
    while done < len(ids):
        count = min((stride or max_length) if done else max_length, len(ids) - done)
        done += count
        rows.append(Row(whole[max(0, done - max_length) : done + 1], count))
    return rows


def generate_texts(
    model: Model, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, stops: Sequence[str], **settings: Any
) -> Iterator[tuple[str, Completion]]:
    """(text up to the first stop text, completion) for each prompt, in order. settings: seed, batch_size."""
    tokenizer = model.tokenizer
    ends = tokenizer.stop_ids
    settings |= {"sampling": sampling, "stop_ids": ends, "pad_id": tokenizer.pad_id, "mesh": model.mesh}
    for rollout, count in roll_out(model.params, model.config, prompts, **settings):
        rollout = cut_at_strings(fetch(rollout), stops, tokenizer.decode)
        for drawn in completions(rollout, ends)[:count]:
            text = tokenizer.decode(drawn.ids)
            cut = min((text.index(stop) for stop in stops if stop in text), default=len(text))
            yield text[:cut], drawn
