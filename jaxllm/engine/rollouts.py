"""Sampled responses as arrays, and what is computed from them: texts' ids, stop strings, log-probabilities.

Shapes: B rows (prompts times samples), P prompt positions, R response positions, D model width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import output_layer
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig


class Rollout(NamedTuple):
    """Responses of a model to prompts. The rows are prompt-major: a prompt's samples are adjacent.

    A prompt of two tokens and a response of two, the second of which is the stop token, with P = 4 and R = 3:

        tokens        - - p p r s -
        prompt_mask   . . 1 1
        mask                  1 1 .
    """

    tokens: jax.Array  # int32[B, P + R]: left-padded prompt, response, padding
    prompt_mask: jax.Array  # bool[B, P]: tokens of the prompt
    mask: jax.Array  # bool[B, R]: response tokens up to and including the stop token
    # float32[B, R]: the sampler's, at its temperature and before top-k and top-p
    logprobs: jax.Array
    finished: jax.Array  # bool[B]: whether the response ended with a stop token


class Completion(NamedTuple):
    """One sampled response."""

    ids: list[int]  # its tokens, without the stop token
    finished: bool  # whether it ended with a stop token


def left_pad(
    rows: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token lists padded on the left: (tokens int32[B, length], mask bool[B, length])."""
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return tokens, mask


def completions(rollout: Rollout, stop_ids: Sequence[int]) -> list[Completion]:
    """The rows of a fetched rollout as lists of ids, without the stop token."""
    results = []
    for row, mask, finished in zip(rollout.tokens, rollout.mask, rollout.finished, strict=True):
        response = np.asarray(row)[-len(mask) :]
        ids = response[: int(mask.sum())].tolist()
        if ids and ids[-1] in stop_ids:
            ids.pop()
        results.append(Completion(ids, bool(finished)))
    return results


def cut_at_strings(
    rollout: Rollout, strings: Sequence[str], decode: Callable[[list[int]], str]
) -> Rollout:
    """Ends each response of a fetched rollout with the token that completes the first of `strings` in it.

    What follows is masked, and the response counts as finished.
    """
    mask = np.array(rollout.mask)
    finished = np.array(rollout.finished)

    def contains_one(ids: list[int]) -> bool:
        text = decode(ids)
        return any(string in text for string in strings)

    for b, row in enumerate(np.asarray(rollout.tokens)[:, -mask.shape[1] :]):
        ids = row[: mask[b].sum()].tolist()
        if contains_one(ids):
            length = next(n for n in range(1, len(ids) + 1) if contains_one(ids[:n]))
            mask[b, length:] = False
            finished[b] = True
    return rollout._replace(mask=mask, finished=finished)


def row_inputs(rollout: Any) -> tuple[jax.Array, jax.Array]:
    """segment_ids and positions, int32[B, P + R] each, of left-padded prompts with responses; padding is segment 0.

    rollout: anything with tokens, prompt_mask and mask. With P = 4, R = 3 and a response of two tokens:

        tokens     - - p p r r -
        segments   0 0 1 1 1 1 0
        positions  0 0 0 1 2 3 3
    """
    segment_ids = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1).astype(jnp.int32)
    return segment_ids, jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)


def response_hidden(params: Any, rollout: Any, config: ModelConfig) -> jax.Array:
    """Hidden states [B, R, D] in which the response tokens were chosen: each at the position before its token."""
    R = rollout.mask.shape[1]
    hidden = transformer.apply(params, config, rollout.tokens, *row_inputs(rollout))
    return hidden[:, -R - 1 : -1]


def response_logprobs(
    params: Any, rollout: Any, *, config: ModelConfig, temperature: float
) -> output_layer.TokenStats:
    """Log-probabilities and entropies float32[B, R] of the response tokens under softmax(logits / temperature)."""
    hidden = response_hidden(params, rollout, config)
    return hidden_logprobs(params, hidden, rollout, config=config, temperature=temperature)


def hidden_logprobs(
    params: Any, hidden: jax.Array, rollout: Any, *, config: ModelConfig, temperature: float
) -> output_layer.TokenStats:
    """`response_logprobs`, from the hidden states [B, R, D] of `response_hidden`."""
    R = rollout.mask.shape[1]
    return output_layer.token_logprobs(
        hidden,
        transformer.head(params),
        rollout.tokens[:, -R:],
        temperature=temperature,
        cap=config.logit_softcap,
    )
