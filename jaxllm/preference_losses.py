"""Objectives that train a policy directly on K ranked responses to each prompt: pure functions of log-probabilities.

    objective       learns from                   reference   log-probability of a response
    dpo             every pair                    yes         sum over tokens
    plackett_luce   the whole order               yes         sum over tokens
    ipo             every pair                    yes         sum over tokens
    kto             every response by itself      yes         sum over tokens
    orpo            every pair, and imitation     no          mean over tokens
    simpo           every pair                    no          mean over tokens

Each has an implicit reward, by which accuracy and margins are measured, and a loss. Prompts count as in
`losses.pairwise`: each once, or each of its pairs (kto: of its responses) once.

Shapes: B prompts, K responses to a prompt.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm import losses
from jaxllm.losses import Loss


class Coefficients(Protocol):
    """What the objectives read of the config; its docstrings explain them."""

    @property
    def beta(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def kto_desirable_weight(self) -> float: ...
    @property
    def kto_undesirable_weight(self) -> float: ...
    @property
    def orpo_coef(self) -> float: ...
    @property
    def simpo_beta(self) -> float: ...
    @property
    def simpo_gamma(self) -> float: ...
    @property
    def weighting(self) -> str: ...


class Responses(NamedTuple):
    """K responses to each of B prompts."""

    logprobs: Array  # float32[B, K]: log policy(response), summed over its tokens
    lengths: Array  # float32[B, K]: its tokens, the end of turn included
    ranks: Array  # int32[B, K] as in `losses.pairwise`: 1 is best, 0 is no such response
    labels: Array  # int32[B, K]: 1 desirable, -1 undesirable, 0 not given
    ref_logprobs: Array | None = (
        None  # float32[B, K]: the reference's; None: the objective has no reference
    )
    margins: Array | None = None  # float32[B, K, K]: dpo: by how much i should exceed j
    kl: Array | None = (
        None  # float32[]: kto: mean log(policy / reference) of responses to other prompts
    )


# --- Implicit rewards, float32[B, K].


def log_ratio_reward(responses: Responses, config: Coefficients) -> Array:
    """beta * log(policy / reference), not normalized by length (Rafailov et al. 2023, eq. 5)."""
    return config.beta * _log_ratios(responses)


def odds_reward(responses: Responses, config: Coefficients) -> Array:
    """log(p / (1 - p)), where log p is the mean over tokens (Hong et al. 2024, eq. 4)."""
    del config
    # A mean of 0 has no odds. Of a response that does not exist it is 0, too.
    logprobs = jnp.minimum(_mean_logprobs(responses), -jnp.finfo(jnp.float32).eps)
    # log(1 - p), without the cancellation of 1 - exp(log p) where p is almost 1.
    return logprobs - jnp.log(-jnp.expm1(logprobs))


def mean_logprob_reward(responses: Responses, config: Coefficients) -> Array:
    """simpo_beta * log policy / tokens, normalized by length (Meng et al. 2024, eq. 4)."""
    return config.simpo_beta * _mean_logprobs(responses)


def _log_ratios(responses: Responses) -> Array:
    assert responses.ref_logprobs is not None
    return responses.logprobs - responses.ref_logprobs


def _mean_logprobs(responses: Responses) -> Array:
    return responses.logprobs / jnp.maximum(responses.lengths, 1.0)


# --- Losses.


def dpo(responses: Responses, config: Coefficients) -> Loss:
    """-log sigmoid(reward of the better - reward of the worse), over all pairs (Rafailov et al. 2023, eq. 7).

    Log-probabilities are sums over tokens. With label_smoothing, labels are wrong with that probability (Mitchell 2023).
    """
    return losses.pairwise(
        log_ratio_reward(responses, config),
        responses.ranks,
        margins=responses.margins,
        label_smoothing=config.label_smoothing,
        per_prompt=config.weighting == "prompt",
    )


def plackett_luce(responses: Responses, config: Coefficients) -> Loss:
    """DPO's likelihood of the whole order (Rafailov et al. 2023, appendix A.3), with sums over tokens."""
    rewards = log_ratio_reward(responses, config)
    per_prompt = config.weighting == "prompt"
    return losses.plackett_luce(rewards, responses.ranks, per_prompt=per_prompt)


def ipo(responses: Responses, config: Coefficients) -> Loss:
    """(h - 1 / (2 beta))^2, over all pairs (Azar et al. 2023, eq. 17); h: log-ratio of the better - of the worse.

    Log-ratios are sums over tokens, as in the paper, where beta is called tau. The loss is least at a finite h, so that
    labels without noise do not drive the policy away from its reference.
    """
    ratios = _log_ratios(responses)
    gap = ratios[:, :, None] - ratios[:, None, :]  # [B, K, K]: i over j
    errors = jnp.square(gap - 1.0 / (2.0 * config.beta))
    return _over_pairs(errors, responses, config, log_ratio_reward(responses, config))


