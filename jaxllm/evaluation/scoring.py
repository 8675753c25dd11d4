"""Log-probabilities of given tokens, and answers: rows and prompts of any length, and how texts become such rows.

The conventions are those of EleutherAI's lm-evaluation-harness (Gao et al. 2021), so that numbers can be compared.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import losses
from jaxllm.config import InputError
from jaxllm.generate import Completion, SamplingConfig, completions, roll_out, whole_batch
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.rollouts import cut_at_strings
from jaxllm.runtime.transfer import fetch
from jaxllm.sharding import activation
from jaxllm.tokenizers.trained import Tokenizer

_SHORTEST = (
    32  # rows are padded to this, twice this, ..., the context's length: few shapes to compile
)


class Model(NamedTuple):
    """A model to be measured."""

    params: Any
    config: ModelConfig
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh


class Row(NamedTuple):
    """Token ids: the last `count` are scored, the ones before are their context (at least one)."""

    ids: list[int]
    count: int


def score_rows(model: Model, rows: Sequence[Row], batch_size: int = 32) -> list[tuple[float, bool]]:
    """(nats, whether greedy decoding gives exactly these) of the scored tokens of each row of max_length + 1 at most."""
    limit, scores = model.config.max_length, {}
    if bad := next((r for r in rows if not 0 < r.count < len(r.ids) <= limit + 1), None):
        raise ValueError(
            f"row: {bad.count} scored of {len(bad.ids)} ids, and the context holds {limit}"
        )
    padded = lambda i: min(max(_SHORTEST, 1 << (len(rows[i].ids) - 2).bit_length()), limit)
    place = lambda x: jax.device_put(x, activation(model.mesh, "batch", *[None] * (x.ndim - 1)))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    for length, group in itertools.groupby(order, key=padded):
        numbers = [*group]
        size = whole_batch(model.mesh, min(batch_size, 1 << (len(numbers) - 1).bit_length()))
        for batch in itertools.batched(numbers, size):
            tokens, lengths, counts = (
                np.zeros((size, length + 1), np.int32),
                *np.zeros((2, size), np.int32),
            )
            for i, (ids, count) in enumerate(rows[number] for number in batch):
                tokens[i, : len(ids)], lengths[i], counts[i] = ids, len(ids), count
            with jax.set_mesh(model.mesh):
                sums = _row_sums(
                    model.params, *map(place, (tokens, lengths, counts)), config=model.config
                )
            nats, greedy = (x[: len(batch)].tolist() for x in fetch(sums))
            scores |= zip(batch, zip(nats, greedy, strict=True), strict=True)
    return [scores[i] for i in range(len(rows))]


@functools.partial(jax.jit, static_argnames="config")
def _row_sums(
    params: Any, tokens: jax.Array, lengths: jax.Array, counts: jax.Array, *, config: ModelConfig
):
    """(float32[B], bool[B]) of tokens int32[B, T + 1], padded on the right; lengths, counts int32[B]."""
    places = jnp.arange(1, tokens.shape[1], dtype=jnp.int32)[None]  # of the targets
    real = places < lengths[:, None]
    hidden = transformer.apply(params, config, tokens[:, :-1], real.astype(jnp.int32))
    stats = losses.token_logprobs(
        hidden, transformer.head(params), tokens[:, 1:], cap=config.logit_softcap
    )
    scored = real & (places >= (lengths - counts)[:, None])
    return jnp.where(scored, stats.logprob, 0.0).sum(1), (
        ~scored | (stats.logprob >= stats.top)
    ).all(1)


def split(
    encode: Callable[[str], list[int]], context: str, text: str
) -> tuple[list[int], list[int]]:
    """Token ids of a context, without the spaces at its end, and of the text that goes on (at least one), as of one."""
    ids = encode(context + text)
    boundary = min(len(encode(context.rstrip())), len(ids) - 1)
    return ids[:boundary], ids[boundary:]


def fit(context: Sequence[int], text: Sequence[int], config: ModelConfig, origin: str) -> Row:
    """A row that scores the text; a context too long loses its oldest tokens but the first, which is <|bos|>."""
    room = config.max_length + 1 - len(text)
    if room < 1:
        raise InputError(
            f"{origin}: the answer takes {len(text)} tokens and the context holds {config.max_length}"
        )
    return Row([*shorten(context, room), *text], len(text))


def shorten(ids: Sequence[int], room: int) -> list[int]:
    """The first id and the newest ones, `room` in all: models are trained with <|bos|> in front."""
    return [*ids] if len(ids) <= room else [ids[0], *ids[len(ids) - room + 1 :]]


def windows(ids: Sequence[int], bos_id: int, max_length: int) -> list[Row]:
    """Rows that score each of a text's ids once, max_length in each; the last begins earlier, to be full as well."""
    whole, rows = [bos_id, *ids], []
    for begin in range(0, len(ids), max_length):
        end = min(begin + max_length, len(ids))
        rows.append(Row(whole[max(0, end - max_length) : end + 1], end - begin))
    return rows


def generate_texts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stops: Sequence[str],
    **settings: Any,
) -> list[tuple[str, Completion]]:
    """(text up to the first stop text, completion) for each prompt, shortened to fit. settings: seed, batch_size."""
    tokenizer, texts = model.tokenizer, []
    ends = tokenizer.stop_ids
    settings |= {
        "sampling": sampling,
        "stop_ids": ends,
        "pad_id": tokenizer.pad_id,
        "mesh": model.mesh,
    }
    prompts = [shorten(ids, model.config.max_length - sampling.max_new_tokens) for ids in prompts]
    with jax.set_mesh(model.mesh):
        for rollout, count in roll_out(model.params, model.config, prompts, **settings):
            rollout = cut_at_strings(fetch(rollout), stops, tokenizer.decode)
            for drawn in completions(rollout, ends)[:count]:
                text = tokenizer.decode(drawn.ids)
                cut = min((text.index(stop) for stop in stops if stop in text), default=len(text))
                texts.append((text[:cut], drawn))
    return texts
