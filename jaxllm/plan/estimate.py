"""What a training step needs, by formulas alone. Rough.

For accelerators that cannot be compiled for here, and to choose what `plan --search` compiles.

    temporaries  what the backward pass keeps of every layer, one layer's own, and the gathered weights of two layers
    seconds      compute at `hardware.EFFICIENCY` of the peak, or collectives, whichever takes longer
"""

from collections.abc import Mapping
from typing import Any

from jaxllm.life import Config
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.pipeline import MICRO
from jaxllm.preference_losses import OBJECTIVES
from jaxllm.runtime.hardware import EFFICIENCY, Chip
from jaxllm.stages.config import DPOConfig, PreferenceConfig

_BF16 = 2.0  # bytes
_SLACK = 2**29  # bytes a program takes besides what is counted here

# FLOPs executed for each FLOP of the model. Recomputing the forward pass adds a third of all of them.
_RECOMPUTED = {
    "none": 1.0,
    "dots": 1.0,
    "offload_dots": 1.0,
    "attention": 4 / 3,
    "full": 4 / 3,
    "offload": 4 / 3,
}


def figures(
    config: Config, stage: str, mesh: Any, chip: Chip, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """What `plan` would find by compiling, marked as estimated.

    sizes: the part of the report that is known without compiling.
    """
    model, tokens, length = config.model, sizes["tokens_per_step"], row_length(config, stage)
    micro_tokens = tokens / getattr(config, stage).num_micro
    # Frozen models pass over the tokens too: as much work as of more tokens.
    worked = tokens * _passes(getattr(config, stage)) / 3
    step = estimate_step(model, dict(mesh.shape), micro_tokens, worked, length, chip)
    # Exact, unlike the temporaries: shardings are known.
    held = sizes["state_bytes_per_device"]
    total = held + sizes["gradient_bytes_per_device"] + step["temp_bytes_per_device"]
    model_flops = transformer.flops_per_token(model, length) * worked / mesh.size
    # MFU counts what the model needs, not what is recomputed.
    seconds = step["predicted_step_seconds"]
    return {
        "estimated": True,
        "fits": total < chip.hbm,
        "collectives": [],
        "hbm_bytes": int(chip.hbm),
        "argument_bytes_per_device": held,
        "total_bytes_per_device": int(total),
        "model_flops_per_device": model_flops,
        "predicted_tokens_per_second": tokens / seconds,
        "predicted_mfu": model_flops / chip.flops / seconds,
        **step,
    }


def _passes(section: Any) -> int:
    """Forward passes' worth of work of a step: 3 of the model that is trained, and those of frozen ones."""
    return OBJECTIVES[section.loss].passes if isinstance(section, DPOConfig) else 3


def row_length(config: Config, stage: str) -> int:
    """Tokens of a row: of prompt and response in a stage that samples."""
    section = getattr(config, stage)
    if hasattr(section, "max_prompt_length"):
        return section.max_prompt_length + section.sampling.max_new_tokens
    return section.length or config.model.max_length


def tokens_per_step(config: Config, stage: str) -> int:
    """Tokens of an update: in reward and dpo, of all responses to each prompt."""
    section = getattr(config, stage)
    rows = section.batch_size
    if isinstance(section, PreferenceConfig):
        rows *= config.sample.num_responses
    return rows * row_length(config, stage)


def estimate_step(
    model: ModelConfig,
    mesh: Mapping[str, int],
    micro_tokens: float,
    tokens: float,
    length: int,
    chip: Chip,
) -> dict[str, Any]:
    """Bytes of temporaries and seconds of a step on one device.

    Args:
      mesh: {axis: size}.
      micro_tokens: tokens of a microbatch, on all devices.
      tokens: tokens of the step, on all devices.
      length: tokens of a row.
    """
    shards = mesh["data"] * mesh["fsdp"] * mesh["expert"] * mesh["context"]
    stages, tensor = mesh["pipeline"], mesh["tensor"]
    own_tokens = micro_tokens / shards
    kept, working = _activations(model)
    layer = transformer.num_params(model) / model.num_layers / tensor / mesh["expert"]
    activations = own_tokens * (kept * model.num_layers / stages + working) / tensor
    temporary = _BF16 * activations + 2 * _BF16 * layer + _SLACK

    flops = transformer.flops_per_token(model, length) * tokens / (shards * tensor * stages)
    flops *= _RECOMPUTED[model.remat] * _pipeline_bubble(own_tokens, length, mesh)
    moved = _moved_bytes(model, mesh, tokens / shards, tokens / micro_tokens)
    compute, links = flops / chip.flops, moved / chip.link
    return {
        "flops_per_device": flops,
        "temp_bytes_per_device": int(temporary),
        "compute_seconds": compute,
        "link_seconds": links,
        "predicted_step_seconds": max(compute / EFFICIENCY, links),
    }


def _pipeline_bubble(own_tokens: float, length: int, mesh: Mapping[str, int]) -> float:
    """How much longer a pipeline runs than its work takes: (m + p - 1) / m for m microbatches in p stages."""
    stages = mesh["pipeline"]
    rows = max(own_tokens * mesh["context"] / length, 1)
    micro = min(rows, MICRO * stages)  # each row of a device is a microbatch, up to a limit
    return (micro + stages - 1) / micro


def _activations(model: ModelConfig) -> tuple[float, float]:
    """(numbers kept of each token and layer for the backward pass, numbers one layer makes of each token)."""
    embed, heads = model.embed_dim, model.num_heads
    hidden = model.mlp_dim
    if model.moe.num_experts:
        hidden = model.moe.per_token * (model.moe.mlp_dim or model.mlp_dim)
    attention = (2 * heads + 2 * model.num_kv_heads) * model.head_dim
    products = attention + 2 * hidden + 2 * embed
    kept = {
        "none": 3 * embed + 2 * products,
        "dots": embed + products,
        "attention": embed + heads * model.head_dim,
        "full": embed,
        # On the host instead.
        "offload": 0,
        "offload_dots": embed,
    }
    return kept[model.remat], 3 * products


def _moved_bytes(
    model: ModelConfig, mesh: Mapping[str, int], own_tokens: float, micros: float
) -> float:
    """Bytes that leave a device in a step of `micros` microbatches and `own_tokens` tokens a device."""
    # A ring over n devices sends (n - 1) / n of what it gathers or reduces.
    share = {axis: (size - 1) / size for axis, size in mesh.items()}
    shards = mesh["tensor"] * mesh["expert"] * mesh["pipeline"]
    weights = _BF16 * transformer.num_params(model) / shards
    # fsdp gathers weights forward and backward and reduces gradients, in every microbatch; data reduces them once.
    total = 3 * micros * weights * share["fsdp"] + 4 * weights / mesh["fsdp"] * share["data"]

    activations = _BF16 * own_tokens * model.embed_dim * model.num_layers / mesh["pipeline"]
    total += 12 * activations * share["tensor"]
    if model.moe.num_experts:
        total += 6 * activations * (mesh["expert"] - 1)

    # Every device of a context shard gets the keys and values of all others, and their gradients.
    kv = _BF16 * own_tokens * 2 * model.num_kv_heads * model.head_dim * model.num_layers
    return total + 3 * kv * (mesh["context"] - 1)
