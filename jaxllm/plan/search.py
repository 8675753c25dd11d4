"""Meshes, remat policies and batch sizes that may fit, ordered by estimated speed."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from jaxllm.life import Config
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.plan.estimate import estimate_step, row_length, tokens_per_step
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.hardware import Chip
from jaxllm.sharding import MESH_AXES

_REMAT = ("none", "dots", "full")
_BATCH_FACTORS = (0.5, 1, 2, 4)
# Beyond 8 devices, collectives of tensor parallelism leave the fastest links.
_MAX_TENSOR = 8
_MAX_CONTEXT = 16
# Rows up to this many tokens are not worth splitting over devices; a shard holds whole blocks of attention.
_LONG, _ATTENTION_BLOCK = 32768, 128
# Parameters, gradients and two moments of Adam, in float32.
_STATE_BYTES = 16.0


def candidates(
    config: Config, stage: str, devices: int, slices: int, chip: Chip
) -> list[tuple[Config, dict[str, Any]]]:
    """[(config, {mesh, remat, batch_size})] of all that may fit, the fastest first."""
    rated = []
    for mesh in _meshes(config.model, devices, slices):
        for remat, factor in itertools.product(_REMAT, _BATCH_FACTORS):
            change = {"mesh": mesh, "remat": remat, "factor": factor}
            candidate = _changed(config, stage, devices, change)
            if candidate is None:
                continue
            rate = _estimated_rate(candidate, stage, devices, mesh, chip)
            if rate is not None:
                summary = {
                    "mesh": {axis: size for axis, size in mesh.items() if size > 1},
                    "remat": remat,
                    "batch_size": getattr(candidate, stage).batch_size,
                }
                rated.append((rate, candidate, summary))
    # Stable: of equally fast candidates the simpler mesh, which came first, stays ahead.
    rated.sort(key=lambda row: -row[0])
    return [(candidate, summary) for _, candidate, summary in rated]


def _changed(config: Config, stage: str, devices: int, change: dict[str, Any]) -> Config | None:
    """The config with another mesh, remat policy and batch size; None where the batch does not divide."""
    section, mesh = getattr(config, stage), change["mesh"]
    batch_size = int(section.batch_size * change["factor"])
    # Devices along tensor and context work on the same rows.
    rows = devices // mesh["tensor"] // mesh["context"] * section.num_micro
    if batch_size < 1 or batch_size % rows:
        return None
    sections: dict[str, Any] = {stage: dataclasses.replace(section, batch_size=batch_size)}
    return dataclasses.replace(
        config,
        mesh=MeshConfig(**mesh),
        meshes=(),
        model=dataclasses.replace(config.model, remat=change["remat"]),
        **sections,
    )


def _estimated_rate(
    config: Config, stage: str, devices: int, mesh: dict[str, int], chip: Chip
) -> float | None:
    """Tokens per second; None where state and temporaries exceed a device's memory."""
    model, tokens = config.model, tokens_per_step(config, stage)
    micro_tokens = tokens / getattr(config, stage).num_micro
    step = estimate_step(model, mesh, micro_tokens, tokens, row_length(config, stage), chip)
    shards = devices / mesh["data"] / mesh["context"]
    state = _STATE_BYTES * transformer.num_params(model) / shards
    if state + step["temp_bytes_per_device"] > chip.hbm:
        return None
    return tokens / step["predicted_step_seconds"]


def _meshes(model: ModelConfig, devices: int, slices: int) -> Iterator[dict[str, int]]:
    """Sizes of the axes that are worth a try.

    Slices are joined along data, or hold one pipeline stage each. Tensor divides the heads of keys, expert the experts.
    """
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    tensors = [n for n in divisors if n <= _MAX_TENSOR and model.num_kv_heads % n == 0]
    axes = (tensors, _expert_sizes(model, divisors), _context_sizes(model, divisors))
    for tensor, expert, context, data, pipeline in itertools.product(
        *axes, divisors, _pipeline_sizes(model, slices)
    ):
        used = tensor * expert * context * data * pipeline
        fsdp = devices // used
        over_slices = data % slices == 0 or pipeline == slices
        # What is left over goes to fsdp, which has to divide the model's width.
        if used * fsdp == devices and over_slices and model.embed_dim % fsdp == 0:
            sizes = (data, pipeline, fsdp, context, expert, tensor)
            yield dict(zip(MESH_AXES, sizes, strict=True))


def _expert_sizes(model: ModelConfig, divisors: list[int]) -> list[int]:
    experts = model.moe.num_experts
    return [n for n in divisors if experts and experts % n == 0] or [1]


def _context_sizes(model: ModelConfig, divisors: list[int]) -> list[int]:
    if model.max_length <= _LONG:
        return [1]
    return [
        n for n in divisors if n <= _MAX_CONTEXT and model.max_length % (n * _ATTENTION_BLOCK) == 0
    ]


def _pipeline_sizes(model: ModelConfig, slices: int) -> list[int]:
    divides = all(len(layers) % slices == 0 for *_, layers in transformer.stacks(model))
    return [1, slices] if slices > 1 and divides else [1]
