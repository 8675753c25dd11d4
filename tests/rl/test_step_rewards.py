"""Rewards of steps: where they are paid, what a token learns from them, and that they do not move the optimum.

Rewards of steps that add up to r(y) have the optimum of r(y): a return counts from its token on, and what was paid before does
not depend on the token. So the policy must reach pi*(y) = ref(y) exp(r(y) / beta) / Z, and does not if a step is paid before
the tokens that earn it. With its figures:

    python -m pytest tests/rl/test_step_rewards.py -m "slow or life or not slow" -n 0 -s
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import policy_losses
from jaxllm.config import InputError, load
from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.rollouts import Rollout
from jaxllm.life import Config
from jaxllm.models import scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.rl import rewards, step_rewards
from jaxllm.rl.config import PPOConfig
from jaxllm.rl.experience import StepRewards, make_experience, step_scores
from jaxllm.rl.reward_config import RewardSource
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.stages import reinforce
from tests.stages import test_objectives, worlds
from tests.stages.fixed_points import Table
from tests.stages.test_proofs import QUICK, within

ROOT = Path(__file__).parent.parent.parent
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
        StepRewards(jnp.array(steps, jnp.float32), jnp.array(steps != 0)),
        spec=worlds.run_spec(config, model),
    )
    token_rewards = paid.copy()
    token_rewards[np.arange(4), lengths - 1] += scores - paid.sum(1)
    want = np.where(mask, token_rewards[:, ::-1].cumsum(1)[:, ::-1], 0.0)
    np.testing.assert_allclose(experience.returns, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of_response", [False, True])
def test_grpo_of_steps_compares_steps_and_what_the_whole_response_is_paid(of_response):
    """Two responses to a prompt; the first ends after its last step, so that its last token ends none."""
    model = ModelConfig(
        vocab_size=6, max_length=8, num_layers=1, embed_dim=8, num_heads=2, dtype="float32"
    )
    whole = (RewardSource("length"),) if of_response else ()
    config = PPOConfig(
        rewards=(RewardSource(OF_STEPS), *whole),
        advantages="grpo_steps",
        num_responses=2,
        batch_size=2,
        num_minibatches=1,
        kl_coef=0.0,
        missing_end_score=-3.0,
        whiten_advantages=False,
        sampling=SamplingConfig(4),
    )
    rollout = Rollout(
        tokens=jnp.array([[2, 3, 3, 3, 1], [2, 3, 3, 1, 0]], jnp.int32),
        prompt_mask=jnp.ones((2, 1), bool),
        mask=jnp.array([[True] * 4, [True] * 3 + [False]]),
        logprobs=jnp.zeros((2, 4)),
        finished=jnp.ones(2, bool),
    )
    paid = jnp.array([[0.0, 1.0, 0.5, 0.0], [-2.0, 0.0, 0.25, 9.0]])
    ends = jnp.array([[False, True, True, False], [True, False, True, True]])
    scores = jnp.array([1.5, -1.75])
    if of_response:
        scores = scores + jnp.array([4.0, 3.0])
    experience, _ = make_experience(
        transformer.init(model, jax.random.key(0)),
        {},
        rollout,
        jnp.zeros((2, 4)),
        {},
        scores,
        jnp.zeros(()),
        StepRewards(paid, ends),
        spec=worlds.run_spec(config, model),
    )
    # The score of the first response is one more step of it; that of the second is paid where its last step ends.
    values = [1.0, 0.5, 4.0, -2.0, 3.25] if of_response else [1.0, 0.5, -2.0, 0.25]
    values = (np.array(values) - np.mean(values)) / np.std(values)
    if of_response:
        a, b, c, d, e = values
        want = [[a + b + c, a + b + c, b + c, c], [d + e, e, e, 0.0]]
    else:
        a, b, d, e = values
        want = [[a + b, a + b, b, 0.0], [d + e, e, e, 0.0]]
    np.testing.assert_allclose(experience.advantages, want, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize(("name", "stage"), [("steps", "ppo"), ("grpo_steps", "grpo")])
def test_the_small_configs_are_planned_with_the_reward_model_read_at_ends_of_steps(name, stage):
    life = load(Config, ROOT / "configs" / "objectives" / f"{name}.yaml")
    # A run takes the size from its tokenizer.
    life = dataclasses.replace(life, model=dataclasses.replace(life.model, vocab_size=276))
    mesh = make_mesh(MeshConfig(), jax.devices()[:8])
    programs, held = reinforce.plan(mesh, life, stage)
    times = {program.name: program.times for program in programs}
    assert times["score_steps"] == 1 and ("score" in times) == (name == "steps")
    assert "reward" in held and ("critic" in held) == (stage == "ppo")


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
    groups = {"advantages": "grpo_steps", "num_responses": 2}
    for more, message in (
        ({"kl_coef": 0.0}, "advantages: grpo_steps compares rewards of steps, and rewards names"),
        ({"rewards": steps}, "kl_coef: grpo_steps compares what is paid where steps end"),
        ({"rewards": steps, "num_responses": 1}, "num_responses: grpo_steps needs at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            PPOConfig(**(groups | more))
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


# --- GRPO of steps: its own fixed point.

GROUPS = dataclasses.replace(
    test_objectives.BASE,
    rewards=(RewardSource(OF_STEPS),),
    advantages="grpo_steps",
    num_responses=2,
    num_steps=800,
    batch_size=512,
    kl_loss_coef=1.0,
    step_marker=MARKER,
)


def step_rewards_of(space, prompt):
    """(rewards float64[N, R], where steps end bool[N, R]) of all responses of a world, counted by hand."""
    marker = worlds.LETTERS.decode(range(6)).index(MARKER)
    ends = space.mask & (space.tokens == marker)
    paid = np.zeros(ends.shape)
    for n, (text, length) in enumerate(zip(space.texts, space.mask.sum(1), strict=True)):
        if not text.endswith(MARKER):
            ends[n, length - 1] = True
        steps = [step + MARKER for step in text.split(MARKER)[:-1]]
        if not text.endswith(MARKER):
            steps.append(text.split(MARKER)[-1])
        paid[n, ends[n]] = paid_by_step(prompt, steps, "")
        if not space.finished[n]:
            paid[n, length - 1] += GROUPS.missing_end_score - paid[n].sum()
    return paid, ends


def compared(paid, ends):
    """The advantages float64[N, N, R] of response n beside response m."""
    N, R = paid.shape
    advantages = np.zeros((N, N, R))
    for n in range(N):
        for m in range(N):
            values = np.concatenate([paid[n, ends[n]], paid[m, ends[m]]])
            normalized = (paid[n] - values.mean()) / (values.std() + 1e-6)
            normalized = np.where(ends[n] & (np.ptp(values) > 0), normalized, 0.0)
            advantages[n, m] = normalized[::-1].cumsum()[::-1]
    return advantages


def beside_each_other(prompt, space):
    """The expected advantage float64[N, R], for two responses to a prompt."""
    advantages = compared(*step_rewards_of(space, prompt))
    return lambda policy, sampler: np.einsum("nmt,m->nt", advantages, sampler.probs)


def grpo_of_steps(note):
    """Total variation to the fixed point, the larger of the two prompts'."""
    objective = test_objectives.Objective(GROUPS)
    world = test_objectives.make_world(objective)
    table, points = Table(world.space), []
    for prompt in worlds.PROMPTS:
        text = worlds.LETTERS.decode(prompt)
        points.append(
            table.rest(
                test_objectives.probs(world, world.ref, prompt),
                beside_each_other(text, world.space),
                kl_loss_coef=GROUPS.kl_loss_coef,
                kl_loss=GROUPS.kl_loss,
                loss_mean=GROUPS.loss_mean,
            )
        )
    start = test_objectives.worst(world, world.ref, points)
    end = test_objectives.worst(world, world.train(), points)
    print(f"\nGRPO of steps, {note}: total variation {start:.3f} -> {end:.4f}", flush=True)
    assert start > 0.15  # there was something to learn
    return end


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_well")
def test_grpo_of_steps_reaches_its_own_fixed_point():
    assert grpo_of_steps("no mistake") <= test_objectives.LIMIT


def _of_its_own_step_only(rewards, ends, num_responses):
    to_go = _right_advantages(rewards, ends, num_responses)
    return to_go - jnp.pad(to_go[:, 1:], ((0, 0), (0, 1)))


_right_advantages = policy_losses.step_advantages


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_well")
def test_without_the_rewards_of_later_steps_the_fixed_point_is_missed(monkeypatch):
    monkeypatch.setattr(policy_losses, "step_advantages", _of_its_own_step_only)
    assert not grpo_of_steps("the end of each step alone") <= test_objectives.LIMIT


def _at_once(ids, length, marker, decode):
    return [0] * len(step_rewards.split(decode(ids), marker))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_well")
def test_with_every_step_paid_at_the_first_token_the_optimum_is_missed(monkeypatch):
    monkeypatch.setattr(step_rewards, "ends_of", _at_once)
    assert not within(distance("all paid at the first token"))
