"""Losses and estimators: pure functions of arrays that know no model.

A loss returns (sum, weight, {name: (sum, weight)}), never a mean: sums are added over microbatches and devices
in float32 and divided once. Shapes: B batch, T positions, R response positions, K responses of a prompt.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.sharding import constrain_scored, constrain_weights, in_blocks, memories, mesh_size

Pair = tuple[Array, Array]  # (sum, weight)
Metrics = dict[str, Pair]
Loss = tuple[Array, Array, Metrics]

# Logits of one block, float32 elements in one memory: 256 MiB. Larger batches are scored in more blocks.
_BLOCK_ELEMENTS = 1 << 26


class TokenStats(NamedTuple):
    """What the loss needs of the logits of every position, each float32[B, T]."""

    logprob: Array  # log p(target)
    logsumexp: Array  # log of the partition function
    entropy: Array  # nats
    top: Array  # log p of the likeliest token: greedy decoding takes the target where it has this


def token_logprobs(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    temperature: float = 1.0,
    cap: float = 0.0,
    block_elements: int = 0,
) -> TokenStats:
    """Log-probabilities of targets int32[B, T] under softmax(softcap(hidden @ head.T, cap) / temperature).

    hidden: [B, T, D]; head: float32[V, D]. The vocabulary is gone through in blocks, whose logits are recomputed in the
    backward pass, so that [B, T, V] never exists; on a mesh each block of the head is gathered, and its gradient
    reduced, once a pass. The only log-probability code: training, evaluation, the reference's KL and PPO's ratio all
    come here.
    """
    (B, T, _), V = hidden.shape, head.shape[0]
    count, length = _blocks(V, -(-B * T * V // (block_elements or _BLOCK_ELEMENTS * memories())))
    numbers = jnp.arange(length, dtype=jnp.int32)
    wide = constrain_scored(hidden).astype(
        jnp.float32
    )  # so that its gradient is summed over blocks in float32

    def score(block: Array, numbers: Array) -> _Block:
        weights = block.astype(hidden.dtype)
        logits = jnp.einsum(
            "btd,vd->btv", wide.astype(hidden.dtype), weights, preferred_element_type=jnp.float32
        )
        logits = softcap(logits, cap) / temperature
        if length > V:
            logits = jnp.where(numbers[None, None] < V, logits, -1e30)
        return _block(logits, numbers[None, None] == targets[..., None])

    if count == 1:
        return _softmax(jax.tree.map(lambda x: x[None], score(head, numbers)))
    head = constrain_weights(jnp.pad(head, ((0, length - V), (0, 0))), "vocab", "embed")
    blocks = (in_blocks(head, 0, count), in_blocks(numbers, 0, count))
    one = jax.checkpoint(score, prevent_cse=False)
    return _softmax(jax.lax.scan(lambda _, block: (None, one(*block)), None, blocks)[1])


def _blocks(vocab_size: int, wanted: int) -> tuple[int, int]:
    """(how many, entries of all): as many as wanted, up to twice as many where those cut the vocabulary evenly."""
    wanted, shards = min(max(wanted, 1), vocab_size), mesh_size("tensor")
    count = next(
        (n for n in range(wanted, 2 * wanted + 1) if vocab_size % (n * shards) == 0), wanted
    )
    return count, -(-vocab_size // (count * shards)) * count * shards


class _Block(NamedTuple):
    """Of logits float32[B, T, V / blocks], each float32[B, T]."""

    top: Array  # the largest
    total: Array  # sum of exp(logits - top)
    mean: Array  # sum of exp(logits - top) * (logits - top)
    target: Array  # the target's logit, 0 where it is in another block


def _block(logits: Array, chosen: Array) -> _Block:
    """chosen: bool[B, T, V / blocks], True at the target."""
    top = jax.lax.stop_gradient(logits.max(-1))
    below = logits - top[..., None]
    exp = jnp.exp(below)
    return _Block(top, exp.sum(-1), (exp * below).sum(-1), jnp.where(chosen, logits, 0.0).sum(-1))


def _softmax(blocks: _Block) -> TokenStats:
    """The softmax over all blocks, [blocks, B, T] each."""
    top = blocks.top.max(0)
    below = blocks.top - top[None]
    share = jnp.exp(below)
    total = (share * blocks.total).sum(0)
    mean = (share * (blocks.mean + blocks.total * below)).sum(0) / total
    log_total, target = jnp.log(total), blocks.target.sum(0)
    return TokenStats(target - top - log_total, log_total + top, log_total - mean, -log_total)


def softcap(logits: Array, cap: float) -> Array:
    """cap * tanh(logits / cap) (Gemma 2, section 2); cap 0: as they are."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def next_token_targets(
    tokens: Array, segment_ids: Array, loss_mask: Array, ahead: int = 1
) -> tuple[Array, Array]:
    """The one place where targets are shifted: position t predicts token t + ahead of its segment.

    tokens, segment_ids: int32[B, T]; loss_mask: bool[B, T], True where a token may be a target. Returns targets
    int32[B, T] and mask bool[B, T]. Five places, two segments, everything may be learnt:

        tokens   a b | c d e      targets  b c d e -      mask  1 . 1 1 .
    """
    shift = lambda x: jnp.pad(x[:, ahead:], ((0, 0), (0, ahead)))
    mask = (shift(segment_ids) == segment_ids) & (segment_ids > 0) & shift(loss_mask)
    return shift(tokens), mask


