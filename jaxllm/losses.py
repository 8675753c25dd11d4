"""Losses and estimators: pure functions of arrays, independent of any model.

A loss returns (sum, weight, {name: (sum, weight)}), never a mean: sums are added over microbatches and devices in
float32 and divided once.

Shapes: B rows (or prompts), T positions, D model width, V vocabulary, R response positions, K responses to a prompt.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.output_layer import TokenStats
from jaxllm.soft_targets import SoftStats

Pair = tuple[Array, Array]  # (sum, weight), each float32[]
Metrics = dict[str, Pair]
Loss = tuple[Array, Array, Metrics]  # (sum, weight, metrics); the loss is sum / weight


def next_token_targets(
    tokens: Array, segment_ids: Array, loss_mask: Array, distance: int = 1
) -> tuple[Array, Array]:
    """Shifts tokens to targets: position t predicts token t + distance of its segment. No other code shifts targets.

    Five positions, two segments, the loss on every token:

        tokens   a b | c d e      targets  b c d e -      mask  1 . 1 1 .

    Position 1 predicts nothing: the next token is another document's. tokens, segment_ids (0: padding): int32[B, T];
    loss_mask: bool[B, T], True where a token may be a target. Returns (int32[B, T], bool[B, T]).
    """

    # The zeros that are shifted in are padding, so the last positions of a row predict nothing.
    is_same = shift(segment_ids, distance) == segment_ids
    mask = is_same & (segment_ids > 0) & shift(loss_mask, distance)
    return shift(tokens, distance), mask


def shift(x: Array, distance: int = 1) -> Array:
    """What belongs to tokens, [B, T, ...], moved to the positions that predict them; zeros at the end."""
    moved = x[:, distance:]
    return jnp.pad(moved, ((0, 0), (0, distance), *[(0, 0)] * (x.ndim - 2)))


def unshift(x: Array) -> Array:
    """What belongs to positions, [B, T, ...], moved to the tokens that they predict; zeros at the beginning."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)))


def language_model(stats: TokenStats | SoftStats, mask: Array, z_loss_coef: float = 0.0) -> Loss:
    """Next-token cross entropy, plus z_loss_coef * logsumexp^2 (PaLM, Chowdhery et al. 2022, section 5).

    stats: of the targets, float32[B, T]; mask: bool[B, T], True where there is a target.
    """
    weight = mask.astype(jnp.float32)
    nats = -(stats.logprob * weight).sum()
    count = weight.sum()
    z = (jnp.square(stats.logsumexp) * weight).sum()
    # The loss as a metric is without z-loss, so that runs can be compared.
    metrics: Metrics = {"loss": (nats, count)}
    if z_loss_coef:
        metrics["z_loss"] = (z_loss_coef * z, count)
    return nats + z_loss_coef * z, count, metrics


def soft_targets(stats: SoftStats, mask: Array, share: float, z_loss_coef: float = 0.0) -> Loss:
    """`language_model` whose cross entropy gives way, by this share, to the divergence from a teacher's soft targets.

    stats: of the targets, float32[B, T]; mask: bool[B, T], True where there is a target.
    """
    total, count, metrics = language_model(stats, mask, z_loss_coef)
    nats, _ = metrics["loss"]
    divergence = (stats.divergence * mask.astype(jnp.float32)).sum()
    total = total + share * (divergence - nats)
    return total, count, {**metrics, "divergence": (divergence, count)}


