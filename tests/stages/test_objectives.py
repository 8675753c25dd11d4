"""Each objective reaches the fixed point that is derived for it (`fixed_points`), and with one mistake does not.

With the KL in the reward, pi* makes every advantage zero, whatever the objective does with it. So here the KL is in the
loss, as k2, where each objective comes to rest somewhere else. Every response is listed, prompts are padded, responses
end early or never, at temperature 0.7. All of it, with its figures:

    python -m pytest tests/stages/test_objectives.py -m "slow or not slow" -n 0 -s
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import losses, policy_losses
from jaxllm.config import InputError, load
from jaxllm.engine.config import SamplingConfig
from jaxllm.life import Config
from jaxllm.optim_config import OptimConfig
from jaxllm.rl import dynamic_sampling
from jaxllm.rl.config import PPOConfig
from jaxllm.rl.layouts import STAY, MeshProgram
from jaxllm.rl.reward_config import RewardSource
from jaxllm.rl.scoring import overlong
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.stages import reinforce
from tests.stages import worlds
from tests.stages.fixed_points import Policy, Table, total_variation

compiled_well = pytest.mark.usefixtures("compiled_well")
slow = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
LIMIT = 0.03  # total variation to the fixed point
BETA = 0.4
BASE = PPOConfig(
    rewards=(RewardSource("tests.stages.worlds:reward_of"),),
    advantages="rloo",
    num_responses=16,
    num_steps=250,
    batch_size=256,
    num_epochs=1,
    num_minibatches=1,
    kl_coef=0.0,
    kl_loss_coef=BETA,
    kl_loss="k2",
    missing_end_score=-0.35,
    whiten_advantages=False,
    max_prompt_length=4,
    sampling=SamplingConfig(3, 0.7),
    actor=OptimConfig(
        learning_rate=3e-3,
        schedule="linear",
        final_fraction=0.0,
        weight_decay=0.0,
        eps=1e-5,
        b2=0.99,
    ),
)
# (rewards float64[N] of a prompt's responses, responses to a prompt) -> (policy, sampler's) -> advantages
Advantage = Callable[[np.ndarray, int], Callable[[Policy, Policy], np.ndarray]]


def centered(reward, K):
    """RLOO: the mean of the others is the sampler's expectation."""
    del K
    return lambda policy, sampler: reward - (sampler.probs * reward).sum()


def shrunk(reward, K):
    """Dr. GRPO: a response is part of the mean it is compared with."""
    return lambda policy, sampler: (1.0 - 1.0 / K) * centered(reward, K)(policy, sampler)


def signs(reward, K):
    """GRPO with two responses to a prompt: the difference over its own size."""
    assert K == 2
    better = np.sign(reward[:, None] - reward[None])
    return lambda policy, sampler: better @ sampler.probs


class Objective(NamedTuple):
    """An objective, and what is known about where it ends."""

    config: PPOConfig
    advantage: Advantage = centered
    world: Mapping[str, Any] = {}
    """Arguments of the world."""
    sharpness: float = 1.0
    """The sampler's logits are the policy's times this."""


def changed(**more):
    return dataclasses.replace(BASE, **more)


GSPO = changed(ratio="sequence", loss_mean="response", num_minibatches=2)
# Advantages that are divided by their own deviation grow as a policy becomes sure: at 3e-3 one ended far away in another world.
REINFORCE_PP = changed(
    advantages="reinforce_pp",
    num_responses=4,
    kl_loss_coef=1.0,
    num_steps=500,
    batch_size=512,
    actor=dataclasses.replace(BASE.actor, learning_rate=1e-3),
)
TIES = {"reward_digits": 0, "reward_scale": 1.0}  # rewards are integers, and often equal
DROPPING = changed(num_responses=2, sampling_rounds=6, kl_loss_coef=1.5)
# In some worlds 250 updates of 256 responses end beside a fixed point that these reach.
LONGER = {"num_steps": 800, "batch_size": 512}
CORRECTED = changed(sampler_correction="sequence", sampler_cap=20.0, **LONGER)
OBJECTIVES = {
    "gspo": Objective(dataclasses.replace(GSPO, kl_loss_coef=0.5, batch_size=512)),
    # Closer, so that a mean over tokens, whose fixed point is not far, shows.
    "gspo, longer": Objective(dataclasses.replace(GSPO, **LONGER)),
    "cispo": Objective(changed(surrogate="cispo", clip_low=1.0, num_minibatches=2, **LONGER)),
    "dr_grpo": Objective(
        changed(advantages="dr_grpo", num_responses=2, loss_mean="constant", **LONGER), shrunk
    ),
    "reinforce_pp": Objective(REINFORCE_PP),
    "dropping": Objective(DROPPING, world=TIES),
    "corrected by response": Objective(CORRECTED, sharpness=0.5),
    "corrected by token": Objective(
        dataclasses.replace(CORRECTED, sampler_correction="token"), sharpness=0.5
    ),
    "not corrected": Objective(changed(**LONGER), sharpness=0.5),
    # As published, with two responses to a prompt: noise that takes longer to still.
    "grpo": Objective(
        changed(
            advantages="grpo",
            num_responses=2,
            kl_loss="k3",
            loss_mean="response",
            **LONGER,
        ),
        signs,
    ),
    "dapo": Objective(
        changed(
            advantages="grpo",
            num_responses=2,
            clip_high=0.28,
            sampling_rounds=6,
            kl_loss_coef=1.5,
            num_minibatches=2,
            **LONGER,
        ),
        signs,
        TIES,
    ),
}