def language_model(stats: TokenStats, mask: Array, z_loss_coef: float = 0.0) -> Loss:
    """Next-token cross entropy, plus z_loss_coef * logsumexp^2 (PaLM, Chowdhery et al. 2022, section 5)."""
    weight = mask.astype(jnp.float32)
    nats, count = -(stats.logprob * weight).sum(), weight.sum()
    z = (jnp.square(stats.logsumexp) * weight).sum()
    metrics = {"loss": (nats, count)} | (
        {"z_loss": (z_loss_coef * z, count)} if z_loss_coef else {}
    )
    return nats + z_loss_coef * z, count, metrics


def pairwise(
    scores: Array,
    ranks: Array,
    *,
    margins: Array | None = None,
    label_smoothing: float = 0.0,
    per_prompt: bool = True,
) -> Loss:
    """Bradley-Terry loss over all pairs, -mean log sigmoid(r_better - r_worse - margin) (Ouyang et al. 2022, eq. 1).

    scores: float32[B, K]; ranks: int32[B, K], 1 = best, equal = tie (dropped), 0 = no such response. margins:
    float32[B, K, K], how far i should lie above j (Touvron et al. 2023, eq. 2). label_smoothing: the chance that a
    label is wrong (Mitchell 2023). per_prompt: a prompt counts once, however many pairs it has, and one without a
    pair counts nothing; otherwise every pair counts once.
    """
    better = _pairs(ranks).astype(jnp.float32)  # [B, K, K]
    gap = scores[:, :, None] - scores[:, None, :] - (0.0 if margins is None else margins)
    right, wrong = jax.nn.log_sigmoid(gap), jax.nn.log_sigmoid(-gap)
    nats = -better * ((1.0 - label_smoothing) * right + label_smoothing * wrong)
    return _per_prompt(
        nats.sum((1, 2)), better.sum((1, 2)), per_prompt, ranking_metrics(scores, ranks)
    )


def plackett_luce(scores: Array, ranks: Array, *, per_prompt: bool = True) -> Loss:
    """Minus log-likelihood of the whole ranking under Plackett-Luce (Luce 1959; Plackett 1975), a mean over choices.

    The best is chosen among all by a softmax of scores, the next among the rest, and so on. A response is set
    against those ranked strictly worse, so that with K = 2 this is `pairwise`, ties dropped. Shapes as there.
    """
    worse = _pairs(ranks)  # [B, K, K]: j is worse than i
    itself = jnp.eye(ranks.shape[1], dtype=bool)[None]
    rivals = jnp.where(worse | itself, scores[:, None, :], -jnp.inf)
    choices = worse.any(2)
    nats = jnp.where(choices, jax.nn.logsumexp(rivals, axis=2) - scores, 0.0)
    count = choices.astype(jnp.float32).sum(1)
    return _per_prompt(nats.sum(1), count, per_prompt, ranking_metrics(scores, ranks))


def score_regression(
    scores: Array, targets: Array, ranks: Array, *, per_prompt: bool = True
) -> Loss:
    """Half squared error to given scores float32[B, K]; ranks as in `pairwise`, 0 where there is no response."""
    exists = (ranks > 0).astype(jnp.float32)
    error = 0.5 * exists * jnp.square(jnp.where(ranks > 0, scores - targets, 0.0))
    return _per_prompt(error.sum(1), exists.sum(1), per_prompt, ranking_metrics(scores, ranks))


