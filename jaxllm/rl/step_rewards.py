"""Rewards of steps: a response is cut into steps at a marker, and each step is paid where it ends.

With the marker "\\n", and the token ids a b e of "2+2", "=4\\n" and "so 4":

    steps   "2+2=4\\n"   "so 4"
    ends    . 1 1                   and with the token that ends the response:  . 1 . 1

Shapes: B rows, R response positions.
"""

import bisect
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxllm.engine.rollouts import Rollout
from jaxllm.rl import rewards
from jaxllm.rl.programs import UpdatePrograms
from jaxllm.rl.responses import Responses
from jaxllm.rl.reward_config import RewardSource
from jaxllm.rl.roles import FrozenModels, RunSpec
from jaxllm.rl.update import RunProgram
from jaxllm.sharding import activation

# (run, rollout, its responses) -> ({source: rewards float32[B, R]}, whether a step ends bool[B, R])
StepScorer = Callable[
    [RunProgram, Rollout, Responses], tuple[dict[RewardSource, jax.Array], jax.Array]
]


def split(text: str, marker: str) -> list[str]:
    """The steps of a response, each with the marker that ends it; one, perhaps empty, at least."""
    pieces = text.split(marker)
    steps = [piece + marker for piece in pieces[:-1]]
    # What follows the last marker is a step too, unless it is nothing.
    return [*steps, pieces[-1]] if pieces[-1] or not steps else steps


def ends_of(
    ids: Sequence[int], length: int, marker: str, decode: Callable[[Sequence[int]], str]
) -> list[int]:
    """The position of the token that ends each step: the one that completes its marker, or the response's last.

    Args:
      ids: tokens of the response, without the one that ends it.
      length: tokens of the response, with it.
    """

    def markers(count: int) -> int:
        return decode(ids[:count]).count(marker)

    positions = []
    for number, step in enumerate(split(decode(ids), marker), 1):
        if step.endswith(marker):
            # The number of markers in a prefix grows with it, so that its first n is found by bisection.
            count = bisect.bisect_left(range(len(ids) + 1), number, key=markers)
            positions.append(count - 1)
        else:
            positions.append(length - 1)
    return positions


def make_scorer(
    spec: RunSpec,
    programs: UpdatePrograms,
    frozen: FrozenModels,
    decode: Callable[[Sequence[int]], str],
    mesh: jax.sharding.Mesh,
    field: str,
) -> StepScorer:
    """A function that gives the rewards of steps, each at the token that ends its step; arguments as in `scoring`.

    Raises:
      InputError: where a source is not a function that can be imported.
    """
    sources = [source for source in spec.config.rewards if source.pays_steps]
    functions = {
        source: rewards.resolve_steps(source, field)
        for source in sources
        if source.source != "model_steps"
    }
    marker = spec.config.step_marker
    rows = activation(mesh, "batch")

    def score(
        run: RunProgram, rollout: Rollout, responses: Responses
    ) -> tuple[dict[RewardSource, jax.Array], jax.Array]:
        steps = [split(text, marker) for text in responses.texts]
        ends = [
            ends_of(ids, int(length), marker, decode)
            for ids, length in zip(responses.ids, responses.lengths, strict=True)
        ]
        shape = rollout.mask.shape
        ones = [np.ones(len(positions)) for positions in ends]
        at_ends = jax.device_put(_at_ends(ends, ones, shape) > 0, rows)
        terms = {}
        for source in sources:
            if source in functions:
                values = functions[source](responses.prompts, steps, responses.answers)
                terms[source] = jax.device_put(_at_ends(ends, values, shape), rows)
            else:
                terms[source] = run(programs.step_scores, frozen.reward, rollout, at_ends)
        return terms, at_ends

    return score


def _at_ends(
    ends: Sequence[Sequence[int]], values: Sequence[np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """float32[B, R] with the values of each row's steps at the positions where they end, and 0 elsewhere."""
    placed = np.zeros(shape, np.float32)
    for row, (positions, paid) in enumerate(zip(ends, values, strict=True)):
        for position, reward in zip(positions, paid, strict=True):
            # Two steps may end with one token, which is then paid for both.
            placed[row, position] += reward
    return placed