def make_world(objective: Objective, seed: int = 0) -> worlds.World:
    arguments = {"vocab": 3, "length": 3, "layers": 1, "devices": 1, "reward_scale": 0.7} | dict(
        objective.world
    )
    world = worlds.World(objective.config, seed=seed, **arguments)

    def sharpened(params, base):
        head = {"tokens": params["head"]["tokens"] * objective.sharpness}
        return {**world.spec.policy(params, base), "head": head}

    if objective.sharpness != 1:
        weights = MeshProgram(
            "weights", sharpened, world.mesh, world.mesh, (STAY, STAY), computes=False
        )
        world.programs = world.programs._replace(weights=weights)
    return world


def kept(reward):
    """Probability that another response has another reward, for two responses to a prompt."""
    differ = (reward[:, None] != reward[None]).astype(float)
    return lambda policy: differ @ policy.probs


def fixed_points(world: worlds.World, objective: Objective) -> list[np.ndarray]:
    """Of each prompt."""
    config, table, points = objective.config, Table(world.space), []
    for prompt, reward in zip(worlds.PROMPTS, world.reward_rows, strict=True):
        arguments = dict[str, Any](correction=config.sampler_correction)
        if config.sampling_rounds > 1:
            arguments["kept"] = kept(reward)
        if objective.sharpness != 1:
            arguments["sampler"] = lambda logits: objective.sharpness * logits
        points.append(
            table.rest(
                probs(world, world.ref, prompt),
                objective.advantage(reward, config.num_responses),
                kl_loss_coef=config.kl_loss_coef,
                kl_loss=config.kl_loss,
                loss_mean=config.loss_mean,
                **arguments,
            )
        )
    return points


def normalized_fixed_points(world: worlds.World, config: PPOConfig) -> list[np.ndarray]:
    """Of REINFORCE++ with a baseline: `shrunk` advantages over their deviation in the whole batch, which is that of the
    fixed point itself."""
    K, length, deviation = config.num_responses, Table(world.space).length, 1.0
    advantage = lambda reward, K: (
        lambda policy, sampler: shrunk(reward, K)(policy, sampler) / deviation
    )
    for _ in range(12):
        points = fixed_points(world, Objective(config, advantage))
        tokens = mean = square = 0.0
        for point, reward in zip(points, world.reward_rows, strict=True):
            above = reward - (point * reward).sum()
            # The mean of a group moves with the other responses of it.
            spread = (K - 1) / K**2 * (point * above**2).sum()
            tokens += (point * length).sum()
            mean += (point * length * (1 - 1 / K) * above).sum()
            square += (point * length * (((1 - 1 / K) * above) ** 2 + spread)).sum()
        last, deviation = deviation, np.sqrt(square / tokens - (mean / tokens) ** 2)
        if abs(deviation - last) < 1e-4:
            return points
    raise AssertionError("the deviation does not settle")


def probs(world, params, prompt):
    return np.exp(world.space.logprobs(params, world.model, prompt, 0.7))


def worst(world, params, points):
    """The larger total variation of the two prompts."""
    return max(
        total_variation(probs(world, params, prompt), point)
        for prompt, point in zip(worlds.PROMPTS, points, strict=True)
    )


