"""What the engine is asked for, and what it answers."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxllm.engine.config import SamplingConfig

End = Literal["stop", "length"]
"""Why a response ended: with a stop token, or at its longest length."""


class Alternative(NamedTuple):
    """A token that could have been drawn."""

    id: int
    logprob: float


@dataclasses.dataclass(frozen=True)
class Request:
    """One response to one prompt."""

    prompt: Sequence[int]
    """Token ids."""
    sampling: SamplingConfig
    key: tuple[int, int]
    """The words of this response's random key, from `sampling.row_keys`; nothing else decides what is drawn."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the response; they are part of it."""
    num_alternatives: int = 0
    """For each token, how many of the likeliest are reported."""


class Draw(NamedTuple):
    """A token of a response."""

    id: int
    logprob: float
    """At the request's temperature, before tokens are left out or penalized."""
    alternatives: tuple[Alternative, ...] = ()


class Event(NamedTuple):
    """What a step has added to a response."""

    ticket: int
    """What `submit` returned."""
    draws: tuple[Draw, ...]
    end: End | None
    """None: it goes on."""
