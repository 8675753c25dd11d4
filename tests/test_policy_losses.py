"""Every part of a policy-gradient objective against a plain-loop NumPy float64 oracle, in value and gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import losses, policy_losses
from tests.test_losses import numeric_gradient, random_mask, with_garbage

SEEDS = pytest.mark.parametrize("seed", range(3))
PARTS = list(
    itertools.product(("token", "sequence"), ("clip", "cispo"), ("token", "response", "constant"))
)
LOW, HIGH = 0.15, 0.3


def policy_oracle(new, constant, old, advantages, weights, mask, parts):
    """(loss, weight): `constant` is `new` where its gradient is stopped."""
    ratio, surrogate, loss_mean = parts
    loss = weight = 0.0
    for b in range(len(new)):
        times = np.flatnonzero(mask[b])
        if not len(times):
            continue
        for t in times:
            terms = times if ratio == "sequence" else [t]
            moved, still = (
                np.exp(np.mean([x[b, i] - old[b, i] for i in terms])) for x in (new, constant)
            )
            advantage = advantages[b, t]
            if surrogate == "clip":
                gain = min(moved * advantage, np.clip(moved, 1 - LOW, 1 + HIGH) * advantage)
            else:
                gain = np.clip(still, 1 - LOW, 1 + HIGH) * advantage * new[b, t]
            share = 1.0 / len(times) if loss_mean == "response" else 1.0
            loss -= share * weights[b, t] * gain
        weight += {"token": len(times), "response": 1.0, "constant": mask.shape[1]}[loss_mean]
    return loss, weight


@SEEDS
@pytest.mark.parametrize("parts", PARTS, ids="-".join)
def test_every_objective_equals_the_oracle_with_its_gradient(parts, seed):
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, 4, 6)
    mask[2] = False  # a row that only fills the batch
    new, old, advantages = (0.5 * rng.normal(size=mask.shape) for _ in range(3))
    weights = rng.uniform(0.2, 2.0, size=mask.shape)
    ratio, surrogate, loss_mean = parts
    dirty_old, dirty_advantages = (jnp.array(with_garbage(rng, x, mask)) for x in (old, advantages))

    def loss(x):
        total, weight, _ = policy_losses.policy(
            x,
            dirty_old,
            dirty_advantages,
            jnp.array(mask),
            ratio=ratio,
            surrogate=surrogate,
            loss_mean=loss_mean,
            clip_low=LOW,
            clip_high=HIGH,
            sampler_weights=jnp.array(weights, jnp.float32),
        )
        return total, weight

    x = jnp.array(with_garbage(rng, new, mask))
    (total, weight), gradient = jax.value_and_grad(loss, has_aux=True)(x)
    want = policy_oracle(new, new, old, advantages, weights, mask, parts)
    np.testing.assert_allclose((total, weight), want, rtol=1e-5, atol=1e-6)
    slope = numeric_gradient(
        lambda x: policy_oracle(x, new, old, advantages, weights, mask, parts)[0], new
    )
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_mean", ["token", "response", "constant"])
def test_sums_and_weights_of_parts_add_up_to_those_of_the_whole(loss_mean):
    rng = np.random.default_rng(0)
    mask = random_mask(rng, 6, 5)
    arrays = [jnp.array(rng.normal(size=mask.shape), jnp.float32) for _ in range(3)]

    def pair(rows):
        part = [x[rows] for x in (*arrays, jnp.array(mask))]
        return np.array(policy_losses.policy(*part, loss_mean=loss_mean)[:2])

    parts = pair(slice(0, 2)) + pair(slice(2, 6))
    np.testing.assert_allclose(parts, pair(slice(0, 6)), rtol=1e-5)


def test_before_the_policy_moves_surrogates_and_ratios_have_one_gradient():
    """On policy each is the plain policy gradient: the advantage times that of the log-probability."""
    rng = np.random.default_rng(0)
    mask = random_mask(rng, 5, 4)
    logprobs = jnp.array(rng.normal(size=mask.shape), jnp.float32)
    # The same at each token of a response, as the sequence's ratio needs it.
    advantages = jnp.broadcast_to(jnp.array(rng.normal(size=(5, 1)), jnp.float32), mask.shape)
    want = np.where(mask, -advantages, 0.0)
    for ratio, surrogate in itertools.product(("token", "sequence"), ("clip", "cispo")):
        gradient = jax.grad(
            lambda x, ratio=ratio, surrogate=surrogate: policy_losses.policy(
                x, logprobs, advantages, jnp.array(mask), ratio=ratio, surrogate=surrogate
            )[0]
        )(logprobs)
        np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-6)


def test_a_token_beyond_its_limit_keeps_its_gradient_in_cispo_only():
    old, new = jnp.zeros((1, 1)), jnp.full((1, 1), 0.5)
    slope = {
        surrogate: float(
            jax.grad(
                lambda x, surrogate=surrogate: policy_losses.policy(
                    x, old, jnp.ones((1, 1)), jnp.ones((1, 1), bool), surrogate=surrogate
                )[0]
            )(new)[0, 0]
        )
        for surrogate in ("clip", "cispo")
    }
    assert slope["clip"] == 0.0 and slope["cispo"] == pytest.approx(-1.2)


def test_advantages_of_groups_equal_the_oracle():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(5, 4))
    for kind in ("rloo", "grpo", "dr_grpo"):
        found = policy_losses.group_advantages(jnp.array(scores, jnp.float32), kind)
        for b, k in np.ndindex(5, 4):
            others = np.delete(scores[b], k).mean()
            want = {
                "rloo": scores[b, k] - others,
                "grpo": (scores[b, k] - scores[b].mean()) / (scores[b].std() + 1e-6),
                "dr_grpo": scores[b, k] - scores[b].mean(),
            }[kind]
            np.testing.assert_allclose(found[b, k], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["rloo", "grpo", "dr_grpo"])
def test_equal_scores_teach_nothing_whatever_their_mean_rounds_to(kind):
    # The mean of some of these is not the number itself.
    for K in (2, 3, 5, 6, 7, 11):
        for score in (0.7, -0.1, 0.3333, 1e6 + 0.1):
            scores = jnp.full((1, K), score, jnp.float32)
            assert not np.any(policy_losses.group_advantages(scores, kind)), (K, score)


@pytest.mark.parametrize("K", [1, 3])
def test_rewards_to_go_equal_the_oracle(K):
    rng = np.random.default_rng(K)
    mask = random_mask(rng, 6, 5)
    rewards = rng.normal(size=mask.shape)
    found = policy_losses.rewards_to_go(
        jnp.array(with_garbage(rng, rewards, mask)), jnp.array(mask), K
    )
    sums = (rewards * mask).sum(1)
    for b, t in np.ndindex(*mask.shape):
        group = sums[b // K * K : b // K * K + K]
        baseline = group.mean() if K > 1 else 0.0
        want = rewards[b, t : mask[b].sum()].sum() - baseline if mask[b, t] else 0.0
        np.testing.assert_allclose(found[b, t], want, rtol=1e-4, atol=1e-5)


def normalized(values):
    """Float64; what has no spread is 0."""
    if len(set(values)) < 2:
        return [0.0] * len(values)
    return (values - np.mean(values)) / (np.std(values) + 1e-6)


@SEEDS
@pytest.mark.parametrize("K", [2, 3])
def test_advantages_of_steps_equal_the_oracle(K, seed):
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, 4 * K, 8)
    ends = mask & (rng.random(mask.shape) < 0.7)
    rewards = rng.normal(size=mask.shape)
    # Of one prompt all steps are worth the same, in a number whose mean is rounded; another has no step at all.
    rewards[K : 2 * K] = 0.1
    ends[3 * K :] = False
    found = policy_losses.step_advantages(
        jnp.array(with_garbage(rng, rewards, ends)), jnp.array(ends), K
    )
    for prompt in range(4):
        rows = range(prompt * K, prompt * K + K)
        steps = [(b, t) for b in rows for t in np.flatnonzero(ends[b])]
        values = dict(zip(steps, normalized([rewards[step] for step in steps]), strict=True))
        for b, t in itertools.product(rows, range(8)):
            want = sum(value for (row, end), value in values.items() if row == b and end >= t)
            np.testing.assert_allclose(found[b, t], want, rtol=1e-4, atol=1e-5)
    assert not np.any(found[K : 2 * K]) and np.any(found)


@SEEDS
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_weights_and_their_metrics_equal_the_oracle(level, seed):
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, 5, 4)
    trainer, sampler = (rng.normal(size=mask.shape) for _ in range(2))
    dirty_trainer, dirty_sampler = (
        jnp.array(with_garbage(rng, x, mask)) for x in (trainer, sampler)
    )
    weights, metrics = policy_losses.truncated_weights(
        dirty_trainer, dirty_sampler, jnp.array(mask), level=level, cap=1.5
    )
    each = []
    for b in range(5):
        ratio = np.exp((trainer - sampler)[b, mask[b]])
        if level == "sequence":
            ratio = np.array([ratio.prod()])
        each.append(ratio)
        np.testing.assert_allclose(
            weights[b][mask[b]], np.broadcast_to(np.minimum(ratio, 1.5), mask[b].sum()), rtol=1e-5
        )
    flat = np.concatenate(each)
    used = np.minimum(flat, 1.5)
    found = {name: float(s) / float(w) for name, (s, w) in metrics.items()}
    assert found == pytest.approx(
        {
            "sampler_weight": used.mean(),
            "sampler_capped": (flat > 1.5).mean(),
            "sampler_ess": used.sum() ** 2 / (len(used) * (used**2).sum()),
        },
        rel=1e-5,
    )


def test_a_sampler_that_agrees_has_weights_of_one_and_every_sample_counts():
    mask = jnp.array([[True, True, False], [True, False, False]])
    logprobs = jnp.array([[-1.0, -2.0, jnp.nan], [-0.5, jnp.inf, 0.0]])
    for level in ("token", "sequence"):
        weights, metrics = policy_losses.truncated_weights(
            logprobs, logprobs, mask, level=level, cap=2.0
        )
        assert (weights[mask] == 1.0).all() and float(metrics["sampler_ess"][0]) == 1.0


def test_k2_in_the_loss_pulls_like_the_divergence_to_the_reference():
    """On policy, the mean gradient of k2 is that of KL(policy || reference)."""
    rng = np.random.default_rng(0)
    logits = jnp.array(rng.normal(size=6), jnp.float32)
    ref = jax.nn.log_softmax(jnp.array(rng.normal(size=6), jnp.float32))
    per_sample = jax.jacobian(lambda x: losses.kl_k2(jax.nn.log_softmax(x) - ref))(logits)
    mean = (jax.nn.softmax(logits)[:, None] * per_sample).sum(0)
    kl = jax.grad(lambda x: (jax.nn.softmax(x) * (jax.nn.log_softmax(x) - ref)).sum())(logits)
    np.testing.assert_allclose(mean, kl, atol=1e-5)