def kto(responses: Responses, config: Coefficients) -> Loss:
    """Kahneman-Tversky optimization of single responses (Ethayarajh et al. 2024, eq. 8); log-ratios r are sums.

    A desirable response loses weight_D * (1 - sigmoid(beta * (r - z))), an undesirable one
    weight_U * (1 - sigmoid(beta * (z - r))). Labels say which is which, or else `desirability`. The reference point z is
    max(0, responses.kl), through which no gradient flows. It belongs to a microbatch, over all devices: its number of
    prompts is part of the objective.
    """
    assert responses.kl is not None
    label = labels_of(responses).astype(jnp.float32)
    point = jax.lax.stop_gradient(jnp.maximum(responses.kl, 0.0))
    # 1 - sigmoid(x) = sigmoid(-x). Labels are +1 and -1.
    lost = jax.nn.sigmoid(config.beta * label * (point - _log_ratios(responses)))
    weights = jnp.where(label > 0, config.kto_desirable_weight, config.kto_undesirable_weight)
    labeled = jnp.abs(label)
    rewards = log_ratio_reward(responses, config)
    desirable = (label > 0).astype(jnp.float32).sum()
    metrics = {
        **losses.ranking_metrics(rewards, responses.ranks),
        "reference_point": (point, jnp.ones(())),
        "desirable": (desirable, labeled.sum()),
    }
    sums = (labeled * weights * lost).sum(1)
    return losses.per_prompt_loss(sums, labeled.sum(1), config.weighting == "prompt", metrics)


def labels_of(responses: Responses) -> Array:
    """Labels int32[B, K]: the given ones of a prompt, or `desirability` where none is given."""
    given = (responses.labels != 0).any(1, keepdims=True)
    return jnp.where(given, responses.labels, desirability(responses.ranks))


def desirability(ranks: Array) -> Array:
    """Labels int32[B, K] of ranks int32[B, K]: 1 beats more of the prompt's responses than beat it, -1 fewer, 0 neither.

    Of two responses the better one is desirable. Labels do not depend on how ties are numbered:

        ranks  1 2 3 4    labels  1  1 -1 -1
               1 2 2 0            1 -1 -1  0
               1 2 2 5            1  0  0 -1
               1 1                0  0
    """
    better = losses.better_pairs(ranks).astype(jnp.int32)
    return jnp.sign(better.sum(2) - better.sum(1))


def orpo(responses: Responses, config: Coefficients) -> Loss:
    """Imitation and odds ratio, without a reference (Hong et al. 2024, eq. 6 and 7), over all pairs.

    A pair costs -log p(better) - orpo_coef * log sigmoid(log odds(better) - log odds(worse)). Both log p and the odds
    p / (1 - p) are of the mean over a response's tokens. A response is imitated as often as it is the better one.
    """
    odds = odds_reward(responses, config)
    gap = odds[:, :, None] - odds[:, None, :]  # [B, K, K]: i over j
    nats = -_mean_logprobs(responses)[:, :, None]  # of i
    total, weight, metrics = _over_pairs(
        nats - config.orpo_coef * jax.nn.log_sigmoid(gap), responses, config, odds
    )
    imitation, pairs, _ = _over_pairs(jnp.broadcast_to(nats, gap.shape), responses, config, odds)
    return total, weight, {**metrics, "imitation_loss": (imitation, pairs)}


def simpo(responses: Responses, config: Coefficients) -> Loss:
    """-log sigmoid(reward of the better - reward of the worse - simpo_gamma), over all pairs (Meng et al. 2024, eq. 6).

    Rewards are simpo_beta times the mean log-probability of a response's tokens; there is no reference.
    """
    return losses.pairwise(
        mean_logprob_reward(responses, config),
        responses.ranks,
        margins=config.simpo_gamma,
        per_prompt=config.weighting == "prompt",
    )


def _over_pairs(costs: Array, responses: Responses, config: Coefficients, rewards: Array) -> Loss:
    """The loss from costs float32[B, K, K] of i being better than j, with the metrics of rewards float32[B, K]."""
    better = losses.better_pairs(responses.ranks).astype(jnp.float32)
    metrics = losses.ranking_metrics(rewards, responses.ranks)
    sums = (better * costs).sum((1, 2))
    per_prompt = config.weighting == "prompt"
    return losses.per_prompt_loss(sums, better.sum((1, 2)), per_prompt, metrics)


# --- The table.


class Objective(NamedTuple):
    """How a policy learns from rankings."""

    loss: Callable[[Responses, Coefficients], Loss]
    reward: Callable[[Responses, Coefficients], Array]  # the implicit one, float32[B, K]
    has_reference: bool = True
    needs_kl: bool = False

    @property
    def passes(self) -> int:
        """Forward passes' worth of work: 3 of training, 1 of the reference, 2 of both models for the KL."""
        return 3 + self.has_reference + 2 * self.needs_kl


OBJECTIVES = {
    "dpo": Objective(dpo, log_ratio_reward),
    "plackett_luce": Objective(plackett_luce, log_ratio_reward),
    "ipo": Objective(ipo, log_ratio_reward),
    "kto": Objective(kto, log_ratio_reward, needs_kl=True),
    "orpo": Objective(orpo, odds_reward, has_reference=False),
    "simpo": Objective(simpo, mean_logprob_reward, has_reference=False),
}
