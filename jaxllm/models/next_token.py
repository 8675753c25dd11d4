"""The next-token loss of a decoder on packed rows, for pretraining, fine-tuning and the pretraining mix of PPO."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import losses, output_layer
from jaxllm.models import lora, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.sharding import rows_like
from jaxllm.soft_targets import SoftStats, SoftTargets, soft_stats, top_tokens


def planned_rows(
    mesh: jax.sharding.Mesh, batch_size: int, length: int, top_k: int = 0
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of packed rows as shapes with their shardings: {name: [batch_size, length]}.

    top_k: tokens kept of a teacher, which are the last dimension of two more arrays; 0: there is none.
    """
    types = {
        "tokens": jnp.int32,
        "segment_ids": jnp.int32,
        "positions": jnp.int32,
        "loss_mask": jnp.bool_,
    }
    shapes = {
        name: jax.ShapeDtypeStruct((batch_size, length), dtype) for name, dtype in types.items()
    }
    if top_k:
        of_teacher = {"teacher_ids": jnp.int32, "teacher_logprobs": jnp.float32}
        for name, dtype in of_teacher.items():
            shapes[name] = jax.ShapeDtypeStruct((batch_size, length, top_k), dtype)
    return rows_like(mesh, shapes)


def soft_targets(params: Any, batch: Any, *, model: ModelConfig, top_k: int) -> SoftTargets:
    """What a decoder thinks of every token given those before it, beside the token itself: [B, T, K] each.

    batch: {tokens, segment_ids, positions int32[B, T]}. Garbage where a token is no target.
    """
    states = transformer.apply(
        params, model, batch["tokens"], batch["segment_ids"], batch["positions"]
    )
    kept = top_tokens(states, transformer.head(params), top_k, cap=model.logit_softcap)
    return SoftTargets(losses.unshift(kept.ids), losses.unshift(kept.logprobs))


def loss(
    params: Any,
    batch: Any,
    key: Any,
    base: Any,
    *,
    model: ModelConfig,
    z_loss_coef: float = 0.0,
    mtp_coef: float = 0.0,
    teacher_weight: float = 1.0,
) -> losses.Loss:
    """Next-token loss of packed rows, with the terms that the model's routers and MTP modules add.

    Where the batch has a teacher's soft targets, the divergence from them takes the place of a share of the loss.

    Args:
      params: the trained parameters.
      batch: {tokens, segment_ids, positions int32[B, T], loss_mask bool[B, T]}; with a teacher also {teacher_ids int32,
        teacher_logprobs float32}, [B, T, K] each, beside the tokens that it predicts.
      key: unused; there is no dropout.
      base: the frozen parameters under adapters; {} where `params` are all (`lora.join`).
      model: config of the decoder.
      z_loss_coef: of `losses.language_model`.
      mtp_coef: weight of the mean loss over the MTP modules (DeepSeek-V3, eq. 25), which have no teacher.
      teacher_weight: that share (`losses.soft_targets`).

    Returns:
      (sum over targets, number of targets, metrics).
    """
    del key
    params = lora.join(base, params)
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    hidden, load = transformer.apply_routed(params, model, tokens, segment_ids, batch["positions"])
    targets, mask = losses.next_token_targets(tokens, segment_ids, batch["loss_mask"])
    # At every position, also those without a target: the mask removes them from the sums.
    if "teacher_ids" in batch:
        stats = _score_with_teacher(params, model, hidden, targets, batch)
        total, weight, metrics = losses.soft_targets(stats, mask, teacher_weight, z_loss_coef)
    else:
        stats = _score(params, model, hidden, targets)
        total, weight, metrics = losses.language_model(stats, mask, z_loss_coef)
    if load:
        # Terms that are means over tokens are scaled by the weight, since the total is a sum over targets.
        balance, routing = transformer.routing_loss(params["layers"], model, load)
        total = total + balance * weight
        metrics = {**metrics, **routing}
    # Evaluation leaves out the modules.
    if not (model.mtp_modules and mtp_coef):
        return total, weight, metrics
    nats, count, load = _mtp_loss(params, model, hidden, batch)
    if load:
        balance, _ = transformer.routing_loss(params["mtp"]["block"], model, load)
        total = total + balance * weight
    # The mean over modules, relative to the decoder's number of targets.
    total = total + mtp_coef / model.mtp_modules * nats
    return total, weight, {**metrics, "mtp_loss": (nats, count)}


def _mtp_loss(
    params: Any, model: ModelConfig, hidden: jax.Array, batch: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """The loss of all MTP modules together: (sum of -log p, number of targets, the `moe.Load` of their experts or {}).

    hidden: [B, T, D], of the decoder. Module k (from 0) predicts token t + k + 2 at position t.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    states, load = transformer.apply_mtp(
        params, model, hidden, tokens, segment_ids, batch["positions"]
    )
    # Sums over modules: each has its own number of targets, one less per document than the module before.
    total: Any = 0
    weight: Any = 0
    for k, state in enumerate(states):
        targets, mask = losses.next_token_targets(
            tokens, segment_ids, batch["loss_mask"], distance=k + 2
        )
        stats = _score(params, model, state, targets)
        nats, count, _ = losses.language_model(stats, mask)
        total = total + nats
        weight = weight + count
    return total, weight, load


def _score(
    params: Any, model: ModelConfig, hidden: jax.Array, targets: jax.Array
) -> output_layer.TokenStats:
    """Statistics of the logits of hidden states [B, T, D] at targets int32[B, T]."""
    return output_layer.token_logprobs(
        hidden, transformer.head(params), targets, cap=model.logit_softcap
    )


def _score_with_teacher(
    params: Any, model: ModelConfig, hidden: jax.Array, targets: jax.Array, batch: Any
) -> SoftStats:
    """As `_score`, with the divergence from the soft targets of a batch."""
    kept = SoftTargets(losses.shift(batch["teacher_ids"]), losses.shift(batch["teacher_logprobs"]))
    head = transformer.head(params)
    return soft_stats(hidden, head, targets, kept, cap=model.logit_softcap)