def reached(name: str, note: str = "", seed: int = 0) -> float:
    """Total variation of the trained policy to the objective's fixed point; another seed is another world."""
    objective = OBJECTIVES[name]
    world = make_world(objective, seed)
    if objective.config.advantages == "reinforce_pp":
        points = normalized_fixed_points(world, objective.config)
    else:
        points = fixed_points(world, objective)
    start = worst(world, world.ref, points)
    end = worst(world, world.train(), points)
    print(
        f"\n{name}{note}, seed {seed}: total variation to its fixed point {start:.3f} -> {end:.4f}",
        flush=True,
    )
    assert start > 0.15  # there was something to learn
    return end


IN_TWO_WORLDS = ("gspo", "cispo", "dr_grpo", "reinforce_pp", "dropping", "corrected by response")


def proofs():
    """(objective, seed of the world); the quickest of them are in the tier `life`."""
    for name in OBJECTIVES:
        for seed in (0, 1) if name in IN_TWO_WORLDS else (0,):
            quick = name in ("gspo", "dropping") and seed == 0
            yield pytest.param(name, seed, marks=pytest.mark.life if quick else slow)


@compiled_well
@pytest.mark.parametrize(("name", "seed"), [*proofs()])
def test_an_objective_reaches_its_own_fixed_point(name, seed):
    assert reached(name, seed=seed) <= LIMIT


def test_fixed_points_that_have_a_formula_are_those():
    """With the KL in the reward it is pi* for any share of tokens and any sampler; with k2, RLOO's is a softmax."""
    space, rng = worlds.Responses(3, 3), np.random.default_rng(0)
    table = Table(space)
    ref = table.policy(rng.normal(size=(table.num_states, 3))).probs
    reward = rng.normal(size=len(ref))
    best = ref * np.exp(reward / BETA)
    best /= best.sum()

    def penalized(policy, sampler):
        return centered(reward - BETA * np.log(policy.probs / ref), 2)(policy, sampler)

    flatter = dict[str, Any](sampler=lambda logits: 0.5 * logits)
    for more in ({}, dict[str, Any](loss_mean="response"), flatter):
        assert total_variation(table.rest(ref, penalized, **more), best) < 1e-6
    point = table.rest(ref, centered(reward, 2), kl_loss_coef=BETA)
    steps, start = table.policy(table.logits_of(point)), table.policy(table.logits_of(ref))
    for state in range(table.num_states):
        # pi(a | s) is ref(a | s) exp(E[r | s, a] / beta), normalized.
        there = (table.state == state) & table.mask
        worth = np.zeros(3)
        for token in range(3):
            rows = (there & (table.tokens == token)).any(1)
            worth[token] = (point * reward)[rows].sum() / point[rows].sum()
        want = start.steps[state] + worth / BETA
        want -= np.log(np.exp(want).sum())
        np.testing.assert_allclose(steps.steps[state], want, atol=1e-5)


def test_the_fixed_points_of_the_corrections_are_far_apart():
    """Otherwise the tests above would not tell them from each other."""
    names = ("corrected by response", "corrected by token", "not corrected")
    world = make_world(OBJECTIVES["not corrected"])
    plain = fixed_points(world, Objective(BASE))
    first, *others = (fixed_points(world, OBJECTIVES[name]) for name in names)
    distance = lambda points: max(map(total_variation, points, plain))
    assert distance(first) < 1e-5 and min(map(distance, others)) > 0.1


@slow
@compiled_well
@pytest.mark.parametrize("mistake", [False, True])
def test_reinforce_pp_with_the_kl_in_the_reward_reaches_the_optimum(mistake, monkeypatch):
    """One response to a prompt; at pi* what is left of a response promises the same after any token."""
    config = changed(
        advantages="reinforce_pp", num_responses=1, kl_coef=0.5, kl_loss_coef=0.0, num_steps=300
    )
    if mistake:
        past = lambda rewards, mask, K: jnp.where(mask, jnp.cumsum(rewards, axis=1), 0.0)
        monkeypatch.setattr(policy_losses, "rewards_to_go", past)
    world = make_world(Objective(config))
    far, _ = world.distances(world.train())
    print(f"\nreinforce_pp, one response, mistake {mistake}: total variation to pi* {far:.4f}")
    assert (far <= LIMIT) == (not mistake)


def _mean_over_tokens(x, mask, loss_mean):
    del loss_mean
    return jnp.where(mask, x, 0.0).sum()


_right_weights, _right_replace = policy_losses.truncated_weights, dynamic_sampling._replace
_right_groups = policy_losses.group_advantages


def _scores_stay(batch, *more):
    return _right_replace(batch, *more)._replace(scores=batch.scores)


