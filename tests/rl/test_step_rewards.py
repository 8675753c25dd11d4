"""Rewards of steps: where they are paid, what a token learns from them, and that they do not move the optimum.

Rewards of steps that add up to r(y) have the optimum of r(y): a return counts from its token on, and what was paid before does
not depend on the token. So the policy must reach pi*(y) = ref(y) exp(r(y) / beta) / Z, and does not if a step is paid before
the tokens that earn it. With its figures:

    python -m pytest tests/rl/test_step_rewards.py -m "slow or life or not slow" -n 0 -s
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import InputError
from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.rollouts import Rollout
from jaxllm.models import scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.rl import rewards, step_rewards
from jaxllm.rl.config import PPOConfig
from jaxllm.rl.experience import make_experience, step_scores
from jaxllm.rl.reward_config import RewardSource
from tests.stages import worlds
from tests.stages.test_proofs import QUICK, within

MARKER = "c"
OF_STEPS = "steps:tests.rl.test_step_rewards:paid_by_step"


def paid_by_step(prompt, steps, answer):
    """Anything that a step and what precedes it decide."""
    del answer
    return [np.cos(3.0 * len(prompt) + 5.0 * n + 7.0 * len(step)) for n, step in enumerate(steps)]


def the_rest(prompt, response, answer):
    """What `worlds.REWARDS` has left."""
    steps = step_rewards.split(response, MARKER)
    return worlds.REWARDS[prompt, response] - sum(paid_by_step(prompt, steps, answer))


def one_each(prompt, steps, answer):
    del prompt, answer
    return [1.0 for _ in steps]


def one_in_all(prompt, steps, answer):
    del prompt, steps, answer
    return [1.0]


PIECES = ["", "x", "y\n", "\n", "a\n\nb", "|", "|\n|"]


@pytest.mark.parametrize("marker", ["\n", "|", "\n|"])
def test_steps_are_the_text_and_end_with_the_token_that_completes_their_marker(marker):
    """Tokens of any text, some with two markers, some with half of one: compared by counting characters."""
    rng = np.random.default_rng(0)
    decode = lambda ids: "".join(PIECES[i] for i in ids)
    seen = 0
    for _ in range(300):
        ids = rng.integers(0, len(PIECES), rng.integers(0, 9)).tolist()
        text, ends_itself = decode(ids), int(rng.integers(0, 2))
        steps = step_rewards.split(text, marker)
        assert "".join(steps) == text and all(step.count(marker) <= 1 for step in steps)
        ends = step_rewards.ends_of(ids, len(ids) + ends_itself, marker, decode)
        characters = np.cumsum([len(PIECES[i]) for i in ids])
        want, read = [], 0
        for step in steps:
            read += len(step)
            complete = step.endswith(marker)
            last = len(ids) + ends_itself - 1
            want.append(int(np.searchsorted(characters, read)) if complete else last)
        assert ends == want
        seen += len(steps) > 2
    assert seen > 50


def test_a_token_learns_from_the_rewards_of_its_own_step_and_later_ones():
    """Returns with lambda 1, against sums in NumPy; a response without an end has its set score in all."""
    model = ModelConfig(
        vocab_size=6, max_length=8, num_layers=1, embed_dim=8, num_heads=2, dtype="float32"
    )
    config = PPOConfig(
        batch_size=4,
        kl_coef=0.0,
        gae_lambda=1.0,
        whiten_advantages=False,
        missing_end_score=-3.0,
        sampling=SamplingConfig(5),
    )
    params = transformer.init(model, jax.random.key(0))
    lengths, finished = np.array([5, 3, 1, 5]), np.array([True, True, True, False])
    mask = np.arange(5)[None] < lengths[:, None]
    rng = np.random.default_rng(1)
    steps = rng.normal(size=(4, 5)) * (rng.random((4, 5)) < 0.5)
    steps[:, 0] = 0.3
    paid = np.where(mask, steps, 0.0)
    scores = np.where(finished, rng.normal(size=4) + paid.sum(1), -3.0)
    rollout = Rollout(
        tokens=jnp.array(rng.integers(0, 6, (4, 7)), jnp.int32),
        prompt_mask=jnp.ones((4, 2), bool),
        mask=jnp.array(mask),
        logprobs=jnp.zeros((4, 5)),
        finished=jnp.array(finished),
    )
    arrays = (jnp.zeros((4, 5)), jnp.zeros((4, 5)), jnp.array(scores, jnp.float32), jnp.zeros(()))
    experience, _ = make_experience(
        params,
        {},
        rollout,
        *arrays,
        jnp.array(steps, jnp.float32),
        spec=worlds.run_spec(config, model),
    )
    token_rewards = paid.copy()
    token_rewards[np.arange(4), lengths - 1] += scores - paid.sum(1)
    want = np.where(mask, token_rewards[:, ::-1].cumsum(1)[:, ::-1], 0.0)
    np.testing.assert_allclose(experience.returns, want, rtol=1e-5, atol=1e-6)


def test_a_reward_model_is_read_at_the_ends_of_steps():
    model = ModelConfig(
        vocab_size=6, max_length=8, num_layers=1, embed_dim=8, num_heads=2, dtype="float32"
    )
    params = scalar.init(transformer.init(model, jax.random.key(0)), model, jax.random.key(1))
    params["head"]["kernel"] = jax.random.normal(jax.random.key(2), (8,))
    tokens = jnp.array([[0, 3, 4, 5, 2, 1, 0], [2, 3, 5, 5, 2, 4, 1]], jnp.int32)
    rollout = Rollout(
        tokens=tokens,
        prompt_mask=jnp.array([[False, True], [True, True]]),
        mask=jnp.array([[True] * 4 + [False], [True] * 5]),
        logprobs=jnp.zeros((2, 5)),
        finished=jnp.ones(2, bool),
    )
    ends = np.zeros((2, 5), bool)
    ends[0, [1, 3]] = ends[1, [0, 4]] = True
    found = step_scores(params, rollout, jnp.array(ends), model=model)
    assert not np.any(np.asarray(found)[~ends])
    for row, begin in ((0, 1), (1, 0)):
        for place in np.flatnonzero(ends[row]):
            alone = tokens[row : row + 1, begin : 2 + place + 1]
            want = scalar.apply(params, model, alone, jnp.ones_like(alone))[0, -1]
            np.testing.assert_allclose(found[row, place], want, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("steps:tests.rl.test_step_rewards:one_in_all", "1 scores for 2 steps"),
        ("steps:jaxllm.demo.annotators:keyword_sentiment", "takes prompt, steps, answer"),
        ("steps:tests.rl.test_step_rewards:nothing", "no function 'nothing'"),
    ],
)
def test_a_wrong_function_is_one_line(source, message):
    with pytest.raises(InputError, match=message):
        rewards.resolve_steps(RewardSource(source), "ppo.rewards")(["q"], [["a\n", "b"]], [""])


def test_settings_that_make_no_sense_are_one_line():
    steps = (RewardSource(OF_STEPS),)
    for more in ({"normalize_scores": True}, {"score_clip": 1.0}):
        with pytest.raises(ValueError, match="normalize_scores: it and score_clip"):
            PPOConfig(rewards=steps, **more)
    with pytest.raises(ValueError, match="step_marker: "):
        PPOConfig(step_marker="")
    with pytest.raises(ValueError, match="source: give model"):
        RewardSource("steps:")


# More updates than without rewards of steps, which are noise until the critic knows them.
CONFIG = dataclasses.replace(
    QUICK,
    num_steps=300,
    rewards=(RewardSource(OF_STEPS), RewardSource("tests.rl.test_step_rewards:the_rest")),
    step_marker=MARKER,
    sampling=SamplingConfig(3, 0.7),
)


def distance(note):
    """(total variation to pi*, gap) of the policy that learned from rewards of steps."""
    size = {"vocab": 3, "length": 3, "layers": 1, "devices": 1, "reward_scale": 0.7}
    world = worlds.World(CONFIG, 0, **size)
    end = world.distances(world.train())
    print(f"\nrewards of steps, {note}: total variation {end[0]:.4f}, gap {end[1]:.4f}", flush=True)
    return end


@pytest.mark.life
@pytest.mark.usefixtures("compiled_well")
def test_the_optimum_is_that_of_the_sum():
    assert within(distance("no mistake"))


def _at_once(ids, length, marker, decode):
    return [0] * len(step_rewards.split(decode(ids), marker))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_well")
def test_with_every_step_paid_at_the_first_token_the_optimum_is_missed(monkeypatch):
    monkeypatch.setattr(step_rewards, "ends_of", _at_once)
    assert not within(distance("all paid at the first token"))