def _per_prompt(sums: Array, counts: Array, per_prompt: bool, metrics: Metrics) -> Loss:
    """Sums and counts float32[B] of prompts -> the loss: prompts or their parts weigh the same."""
    if per_prompt:
        sums, counts = sums / jnp.maximum(counts, 1.0), (counts > 0).astype(jnp.float32)
    total, weight = sums.sum(), counts.sum()
    return total, weight, {"loss": (total, weight), **metrics}


def ranking_metrics(scores: Array, ranks: Array) -> Metrics:
    """Pairwise accuracy (equal scores are half right), top-1 accuracy and the mean margin r_better - r_worse."""
    better = _pairs(ranks).astype(jnp.float32)
    gap = scores[:, :, None] - scores[:, None, :]
    right = better * ((gap > 0).astype(jnp.float32) + 0.5 * (gap == 0).astype(jnp.float32))
    has_pair = better.sum((1, 2)) > 0
    best = (
        ranks == jnp.where(ranks > 0, ranks, jnp.iinfo(jnp.int32).max).min(1, keepdims=True)
    ) & has_pair[:, None]
    chosen = jnp.argmax(jnp.where(ranks > 0, scores, -jnp.inf), axis=1)
    top = jnp.take_along_axis(best, chosen[:, None], axis=1).astype(jnp.float32)
    return {
        "accuracy": (right.sum(), better.sum()),
        "top1": (top.sum(), has_pair.astype(jnp.float32).sum()),
        "margin": ((better * gap).sum(), better.sum()),
    }


def _pairs(ranks: Array) -> Array:
    """bool[B, K, K]: response i is ranked strictly better than j, and both exist."""
    exists = (ranks[:, :, None] > 0) & (ranks[:, None, :] > 0)
    return exists & (ranks[:, :, None] < ranks[:, None, :])


def token_rewards(
    scores: Array, logprobs: Array, ref_logprobs: Array, mask: Array, kl_coef
) -> Array:
    """Reward of every response token: -kl_coef * (logprob - ref_logprob), plus the score on the last one.

    Ziegler et al. 2019, eq. 2, spread over tokens (Ouyang et al. 2022, eq. 2). scores: float32[B]; the others
    [B, R], mask True up to and including the end token. With a response of three tokens of five, k = -coef * KL:

        mask  1 1 1 . .      rewards  k k k+score 0 0
    """
    last = mask & ~jnp.concatenate([mask[:, 1:], jnp.zeros_like(mask[:, :1])], axis=1)
    kl = jnp.where(mask, kl_k1(logprobs - ref_logprobs), 0.0)
    return jnp.where(last, scores[:, None], 0.0) - kl_coef * kl


