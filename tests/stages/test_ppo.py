"""What has to hold at the first step of PPO, where every number is known."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import losses, train
from jaxllm.config import InputError
from jaxllm.data.loader import PromptExample
from jaxllm.engine import rollouts
from jaxllm.engine.config import SamplingConfig
from jaxllm.models import scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.parts_config import LoRAConfig
from jaxllm.optim_config import OptimConfig
from jaxllm.rl import layouts
from jaxllm.rl.config import PPOConfig, RoleMesh
from jaxllm.rl.experience import make_experience, response_values, reward_scores, shape_scores
from jaxllm.rl.held_out import HeldOut
from jaxllm.rl.objectives import actor_loss
from jaxllm.rl.programs import build_programs
from jaxllm.rl.reward_config import RewardSource
from jaxllm.rl.roles import FrozenModels, initial_state, split_trainable, with_value_head
from jaxllm.rl.scoring import make_scorer
from jaxllm.rl.update import minibatch_rows
from jaxllm.runtime import digest
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.runtime.transfer import reshard_across_meshes
from jaxllm.sharding import activation, param_shardings
from tests.engine import static
from tests.stages import worlds

MODEL = ModelConfig(
    vocab_size=24,
    max_length=32,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    mlp_dim=48,
    dtype="float32",
    init_std=0.3,
)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [14, 15]] * 4
LETTERS: Any = worlds.LETTERS
SAMPLING = SamplingConfig(10, 0.7)
CONFIG = PPOConfig(batch_size=16, num_epochs=2, num_minibatches=2, sampling=SAMPLING, kl_coef=0.1)


@pytest.fixture(scope="module")
def world():
    """Policy, another reference, critic, reward model, and a batch of rollouts."""
    keys = jax.random.split(jax.random.key(0), 4)
    actor, other = (transformer.init(MODEL, k) for k in keys[:2])
    critic, reward = (scalar.init(transformer.init(MODEL, k), MODEL, k) for k in keys[2:])
    rollout = static.roll_out(
        actor, MODEL, PROMPTS, SAMPLING, stop_ids=(2,), pad_id=0, seed=3, length=6
    )
    return {"actor": actor, "other": other, "critic": critic, "reward": reward, "rollout": rollout}


def setup(config=CONFIG):
    return worlds.run_spec(config, MODEL)


def experience(world, ref, config=CONFIG, scores=None):
    scores = jnp.linspace(-1.0, 1.0, 16) if scores is None else scores
    rollout = world["rollout"]
    logprobs, values = setup(config).logprobs(ref, rollout).logprob, {}
    if config.has_critic:
        values = response_values(world["critic"], rollout, model=MODEL)
    judging = (world["actor"], {}, rollout, logprobs, values, scores, jnp.float32(config.kl_coef))
    return make_experience(*judging, spec=setup(config))


def test_policy_equal_to_the_reference_has_no_kl_at_any_temperature(world):
    _, metrics = experience(world, world["actor"])
    assert float(metrics["kl"][0]) == 0.0 and float(metrics["kl_k3"][0]) == 0.0
    _, metrics = experience(world, world["other"])
    assert float(metrics["kl"][0]) != 0.0


def test_first_minibatch_has_ratio_one_and_no_clipping(world):
    batch, metrics = experience(world, world["other"])
    _, weight, first = actor_loss(world["actor"], batch, None, {}, spec=setup())
    np.testing.assert_allclose(first["ratio"][0] / weight, 1.0, atol=1e-5)
    assert float(first["clip_fraction"][0]) == 0 and abs(float(first["approx_kl"][0])) < 1e-5
    assert float(metrics["sampler_drift"][0] / metrics["sampler_drift"][1]) < 1e-4
    hot = setup(
        dataclasses.replace(CONFIG, sampling=dataclasses.replace(SAMPLING, temperature=1.0))
    )
    wrong = actor_loss(world["actor"], batch, None, {}, spec=hot)[2]
    assert float(wrong["clip_fraction"][0]) > 0  # another temperature would show


def test_rewards_are_fractional_and_on_the_last_token(world):
    config = dataclasses.replace(CONFIG, kl_coef=0.0, gae_lambda=1.0, whiten_advantages=False)
    batch, _ = experience(world, world["other"], config, jnp.full((16,), 0.3))
    np.testing.assert_allclose(np.asarray(batch.returns)[np.asarray(batch.mask)], 0.3, rtol=1e-5)


def test_the_reward_model_reads_a_row_as_if_it_were_alone(world):
    rollout = world["rollout"]
    scores = reward_scores(world["reward"], rollout, model=MODEL)
    for i in range(4):
        ids = [
            *PROMPTS[i],
            *np.asarray(rollout.tokens)[i, 6:][np.asarray(rollout.mask)[i]].tolist(),
        ]
        row = jnp.array([ids], jnp.int32)
        alone = scalar.apply(world["reward"], MODEL, row, jnp.ones_like(row))[0, -1]
        np.testing.assert_allclose(scores[i], alone, atol=1e-4)


NO_MOMENTS = losses.Moments(*(jnp.float32(0) for _ in range(3)))


def test_responses_that_never_end_get_the_set_score(world):
    finished, raw = world["rollout"].finished, jnp.linspace(-3.0, 3.0, 16)
    assert finished.any() and not finished.all()
    config = dataclasses.replace(CONFIG, missing_end_score=-7.5, score_clip=1.0)
    scores, _, metrics = shape_scores(raw, finished, NO_MOMENTS, config=config)
    np.testing.assert_allclose(scores, np.where(finished, np.clip(raw, -1, 1), -7.5))
    np.testing.assert_allclose(metrics["score"][0], np.where(finished, raw, -7.5).sum(), rtol=1e-5)


def test_scores_are_normalised_by_all_that_were_seen():
    config = dataclasses.replace(CONFIG, normalize_scores=True)
    rng, moments, seen = np.random.default_rng(0), NO_MOMENTS, []
    for _ in range(5):
        raw, finished = rng.normal(3.0, 2.0, 16).astype(np.float32), rng.random(16) < 0.8
        seen += raw[finished].tolist()
        scores, moments, _ = shape_scores(
            jnp.array(raw), jnp.array(finished), moments, config=config
        )
        want = (raw - np.mean(seen)) / np.std(seen)
        np.testing.assert_allclose(scores, np.where(finished, want, -1.0), rtol=1e-4, atol=1e-4)


def test_a_value_belongs_to_the_state_before_its_token(world):
    """Changing the tokens from place t on leaves the values up to t as they were."""
    rollout = world["rollout"]
    values = response_values(world["critic"], rollout, model=MODEL)
    changed = rollout._replace(tokens=rollout.tokens.at[:, 6 + 4 :].set(3))
    other = response_values(world["critic"], changed, model=MODEL)
    np.testing.assert_allclose(values[:, :5], other[:, :5], atol=1e-5)
    assert (np.abs(np.asarray(values - other))[:, 5:] > 1e-3).any()


def test_gradients_do_not_depend_on_padding_or_microbatches(world):
    config = dataclasses.replace(CONFIG, entropy_coef=0.01, kl_loss_coef=0.1)
    batch, _ = experience(world, world["other"], config)
    loss = functools.partial(actor_loss, spec=setup(config))
    gradient = jax.jit(
        lambda params, batch, n: train.accumulate(
            loss, params, batch, jax.random.key(0), n, {"base": {}}
        ),
        static_argnums=2,
    )
    whole, weight, _ = gradient(world["actor"], batch, 1)
    parts, part_weight, _ = gradient(world["actor"], batch, 4)
    pad = lambda x, n, value: jnp.pad(x, ((0, 0), (n, 0)), constant_values=value)
    wider = batch._replace(
        tokens=pad(batch.tokens, 5, 0), prompt_mask=pad(batch.prompt_mask, 5, False)
    )
    padded, _, _ = gradient(world["actor"], wider, 1)
    assert float(weight) == float(part_weight)
    for a, b, c in zip(*map(jax.tree.leaves, (whole, parts, padded)), strict=True):
        scale = float(jnp.abs(a).max()) + 1e-9
        assert (
            float(jnp.abs(a - b).max()) / scale < 1e-5
            and float(jnp.abs(a - c).max()) / scale < 1e-5
        )


def test_a_fully_masked_microbatch_contributes_nothing(world):
    batch, _ = experience(world, world["other"])
    off = batch._replace(
        mask=jnp.zeros_like(batch.mask), advantages=jnp.full_like(batch.advantages, jnp.nan)
    )
    config = dataclasses.replace(CONFIG, entropy_coef=0.01, kl_loss_coef=0.1)
    loss = functools.partial(actor_loss, spec=setup(config))
    grads, weight, _ = train.accumulate(
        loss, world["actor"], off, jax.random.key(0), 1, {"base": {}}
    )
    assert float(weight) == 0 and all(
        not jnp.abs(g).max() > 0 and jnp.isfinite(g).all() for g in jax.tree.leaves(grads)
    )


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_without_a_critic_every_token_has_its_responses_advantage(world, kind):
    config = dataclasses.replace(
        CONFIG, advantages=kind, num_responses=4, kl_coef=0.2, whiten_advantages=False
    )
    batch, metrics = experience(world, world["other"], config)
    mask = np.asarray(batch.mask)
    log_ratio = np.where(mask, np.asarray(batch.old_logprobs - batch.ref_logprobs), 0.0).sum(1)
    rewards = (np.linspace(-1.0, 1.0, 16) - 0.2 * log_ratio).reshape(4, 4)
    for b, t in zip(*np.nonzero(mask), strict=True):
        group, k = rewards[b // 4], b % 4
        loo = group[k] - np.delete(group, k).mean()
        want = loo if kind == "rloo" else (group[k] - group.mean()) / (group.std() + 1e-6)
        np.testing.assert_allclose(batch.advantages[b, t], want, rtol=1e-4, atol=1e-5)
    assert "value" not in metrics and not np.asarray(batch.advantages)[~mask].any()


def test_whitened_advantages_have_mean_zero_and_variance_one(world):
    batch, _ = experience(world, world["other"])
    advantages = np.asarray(batch.advantages)[np.asarray(batch.mask)]
    np.testing.assert_allclose([advantages.mean(), advantages.std()], [0, 1], atol=1e-4)


SMALL = PPOConfig(
    rewards=(RewardSource("tests.stages.worlds:reward_of"), RewardSource("length", -0.25)),
    batch_size=64,
    num_epochs=2,
    num_minibatches=2,
    kl_coef=0.3,
    max_prompt_length=4,
    sampling=SamplingConfig(3, 0.7),
    actor=OptimConfig(learning_rate=3e-3, schedule="constant", weight_decay=0.0, eps=1e-5),
    critic=OptimConfig(learning_rate=3e-3, schedule="constant", weight_decay=0.0, eps=1e-5),
)
EVERYTHING = dataclasses.replace(
    SMALL,
    kl_target=0.2,
    kl_horizon=500.0,
    normalize_scores=True,
    missing_end_score=-3.0,  # in units of the normalised score: below what the clip leaves
    score_clip=2.0,
    whiten_rewards=True,
    ema_decay=0.9,
    entropy_coef=0.01,
    dual_clip=3.0,
    max_approx_kl=0.01,
    clip_high=0.3,
    stop_strings=("ad",),
    num_micro=2,
)
VARIANTS = {
    "ppo": SMALL,
    "every switch": EVERYTHING,
    "shared trunk": dataclasses.replace(SMALL, critic_trunk="shared", value_coef=0.5),
    "adapters": dataclasses.replace(SMALL, lora=LoRAConfig(rank=4)),
    "rloo": dataclasses.replace(
        SMALL, advantages="rloo", num_responses=4, num_epochs=1, num_minibatches=1
    ),
    "grpo": dataclasses.replace(
        SMALL,
        advantages="grpo",
        num_responses=8,
        num_epochs=1,
        num_minibatches=1,
        kl_coef=0.0,
        kl_loss_coef=0.04,
        actor=dataclasses.replace(SMALL.actor, learning_rate=1e-3),
    ),
}


# Plain PPO has its proof in the default tier: tests/stages/test_proofs.py.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ppo", marks=pytest.mark.life),
        "every switch",
        pytest.param("shared trunk", marks=pytest.mark.life),
        pytest.param("adapters", marks=pytest.mark.slow),
        pytest.param("rloo", marks=pytest.mark.life),
        pytest.param("grpo", marks=pytest.mark.life),
    ],
)
def test_the_reward_rises_and_a_resumed_run_has_the_same_bits(name):
    world = worlds.World(VARIANTS[name], seed=1, vocab=4, length=3, devices=2, layers=1)
    states = {}

    def watch(number, metrics, state):
        assert all(np.isfinite(v) for v in metrics.values())
        assert {
            "ppo/kl",
            "ppo/kl_k3",
            "ppo/entropy",
            "ppo/clip_fraction",
            "ppo/sampler_drift",
        } <= metrics.keys()
        assert metrics["ppo/sampler_drift"] < 1e-4
        states[number] = jax.device_get(state)

    assert world.expected_reward(world.train(24, watch)) > world.expected_reward(world.ref) + 0.1
    world.train(
        24,
        lambda number, metrics, state: states.update({f"again {number}": jax.device_get(state)}),
        states[11],
    )
    for a, b in zip(jax.tree.leaves(states[23]), jax.tree.leaves(states["again 23"]), strict=True):
        np.testing.assert_array_equal(a, b)
    if name == "every switch":
        assert float(states[23].kl_coef) != 0.3 and float(states[23].moments.count) > 0
        moved = [
            np.abs(a - b).max()
            for a, b in zip(
                *map(jax.tree.leaves, (states[23].ema, states[23].actor.params)), strict=True
            )
        ]
        assert max(moved) > 0


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    """Layouts of their own have the devices in another order."""
    monkeypatch.setattr(
        layouts, "planned_mesh", lambda layout, devices: make_mesh(layout, devices[::-1])
    )


@pytest.mark.life
@pytest.mark.usefixtures("as_on_a_tpu")
def test_one_device_and_eight_with_a_critic_laid_out_otherwise_make_the_same_update():
    """The critic's moments are digested and compared where they are."""
    after = []
    for devices, meshes in ((1, ()), (8, (RoleMesh(role="critic", data=2, fsdp=2, tensor=2),))):
        config = dataclasses.replace(SMALL, meshes=meshes)
        world = worlds.World(config, seed=2, vocab=4, length=3, devices=devices, layers=1)
        after.append({})
        world.train(
            2, lambda number, metrics, state, to=after[-1]: to.update(state=state, metrics=metrics)
        )
        state = after[-1]["state"]
        assert digest.digests(state) == digest.digests(
            jax.device_get(state)
        ) and not digest.unequal_replicas(state)
        assert bool(meshes) == (
            state.critic.params["head"]["kernel"].sharding.mesh.shape["fsdp"] == 2
        )
    moments = lambda seen: jax.tree.leaves(
        (seen["state"].actor.opt_state, seen["state"].critic.opt_state)
    )
    for a, b in zip(*map(moments, after), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(*(seen["metrics"]["ppo/score"] for seen in after), rtol=1e-6)
    for more in ({"critic_trunk": "shared"}, {"advantages": "rloo", "num_responses": 2}):
        with pytest.raises(ValueError, match="no separate critic"):
            dataclasses.replace(SMALL, meshes=(RoleMesh(role="critic"),), **more)


def test_permutations_are_fresh_in_every_epoch_and_update():
    orders = [
        tuple(minibatch_rows(setup(), n).reshape(2, -1)[e].tolist())
        for n in range(3)
        for e in range(2)
    ]
    assert len(set(orders)) == 6 and all(sorted(o) == list(range(16)) for o in orders)


def test_the_adaptive_coefficient_follows_its_target():
    adapt = functools.partial(losses.adapt_kl_coef, target=6.0, horizon=100.0, batch_size=10)
    up, down, near = (float(adapt(jnp.float32(0.1), jnp.float32(kl))) for kl in (60.0, 0.0, 6.6))
    np.testing.assert_allclose([up, down, near], [0.1 * 1.02, 0.1 * 0.98, 0.1 * 1.01], rtol=1e-5)


def test_a_response_is_cut_at_a_stop_string():
    mask = np.array([[True] * 4, [True] * 3 + [False]])
    tokens = np.array([[9, 2, 0, 3, 4], [9, 4, 4, 1, 0]], np.int32)
    rollout = rollouts.Rollout(
        tokens, np.ones((2, 1), bool), mask, np.zeros((2, 4)), np.array([False, True])
    )
    cut = rollouts.cut_at_strings(rollout, ["cad", "zz"], worlds.LETTERS.decode)
    assert cut.mask.tolist() == [[True, True, True, False], [True, True, True, False]]
    assert cut.finished.tolist() == [True, True]
    assert [c.ids for c in rollouts.completions(cut, (1,))] == [[2, 0, 3], [4, 4]]


def test_at_the_optimum_with_the_true_value_every_advantage_is_zero():
    """Rewards of pi*, token by token, and V(prefix) = beta log Z(prefix): the deltas vanish, for any lambda."""
    rng, beta, space = np.random.default_rng(0), 0.7, worlds.Responses(4, 3)
    reward = rng.normal(size=len(space.rows))
    step = {}  # the reference: a distribution over four tokens after every prefix
    for row in space.rows:
        for n in range(len(row)):
            step.setdefault(row[:n], np.log(rng.dirichlet(np.ones(4))))
    ref = np.array([sum(step[row[:n]][row[n]] for n in range(len(row))) for row in space.rows])
    tilted = ref + reward / beta

    def log_z(
        prefix,
    ):  # log sum over responses that begin with it, given the prefix under the reference
        inside = np.array([row[: len(prefix)] == prefix for row in space.rows])
        before = sum(step[prefix[:n]][prefix[n]] for n in range(len(prefix)))
        return np.log(np.exp(tilted[inside]).sum()) - before

    R = 3
    mask, rewards, values = (
        np.zeros((len(space.rows), R), bool),
        *(np.full((len(space.rows), R), np.nan) for _ in "rv"),
    )
    for i, row in enumerate(space.rows):
        for n in range(len(row)):
            mask[i, n], values[i, n] = True, beta * log_z(row[:n])
            after = reward[i] / beta if n == len(row) - 1 else log_z(row[: n + 1])
            optimal = step[row[:n]][row[n]] + after - log_z(row[:n])  # log pi* of the token
            rewards[i, n] = -beta * (optimal - step[row[:n]][row[n]]) + (
                reward[i] if n == len(row) - 1 else 0.0
            )
    for lam in (0.0, 0.5, 0.95, 1.0):
        arrays = (jnp.array(rewards, jnp.float32), jnp.array(values, jnp.float32), jnp.array(mask))
        advantages, returns = losses.gae(*arrays, discount=1.0, lam=lam)
        np.testing.assert_allclose(advantages, 0.0, atol=2e-5)
        np.testing.assert_allclose(np.asarray(returns)[mask], values[mask], atol=2e-5)


@pytest.mark.usefixtures("as_on_a_tpu")
@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param({"critic_trunk": "shared"}, marks=pytest.mark.life),
        pytest.param({"lora": LoRAConfig(rank=2)}, marks=pytest.mark.life),
    ],
    ids=str,
)
def test_responses_drawn_in_another_layout_are_the_same(more):
    drawn, mesh = [], make_mesh(MeshConfig(data=2, fsdp=4))
    for tensor in (0, 4):
        meshes = (RoleMesh(role="rollout", tensor=tensor),) if tensor else ()
        config = dataclasses.replace(CONFIG, meshes=meshes, **more)
        made = setup(config)
        with jax.set_mesh(mesh):
            programs, _ = build_programs(made, layouts.role_meshes(made.config, mesh))
            policy = transformer.init(MODEL, jax.random.key(0))
            start = with_value_head(policy, MODEL) if config.shares_trunk else policy
            params, base = split_trainable(
                config.lora, start, (scalar if config.shares_trunk else transformer).axes(MODEL)
            )
            tokens, mask = rollouts.left_pad(PROMPTS, 6, 0)
            batch = {
                "tokens": jnp.array(tokens),
                "mask": jnp.array(mask),
                "index": jnp.arange(16, dtype=jnp.int32),
            }
            weights = programs.weights(params, base)
            words = np.asarray(jax.random.key_data(jax.random.key(3)))
            drawn.append(jax.device_get(programs.rollout(weights, batch, words)))
    for field in ("tokens", "mask", "prompt_mask", "finished"):
        np.testing.assert_array_equal(getattr(drawn[0], field), getattr(drawn[1], field))
    np.testing.assert_allclose(drawn[0].logprobs, drawn[1].logprobs, rtol=1e-4, atol=1e-5)
    assert programs.rollout.mesh.shape["tensor"] == 4 and drawn[0].mask.sum() > 16


