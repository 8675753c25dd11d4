"""Policy gradients: how responses are compared, and what is summed over their tokens.

An objective is made of independent parts, each a field of `rl.config.PPOConfig`; here is what they are called elsewhere:

    objective     advantages     ratio     surrogate  loss_mean  source
    PPO           gae            token     clip       token      Schulman et al. 2017, eq. 7
    RLOO          rloo           token     clip       token      Ahmadian et al. 2024, eq. 8
    GRPO          grpo           token     clip       response   Shao et al. 2024, eq. 3
    GRPO of steps grpo_steps     token     clip       response   Shao et al. 2024, section 4.1.3
    Dr. GRPO      dr_grpo        token     clip       constant   Liu et al. 2025, "Understanding R1-Zero-like training"
    DAPO          grpo           token     clip       token      Yu et al. 2025, eq. 8; sampling_rounds, overlong:N
    GSPO          grpo           sequence  clip       response   Zheng et al. 2025, eq. 5 and 7
    CISPO         grpo           token     cispo      token      MiniMax 2025, "MiniMax-M1", eq. 4 and 5
    REINFORCE++   reinforce_pp   token     clip       token      Hu et al. 2025, "REINFORCE++"

As in `losses`, a loss returns (sum, weight, {name: (sum, weight)}). Shapes: B rows, R response positions, K responses
to a prompt.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.losses import Loss, Metrics, kl_k3

# --- Advantages: how much better a response is than expected.


def group_advantages(scores: Array, kind: str) -> Array:
    """Advantages float32[B, K] of K responses to each of B prompts, from their scores float32[B, K] alone.

    "rloo": the score minus the mean of the other responses' (Kool et al. 2019, eq. 4; Ahmadian et al. 2024, eq. 8).
    "grpo": minus the mean of all, over their population standard deviation (Shao et al. 2024, section 4.1.2).
    "dr_grpo": minus the mean of all, so that easy and hard prompts weigh what they differ (Liu et al. 2025).
    """
    K = scores.shape[1]
    # Equal scores teach nothing. Their mean may be rounded, and what is left would be divided by its own size.
    differ = scores.max(1, keepdims=True) > scores.min(1, keepdims=True)
    centered = jnp.where(differ, scores - scores.mean(1, keepdims=True), 0.0)
    if kind == "rloo":
        # s - mean of the others = (s - mean of all) * K / (K - 1)
        return centered * (K / (K - 1))
    if kind == "dr_grpo":
        return centered
    return centered / (scores.std(1, keepdims=True) + 1e-6)


def rewards_to_go(rewards: Array, mask: Array, num_responses: int) -> Array:
    """Sum of the rewards of a token and of all after it, float32[B, R] (Hu et al. 2025, "REINFORCE++").

    With several responses to a prompt, the mean of their sums is subtracted ("REINFORCE++ with baseline"). The batch is
    normalized afterwards, by `losses.whiten`. rewards: float32[B, R], rows of one prompt adjacent; mask: bool[B, R].
    """
    rewards = jnp.where(mask, rewards, 0.0)
    to_go = jax.lax.cumsum(rewards, axis=1, reverse=True)
    if num_responses > 1:
        # The first token's rewards to go are those of the whole response.
        by_prompt = to_go[:, 0].reshape(-1, num_responses)
        to_go = to_go - by_prompt.mean(1).repeat(num_responses)[:, None]
    return jnp.where(mask, to_go, 0.0)


def step_advantages(rewards: Array, ends: Array, num_responses: int) -> Array:
    """Advantages from rewards of steps, normalized within a prompt's responses (Shao et al. 2024, section 4.1.3).

    All steps of the K responses to a prompt are one group: each step's reward loses the group's mean and is divided by
    its population standard deviation. The advantage of a token is the sum over its own step and all later ones.

    Args:
      rewards: float32[B, R], read where a step ends; rows of one prompt are adjacent.
      ends: bool[B, R], True where a step ends; nothing beyond a response's last token.
      num_responses: K.

    Returns:
      float32[B, R], 0 after the last step's end.
    """
    by_prompt = rewards.reshape(-1, num_responses * rewards.shape[1])
    of_step = ends.reshape(by_prompt.shape)
    # As in `group_advantages`: equal rewards teach nothing, and their mean may be rounded.
    highest = by_prompt.max(1, keepdims=True, where=of_step, initial=-jnp.inf)
    lowest = by_prompt.min(1, keepdims=True, where=of_step, initial=jnp.inf)
    counts = of_step & (highest > lowest)
    number = jnp.maximum(counts.astype(jnp.float32).sum(1, keepdims=True), 1.0)
    mean = jnp.where(counts, by_prompt, 0.0).sum(1, keepdims=True) / number
    centered = jnp.where(counts, by_prompt - mean, 0.0)
    std = jnp.sqrt(jnp.square(centered).sum(1, keepdims=True) / number)
    normalized = (centered / (std + 1e-6)).reshape(rewards.shape)
    return jax.lax.cumsum(normalized, axis=1, reverse=True)


# --- Ratios: how far the policy has moved since it sampled, as log-ratios float32[B, R].


def _of_tokens(log_ratio: Array, mask: Array) -> Array:
    del mask
    return log_ratio


def _of_responses(log_ratio: Array, mask: Array) -> Array:
    """The mean over a response at each of its tokens: the ratio's geometric mean (Zheng et al. 2025, eq. 7)."""
    length = mask.astype(jnp.float32).sum(1, keepdims=True)
    mean = log_ratio.sum(1, keepdims=True) / jnp.maximum(length, 1.0)
    return jnp.where(mask, mean, 0.0)


RATIOS: dict[str, Callable[[Array, Array], Array]] = {
    "token": _of_tokens,
    "sequence": _of_responses,
}

