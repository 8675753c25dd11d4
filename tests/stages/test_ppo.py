"""What has to hold at the first step of PPO, where every number is known."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import generate as g
from jaxllm import losses, train
from jaxllm.models import scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.optim import OptimConfig, make_optimizer
from jaxllm.stages import ppo

MODEL = ModelConfig(
    vocab_size=24, max_length=32, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, dtype="float32", init_std=0.3
)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [14, 15]] * 4
SAMPLING = g.SamplingConfig(10, 0.7)
CONFIG = ppo.PPOConfig(batch_size=16, num_epochs=2, num_minibatches=2, sampling=SAMPLING, kl_coef=0.1)


@pytest.fixture(scope="module")
def world():
    """Policy, another reference, critic, reward model, and a batch of rollouts."""
    keys = jax.random.split(jax.random.key(0), 4)
    actor, other = (transformer.init(MODEL, k) for k in keys[:2])
    critic, reward = (scalar.init(transformer.init(MODEL, k), MODEL, k) for k in keys[2:])
    tokens, mask = g.left_pad(PROMPTS, 6, 0)
    run = g.jitted(MODEL, SAMPLING, (2,), 0, 1)
    rollout = run(actor, jnp.array(tokens), jnp.array(mask), jax.random.key(1), np.arange(16, dtype=np.int32))
    return {"actor": actor, "other": other, "critic": critic, "reward": reward, "rollout": rollout}


def experience(world, ref, config=CONFIG, scores=None):
    scores = jnp.linspace(-1.0, 1.0, 16) if scores is None else scores
    make = functools.partial(ppo.make_experience, config=config, model=MODEL, reward_model=MODEL)
    return make(world["actor"], world["critic"], ref, world["rollout"], scores, jnp.float32(config.kl_coef))


def test_policy_equal_to_the_reference_has_no_kl_at_any_temperature(world):
    _, metrics = experience(world, world["actor"])
    assert float(metrics["kl"][0]) == 0.0 and float(metrics["kl_k3"][0]) == 0.0
    _, metrics = experience(world, world["other"])
    assert float(metrics["kl"][0]) != 0.0


def test_first_minibatch_has_ratio_one_and_no_clipping(world):
    batch, metrics = experience(world, world["other"])
    _, weight, first = ppo.actor_loss(world["actor"], batch, None, model=MODEL, temperature=0.7, clip=0.2)
    np.testing.assert_allclose(first["ratio"][0] / weight, 1.0, atol=1e-5)
    assert float(first["clip_fraction"][0]) == 0 and abs(float(first["approx_kl"][0])) < 1e-5
    assert float(metrics["sampler_drift"][0] / metrics["sampler_drift"][1]) < 1e-4
    wrong = ppo.actor_loss(world["actor"], batch, None, model=MODEL, temperature=1.0, clip=0.2)[2]
    assert float(wrong["clip_fraction"][0]) > 0  # another temperature would show


def test_rewards_are_fractional_and_on_the_last_token(world):
    config = dataclasses.replace(CONFIG, kl_coef=0.0, gae_lambda=1.0, whiten_advantages=False)
    scores = jnp.full((16,), 0.3)
    batch, _ = experience(world, world["other"], config, scores)
    np.testing.assert_allclose(np.asarray(batch.returns)[np.asarray(batch.mask)], 0.3, rtol=1e-5)


def test_responses_that_never_end_get_the_set_score(world):
    rollout = world["rollout"]
    scores = ppo.reward_scores(world["reward"], rollout, model=MODEL, missing_end_score=-7.5)
    finished = np.asarray(rollout.finished)
    assert finished.any() and not finished.all()
    np.testing.assert_array_equal(np.asarray(scores)[~finished], -7.5)
    for i in np.flatnonzero(finished)[:3]:  # the score of the row alone, without padding
        ids = [*PROMPTS[i], *np.asarray(rollout.tokens)[i, 6:][np.asarray(rollout.mask)[i]].tolist()]
        row = jnp.array([ids], jnp.int32)
        alone = scalar.apply(world["reward"], MODEL, row, jnp.ones_like(row))[0, -1]
        np.testing.assert_allclose(scores[i], alone, atol=1e-4)


def test_a_value_belongs_to_the_state_before_its_token(world):
    """Changing the tokens from place t on leaves the values up to t as they were."""
    rollout = world["rollout"]
    values = ppo.response_values(world["critic"], rollout, model=MODEL)
    changed = rollout._replace(tokens=rollout.tokens.at[:, 6 + 4 :].set(3))
    other = ppo.response_values(world["critic"], changed, model=MODEL)
    np.testing.assert_allclose(values[:, :5], other[:, :5], atol=1e-5)
    assert (np.abs(np.asarray(values - other))[:, 5:] > 1e-3).any()


def test_gradients_do_not_depend_on_padding_or_microbatches(world):
    batch, _ = experience(world, world["other"])
    loss = functools.partial(ppo.actor_loss, model=MODEL, temperature=0.7, clip=0.2)
    whole, weight, _ = train.accumulate(loss, world["actor"], batch, jax.random.key(0), 1, {})
    parts, part_weight, _ = train.accumulate(loss, world["actor"], batch, jax.random.key(0), 4, {})
    pad = lambda x, n, value: jnp.pad(x, ((0, 0), (n, 0)), constant_values=value)
    wider = batch._replace(tokens=pad(batch.tokens, 5, 0), prompt_mask=pad(batch.prompt_mask, 5, False))
    padded, _, _ = train.accumulate(loss, world["actor"], wider, jax.random.key(0), 1, {})
    assert float(weight) == float(part_weight)
    for a, b, c in zip(*map(jax.tree.leaves, (whole, parts, padded)), strict=True):
        scale = float(jnp.abs(a).max()) + 1e-9
        assert float(jnp.abs(a - b).max()) / scale < 1e-4 and float(jnp.abs(a - c).max()) / scale < 1e-4


def test_whitened_advantages_have_mean_zero_and_variance_one(world):
    batch, _ = experience(world, world["other"])
    advantages = np.asarray(batch.advantages)[np.asarray(batch.mask)]
    np.testing.assert_allclose([advantages.mean(), advantages.std()], [0, 1], atol=1e-4)


def ppo_world(world, seed=0):
    """A PPO step on this world, with a reward that likes token 9."""
    tx = make_optimizer(OptimConfig(learning_rate=3e-3, weight_decay=0.0, schedule="constant"), 100)
    roll = jax.jit(
        lambda p, b, k: g.generate(p, MODEL, b["tokens"], b["mask"], k, sampling=SAMPLING, stop_ids=(2,), pad_id=0)
    )
    like = lambda _, r: jnp.where(r.mask, (r.tokens[:, 6:] == 9).astype(jnp.float32), 0.0).sum(1) * 0.3
    make = functools.partial(ppo.make_experience, config=CONFIG, model=MODEL, reward_model=MODEL)
    actor_loss = functools.partial(ppo.actor_loss, model=MODEL, temperature=0.7, clip=0.2)
    critic_loss = functools.partial(ppo.critic_loss, model=MODEL, value_clip=0.2)
    step = ppo.make_ppo_step(
        CONFIG,
        rollout=roll,
        score=jax.jit(like),
        experience=jax.jit(make),
        actor_step=train.make_step(actor_loss, tx),
        critic_step=train.make_step(critic_loss, tx),
        seed=seed,
        ref=world["actor"],
        reward=world["reward"],
    )
    copy = functools.partial(jax.tree.map, jnp.copy)
    state = ppo.PPOState(
        jnp.int32(0),
        train.init_state(copy(world["actor"]), tx),
        train.init_state(copy(world["critic"]), tx),
        jnp.float32(0.1),
    )
    tokens, mask = g.left_pad(PROMPTS, 6, 0)
    return step, state, {"tokens": jnp.array(tokens), "mask": jnp.array(mask)}


def test_ppo_raises_a_fractional_reward_and_resumes_bit_for_bit(world):
    step, state, prompts = ppo_world(world)
    scores, middle = [], None
    for n in range(24):
        if n == 12:
            middle = jax.tree.map(np.asarray, state)
        state, metrics = step(state, prompts)
        scores.append(float(metrics["ppo/score"][0] / metrics["ppo/score"][1]))
    assert np.mean(scores[-4:]) > np.mean(scores[:4]) + 0.1
    resumed = jax.tree.map(jnp.asarray, middle)
    for _ in range(12, 24):
        resumed, _ = step(resumed, prompts)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_permutations_are_fresh_in_every_epoch_and_update():
    orders = [tuple(np.random.default_rng([0, n, e]).permutation(16)) for n in range(3) for e in range(3)]
    assert len(set(orders)) == 9


def test_gae_of_the_true_value_is_zero():
    """With the exact value of every state, every advantage is 0 for any lambda."""
    mask = jnp.array([[True, True, True, False]])
    rewards = jnp.array([[0.1, -0.2, 0.7, 9.0]])
    values = jnp.array([[0.6, 0.5, 0.7, 9.0]])
    for lam in (0.0, 0.5, 1.0):
        advantages, _ = losses.gae(rewards, values, mask, discount=1.0, lam=lam)
        np.testing.assert_allclose(advantages, 0.0, atol=1e-6)