def pairwise(
    scores: Array,
    ranks: Array,
    *,
    margins: Array | float | None = None,
    label_smoothing: float = 0.0,
    per_prompt: bool = True,
) -> Loss:
    """Bradley-Terry loss over all pairs, -mean log sigmoid(r_better - r_worse - margin) (Ouyang et al. 2022, eq. 1).

    scores: float32[B, K]; ranks: int32[B, K], where 1 is best, equal ranks are a tie (dropped) and 0 is no such response;
    margins: float32[B, K, K], by how much i should exceed j (Touvron et al. 2023, eq. 2), or one for all pairs;
    label_smoothing: probability that a label is wrong (Mitchell 2023). per_prompt: a prompt counts once, however many pairs
    it has, and not at all without a pair; if False, every pair counts once.
    """
    better = better_pairs(ranks).astype(jnp.float32)  # [B, K, K]: i is better than j
    gap = scores[:, :, None] - scores[:, None, :]  # [B, K, K]: i over j
    gap = gap - (0.0 if margins is None else margins)
    # With ties dropped, `better` holds each pair once: (i, j) or (j, i).
    right = jax.nn.log_sigmoid(gap)
    wrong = jax.nn.log_sigmoid(-gap)
    nats = -better * ((1.0 - label_smoothing) * right + label_smoothing * wrong)
    metrics = ranking_metrics(scores, ranks)
    return per_prompt_loss(nats.sum((1, 2)), better.sum((1, 2)), per_prompt, metrics)


def plackett_luce(scores: Array, ranks: Array, *, per_prompt: bool = True) -> Loss:
    """Negative log-likelihood of a ranking under Plackett-Luce (Luce 1959; Plackett 1975), a mean over choices.

    The best response is chosen among all by a softmax of scores, the next among the rest, and so on. A response competes
    with those ranked strictly worse, so that with K = 2 this is `pairwise` without ties. With ranks 1 2 2 3 of a b c d the
    choices are a over b c d, b over d, and c over d. scores: float32[B, K]; ranks: int32[B, K] as in `pairwise`.
    """
    worse = better_pairs(ranks)  # [B, K, K]: j is worse than i
    itself = jnp.eye(ranks.shape[1], dtype=bool)[None]
    # exp(-inf) = 0: others do not take part in the choice. A row always has itself, so no sum is empty.
    rivals = jnp.where(worse | itself, scores[:, None, :], -jnp.inf)
    choices = worse.any(2)  # the last response, and one that does not exist, choose nothing
    nats = jnp.where(choices, jax.nn.logsumexp(rivals, axis=2) - scores, 0.0)
    count = choices.astype(jnp.float32).sum(1)
    return per_prompt_loss(nats.sum(1), count, per_prompt, ranking_metrics(scores, ranks))


def score_regression(
    scores: Array, targets: Array, ranks: Array, *, per_prompt: bool = True
) -> Loss:
    """Half the squared error of scores to targets, both float32[B, K]; ranks: int32[B, K] as in `pairwise`."""
    exists = (ranks > 0).astype(jnp.float32)
    # Masked twice: the inner one keeps a NaN of a missing target out of the gradient.
    error = 0.5 * exists * jnp.square(jnp.where(ranks > 0, scores - targets, 0.0))
    return per_prompt_loss(error.sum(1), exists.sum(1), per_prompt, ranking_metrics(scores, ranks))


def per_prompt_loss(sums: Array, counts: Array, per_prompt: bool, metrics: Metrics) -> Loss:
    """The loss from sums and counts float32[B] of prompts; either prompts or the items counted weigh the same."""
    if per_prompt:
        sums = sums / jnp.maximum(counts, 1.0)
        counts = (counts > 0).astype(jnp.float32)
    total = sums.sum()
    weight = counts.sum()
    return total, weight, {"loss": (total, weight), **metrics}