# Mistake -> (objective, module or table, what is wrong in it)
MISTAKES = {
    "each token counts once": ("gspo, longer", policy_losses, {"total": _mean_over_tokens}),
    "ratio upside down": (
        "gspo",
        policy_losses.RATIOS,
        {"sequence": lambda x, mask: -policy_losses._of_responses(x, mask)},
    ),
    "gradient of the weight": (
        "cispo",
        policy_losses.SURROGATES,
        {"cispo": lambda logprobs, ratio, clipped, advantages: clipped * advantages * logprobs},
    ),
    "divided by the deviation": (
        "dr_grpo",
        policy_losses,
        {"group_advantages": lambda scores, kind: _right_groups(scores, "grpo")},
    ),
    "not normalized": (
        "reinforce_pp",
        losses,
        {"whiten": lambda x, mask: jnp.where(mask, x, 0.0)},
    ),
    "scores stay with their places": ("dropping", dynamic_sampling, {"_replace": _scores_stay}),
    "weights upside down": (
        "corrected by response",
        policy_losses,
        {"truncated_weights": lambda p, q, mask, **more: _right_weights(q, p, mask, **more)},
    ),
    "weights cut at 1": (
        "corrected by response",
        policy_losses,
        {
            "truncated_weights": lambda p, q, mask, level, cap: _right_weights(
                p, q, mask, level=level, cap=1.0
            )
        },
    ),
}


@slow
@compiled_well
@pytest.mark.parametrize("mistake", MISTAKES)
def test_with_one_mistake_the_fixed_point_is_missed(mistake, monkeypatch):
    name, home, wrong = MISTAKES[mistake]
    for key, value in wrong.items():
        if isinstance(home, dict):
            monkeypatch.setitem(home, key, value)
        else:
            monkeypatch.setattr(home, key, value)
    assert not reached(name, f", mistake: {mistake}") <= LIMIT


# --- Dynamic sampling: what is kept, and that a resumed run keeps the same.


UNFINISHED = 9.0  # what the terms say of responses that do not end


def sampled(scores, first):
    """Groups of two responses with these scores, the tokens of row i being first + i."""
    flat = np.array(scores, np.float32).reshape(-1)
    names = first + np.arange(len(flat), dtype=np.int32)
    rollout = dynamic_sampling.Rollout(
        tokens=jnp.array(names[:, None]),
        prompt_mask=jnp.ones((len(flat), 0), bool),
        mask=jnp.ones((len(flat), 1), bool),
        logprobs=jnp.zeros((len(flat), 1)),
        finished=jnp.array(flat != UNFINISHED),
    )
    return dynamic_sampling.Sampled(rollout, jnp.array(flat), [f"prompt {n // 2}" for n in names])  # pyright: ignore[reportArgumentType]


def exchange(pair, rows):
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[rows], *pair)


@pytest.mark.parametrize(
    ("rounds", "kept_groups"), [(1, [0, 1, 2]), (2, [0, 11, 2]), (3, [0, 11, 20])]
)
def test_groups_without_spread_give_way_in_order(rounds, kept_groups):
    """A response that did not end has the score -1, whatever its terms say."""
    later = {
        1: sampled([[0, 0], [0, 1], [UNFINISHED, -1]], first=20),
        2: sampled([[1, 0], [0, 1], [1, 0]], first=40),
    }
    config = changed(num_responses=2, sampling_rounds=rounds, missing_end_score=-1.0)
    terms = {"reward": (jnp.float32(1.0), jnp.float32(6.0))}
    batch, metrics = dynamic_sampling.fill(
        sampled([[1, 0], [1, 1], [UNFINISHED, UNFINISHED]], first=0),
        terms,
        lambda round_: (later[round_], terms),
        exchange,
        config,
    )
    assert batch.rollout.tokens[::2, 0].tolist() == [2 * group for group in kept_groups]
    assert batch.rollout.tokens[1::2, 0].tolist() == [2 * group + 1 for group in kept_groups]
    assert batch.prompts == [f"prompt {group}" for group in kept_groups for _ in range(2)]
    scores = {0: [1, 0], 1: [1, 1], 2: [UNFINISHED, UNFINISHED], 11: [0, 1], 20: [1, 0]}
    np.testing.assert_array_equal(
        batch.scores.reshape(-1, 2), [scores[group] for group in kept_groups]
    )
    plain = {name: tuple(map(float, pair)) for name, pair in metrics.items()}
    assert plain["reward"] == (rounds, 6.0 * rounds)
    assert plain["sampling_rounds"] == (rounds, 1.0)
    assert plain["no_spread"] == ({1: 2, 2: 4, 3: 4}[rounds], 3.0 * rounds)
    assert plain["no_spread_kept"] == ({1: 2, 2: 1, 3: 0}[rounds], 3.0)


