"""Every loss and estimator against a plain-loop NumPy float64 oracle, with garbage beyond the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import losses, output_layer, policy_losses


def random_mask(rng, B, R):
    return np.arange(R)[None] < rng.integers(1, R + 1, size=B)[:, None]


def with_garbage(rng, x, mask):
    """x where the mask is True, NaN, inf and large numbers elsewhere."""
    return np.where(mask, x, rng.choice([np.nan, np.inf, -1e30, 7.0], size=x.shape)).astype(
        np.float32
    )


SEEDS = pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.life) for seed in (2, 3, 4))]
)


def test_targets_stay_inside_their_segment():
    tokens = jnp.array([[10, 11, 20, 21, 22, 0]], jnp.int32)
    segments = jnp.array([[1, 1, 2, 2, 2, 0]], jnp.int32)
    mask = jnp.array([[False, True, False, True, True, False]])
    targets, on = losses.next_token_targets(tokens, segments, mask)
    assert on.tolist() == [[True, False, True, True, False, False]]
    assert targets[on].tolist() == [11, 21, 22]


def test_fully_masked_batch_gives_zero_not_nan():
    stats = output_layer.TokenStats(*(jnp.full((2, 3), 5.0) for _ in range(4)))
    total, weight, _ = losses.language_model(stats, jnp.zeros((2, 3), bool), 1e-4)
    assert (float(total), float(weight)) == (0.0, 0.0)
    nan = jnp.full((2, 3), jnp.nan)
    off = jnp.zeros((2, 3), bool)
    assert not jnp.isnan(policy_losses.policy(nan, nan, nan, off)[0])
    grad = jax.grad(lambda v: losses.value(v, nan, nan, off, clip=0.2)[0])(jnp.ones((2, 3)))
    assert not jnp.isnan(losses.whiten(nan, off)).any()
    del grad


def ranking_oracle(scores, ranks):
    total = weight = right = pairs_seen = 0.0
    for row, rank in zip(scores, ranks, strict=True):
        pairs = [(i, j) for i in range(len(row)) for j in range(len(row)) if 0 < rank[i] < rank[j]]
        if pairs:
            total += np.mean([np.log1p(np.exp(-(row[i] - row[j]))) for i, j in pairs])
            weight += 1
            right += sum(row[i] > row[j] for i, j in pairs)
            pairs_seen += len(pairs)
    return total, weight, right / max(pairs_seen, 1)


@SEEDS
def test_ranking_loss_is_the_mean_over_pairs_of_each_prompt(seed):
    rng = np.random.default_rng(seed)
    scores, ranks = rng.normal(size=(6, 5)) * 2, rng.integers(0, 4, size=(6, 5))
    total, weight, metrics = losses.pairwise(
        jnp.array(scores, jnp.float32), jnp.array(ranks, jnp.int32)
    )
    want = ranking_oracle(scores, ranks)
    np.testing.assert_allclose((total, weight), want[:2], rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"][0] / metrics["accuracy"][1], want[2], rtol=1e-6)


def test_ranking_gradient_sums_to_zero_and_ties_have_none():
    grad = jax.grad(lambda s: losses.pairwise(s, jnp.array([[1, 2, 2, 0]], jnp.int32))[0])(
        jnp.array([[0.3, 0.1, 0.1, 9.0]])
    )
    np.testing.assert_allclose(grad.sum(), 0.0, atol=1e-7)
    assert grad[0, 3] == 0 and np.isclose(grad[0, 1], grad[0, 2])
    tied = jax.grad(lambda s: losses.pairwise(s, jnp.array([[1, 1]], jnp.int32))[0])(
        jnp.array([[0.3, 0.1]])
    )
    assert not tied.any()


def rewards_oracle(scores, logp, ref, mask, coef):
    out = np.zeros(mask.shape)
    for b in range(len(mask)):
        for t in range(mask[b].sum()):
            out[b, t] = -coef * (logp[b, t] - ref[b, t])
        out[b, mask[b].sum() - 1] += scores[b]
    return out


def gae_oracle(rewards, values, mask, discount, lam):
    adv = np.zeros(mask.shape)
    for b in range(len(mask)):
        n, running = mask[b].sum(), 0.0
        for t in reversed(range(n)):
            after = values[b, t + 1] if t + 1 < n else 0.0
            running = rewards[b, t] + discount * after - values[b, t] + discount * lam * running
            adv[b, t] = running
    return adv, np.where(mask, adv + values, 0.0)


@SEEDS
def test_rewards_gae_and_whitening_equal_the_oracle_with_garbage_beyond_the_mask(seed):
    rng = np.random.default_rng(seed)
    B, R = 4, 9
    mask = random_mask(rng, B, R)
    scores = rng.normal(size=B)
    logp, ref, values = (rng.normal(size=(B, R)) for _ in range(3))
    dirty = [jnp.array(with_garbage(rng, x, mask)) for x in (logp, ref, values)]
    rewards = losses.token_rewards(
        jnp.array(scores, jnp.float32), *dirty[:2], jnp.array(mask), 0.13
    )
    want = rewards_oracle(scores, logp, ref, mask, 0.13)
    np.testing.assert_allclose(rewards, want, rtol=1e-5, atol=1e-6)
    advantages, returns = losses.gae(
        jnp.array(want, jnp.float32), dirty[2], jnp.array(mask), discount=0.97, lam=0.9
    )
    adv, ret = gae_oracle(want, values, mask, 0.97, 0.9)
    np.testing.assert_allclose(advantages, adv, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jnp.where(mask, returns, 0.0), ret, rtol=1e-5, atol=1e-5)
    white = losses.whiten(jnp.array(with_garbage(rng, adv, mask)), jnp.array(mask))
    flat = adv[mask]
    np.testing.assert_allclose(white[mask], (flat - flat.mean()) / flat.std(), rtol=1e-4, atol=1e-4)


def test_the_score_lands_on_the_last_token_of_the_response_and_fractions_survive():
    mask = jnp.array([[True, True, True, False, False], [True, False, False, False, False]])
    zero = jnp.zeros((2, 5))
    rewards = losses.token_rewards(jnp.array([0.7, -1.9]), zero, zero, mask, 0.05)
    np.testing.assert_allclose(rewards, [[0, 0, 0.7, 0, 0], [-1.9, 0, 0, 0, 0]], rtol=1e-6)


@SEEDS
def test_policy_and_value_losses_equal_the_oracle(seed):
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, 3, 6)
    new, old, adv, values, old_values, returns = (rng.normal(size=mask.shape) for _ in range(6))
    policy = value = 0.0
    for b, t in zip(*np.nonzero(mask), strict=True):
        ratio = np.exp(new[b, t] - old[b, t])
        policy -= min(ratio * adv[b, t], np.clip(ratio, 0.8, 1.2) * adv[b, t])
        near = old_values[b, t] + np.clip(values[b, t] - old_values[b, t], -0.3, 0.3)
        value += 0.5 * max((values[b, t] - returns[b, t]) ** 2, (near - returns[b, t]) ** 2)
    dirty = [jnp.array(with_garbage(rng, x, mask)) for x in (new, old, adv)]
    total, weight, _ = policy_losses.policy(*dirty, jnp.array(mask))
    np.testing.assert_allclose((total, weight), (policy, mask.sum()), rtol=1e-5, atol=1e-5)
    dirty = [jnp.array(with_garbage(rng, x, mask)) for x in (values, old_values, returns)]
    total, weight, _ = losses.value(*dirty, jnp.array(mask), clip=0.3)
    np.testing.assert_allclose((total, weight), (value, mask.sum()), rtol=1e-5, atol=1e-5)


def test_gradients_ignore_garbage_beyond_the_mask():
    mask = jnp.array([[True, True, False]])
    dirty = jnp.array([[0.1, 0.2, jnp.nan]])
    for loss in (
        lambda x: policy_losses.policy(x, dirty, dirty, mask, clip_low=0.5, clip_high=0.5)[0],
        lambda x: losses.value(x, dirty, dirty, mask, clip=0.5)[0],
    ):
        grad = jax.grad(loss)(jnp.array([[0.3, 0.4, jnp.inf]]))
        assert jnp.isfinite(grad).all() and grad[0, 2] == 0 and (grad[0, :2] != 0).any()


def test_kl_estimators_at_samples_of_p_average_to_the_kl():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    ratio = jnp.array(np.log(p / q), jnp.float32)
    kl = float((p * np.log(p / q)).sum())
    for estimator in (losses.kl_k1, losses.kl_k3):
        np.testing.assert_allclose((p * np.asarray(estimator(ratio))).sum(), kl, rtol=1e-5)
    assert (losses.kl_k3(ratio) >= 0).all()


def plackett_luce_oracle(scores, ranks):
    total = weight = 0.0
    for row, rank in zip(scores, ranks, strict=True):
        terms = []
        for i in range(len(row)):
            worse = [j for j in range(len(row)) if 0 < rank[i] < rank[j]]
            if worse:
                terms.append(np.log(sum(np.exp(row[j]) for j in [i, *worse])) - row[i])
        if terms:
            total, weight = total + np.mean(terms), weight + 1
    return total, weight


def numeric_gradient(f, x, eps=1e-5):
    grad = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[index] = eps
        grad[index] = (f(x + step) - f(x - step)) / (2 * eps)
    return grad


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("K", [2, 5, 16])
def test_plackett_luce_and_pairwise_equal_the_oracle_with_gradients(seed, K):
    rng = np.random.default_rng(seed)
    scores, ranks = rng.normal(size=(4, K)) * 2, rng.integers(0, K, size=(4, K))
    s, r = jnp.array(scores, jnp.float32), jnp.array(ranks, jnp.int32)
    for loss, oracle in (
        (losses.plackett_luce, plackett_luce_oracle),
        (losses.pairwise, ranking_oracle),
    ):
        total, weight, _ = loss(s, r)
        np.testing.assert_allclose((total, weight), oracle(scores, ranks)[:2], rtol=1e-5, atol=1e-6)
        grad = jax.grad(lambda s, f=loss: f(s, r)[0])(s)
        want = numeric_gradient(lambda x, f=oracle: f(x, ranks)[0], scores)
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5)


def test_with_two_responses_plackett_luce_is_bradley_terry():
    rng = np.random.default_rng(0)
    scores = jnp.array(rng.normal(size=(8, 2)), jnp.float32)
    ranks = jnp.array(rng.integers(1, 3, size=(8, 2)), jnp.int32)
    one, other = losses.plackett_luce(scores, ranks), losses.pairwise(scores, ranks)
    np.testing.assert_allclose(one[:2], other[:2], rtol=1e-5)


def test_a_prompt_with_nine_responses_weighs_as_much_as_one_with_four():
    rng = np.random.default_rng(0)
    ranks = np.zeros((2, 9), np.int32)
    ranks[0], ranks[1, :4] = rng.permutation(9) + 1, rng.permutation(4) + 1
    scores = jnp.array(rng.normal(size=(2, 9)), jnp.float32)
    for loss in (losses.pairwise, losses.plackett_luce):
        alone = [loss(scores[i : i + 1], jnp.array(ranks[i : i + 1]))[0] for i in range(2)]
        total, weight, _ = loss(scores, jnp.array(ranks))
        np.testing.assert_allclose(total / weight, sum(alone) / 2, rtol=1e-5)
        assert float(loss(scores, jnp.array(ranks), per_prompt=False)[1]) == (
            42 if loss is losses.pairwise else 11
        )


def test_margins_and_smoothing_equal_the_oracle():
    rng = np.random.default_rng(0)
    scores, ranks = rng.normal(size=(3, 4)), rng.integers(0, 4, size=(3, 4))
    margins = rng.normal(size=(3, 4, 4))
    total = 0.0
    for row, rank, margin in zip(scores, ranks, margins, strict=True):
        terms = []
        for i, j in np.ndindex(4, 4):
            if 0 < rank[i] < rank[j]:
                gap = row[i] - row[j] - margin[i, j]
                terms.append(0.9 * np.log1p(np.exp(-gap)) + 0.1 * np.log1p(np.exp(gap)))
        total += np.mean(terms) if terms else 0.0
    got = losses.pairwise(
        jnp.array(scores, jnp.float32),
        jnp.array(ranks, jnp.int32),
        margins=jnp.array(margins, jnp.float32),
        label_smoothing=0.1,
    )
    np.testing.assert_allclose(got[0], total, rtol=1e-5)


def test_regression_is_half_the_squared_error_of_what_exists():
    scores, targets = jnp.array([[1.0, 2.0, 99.0]]), jnp.array([[0.0, 4.0, 0.0]])
    total, weight, _ = losses.score_regression(scores, targets, jnp.array([[2, 1, 0]], jnp.int32))
    assert (float(total), float(weight)) == (1.25, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_two_limits_and_dual_clip_equal_the_oracle(seed):
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, 3, 6)
    new, old, adv = (rng.normal(size=mask.shape) for _ in range(3))
    want = 0.0
    for b, t in zip(*np.nonzero(mask), strict=True):
        ratio = np.exp(new[b, t] - old[b, t])
        gain = min(ratio * adv[b, t], np.clip(ratio, 0.9, 1.3) * adv[b, t])
        want -= max(gain, 1.5 * adv[b, t]) if adv[b, t] < 0 else gain
    dirty = [jnp.array(with_garbage(rng, x, mask)) for x in (new, old, adv)]
    total, _, _ = policy_losses.policy(
        *dirty, jnp.array(mask), clip_low=0.1, clip_high=0.3, dual_clip=1.5
    )
    np.testing.assert_allclose(total, want, rtol=1e-5, atol=1e-5)


def test_moments_in_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(5.0, 3.0, size=(6, 20)), rng.random((6, 20)) < 0.6
    moments = losses.Moments(*(jnp.float32(0) for _ in range(3)))
    for row, on in zip(x, mask, strict=True):
        moments = losses.update_moments(moments, jnp.array(row, jnp.float32), jnp.array(on))
    np.testing.assert_allclose(moments.mean, x[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(moments.m2 / moments.count, x[mask].var(), rtol=1e-4)


def test_whitening_without_centring_keeps_the_mean():
    x, mask = jnp.array([[1.0, 2.0, 3.0, 99.0]]), jnp.array([[True, True, True, False]])
    white = losses.whiten(x, mask, center=False)[0, :3]
    np.testing.assert_allclose([white.mean(), white.std()], [2.0, 1.0], rtol=1e-5)


def test_k3_in_the_loss_pulls_like_the_reverse_divergence():
    """GRPO's KL term: on policy, the mean gradient of k3 is that of KL(reference || policy), and not of KL(policy || .).

    So GRPO does not converge to PPO's optimum ref * exp(r / beta), but to beta * ref / (constant - r), r being the
    normalized score (the stationary point of E[r] - beta KL(ref || pi)).
    """
    rng = np.random.default_rng(0)
    logits = jnp.array(rng.normal(size=6), jnp.float32)
    ref = jax.nn.log_softmax(jnp.array(rng.normal(size=6), jnp.float32))
    policy = jax.nn.softmax(logits)
    per_sample = jax.jacobian(lambda x: losses.kl_k3(jax.nn.log_softmax(x) - ref))(
        logits
    )  # [sample, logit]
    mean = (policy[:, None] * per_sample).sum(0)
    reverse = jax.grad(lambda x: (jnp.exp(ref) * (ref - jax.nn.log_softmax(x))).sum())(logits)
    forward = jax.grad(lambda x: (jax.nn.softmax(x) * (jax.nn.log_softmax(x) - ref)).sum())(logits)
    np.testing.assert_allclose(mean, reverse, atol=1e-5)
    assert np.abs(np.asarray(mean - forward)).max() > 0.01