def ranking_metrics(scores: Array, ranks: Array) -> Metrics:
    """Pairwise accuracy (equal scores are half right), top-1 accuracy and the mean margin r_better - r_worse.

    scores: float32[B, K]; ranks: int32[B, K] as in `pairwise`.
    """
    better = better_pairs(ranks).astype(jnp.float32)
    gap = scores[:, :, None] - scores[:, None, :]  # [B, K, K]
    right = better * ((gap > 0).astype(jnp.float32) + 0.5 * (gap == 0).astype(jnp.float32))
    has_pair = better.sum((1, 2)) > 0
    # Several responses may share the best rank; any of them is right.
    best_rank = jnp.where(ranks > 0, ranks, jnp.iinfo(jnp.int32).max).min(1, keepdims=True)
    best = (ranks == best_rank) & has_pair[:, None]
    chosen = jnp.argmax(jnp.where(ranks > 0, scores, -jnp.inf), axis=1)
    top = jnp.take_along_axis(best, chosen[:, None], axis=1).astype(jnp.float32)
    return {
        "accuracy": (right.sum(), better.sum()),
        "top1": (top.sum(), has_pair.astype(jnp.float32).sum()),
        "margin": ((better * gap).sum(), better.sum()),
    }


def better_pairs(ranks: Array) -> Array:
    """bool[B, K, K]: response i is ranked strictly better than j, and both exist."""
    exists = (ranks[:, :, None] > 0) & (ranks[:, None, :] > 0)
    return exists & (ranks[:, :, None] < ranks[:, None, :])


def last_tokens(mask: Array) -> Array:
    """bool[B, R]: True at the last token of each row; mask: bool[B, R], True up to and including it."""
    # A token is the last one if it counts and the next one does not.
    return mask & ~jnp.concatenate([mask[:, 1:], jnp.zeros_like(mask[:, :1])], axis=1)


def token_rewards(
    scores: Array, logprobs: Array, ref_logprobs: Array, mask: Array, kl_coef: Array | float
) -> Array:
    """Reward of every response token: -kl_coef * (logprob - ref_logprob), plus the score on the last one.

    Ziegler et al. 2019, eq. 2, spread over tokens (Ouyang et al. 2022, eq. 2). With a response of three tokens in five
    positions, k = -kl_coef * (logprob - ref_logprob):

        mask  1 1 1 . .      rewards  k k k+score 0 0

    scores: float32[B]; logprobs of the policy and of the reference: float32[B, R]; mask: bool[B, R], True up to and
    including the end token. Returns float32[B, R].
    """
    last = last_tokens(mask)
    kl = jnp.where(mask, kl_k1(logprobs - ref_logprobs), 0.0)
    return jnp.where(last, scores[:, None], 0.0) - kl_coef * kl


