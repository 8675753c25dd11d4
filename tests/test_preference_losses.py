"""Every objective against a plain-loop NumPy float64 oracle, value and gradient, and what each is invariant to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import losses, preference_losses
from jaxllm.preference_losses import OBJECTIVES, Responses
from jaxllm.stages.config import DPOConfig
from tests.test_losses import numeric_gradient

# Coefficients other than the defaults, so that one that is not read shows.
CONFIGS = {
    "dpo": DPOConfig(beta=0.3, label_smoothing=0.1),
    "plackett_luce": DPOConfig(loss="plackett_luce", beta=0.3),
    "ipo": DPOConfig(loss="ipo", beta=0.3),
    "kto": DPOConfig(loss="kto", beta=0.3, kto_desirable_weight=1.7, kto_undesirable_weight=0.6),
    "orpo": DPOConfig(loss="orpo", orpo_coef=0.4),
    "simpo": DPOConfig(loss="simpo", simpo_beta=1.5, simpo_gamma=0.7),
}
KL = 0.8


def example(seed, B=4, K=4):
    """Log-probabilities of responses of 1 to 6 tokens; about a quarter does not exist, and has the zeros of padding."""
    rng = np.random.default_rng(seed)
    ranks = rng.integers(0, K, size=(B, K))
    lengths = rng.integers(1, 7, size=(B, K)) * (ranks > 0)
    logprobs = -rng.uniform(0.2, 2.0, size=(B, K)) * lengths
    ref_logprobs = -rng.uniform(0.2, 2.0, size=(B, K)) * lengths
    return logprobs, ref_logprobs, lengths, ranks


def responses_of(name, logprobs, ref_logprobs, lengths, ranks):
    objective = OBJECTIVES[name]
    single = lambda x: jnp.asarray(x, jnp.float32)
    return Responses(
        single(logprobs),
        single(lengths),
        jnp.asarray(ranks, jnp.int32),
        jnp.zeros(np.shape(ranks), jnp.int32),
        single(ref_logprobs) if objective.has_reference else None,
        kl=jnp.float32(KL) if objective.needs_kl else None,
    )


def softplus(x):
    return np.log1p(np.exp(-abs(x))) + max(x, 0.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pair_cost(name, i, j, logp, ref, lengths):
    """What response i costs that is better than j."""
    config = CONFIGS[name]
    if name == "dpo":
        gap = config.beta * ((logp[i] - ref[i]) - (logp[j] - ref[j]))
        return 0.9 * softplus(-gap) + 0.1 * softplus(gap)
    if name == "ipo":
        return (logp[i] - ref[i] - logp[j] + ref[j] - 1 / (2 * config.beta)) ** 2
    mean = [log / max(length, 1) for log, length in zip(logp, lengths, strict=True)]
    if name == "simpo":
        return softplus(config.simpo_gamma - config.simpo_beta * (mean[i] - mean[j]))
    odds = lambda m: np.exp(m) / (1 - np.exp(m))
    ratio = odds(mean[i]) / odds(mean[j])
    return -mean[i] - config.orpo_coef * np.log(ratio / (1 + ratio))


def costs_of_prompt(name, logp, ref, lengths, rank):
    K, config = len(rank), CONFIGS[name]
    beats = lambda i, j: 0 < rank[i] < rank[j]
    if name == "kto":
        costs = []
        for i in range(K):
            wins, beaten = (
                sum(b) for b in zip(*((beats(i, j), beats(j, i)) for j in range(K)), strict=True)
            )
            r = logp[i] - ref[i]
            if wins > beaten:
                costs.append(1.7 * (1 - sigmoid(config.beta * (r - KL))))
            elif wins < beaten:
                costs.append(0.6 * (1 - sigmoid(config.beta * (KL - r))))
        return costs
    if name == "plackett_luce":
        rewards = config.beta * (logp - ref)
        rivals = [[i, *(j for j in range(K) if beats(i, j))] for i in range(K)]
        return [np.log(np.exp(rewards[r]).sum()) - rewards[r[0]] for r in rivals if len(r) > 1]
    pairs = [(i, j) for i in range(K) for j in range(K) if beats(i, j)]
    return [pair_cost(name, i, j, logp, ref, lengths) for i, j in pairs]


def oracle(name, logprobs, ref_logprobs, lengths, ranks, per_prompt=True):
    """(sum, weight)."""
    rows = zip(logprobs, ref_logprobs, lengths, ranks, strict=True)
    costs = [c for row in rows if (c := costs_of_prompt(name, *row))]
    if per_prompt:
        return sum(np.mean(c) for c in costs), len(costs)
    return sum(map(sum, costs)), sum(map(len, costs))


def test_every_objective_of_the_config_is_in_the_table():
    assert set(CONFIGS) == set(OBJECTIVES)
    for name, config in CONFIGS.items():
        assert config.loss == name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_equal_the_oracle(name, seed):
    arrays = example(seed)
    responses, config = responses_of(name, *arrays), CONFIGS[name]
    loss = OBJECTIVES[name].loss
    for weighting in ("prompt", "pair"):
        weighted = DPOConfig(**{**vars(config), "weighting": weighting})
        total, weight, metrics = loss(responses, weighted)
        want = oracle(name, *arrays, per_prompt=weighting == "prompt")
        np.testing.assert_allclose((total, weight), want, rtol=2e-5)
        np.testing.assert_allclose(metrics["loss"], want, rtol=2e-5)
    grad = jax.grad(lambda x: loss(responses._replace(logprobs=x), config)[0])(responses.logprobs)
    want = numeric_gradient(lambda x: oracle(name, x, *arrays[1:])[0], arrays[0])
    np.testing.assert_allclose(grad, np.where(arrays[3] > 0, want, 0.0), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics_are_those_of_the_implicit_reward(name):
    logprobs, ref, lengths, ranks = example(5)
    responses, config = responses_of(name, logprobs, ref, lengths, ranks), CONFIGS[name]
    mean = logprobs / np.maximum(lengths, 1)
    with np.errstate(divide="ignore"):
        rewards = {
            "orpo": mean - np.log(1 - np.exp(mean)),
            "simpo": 1.5 * mean,
        }.get(name, 0.3 * (logprobs - ref))
    exists = ranks > 0
    found = OBJECTIVES[name].reward(responses, config)
    np.testing.assert_allclose(found[exists], rewards[exists], rtol=1e-4, atol=1e-6)
    metrics = OBJECTIVES[name].loss(responses, config)[2]
    for key, pair in losses.ranking_metrics(found, responses.ranks).items():
        np.testing.assert_allclose(metrics[key], pair, rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_responses_that_do_not_exist_and_prompts_of_ties_change_nothing(name):
    """An absent response has the zeros of padding, for which the odds have no logarithm."""
    logprobs, ref, lengths, ranks = (x[:1] for x in example(1))
    ranks = np.array([[2, 1, 3, 1]])
    lengths, logprobs = np.maximum(lengths, 1), np.minimum(logprobs, -0.1)
    config, loss = CONFIGS[name], OBJECTIVES[name].loss
    alone = loss(responses_of(name, logprobs, ref, lengths, ranks), config)
    wider = [np.pad(x, ((0, 1), (0, 2))) for x in (logprobs, ref, lengths, ranks)]
    wider[3][1, :2] = 1  # a tie
    padded = responses_of(name, *wider)
    np.testing.assert_allclose(loss(padded, config)[:2], alone[:2], rtol=1e-6)
    grad = jax.grad(lambda x: loss(padded._replace(logprobs=x), config)[0])(padded.logprobs)
    assert jnp.isfinite(grad).all() and not grad[1].any() and not grad[:, 4:].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_response_that_is_certain_gives_finite_numbers(name):
    zero = np.zeros((1, 2))
    responses = responses_of(name, zero, zero - 1.0, zero + 3.0, np.array([[2, 1]]))
    loss = lambda x: OBJECTIVES[name].loss(responses._replace(logprobs=x), CONFIGS[name])[0]
    assert jnp.isfinite(loss(responses.logprobs))
    assert jnp.isfinite(jax.grad(loss)(responses.logprobs)).all()


def test_odds_are_exact_where_a_probability_is_almost_one():
    """log(p / (1 - p)) in float64 at log p = -1e-5, where 1 - exp(log p) has three digits in float32."""
    responses = responses_of("orpo", [[-1e-5, -12.0]], None, [[1, 1]], [[1, 2]])
    found = preference_losses.odds_reward(responses, CONFIGS["orpo"])
    want = np.array([-1e-5, -12.0]) - np.log(-np.expm1([-1e-5, -12.0]))
    np.testing.assert_allclose(found[0], want, rtol=1e-6)


def test_given_labels_of_a_prompt_replace_those_of_its_ranks():
    arrays = [x[:, :2] for x in example(6)[:3]]
    ranks = np.array([[1, 2], [2, 1], [1, 0], [0, 0]])
    labels = np.array([[-1, 1], [0, 0], [-1, 0], [0, 0]])
    responses = responses_of("kto", *arrays, ranks)._replace(labels=jnp.asarray(labels, jnp.int32))
    total, weight, metrics = preference_losses.kto(responses, CONFIGS["kto"])
    # Ranks with which the oracle finds the labels; a single response needs a better one, which costs nothing by itself.
    costs = [
        costs_of_prompt("kto", *(x[0] for x in arrays[:3]), [2, 1]),
        costs_of_prompt("kto", *(x[1] for x in arrays[:3]), [2, 1]),
        costs_of_prompt("kto", *(x[2] for x in arrays[:3]), [2, 1])[:1],
    ]
    np.testing.assert_allclose((total, weight), (sum(map(np.mean, costs)), 3), rtol=2e-5)
    np.testing.assert_allclose(metrics["desirable"], (2, 5))


def test_desirable_beats_more_than_it_is_beaten_by():
    ranks = [[1, 2, 3, 4], [1, 2, 2, 0], [1, 2, 2, 5], [1, 2, 2, 3], [1, 1, 0, 0], [2, 1, 0, 0]]
    want = [[1, 1, -1, -1], [1, -1, -1, 0], [1, 0, 0, -1], [1, 0, 0, -1], [0] * 4, [-1, 1, 0, 0]]
    found = preference_losses.desirability(jnp.array(ranks, jnp.int32))
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(("kl", "point"), [(1.3, 1.3), (-0.4, 0.0)])
def test_the_reference_point_of_kto_is_at_least_zero_and_has_no_gradient(kl, point):
    responses = responses_of("kto", *example(2))._replace(kl=jnp.float32(kl))
    loss = lambda kl: preference_losses.kto(responses._replace(kl=kl), CONFIGS["kto"])
    np.testing.assert_allclose(loss(jnp.float32(kl))[2]["reference_point"], (point, 1.0))
    assert jax.grad(lambda x: loss(x)[0])(jnp.float32(kl)) == 0.0
    assert loss(jnp.float32(1.3))[0] != loss(jnp.float32(0.0))[0]


def test_with_two_responses_ipo_is_least_at_half_of_one_over_beta():
    responses = responses_of("ipo", [[-1.0, -3.0]], [[-1.0, -1.0]], [[2, 2]], [[1, 2]])
    total, _, _ = preference_losses.ipo(responses, DPOConfig(loss="ipo", beta=0.25))
    assert float(total) == 0.0  # h = 2 = 1 / (2 * 0.25)