# --- Surrogates: what a token gains, from (log-probability, ratio, clipped ratio, advantage), float32[B, R] each.


def _clip(logprobs: Array, ratio: Array, clipped: Array, advantages: Array) -> Array:
    """Schulman et al. 2017, eq. 7: a token whose ratio has left its limits has no gradient."""
    del logprobs
    # The smaller gain: moving the ratio beyond its limits is not rewarded, but moving it the wrong way is punished.
    return jnp.minimum(ratio * advantages, clipped * advantages)


def _cispo(logprobs: Array, ratio: Array, clipped: Array, advantages: Array) -> Array:
    """MiniMax 2025, eq. 4 and 5: the clipped ratio only weighs a token, so that each one keeps its gradient."""
    del ratio
    return jax.lax.stop_gradient(clipped) * advantages * logprobs


SURROGATES: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "clip": _clip,
    "cispo": _cispo,
}

# --- Means: what a loss is a mean over. Its sum and its weight are added over microbatches, and divided once.


def total(x: Array, mask: Array, loss_mean: str) -> Array:
    """Sum float32[] of x float32[B, R] over the mask, beyond which x may hold anything; its weight is `weight_of`.

    "token", "constant": each token counts once. "response": each response counts once, whatever its length.
    """
    x = jnp.where(mask, x, 0.0)
    if loss_mean == "response":
        x = x / jnp.maximum(mask.astype(jnp.float32).sum(1, keepdims=True), 1.0)
    return x.sum()


def weight_of(mask: Array, loss_mean: str) -> Array:
    """What `total` is divided by, float32[], from mask bool[B, R].

    "token": tokens (Yu et al. 2025, eq. 8). "response": responses (Shao et al. 2024, eq. 3). "constant": R tokens for
    each response, however long it is (Liu et al. 2025).
    """
    if loss_mean == "token":
        return mask.astype(jnp.float32).sum()
    # Not the number of rows: rows without a response may fill a batch.
    responses = mask.any(1).astype(jnp.float32).sum()
    return responses * mask.shape[1] if loss_mean == "constant" else responses


# --- The loss.


def policy(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    ratio: str = "token",
    surrogate: str = "clip",
    loss_mean: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    sampler_weights: Array | None = None,
) -> Loss:
    """The loss of the policy, from the parts named above.

    logprobs of the policy that is trained and old_logprobs of the one that sampled, advantages: float32[B, R]; mask:
    bool[B, R], True at response tokens. The ratio is clipped to 1 - clip_low .. 1 + clip_high (two limits: Yu et al.
    2025, section 3.1). dual_clip > 1 also bounds the loss of a token with a negative advantage by dual_clip *
    |advantage| (Ye et al. 2020, eq. 5). sampler_weights: float32[B, R], see `truncated_weights`.
    """
    count = mask.astype(jnp.float32).sum()
    # Beyond the mask everything is garbage, and 0 * inf in a gradient is NaN: it is replaced before any computation.
    log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
    advantages = jnp.where(mask, advantages, 0.0)
    ratios = jnp.exp(RATIOS[ratio](log_ratio, mask))
    clipped = jnp.clip(ratios, 1.0 - clip_low, 1.0 + clip_high)
    gain = SURROGATES[surrogate](jnp.where(mask, logprobs, 0.0), ratios, clipped, advantages)
    if dual_clip:
        gain = jnp.where(advantages < 0, jnp.maximum(gain, dual_clip * advantages), gain)
    if sampler_weights is not None:
        gain = gain * sampler_weights
    loss = -total(gain, mask, loss_mean)
    weight = weight_of(mask, loss_mean)
    outside = ((ratios < 1.0 - clip_low) | (ratios > 1.0 + clip_high)).astype(jnp.float32)
    metrics = {
        "policy_loss": (loss, weight),
        "clip_fraction": (total(outside, mask, "token"), count),
        # KL(old || new), since the old policy sampled.
        "approx_kl": (total(kl_k3(-log_ratio), mask, "token"), count),
        "ratio": (total(ratios, mask, "token"), count),
    }
    return loss, weight, metrics


# --- The sampler's part.


def truncated_weights(
    logprobs: Array, sampler_logprobs: Array, mask: Array, *, level: str, cap: float
) -> tuple[Array, Metrics]:
    """Importance weights min(trainer / sampler, cap), constants to the gradient (Yao et al. 2025), and metrics.

    "token": the ratio of each token's probabilities. "sequence": of the whole response's, which alone corrects for the
    sampler's choice of later tokens.

    logprobs of the trainer, of the same weights and temperature, and of the sampler: float32[B, R]; mask: bool[B, R].
    Returns (float32[B, R], metrics of tokens or of responses).
    """
    log_ratio = jnp.where(mask, logprobs - sampler_logprobs, 0.0)
    # What a weight belongs to: each token, or each response, which its first token stands for.
    counted = mask
    if level == "sequence":
        log_ratio = jnp.where(mask, log_ratio.sum(1, keepdims=True), 0.0)
        counted = mask & (jnp.arange(mask.shape[1]) == 0)[None]
    weights = jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio), cap))
    count = total(jnp.ones_like(weights), counted, "token")
    summed = total(weights, counted, "token")
    squares = total(jnp.square(weights), counted, "token")
    capped = (log_ratio > jnp.log(cap)).astype(jnp.float32)
    metrics = {
        "sampler_weight": (summed, count),
        "sampler_capped": (total(capped, counted, "token"), count),
        # Kish 1965: the share of samples that equally weighted ones would need for the same variance.
        "sampler_ess": (jnp.square(summed) / (count * squares), jnp.ones(())),
    }
    return weights, metrics