def gae(
    rewards: Array, values: Array, mask: Array, *, discount: float, lam: float
) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): (advantages, returns), each float32[B, R].

    The value after a response's last token is 0; nothing beyond the mask is read.
    """
    rewards, values = (jnp.where(mask, x, 0.0) for x in (rewards, values))

    def back(carry: tuple[Array, Array], now: tuple[Array, Array]):
        next_value, next_advantage = carry
        reward, value = now
        advantage = reward + discount * next_value - value + discount * lam * next_advantage
        return (value, advantage), advantage

    zero = jnp.zeros_like(values[:, 0])
    _, advantages = jax.lax.scan(back, (zero, zero), (rewards.T, values.T), reverse=True)
    advantages = jnp.where(mask, advantages.T, 0.0)
    return advantages, advantages + values


def group_advantages(scores: Array, kind: str) -> Array:
    """Advantages float32[B, K] of K responses to each prompt, from their scores alone.

    "rloo": the score minus the mean of the other responses' (Kool et al. 2019, eq. 4; Ahmadian et al. 2024, eq. 8).
    "grpo": minus the mean of all, over their population standard deviation (Shao et al. 2024, section 4.1.2).
    """
    K = scores.shape[1]
    centred = scores - scores.mean(1, keepdims=True)
    if kind == "rloo":
        return centred * (K / (K - 1))
    return centred / (scores.std(1, keepdims=True) + 1e-6)


def whiten(x: Array, mask: Array, eps: float = 1e-8, *, centre: bool = True) -> Array:
    """(x - mean) / std over the mask, with the population variance (as OpenAI's tf.nn.moments); 0 elsewhere.

    centre=False leaves the mean where it is, for rewards (Ziegler et al. 2019; Huang et al., detail 17).
    """
    count = jnp.maximum(mask.astype(jnp.float32).sum(), 1.0)
    mean = _sum(x, mask) / count
    variance = _sum(jnp.square(x - mean), mask) / count
    white = (x - mean) * jax.lax.rsqrt(variance + eps)
    return jnp.where(mask, white if centre else white + mean, 0.0)


def policy(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
) -> Loss:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), summed over response tokens; all float32[B, R].

    The ratio is clipped to 1 - clip_low .. 1 + clip_high (two limits: Yu et al. 2025, section 3.1). dual_clip > 1
    also bounds the loss of a token with a negative advantage by dual_clip * |advantage| (Ye et al. 2020, eq. 5).
    """
    count = mask.astype(jnp.float32).sum()
    # Beyond the mask everything is garbage, and 0 * inf in a gradient is NaN: it is cut off at the entrance.
    log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
    advantages = jnp.where(mask, advantages, 0.0)
    ratio = jnp.exp(log_ratio)
    gain = jnp.minimum(
        ratio * advantages, jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    )
    if dual_clip:
        gain = jnp.where(advantages < 0, jnp.maximum(gain, dual_clip * advantages), gain)
    loss = -_sum(gain, mask)
    outside = ((ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)).astype(jnp.float32)
    metrics = {
        "policy_loss": (loss, count),
        "clip_fraction": (_sum(outside, mask), count),
        "approx_kl": (_sum(kl_k3(-log_ratio), mask), count),
        "ratio": (_sum(ratio, mask), count),
    }
    return loss, count, metrics


def value(values: Array, old_values: Array, returns: Array, mask: Array, *, clip: float) -> Loss:
    """Half squared error, the larger of clipped and not (as OpenAI baselines' ppo2); clip 0 turns clipping off."""
    count = mask.astype(jnp.float32).sum()
    values, old_values, returns = (jnp.where(mask, x, 0.0) for x in (values, old_values, returns))
    error = jnp.square(values - returns)
    near = old_values + jnp.clip(values - old_values, -clip, clip) if clip else values
    clipped_error = jnp.square(near - returns)
    loss = 0.5 * _sum(jnp.maximum(error, clipped_error), mask)
    outside = _sum((clipped_error > error).astype(jnp.float32), mask)
    return loss, count, {"value_loss": (loss, count), "value_clip_fraction": (outside, count)}


def kl_k1(log_ratio: Array) -> Array:
    """Unbiased estimate of KL(p || q) at samples of p, log_ratio = log p - log q (Schulman 2020, "k1").

    The one for the reward: as a reward, k3's gradient is not that of the KL.
    """
    return log_ratio


def kl_k3(log_ratio: Array) -> Array:
    """Low-variance, non-negative estimate at samples of p, log_ratio = log p - log q (Schulman 2020, "k3")."""
    return jnp.expm1(-log_ratio) + log_ratio


def adapt_kl_coef(
    kl_coef: Array, kl: Array, *, target: float, horizon: float, batch_size: int
) -> Array:
    """Ziegler's controller (Ziegler et al. 2019, section 2.2): the coefficient follows the KL to its target.

    kl: the mean over responses of the KL summed over their tokens, nats. The error (kl / target - 1), clipped to
    +-0.2, moves the coefficient by that share of batch_size / horizon (horizon: in responses).
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * batch_size / horizon)


class Moments(NamedTuple):
    """Running count, mean and sum of squared deviations, each float32[]."""

    count: Any
    mean: Any
    m2: Any


def update_moments(moments: Moments, x: Array, mask: Array) -> Moments:
    """Take in x where mask is True, exactly as if all had been seen at once (Chan et al. 1979, eq. 2.1)."""
    n = mask.astype(jnp.float32).sum()
    mean = _sum(x, mask) / jnp.maximum(n, 1.0)
    total, delta = moments.count + n, mean - moments.mean
    share = n / jnp.maximum(total, 1.0)
    m2 = moments.m2 + _sum(jnp.square(x - mean), mask) + jnp.square(delta) * moments.count * share
    return Moments(total, moments.mean + delta * share, m2)


def _sum(x: Array, mask: Array) -> Array:
    """Sum over the mask; what lies beyond it may be anything, inf and NaN included."""
    return jnp.where(mask, x, 0.0).sum()
