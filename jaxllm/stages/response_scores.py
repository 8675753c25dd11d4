"""Scores of K responses to each prompt, by the reward model or by a policy, and how well they agree with rankings.

Shapes: B or N prompts, K responses of a prompt, T positions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import losses, output_layer
from jaxllm.data.loader import RankedExample, ranked_epoch
from jaxllm.evaluation import measures
from jaxllm.models import lora, scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.preference_losses import Responses
from jaxllm.runtime.transfer import fetch
from jaxllm.train import TrainState


def reward_scores(params: Any, batch: Any, *, base: Any, model: ModelConfig) -> jax.Array:
    """Scores float32[B, K] of the reward model, read at the last token of each response.

    Args:
      params: trainable parameters: {"trunk", "head"}, the trunk's or its adapters.
      batch: {tokens, segment_ids}, each int32[B, K, T]; the K responses are rows of one forward pass.
      base: frozen parameters under adapters, or {}.
      model: config of the decoder.
    """
    B, K, T = batch["tokens"].shape
    tokens = batch["tokens"].reshape(B * K, T)
    segment_ids = batch["segment_ids"].reshape(B * K, T)
    # Rows are independent: the K responses of a prompt do not attend to each other.
    values = scalar.apply(lora.join(base, params), model, tokens, segment_ids)
    return scalar.last_value(values, segment_ids).reshape(B, K)


def policy_responses(
    params: Any, batch: Any, *, base: Any, model: ModelConfig, ref: Any = None
) -> Responses:
    """What the policy, and the reference if there is one, makes of each response.

    Args:
      params: trainable parameters of the policy, all or its adapters.
      batch: {tokens, segment_ids int32[B, K, T], loss_mask bool[B, K, T], ranks, labels int32[B, K]}.
      base: frozen parameters under adapters, or {}.
      model: config of both.
      ref: parameters of the reference policy; None: the objective has none.
    """
    logprobs = reply_logprobs(lora.join(base, params), batch, model)
    ref_logprobs = None
    if ref is not None:
        # The gradient of the reference is 0 in any case; stopping it spares the backward pass.
        ref_logprobs = jax.lax.stop_gradient(reply_logprobs(ref, batch, model))
    # Every token of a reply is a target: the prompt before it has at least one token.
    lengths = batch["loss_mask"].astype(jnp.float32).sum(2)
    return Responses(logprobs, lengths, batch["ranks"], batch["labels"], ref_logprobs)


def reply_logprobs(params: Any, batch: Any, model: ModelConfig) -> jax.Array:
    """Log-probability float32[B, K] of each response, its end of turn included, summed over tokens.

    loss_mask is True on the response. With a prompt of two tokens, a response of three and padding, position t
    predicts token t + 1:

        tokens     p p a b e -      targets    p a b e - -
        loss_mask  . . 1 1 1 .      summed     . 1 1 1 . .
    """
    B, K, T = batch["tokens"].shape
    tokens = batch["tokens"].reshape(B * K, T)
    segment_ids = batch["segment_ids"].reshape(B * K, T)
    loss_mask = batch["loss_mask"].reshape(B * K, T)
    targets, mask = losses.next_token_targets(tokens, segment_ids, loss_mask)
    hidden = transformer.apply(params, model, tokens, segment_ids)
    stats = output_layer.token_logprobs(
        hidden, transformer.head(params), targets, cap=model.logit_softcap
    )
    # Summed, not averaged over tokens: an objective that wants the mean divides by the length.
    return jnp.where(mask, stats.logprob, 0.0).sum(1).reshape(B, K)


def unrelated_kl(params: Any, batch: Any, *, base: Any, model: ModelConfig, ref: Any) -> jax.Array:
    """Mean log(policy / reference) of responses to other prompts, float32[] in nats, without a gradient.

    KTO's estimate of the KL to the reference (Ethayarajh et al. 2024, section 4.1): a sum over tokens, and a mean over all
    pairs of `unrelated_pairs`. Arguments as of `policy_responses`.
    """
    pairs = unrelated_pairs(batch)
    policy = jax.lax.stop_gradient(lora.join(base, params))
    ratios = reply_logprobs(policy, pairs, model) - reply_logprobs(ref, pairs, model)
    exists = pairs["loss_mask"].any(2).astype(jnp.float32)
    return jax.lax.stop_gradient((exists * ratios).sum() / jnp.maximum(exists.sum(), 1.0))


def unrelated_pairs(batch: Any) -> dict[str, jax.Array]:
    """Each prompt of a batch with the responses to the next prompt; the last one has those to the first.

    Of two prompts p p and q q q, with K = 1 and T = 6:

        tokens  p p a b e .      with the other's response  p p c e . .
                q q q c e .                                 q q q a b e

    What does not fit in T tokens is cut off. batch: {tokens, segment_ids: int32[B, K, T], loss_mask: bool[B, K, T]};
    returns the same arrays.
    """
    tokens, loss_mask = batch["tokens"], batch["loss_mask"]
    # The K responses share their prompt, and the first of them always exists.
    starts = jnp.argmax(loss_mask[:, :1], axis=2, keepdims=True)  # [B, 1, 1]: where a reply begins
    other_tokens, other_mask, other_starts = (
        jnp.roll(x, -1, axis=0) for x in (tokens, loss_mask, starts)
    )
    positions = jnp.arange(tokens.shape[2])[None, None]
    lengths = other_mask.astype(jnp.int32).sum(2, keepdims=True)  # [B, K, 1]
    in_prompt = positions < starts
    in_reply = ~in_prompt & (positions < starts + lengths)
    # Position t of the new row is position t - start + other start of the other one.
    sources = jnp.clip(positions - starts + other_starts, 0, tokens.shape[2] - 1)
    replies = jnp.take_along_axis(other_tokens, jnp.broadcast_to(sources, tokens.shape), axis=2)
    used = (in_prompt | in_reply) & (lengths > 0)
    return {
        "tokens": jnp.where(used, jnp.where(in_prompt, tokens[:, :1], replies), 0),
        "segment_ids": used.astype(jnp.int32),
        "loss_mask": in_reply & used,
    }


def normalize_scores(state: TrainState, scores: np.ndarray, how: str) -> TrainState:
    """The state with a head whose scores have mean zero (Ouyang et al. 2022, section 3.5).

    Args:
      state: of the reward model.
      scores: float[N] of all training responses under that state.
      how: "center" shifts; "unit" also scales to variance one; "none" changes nothing. None of them changes the order
        of two responses.
    """
    head = state.params["head"]
    shift = 0.0 if how == "none" else float(scores.mean())
    # The floor keeps a constant reward model finite.
    gain = 1.0 / max(float(scores.std()), 1e-6) if how == "unit" else 1.0
    # The head is kernel . hidden + bias, so that (score - shift) * gain has this kernel and this bias.
    kernel = head["kernel"] * jnp.float32(gain)
    bias = (head["bias"] - jnp.float32(shift)) * jnp.float32(gain)
    return state._replace(params={**state.params, "head": {"kernel": kernel, "bias": bias}})


def score_split(
    score: Callable[[Any, Any], jax.Array],
    params: Any,
    examples: Sequence[RankedExample],
    *,
    batch_size: int,
    sharding: jax.sharding.Sharding,
) -> tuple[np.ndarray, np.ndarray]:
    """(scores float32[N, K], ranks int32[N, K]) of N examples; rank 0 marks an absent response."""
    # Fetched after the loop, so that the devices need not wait for the host between batches.
    scores = []
    ranks = []
    for batch in ranked_epoch(examples, batch_size=batch_size, sharding=sharding):
        scores.append(score(params, batch))
        ranks.append(batch["ranks"])
    # The last batch is filled up with empty prompts, which are cut off here.
    count = len(examples)
    return np.concatenate(fetch(scores))[:count], np.concatenate(fetch(ranks))[:count]


def held_out_metrics(
    scores: np.ndarray, ranks: np.ndarray, examples: Sequence[RankedExample] = ()
) -> dict[str, float]:
    """Pairwise loss, pairwise and top-1 accuracy, calibration error, and the number of pairs.

    Args:
      scores: float32[N, K].
      ranks: int32[N, K], 1 = best, equal = tie, 0 = absent.
      examples: what is scored; if labels of both kinds are given, label_accuracy is the share of all pairs of a
        desirable and an undesirable response, of whatever prompts, in which the desirable one scores higher.
    """
    # Always the plain pairwise loss, so that runs with different training losses can be compared.
    _, _, sums = losses.pairwise(jnp.array(scores), jnp.array(ranks))
    means = {}
    for name, (total, weight) in sums.items():
        means[name] = float(total) / max(float(weight), 1.0)
    margins = measures.pair_margins(scores, ranks)
    return {
        "loss": means["loss"],
        "accuracy": means["accuracy"],
        "top1_accuracy": means["top1"],
        "calibration_error": measures.calibration_error(margins),
        "pairs": float(len(margins)),
        **_label_accuracy(scores, examples),
    }


def _label_accuracy(scores: np.ndarray, examples: Sequence[RankedExample]) -> dict[str, float]:
    """{"label_accuracy": ...} of scores [N, K] of N examples, or {} without labels of both kinds."""
    good: list[float] = []
    bad: list[float] = []
    for row, example in zip(scores[: len(examples)], examples, strict=True):
        labels = example.labels
        for score, is_good in zip(row[: len(labels)], labels, strict=True):
            (good if is_good else bad).append(float(score))
    if not (good and bad):
        return {}
    return {"label_accuracy": measures.share_above(good, bad)}


def breakdown(
    scores: np.ndarray, ranks: np.ndarray, examples: Sequence[RankedExample]
) -> dict[str, Any]:
    """Accuracy by K and by difference in rank, the reliability curve, and the annotators' agreement if several ranked.

    scores, ranks: [N, K] as in `held_out_metrics`.
    """
    # By K: many responses make many pairs. By distance: neighbors in rank are hard to tell apart for anyone.
    report: dict[str, Any] = {
        "accuracy_by_k": measures.accuracy_by(scores, ranks, "k"),
        "accuracy_by_distance": measures.accuracy_by(scores, ranks, "distance"),
        "reliability": measures.reliability(measures.pair_margins(scores, ranks)),
    }
    # The annotators' agreement is the ceiling of any reward model's accuracy.
    agreement = measures.annotator_agreement(examples)
    if agreement:
        report["annotator_agreement"], report["annotator_agreement_pairs"] = agreement
    return report
