"""The responses of an update as texts, which rewards read on the host.

Shapes: B rows, R response positions.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.data.loader import PromptExample
from jaxllm.data.messages import prompt_text
from jaxllm.engine import rollouts
from jaxllm.engine.rollouts import Rollout
from jaxllm.runtime.transfer import fetch


class Responses(NamedTuple):
    """B responses, and what they respond to."""

    prompts: list[str]
    answers: list[str]
    """The right ones, empty where the data has none."""
    ids: list[list[int]]
    """Tokens of each response, without the one that ends it."""
    lengths: np.ndarray
    """int[B], with the token that ends it."""
    texts: list[str]


def read_responses(
    rollout: Rollout,
    prompts: Sequence[PromptExample],
    stop_ids: Sequence[int],
    decode: Callable[[Sequence[int]], str],
) -> Responses:
    """Fetches and decodes the responses of a rollout.

    All processes must call it together, since every process scores every text.
    """
    fetched = fetch(rollout)
    ids = [completion.ids for completion in rollouts.completions(fetched, stop_ids)]
    return Responses(
        prompts=[prompt_text(prompt.messages) for prompt in prompts],
        answers=[prompt.answer for prompt in prompts],
        ids=ids,
        lengths=np.asarray(fetched.mask).sum(1),
        texts=[decode(each) for each in ids],
    )
