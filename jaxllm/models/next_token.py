"""The next-token loss of a decoder on packed rows: what pre-training, fine-tuning and PPO-ptx learn from."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import losses
from jaxllm.models import lora, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.sharding import rows_like


def planned_rows(
    mesh: jax.sharding.Mesh, batch_size: int, length: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of packed rows, as shapes with their shardings."""
    types = {
        "tokens": jnp.int32,
        "segment_ids": jnp.int32,
        "positions": jnp.int32,
        "loss_mask": jnp.bool_,
    }
    return rows_like(
        mesh,
        {name: jax.ShapeDtypeStruct((batch_size, length), dtype) for name, dtype in types.items()},
    )


def loss(
    params: Any,
    batch: Any,
    key: Any,
    base: Any,
    *,
    model: ModelConfig,
    z_loss_coef: float = 0.0,
    mtp_coef: float = 0.0,
) -> losses.Loss:
    """Next-token loss of packed rows {tokens, segment_ids, positions, loss_mask}, each [B, T].

    base: the frozen parameters under adapters, {} where `params` are all (`lora.join`).
    """
    del key  # no dropout
    params = lora.join(base, params)
    tokens, segment_ids, positions = (
        batch[name] for name in ("tokens", "segment_ids", "positions")
    )
    hidden, load = transformer.apply_routed(params, model, tokens, segment_ids, positions)
    targets, mask = losses.next_token_targets(tokens, segment_ids, batch["loss_mask"])
    score = lambda hidden: losses.token_logprobs(
        hidden, transformer.head(params), targets, cap=model.logit_softcap
    )
    total, weight, metrics = losses.language_model(score(hidden), mask, z_loss_coef)
    if load:
        balance, routing = transformer.routing_loss(params["layers"], model, load)
        total, metrics = total + balance * weight, {**metrics, **routing}
    if not (model.mtp_modules and mtp_coef):
        return total, weight, metrics
    nats, count, load = _mtp_loss(params, model, hidden, batch)
    if load:
        total = total + transformer.routing_loss(params["mtp"]["block"], model, load)[0] * weight
    return (
        total + mtp_coef / model.mtp_modules * nats,
        weight,
        {**metrics, "mtp_loss": (nats, count)},
    )


def _mtp_loss(
    params: Any, model: ModelConfig, hidden: jax.Array, batch: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """(sum of -log p of the tokens after the next, their number, the experts' loads) of all of the model's modules."""
    tokens, segment_ids, positions = (
        batch[name] for name in ("tokens", "segment_ids", "positions")
    )
    further, load = transformer.ahead(params, model, hidden, tokens, segment_ids, positions)
    found = []
    for k, states in enumerate(further):
        targets, mask = losses.next_token_targets(
            tokens, segment_ids, batch["loss_mask"], ahead=k + 2
        )
        stats = losses.token_logprobs(
            states, transformer.head(params), targets, cap=model.logit_softcap
        )
        found.append(losses.language_model(stats, mask)[:2])
    return sum(nats for nats, _ in found), sum(count for _, count in found), load  # pyright: ignore[reportReturnType]
