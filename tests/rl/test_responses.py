"""What rewards read of an update's responses."""

import jax.numpy as jnp
import numpy as np

from jaxllm.data.loader import PromptExample
from jaxllm.engine.rollouts import Rollout
from jaxllm.rl import responses
from tests.stages.worlds import LETTERS


def test_texts_end_before_the_token_that_ends_a_response_and_lengths_count_it():
    # Prompts of up to two tokens; "a" is token 0, also the padding, and token 1 ends a response.
    rollout = Rollout(
        tokens=jnp.array([[0, 2, 3, 0, 1, 0], [2, 2, 1, 0, 0, 0], [0, 3, 2, 2, 3, 0]]),
        prompt_mask=jnp.array([[False, True], [True, True], [True, True]]),
        mask=jnp.array([[True, True, True, False], [True] + [False] * 3, [True] * 4]),
        logprobs=jnp.zeros((3, 4)),
        finished=jnp.array([True, True, False]),
    )
    prompts = [
        PromptExample([{"role": "user", "content": text}], [], answer)
        for text, answer in (("c", "x"), ("cc", ""), ("ad", "y"))
    ]
    read = responses.read_responses(rollout, prompts, LETTERS.stop_ids, LETTERS.decode)
    assert read.prompts == ["c", "cc", "ad"] and read.answers == ["x", "", "y"]
    assert read.texts == ["da", "", "ccda"]
    assert read.ids == [[3, 0], [], [2, 2, 3, 0]]
    np.testing.assert_array_equal(read.lengths, [3, 1, 4])
