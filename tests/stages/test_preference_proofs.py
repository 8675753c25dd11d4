"""Stage dpo against mathematics: with each objective it reaches a distribution that is known, and with a mistake does not.

All responses y of a prompt can be listed, and a model gives them any distribution pi. Rankings hold all of them, or K. What
a world's rankings say is its population: p[i, j], the share of the rankings with both in which i is above j. A loss is
then a function of log pi alone, and its optimum follows from p, the reference and the lengths.

DPO is the Bradley-Terry likelihood with scores beta log(pi / ref). Let r be the utilities that maximize it for p. Any
scores can be had, up to a constant that sum pi = 1 takes away: pi(y) = ref(y) exp(r(y) / beta) / Z. Plackett-Luce is the
same with the utilities of that likelihood.

SimPO without a margin is that likelihood with scores beta log pi / |y|: pi(y) = exp(|y| (r(y) + c) / beta), with the c for
which the sum is 1.

IPO, of h = s_i - s_j with s = log(pi / ref): p (h - t)^2 + (1 - p) (-h - t)^2 is, up to a constant, (h - (2 p - 1) t)^2 with
t = 1 / (2 beta). If all pairs are equally frequent, the least squares of differences are means: s_i is the mean over j of
(p[i, j] - 1/2) / beta, up to a constant.

KTO, ORPO and SimPO with a margin have no such form. With g = d loss / d log pi, the gradient of logits over whole
responses is g - pi sum g, and `stationary` follows it to its end in float64.

All of it, with its figures:

    python -m pytest tests/stages/test_preference_proofs.py -m "slow or not slow" -n 0 -s
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import losses, preference_losses
from jaxllm.optim_config import OptimConfig
from jaxllm.preference_losses import OBJECTIVES
from jaxllm.stages import preference
from jaxllm.stages.config import DPOConfig
from tests.stages.preference_worlds import PreferenceWorld
from tests.stages.worlds import PROMPTS

pytestmark = pytest.mark.usefixtures("compiled_well")

_ADAM = OptimConfig(
    learning_rate=5e-3, schedule="linear", final_fraction=0.0, weight_decay=0.0, eps=1e-5, b2=0.99
)
_QUICK = {"num_steps": 240, "batch_size": 16, "optim": _ADAM}
CONFIGS = {
    "dpo": DPOConfig(beta=0.5, **_QUICK),
    "plackett_luce": DPOConfig(loss="plackett_luce", beta=0.5, **_QUICK),
    "ipo": DPOConfig(loss="ipo", beta=0.25, **_QUICK),
    # Labels are not without contradiction, and weighted so that every response gains: none vanishes.
    "kto": DPOConfig(loss="kto", beta=0.8, kto_desirable_weight=10.0, **_QUICK),
    "orpo": DPOConfig(loss="orpo", orpo_coef=8.0, **_QUICK),
    "simpo": DPOConfig(loss="simpo", simpo_beta=2.0, simpo_gamma=0.0, **_QUICK),
}
MARGIN = dataclasses.replace(CONFIGS["simpo"], simpo_gamma=0.7)
LIMIT = 0.03  # total variation to the fixed point


# --- What the rankings say.


def preferences(world, index):
    """p float64[N, N]: how often i was ranked above j, of the rankings of prompt `index` that hold both."""
    N = len(world.lengths)
    above = np.zeros((N, N))
    for chosen, ranks in zip(world.choices[index], world.ranks[index], strict=True):
        above[np.ix_(chosen, chosen)] += ranks[:, None] < ranks[None]
    both = above + above.T
    return np.where(both > 0, above / np.maximum(both, 1), 0.5)


def labels(world, index):
    """(desirable, undesirable) float64[N]: the share of the labelled responses of prompt `index` that are y, and are so."""
    good, bad = np.zeros((2, len(world.lengths)))
    if world.labels:
        chosen, is_good = world.choices[index], world.labels[index]
        np.add.at(good, chosen[is_good], 1)
        np.add.at(bad, chosen[~is_good], 1)
        return good / chosen.size, bad / chosen.size
    for chosen, ranks in zip(world.choices[index], world.ranks[index], strict=True):
        middle = (len(ranks) + 1) / 2
        good[chosen[ranks < middle]] += 1
        bad[chosen[ranks > middle]] += 1
    return good / (good + bad).sum(), bad / (good + bad).sum()


# --- Fixed points, float64[N].


def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def normalized(logprobs):
    pi = np.exp(logprobs - logprobs.max())
    return pi / pi.sum()


def bradley_terry(p):
    """Utilities that maximize sum p[i, j] log sigmoid(r_i - r_j), by gradient ascent."""
    r = np.zeros(len(p))
    for _ in range(4000):
        gradient = (p - sigmoid(r[:, None] - r[None])) * (1 - np.eye(len(p)))
        r += 4.0 * gradient.sum(1) / len(p)
    assert np.abs(gradient.sum(1)).max() < 1e-9
    return r


def plackett_luce_utilities(world, index):
    """Utilities that maximize the mean log-likelihood of the rankings, by gradient ascent."""
    chosen, ranks = world.choices[index], world.ranks[index]
    ordered = np.take_along_axis(chosen, ranks.argsort(1), axis=1)  # best first
    r = np.zeros(len(world.lengths))
    for _ in range(1500):
        weights = np.exp(r[ordered])
        rest = weights[:, ::-1].cumsum(1)[:, ::-1]  # of those not yet chosen
        # Response at place k is chosen once, and was a rival in every choice up to k, but the last has no choice.
        odds = (1 / rest[:, :-1]).cumsum(1)
        odds = np.concatenate([odds, odds[:, -1:]], axis=1) * weights
        gained = np.ones_like(odds)
        gained[:, -1] = 0.0
        gradient = np.bincount(ordered.ravel(), (gained - odds).ravel(), len(r)) / len(ordered)
        r += 0.7 * gradient
    assert np.abs(gradient).max() < 1e-7
    return r


def simpo_without_margin(utilities, lengths, beta):
    """exp(|y| (r(y) + c) / beta), where c is bisected."""
    low, high = -100.0, 100.0
    for _ in range(100):
        c = 0.5 * (low + high)
        pi = np.exp(lengths * (utilities + c) / beta)
        low, high = (low, c) if pi.sum() > 1 else (c, high)
    return pi


def stationary(gradient, start):
    """Where logits over whole responses rest that follow `gradient`: log pi -> d loss / d log pi."""
    logits = np.log(start)
    step = 0.1
    before = np.inf
    for _ in range(100_000):
        pi = normalized(logits)
        g = gradient(np.log(pi))
        slope = g - pi * g.sum()
        size = np.abs(slope).max()
        if size < 1e-7:
            return pi
        step = step * 1.02 if size < before else step * 0.7
        before = size
        # Rare responses have small slopes: they are scaled up, which moves no point of rest.
        logits = logits - step * slope / (pi + 0.01)
    raise AssertionError(f"no rest after all steps: {size}")


def of_pairs(p, derivative):
    """d loss / d score float64[N], of the mean over pairs of p[i, j] cost(score_i - score_j), whose derivative is given."""
    N = len(p)

    def gradient(scores):
        slopes = p * derivative(scores[:, None] - scores[None]) / (N * (N - 1) / 2)
        return slopes.sum(1) - slopes.sum(0)

    return gradient


def orpo_gradient(p, lengths, coef):
    """Pairs cost -m_i + coef * softplus(-(o_i - o_j)), where m = log pi / |y| and o = m - log(1 - exp(m))."""
    pairs = len(p) * (len(p) - 1) / 2
    of_odds = of_pairs(p, lambda gap: -coef * sigmoid(-gap))
    better = (p * (1 - np.eye(len(p)))).sum(1) / pairs  # how often a response is imitated

    def gradient(logprobs):
        mean = logprobs / lengths
        odds = mean - np.log(-np.expm1(mean))
        return (of_odds(odds) / -np.expm1(mean) - better) / lengths

    return gradient


def simpo_gradient(p, lengths, beta, gamma):
    of_scores = of_pairs(p, lambda gap: -sigmoid(gamma - gap))
    return lambda logprobs: of_scores(beta * logprobs / lengths) * beta / lengths


def kto_fixed_points(world):
    """The fixed points of both prompts, which share the reference point z: the mean log-ratio of all responses, if positive.

    A desirable response costs D sigmoid(beta (z - s)), an undesirable one U sigmoid(beta (s - z)), s = log(pi / ref): with
    shares d and u, d loss / d s is beta sigmoid'(beta (s - z)) (U u - D d). z has no gradient, but moves with pi: here
    each step finds where pi rests at the z of the last one.
    """
    config = world.config
    refs = [world.logprobs(world.ref, prompt) for prompt in PROMPTS]
    shares = [labels(world, index) for index in range(len(PROMPTS))]
    points = [np.exp(ref) for ref in refs]
    z = before = -1.0
    for _ in range(100):
        ratios = [np.log(pi) - ref for pi, ref in zip(points, refs, strict=True)]
        z = max(0.0, float(np.mean(ratios)))
        if abs(z - before) < 1e-9:
            return points, z
        before = z
        points = [
            stationary(_kto_gradient(config, ref, *share, z), pi)
            for ref, share, pi in zip(refs, shares, points, strict=True)
        ]
    raise AssertionError("the reference point does not settle")


def _kto_gradient(config, ref, good, bad, z):
    gain = config.kto_undesirable_weight * bad - config.kto_desirable_weight * good

    def gradient(logprobs):
        share = sigmoid(config.beta * (logprobs - ref - z))
        return config.beta * share * (1 - share) * gain

    return gradient


def fixed_points(world):
    """The distributions float64[N] that the objective of `world` leads to, of each prompt."""
    config, lengths = world.config, world.lengths
    if config.loss == "kto":
        return kto_fixed_points(world)[0]
    points = []
    for index, prompt in enumerate(PROMPTS):
        ref, p = world.logprobs(world.ref, prompt), preferences(world, index)
        if config.loss == "dpo":
            pi = normalized(ref + bradley_terry(p) / config.beta)
        elif config.loss == "plackett_luce":
            pi = normalized(ref + plackett_luce_utilities(world, index) / config.beta)
        elif config.loss == "ipo":
            pi = normalized(ref + (p - 0.5).mean(1) / config.beta)
        elif config.loss == "orpo":
            pi = stationary(orpo_gradient(p, lengths, config.orpo_coef), np.exp(ref))
        elif config.simpo_gamma:
            gradient = simpo_gradient(p, lengths, config.simpo_beta, config.simpo_gamma)
            pi = stationary(gradient, np.exp(ref))
        else:
            pi = simpo_without_margin(bradley_terry(p), lengths, config.simpo_beta)
        points.append(pi)
    return points


# --- The stage.


def reached(config, seed=0, name="", **world):
    """Total variation of the trained policy to the fixed point, the worse of both prompts."""
    world = PreferenceWorld(config, seed, **world)
    points = fixed_points(world)
    params = world.train()
    starts, ends = [], []
    for prompt, point in zip(PROMPTS, points, strict=True):
        ref, pi = (np.exp(world.logprobs(each, prompt)) for each in (world.ref, params))
        assert abs(pi.sum() - 1) < 1e-5 and abs(point.sum() - 1) < 1e-5
        starts.append(0.5 * np.abs(ref - point).sum())
        ends.append(0.5 * np.abs(pi - point).sum())
    print(
        f"\n{name or config.loss}, {len(world.lengths)} responses, seed {seed}: "
        f"total variation {max(starts):.3f} -> {max(ends):.4f}",
        flush=True,
    )
    assert max(starts) > 0.15  # there was something to learn
    return max(ends)


def longer(config):
    return dataclasses.replace(config, num_steps=400)


@pytest.mark.parametrize("name", ["orpo", pytest.param("kto", marks=pytest.mark.life)])
def test_objectives_with_and_without_reference_reach_their_fixed_points(name):
    assert reached(CONFIGS[name]) <= LIMIT


@pytest.mark.life
def test_single_labeled_responses_lead_kto_to_its_fixed_point():
    # Many responses to a batch: with few, gradients of rare labels are large and rare, which Adam makes too small.
    config = dataclasses.replace(CONFIGS["kto"], kto_desirable_weight=20.0, batch_size=1024)
    assert reached(config, name="kto, single responses", labeled=True) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "plackett_luce", "ipo", "simpo"])
def test_every_other_objective_reaches_its_fixed_point(name):
    assert reached(longer(CONFIGS[name])) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_other_worlds_have_other_fixed_points(name):
    """Another reference and other utilities, and a model of two layers."""
    assert reached(longer(CONFIGS[name]), seed=2, layers=2) <= LIMIT


@pytest.mark.slow
def test_simpo_with_a_margin_reaches_the_minimum_of_its_loss():
    assert reached(longer(MARGIN), name="simpo with a margin") <= LIMIT


def test_the_two_ways_to_a_fixed_point_agree():
    """The closed forms of DPO, IPO and SimPO are where the gradient of their losses rests."""
    for name in ("dpo", "ipo", "simpo"):
        world = PreferenceWorld(CONFIGS[name], seed=0)
        beta, lengths = world.config.beta, world.lengths
        for index, (prompt, point) in enumerate(zip(PROMPTS, fixed_points(world), strict=True)):
            ref, p = world.logprobs(world.ref, prompt), preferences(world, index)
            if name == "simpo":
                found = stationary(simpo_gradient(p, lengths, 2.0, 0.0), np.exp(ref))
            else:
                slope = (
                    (lambda gap, beta=beta: -beta * sigmoid(-beta * gap))
                    if name == "dpo"
                    else (lambda gap, beta=beta: 2 * (gap - 1 / (2 * beta)))
                )
                of_ratios = of_pairs(p * (1 - np.eye(len(p))), slope)
                found = stationary(
                    lambda logprobs, f=of_ratios, ref=ref: f(logprobs - ref), np.exp(ref)
                )
            np.testing.assert_allclose(found, point, atol=1e-5)


# --- Mistakes.

_right_pairs = losses.better_pairs


def _with(name, **changed):
    """The objective with other coefficients in its loss."""
    objective = OBJECTIVES[name]
    wrong = lambda responses, config: objective.loss(
        responses, dataclasses.replace(config, **changed)
    )
    return {name: objective._replace(loss=wrong)}


_SWAPPED_RANKS = (losses, "better_pairs", lambda ranks: _right_pairs(ranks).swapaxes(1, 2))
_NO_REFERENCE = (preference_losses, "_log_ratios", lambda r: r.logprobs)
_MEAN_OF_TOKENS = (
    preference_losses,
    "_log_ratios",
    lambda r: (r.logprobs - r.ref_logprobs) / jnp.maximum(r.lengths, 1.0),
)
_SUM_OF_TOKENS = (preference_losses, "_mean_logprobs", lambda r: r.logprobs)
_NO_KL = (preference, "unrelated_kl", lambda *_, **__: jnp.zeros(()))
_RATIO_WITHOUT_ODDS = (
    preference_losses,
    "odds_reward",
    lambda r, config: r.logprobs / jnp.maximum(r.lengths, 1.0),
)
MISTAKES = {
    "dpo, ranks swapped": (CONFIGS["dpo"], _SWAPPED_RANKS),
    "dpo, no reference": (CONFIGS["dpo"], _NO_REFERENCE),
    "dpo, mean over tokens": (CONFIGS["dpo"], _MEAN_OF_TOKENS),
    "ipo, target twice as far": (CONFIGS["ipo"], _with("ipo", beta=0.125)),
    "ipo, mean over tokens": (CONFIGS["ipo"], _MEAN_OF_TOKENS),
    "kto, no reference point": (CONFIGS["kto"], _NO_KL),
    "kto, no reference": (CONFIGS["kto"], _NO_REFERENCE),
    "kto, weight forgotten": (CONFIGS["kto"], _with("kto", kto_desirable_weight=1.0)),
    "orpo, sum over tokens": (CONFIGS["orpo"], _SUM_OF_TOKENS),
    "orpo, ratio without odds": (CONFIGS["orpo"], _RATIO_WITHOUT_ODDS),
    "orpo, ranks swapped": (CONFIGS["orpo"], _SWAPPED_RANKS),
    "simpo, sum over tokens": (CONFIGS["simpo"], _SUM_OF_TOKENS),
    "simpo, margin forgotten": (MARGIN, _with("simpo", simpo_gamma=0.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_with_one_mistake_the_fixed_point_is_missed(mistake, monkeypatch):
    config, change = MISTAKES[mistake]
    if isinstance(change, dict):
        monkeypatch.setitem(OBJECTIVES, *next(iter(change.items())))
    else:
        monkeypatch.setattr(*change)
    assert reached(longer(config), name=f"mistake: {mistake}") > LIMIT