@pytest.mark.life
@pytest.mark.usefixtures("as_on_a_tpu")
def test_a_reference_and_a_reward_model_in_other_layouts_judge_the_same(world):
    meshes = (
        RoleMesh(role="reference", fsdp=2, tensor=4),
        RoleMesh(role="reward", data=1, fsdp=8),
    )
    mesh, rollout = make_mesh(MeshConfig(data=2, fsdp=4)), world["rollout"]
    made = setup(dataclasses.replace(CONFIG, meshes=meshes))
    plain = (
        made.logprobs(world["other"], rollout).logprob,
        reward_scores(world["reward"], rollout, model=MODEL),
    )
    with jax.set_mesh(mesh):
        programs, _ = build_programs(made, layouts.role_meshes(made.config, mesh))
        rows = jax.device_put(rollout, activation(mesh, "batch"))
        roles = (
            (programs.reference, world["other"], transformer),
            (programs.reward, world["reward"], scalar),
        )
        for (judge, params, family), want in zip(roles, plain, strict=True):
            found = judge(
                reshard_across_meshes(
                    params, judge.mesh, param_shardings(judge.mesh, params, family.axes(MODEL))
                ),
                rows,
            )
            assert judge.mesh is not mesh and found.sharding.mesh == mesh
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="one mesh only"):
        dataclasses.replace(CONFIG, meshes=(RoleMesh(), RoleMesh(tensor=2)))