EVERY_PIECE = dataclasses.replace(
    DROPPING,
    advantages="dr_grpo",
    ratio="sequence",
    surrogate="cispo",
    loss_mean="constant",
    sampler_correction="sequence",
    rewards=(RewardSource("tests.stages.worlds:reward_of"), RewardSource("overlong:2", 0.5)),
    normalize_scores=True,
    batch_size=32,
    num_epochs=2,
    num_minibatches=2,
    num_micro=2,
)


@pytest.mark.parametrize(
    "advantages", ["dr_grpo", pytest.param("reinforce_pp", marks=pytest.mark.life)]
)
def test_a_resumed_run_samples_the_same_rounds_and_has_the_same_bits(advantages):
    config = dataclasses.replace(EVERY_PIECE, advantages=advantages)
    if advantages == "reinforce_pp":
        config = dataclasses.replace(config, ratio="token", loss_mean="response")
    world = worlds.World(config, seed=1, vocab=3, length=3, devices=2, **TIES)
    states, rounds = {}, {}

    def watch(number, metrics, state):
        assert all(np.isfinite(value) for value in metrics.values())
        rounds[number] = metrics["ppo/sampling_rounds"]
        states[number] = jax.device_get(state)

    world.train(6, watch)
    first = states[5], dict(rounds)
    world.train(6, watch, states[2])
    assert rounds == first[1] and max(rounds[n] for n in (3, 4, 5)) > 1
    for a, b in zip(*map(jax.tree.leaves, (first[0], states[5])), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.life
def test_one_device_and_eight_drop_the_same_groups():
    after = []
    for devices in (1, 8):
        world = worlds.World(EVERY_PIECE, seed=1, vocab=3, length=3, devices=devices, **TIES)
        world.train(1, lambda number, metrics, state: after.append(metrics))
    for name in after[0]:
        assert after[0][name] == pytest.approx(after[1][name], rel=1e-3, abs=1e-4), name


# --- The rest.


def test_the_overlong_penalty_falls_over_the_last_tokens():
    mask = jnp.arange(10)[None] < jnp.array([1, 6, 7, 8, 10])[:, None]
    np.testing.assert_allclose(overlong(mask, 4), [0.0, 0.0, -0.25, -0.5, -1.0])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"ratio": "sequence", "advantages": "gae"}, "ratio: sequence needs one advantage"),
        ({"ratio": "sequence", "advantages": "reinforce_pp"}, "ratio: sequence needs one"),
        ({"ratio": "sequence", "dual_clip": 3.0}, "dual_clip: bounds the ratio of a token"),
        ({"surrogate": "cispo", "dual_clip": 3.0}, "dual_clip: bounds the ratio of a token"),
        ({"advantages": "gae", "sampling_rounds": 2}, "sampling_rounds: only groups"),
        (
            {"advantages": "reinforce_pp", "num_responses": 1, "sampling_rounds": 2},
            "sampling_rounds: only groups",
        ),
        ({"advantages": "dr_grpo", "num_responses": 1}, "num_responses: dr_grpo needs at least 2"),
        (
            {"advantages": "gae", "critic_trunk": "shared", "loss_mean": "response"},
            "loss_mean: the value loss of a shared trunk",
        ),
        ({"rewards": (RewardSource("overlong:4"),)}, "overlong:4 needs a number of tokens from 1"),
        ({"rewards": (RewardSource("overlong:x"),)}, "overlong:x needs a number of tokens from 1"),
    ],
)
def test_pieces_that_do_not_fit_are_refused_in_one_line(changes, complaint):
    with pytest.raises((InputError, ValueError), match=complaint) as caught:
        changed(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dr_grpo", "dapo", "gspo", "cispo", "reinforce_pp"])
def test_the_small_configs_are_planned_with_one_round_of_sampling(name):
    life = load(Config, ROOT / "configs" / "objectives" / f"{name}.yaml")
    # A run takes the size from its tokenizer.
    life = dataclasses.replace(life, model=dataclasses.replace(life.model, vocab_size=276))
    mesh = make_mesh(MeshConfig(), jax.devices()[:8])
    programs, held = reinforce.plan(mesh, life, "grpo")
    times = {program.name: program.times for program in programs}
    updates = life.grpo.num_minibatches
    assert times.pop("prefill") == 1 and times.pop("decode") >= 1
    assert times == {"reference": 1, "experience": 1, "actor": updates}
    assert set(held) == {"policy", "ref"}
