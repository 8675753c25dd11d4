"""Responses to a request, piece by piece: tokens from the driver become text, which ends before a stop text."""

import dataclasses
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.request import Draw, Event, Request
from jaxllm.engine.responses import requests_for, row_key_words
from jaxllm.serve.driver import Driver
from jaxllm.serve.served import Served
from jaxllm.serve.text import ResponseText
from jaxllm.web.errors import ApiError

Finish = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is generated."""

    prompts: Sequence[Sequence[int]]
    """Token ids."""
    num_choices: int
    """Responses to each prompt."""
    sampling: SamplingConfig
    stops: Sequence[str]
    """Texts that end a response; they are not part of it."""
    seed: int | None
    num_alternatives: int
    """Alternatives that are reported for each token."""
    seconds: float
    """Longest time."""


class Piece(NamedTuple):
    """What a response has got."""

    number: int
    """Of the response: those to the first prompt come first."""
    text: str
    draws: tuple[Draw, ...]
    """Its tokens, without the one that ends the response."""
    num_tokens: int
    """How many were drawn."""
    finish: Finish | None
    """None: it goes on."""


async def generate(driver: Driver, served: Served, wanted: Wanted) -> AsyncIterator[Piece]:
    """Yields pieces of all responses as they come. Leaving the iteration ends what is drawn.

    Raises:
      Busy, EngineStopped, TimeoutError, InputError: as `Drawing`.
    """
    requests = await _requests(driver, served, wanted)
    readers = [Reader(i, served, wanted.stops) for i in range(len(requests))]
    async with driver.draw(served.number, requests, wanted.seconds) as drawing:
        async for i, event in drawing:
            piece = readers[i].read(event)
            if piece.finish and not event.end:
                drawing.end(i)
            yield piece


async def _requests(driver: Driver, served: Served, wanted: Wanted) -> list[Request]:
    """One for each response. With a seed they are those of `jaxllm generate --seed`."""
    seed = secrets.randbits(32) if wanted.seed is None else wanted.seed % 2**32
    index = np.arange(len(wanted.prompts), dtype=np.int32)
    # In the engines' thread, like all that runs on devices.
    keys = await driver.call(lambda: row_key_words(jax.random.key(seed), index, wanted.num_choices))
    requests = requests_for(
        wanted.prompts, keys, wanted.sampling, served.tokenizer.stop_ids, wanted.num_choices
    )
    count = min(wanted.num_alternatives, served.config.vocab_size)
    return [dataclasses.replace(request, num_alternatives=count) for request in requests]


class Reader:
    """Reads the events of one response."""

    def __init__(self, number: int, served: Served, stops: Sequence[str]):
        self._number = number
        self._stop_ids = served.tokenizer.stop_ids
        self._text = ResponseText(served.tokenizer, stops)

    def read(self, event: Event) -> Piece:
        """What an event adds."""
        text = ""
        draws = []
        for draw in event.draws:
            if draw.id in self._stop_ids:
                break
            text += self._text.add(draw.id)
            draws.append(draw)
            if self._text.stopped:
                return Piece(self._number, text, tuple(draws), len(draws), "stop")
        if event.end:
            text += self._text.finish()
        finish = "stop" if self._text.stopped else event.end
        return Piece(self._number, text, tuple(draws), len(event.draws), finish)


def check_length(served: Served, num_tokens: int, max_new_tokens: int | None, default: int) -> int:
    """The longest response to a prompt of so many tokens.

    Args:
      served: the model.
      num_tokens: of the prompt.
      max_new_tokens: what was asked for; None: `default`, or fewer if there is less room.

    Raises:
      ApiError: the context has no room for the response.
    """
    room = served.config.max_length - num_tokens
    if max_new_tokens is None:
        max_new_tokens = max(min(default, room), 1)
    if max_new_tokens > room:
        raise ApiError(
            400,
            f"the prompt has {num_tokens} tokens, and {max_new_tokens} more for the response exceed the context of "
            f"{served.config.max_length}; shorten the prompt or lower max_tokens",
            "max_tokens",
        )
    return max_new_tokens