@pytest.mark.life
@pytest.mark.usefixtures("as_on_a_tpu")
def test_evaluation_in_other_layouts_finds_the_same(world):
    """Six prompts: of rollouts on two shards, of the stage on four, of the reference on eight."""
    mesh, found = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), []
    other = (RoleMesh(tensor=4), RoleMesh(role="reference"))
    prompts = [
        PromptExample([{"role": "user", "content": ""}], ids) for ids in [*PROMPTS[:4], [3], [4, 5]]
    ]
    for meshes in ((), other):
        made = setup(dataclasses.replace(CONFIG, meshes=meshes, rewards=(RewardSource("length"),)))
        with jax.set_mesh(mesh):
            programs, states = build_programs(made, layouts.role_meshes(made.config, mesh))
            place = lambda params, there: reshard_across_meshes(
                params, there, param_shardings(there, params, transformer.axes(MODEL))
            )
            roles = FrozenModels(place(world["other"], programs.reference.mesh), {}, {}, {})
            state = initial_state(
                states,
                made.config,
                mesh,
                place(jax.tree.map(jnp.copy, world["actor"]), mesh),
                jax.tree.map(jnp.copy, world["critic"]),
            )
            score = make_scorer(made, programs, roles, LETTERS.decode, mesh, "rewards")
            evaluate = HeldOut(made, programs, roles, score, prompts, LETTERS.decode, mesh)
            found.append(evaluate(0, state))
    assert found[0]["eval/kl"] > 0.1
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_rollout_layout_that_does_not_divide_the_prompts_is_refused():
    config = dataclasses.replace(
        CONFIG, batch_size=4, meshes=(RoleMesh(role="rollout"),), num_minibatches=1
    )
    mesh = make_mesh(MeshConfig(data=1, tensor=-1), jax.devices()[:8])
    with pytest.raises(InputError, match=r"4 does not divide over the 8 shards"):
        layouts.role_meshes(config, mesh)