def gae(
    rewards: Array, values: Array, mask: Array, *, discount: float, lam: float
) -> tuple[Array, Array]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16): (advantages, returns), each float32[B, R].

    A_t = delta_t + discount * lam * A_{t+1} with delta_t = r_t + discount * V_{t+1} - V_t; returns are A + V.

    rewards, values: float32[B, R], where the value at t is that of the state before token t; mask: bool[B, R]. The
    value after a response's last token is 0, and nothing beyond the mask is read.
    """
    rewards = jnp.where(mask, rewards, 0.0)
    values = jnp.where(mask, values, 0.0)

    # The recursion runs from the last position to the first; beyond the mask rewards and values are 0, and so is A.
    def back(later: tuple[Array, Array], now: tuple[Array, Array]) -> Any:
        next_value, next_advantage = later
        reward, value = now
        advantage = reward + discount * next_value - value + discount * lam * next_advantage
        return (value, advantage), advantage

    zero = jnp.zeros_like(values[:, 0])
    # Scans go over the first dimension: [R, B].
    _, advantages = jax.lax.scan(back, (zero, zero), (rewards.T, values.T), reverse=True)
    advantages = jnp.where(mask, advantages.T, 0.0)
    return advantages, advantages + values


def whiten(x: Array, mask: Array, eps: float = 1e-8, *, center: bool = True) -> Array:
    """(x - mean) / std over the mask, with the population variance (as OpenAI's tf.nn.moments); 0 elsewhere.

    x: float32 of any shape; mask: bool of it. center=False keeps the mean, for rewards (Ziegler et al. 2019; Huang et al.,
    detail 17).
    """
    count = jnp.maximum(mask.astype(jnp.float32).sum(), 1.0)
    mean = _sum(x, mask) / count
    variance = _sum(jnp.square(x - mean), mask) / count
    # eps keeps a constant x finite: it becomes 0.
    white = (x - mean) * jax.lax.rsqrt(variance + eps)
    return jnp.where(mask, white if center else white + mean, 0.0)


def value(values: Array, old_values: Array, returns: Array, mask: Array, *, clip: float) -> Loss:
    """Half the squared error, the larger of clipped and unclipped (as OpenAI baselines' ppo2); clip 0: unclipped.

    values, old_values, returns: float32[B, R]; mask: bool[B, R].
    """
    count = mask.astype(jnp.float32).sum()
    # Beyond the mask everything is garbage, and 0 * inf in a gradient is NaN: it is replaced before any computation.
    values = jnp.where(mask, values, 0.0)
    old_values = jnp.where(mask, old_values, 0.0)
    returns = jnp.where(mask, returns, 0.0)
    error = jnp.square(values - returns)
    # A clipped value is within `clip` of the old one.
    near = old_values + jnp.clip(values - old_values, -clip, clip) if clip else values
    clipped_error = jnp.square(near - returns)
    loss = 0.5 * _sum(jnp.maximum(error, clipped_error), mask)
    outside = _sum((clipped_error > error).astype(jnp.float32), mask)
    return loss, count, {"value_loss": (loss, count), "value_clip_fraction": (outside, count)}


def kl_k1(log_ratio: Array) -> Array:
    """Unbiased estimate of KL(p || q) at samples of p, from log p - log q of any shape (Schulman 2020, "k1")."""
    # This one is for rewards: the gradient of k3 as a reward is not that of the KL.
    return log_ratio


def kl_k2(log_ratio: Array) -> Array:
    """Half the square, from log p - log q of any shape (Schulman 2020, "k2"); its mean gradient at samples of p is that of KL(p || q)."""
    return 0.5 * jnp.square(log_ratio)


def kl_k3(log_ratio: Array) -> Array:
    """Low-variance, non-negative estimate at samples of p, from log p - log q of any shape (Schulman 2020, "k3")."""
    return jnp.expm1(-log_ratio) + log_ratio


def adapt_kl_coef(
    kl_coef: Array, kl: Array, *, target: float, horizon: float, batch_size: int
) -> Array:
    """Ziegler's controller (Ziegler et al. 2019, section 2.2) moves the coefficient until the KL is at its target.

    The error (kl / target - 1), clipped to +-0.2, changes the coefficient by that share of batch_size / horizon.

    kl_coef: float32[]; kl: float32[] nats, a mean over responses of sums over tokens; horizon, batch_size: in responses.
    """
    # Proportional control with a bounded step, so that one unusual batch moves the coefficient little.
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * batch_size / horizon)


class Moments(NamedTuple):
    """Running moments, each float32[]."""

    count: Any  # number of values
    mean: Any  # their mean
    m2: Any  # sum of their squared deviations from the mean


def update_moments(moments: Moments, x: Array, mask: Array) -> Moments:
    """Adds x (float32 of any shape) where mask is True, as if all values were seen at once (Chan et al. 1979, eq. 2.1)."""
    # A mask that is all False must change nothing: each division is by at least 1.
    n = mask.astype(jnp.float32).sum()
    mean = _sum(x, mask) / jnp.maximum(n, 1.0)
    total = moments.count + n
    delta = mean - moments.mean
    share = n / jnp.maximum(total, 1.0)
    m2 = moments.m2 + _sum(jnp.square(x - mean), mask) + jnp.square(delta) * moments.count * share
    return Moments(total, moments.mean + delta * share, m2)


def _sum(x: Array, mask: Array) -> Array:
    """Sum over the mask, beyond which x may hold anything, inf and NaN included."""
    return jnp.where(mask, x, 0.0).sum()
