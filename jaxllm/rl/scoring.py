"""The score of a response: the weighted sum of the configured reward terms."""

from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.loader import PromptExample
from jaxllm.engine.rollouts import Rollout, cut_at_strings
from jaxllm.losses import Metrics
from jaxllm.rl import rewards, step_rewards
from jaxllm.rl.experience import StepRewards
from jaxllm.rl.programs import UpdatePrograms
from jaxllm.rl.responses import Responses, read_responses
from jaxllm.rl.reward_config import OVERLONG, RewardSource
from jaxllm.rl.roles import FrozenModels, RunSpec
from jaxllm.rl.update import RunProgram, Scorer
from jaxllm.runtime.transfer import fetch
from jaxllm.sharding import activation

# Of each source, float32[B].
Terms = dict[RewardSource, jax.Array]


def make_scorer(
    spec: RunSpec,
    programs: UpdatePrograms,
    frozen: FrozenModels,
    decode: Callable[[Sequence[int]], str],
    mesh: jax.sharding.Mesh,
    field: str,
) -> Scorer:
    """A function that scores responses by every configured source.

    Args:
      decode: token ids -> text, for the sources that read text.
      field: the config field that names the sources, for error messages.

    Raises:
      InputError: where a source is not a function that can be imported.
    """
    sources = spec.config.rewards
    names = rewards.metric_names(sources)
    pays_steps = spec.config.pays_steps
    score_texts = _text_scorer(sources, activation(mesh, "batch"), field)
    score_steps = step_rewards.make_scorer(spec, programs, frozen, decode, mesh, field)
    score_arrays = _array_scorer(sources, programs, frozen)
    reads_text = pays_steps or any(source.reads_text for source in sources)

    def score(
        run: RunProgram, rollout: Rollout, prompts: Sequence[PromptExample]
    ) -> tuple[jax.Array, StepRewards | None, Metrics]:
        terms = score_arrays(run, rollout)
        steps = None
        if reads_text:
            responses = read_responses(rollout, prompts, spec.stop_ids, decode)
            terms |= score_texts(responses)
            if pays_steps:
                of_steps, ends = score_steps(run, rollout, responses)
                terms |= {source: paid.sum(1) for source, paid in of_steps.items()}
                paid = sum(source.weight * paid for source, paid in of_steps.items())
                steps = StepRewards(cast(jax.Array, paid), ends)
        # Summed in the order of the config: floating-point addition depends on it.
        total, metrics = jnp.zeros_like(rollout.finished, jnp.float32), {}
        for source, name in zip(sources, names, strict=True):
            total = total + source.weight * terms[source]
            metrics[f"reward_{name}"] = (terms[source].sum(), jnp.float32(len(prompts)))
        return total, steps, metrics

    return score


def _text_scorer(
    sources: Sequence[RewardSource], rows: jax.sharding.NamedSharding, field: str
) -> Callable[[Responses], Terms]:
    """The terms that are functions of text, computed on the host."""
    functions = {source: rewards.resolve(source, field) for source in sources if source.reads_text}

    def score(responses: Responses) -> Terms:
        terms = {}
        for source, function in functions.items():
            scores = function(responses.prompts, responses.texts, responses.answers)
            terms[source] = jax.device_put(scores.astype(np.float32), rows)
        return terms

    return score


def _array_scorer(
    sources: Sequence[RewardSource], programs: UpdatePrograms, frozen: FrozenModels
) -> Callable[[RunProgram, Rollout], Terms]:
    """The terms that are computed where the responses are: by the reward model, and from lengths."""
    # A fraction of the longest response, so that the weight means the same for any length.
    length = jax.jit(lambda mask: mask.astype(jnp.float32).mean(1))
    too_long = jax.jit(overlong, static_argnums=1)

    def score(run: RunProgram, rollout: Rollout) -> Terms:
        terms = {}
        for source in sources:
            if source.source == "model":
                terms[source] = run(programs.reward, frozen.reward, rollout)
            elif source.source == "length":
                terms[source] = length(rollout.mask)
            elif source.source.startswith(OVERLONG):
                buffer = int(source.source.removeprefix(OVERLONG))
                terms[source] = too_long(rollout.mask, buffer)
        return terms

    return score


def overlong(mask: jax.Array, buffer: int) -> jax.Array:
    """Falls from 0 to -1 over the last `buffer` tokens that a response may have (Yu et al. 2025, eq. 13).

    mask: bool[B, R]. Returns float32[B].
    """
    beyond = mask.astype(jnp.float32).sum(1) - (mask.shape[1] - buffer)
    return -jnp.clip(beyond / buffer, 0.0, 1.0)


def end_at_strings(
    rollout: Rollout, spec: RunSpec, decode: Callable[[Sequence[int]], str]
) -> Rollout:
    """Cuts responses at the configured stop strings; without any the rollout stays on its devices."""
    strings = spec.config.stop_strings
    if not strings:
        return rollout
    cut = cut_at_strings(fetch(rollout), strings, decode)
    # The tokens stay; what the mask leaves out is neither scored nor learned from.
    return rollout._replace(
        mask=jax.device_put(cut.mask, rollout.mask.sharding),
        finished=jax.device_put(cut.finished, rollout.finished.sharding),
    )
