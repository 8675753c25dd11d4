"""What a training step takes, by formulas alone: for accelerators that cannot be compiled for here, and to choose what
`plan --search` compiles. Rough.

Bytes of temporaries: what the backward pass keeps of every layer, one layer's own, and the gathered weights of two.
Seconds: compute at `hardware.EFFICIENCY` of the peak beside collectives, the longer of the two.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from jaxllm.life import Config
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.pipeline import MICRO
from jaxllm.runtime.hardware import EFFICIENCY, Chip
from jaxllm.runtime.mesh import MeshConfig
from jaxllm.sharding import MESH_AXES
from jaxllm.stages.preference import PreferenceConfig

_RECOMPUTED = {
    "none": 1.0,
    "dots": 1.0,
    "offload_dots": 1.0,
    "attention": 4 / 3,
    "full": 4 / 3,
    "offload": 4 / 3,
}  # of the model's FLOPs, attention and elementwise apart


def figures(
    config: Config, stage: str, mesh: Any, chip: Chip, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """Of a report whose `sizes` (state, tokens per step) are known: what `plan` finds by compiling, marked as estimated."""
    model, tokens, length = config.model, sizes["tokens_per_step"], row_length(config, stage)
    made = _step(
        model, dict(mesh.shape), tokens / getattr(config, stage).num_micro, tokens, length, chip
    )
    total = (
        sizes["state_bytes_per_device"]
        + sizes["gradient_bytes_per_device"]
        + made["temp_bytes_per_device"]
    )
    needed = transformer.flops_per_token(model, length) * tokens / mesh.size
    step = made["predicted_step_seconds"]
    return {
        **{
            "estimated": True,
            "fits": total < chip.hbm,
            "collectives": [],
            "hbm_bytes": int(chip.hbm),
        },
        **{
            "argument_bytes_per_device": sizes["state_bytes_per_device"],
            "total_bytes_per_device": int(total),
        },
        **{"model_flops_per_device": needed, "predicted_tokens_per_second": tokens / step},
        **{"predicted_mfu": needed / chip.flops / step, **made},
    }


def row_length(config: Config, stage: str) -> int:
    """Tokens of a row: prompt and response where responses are drawn."""
    section = getattr(config, stage)
    if hasattr(section, "max_prompt_length"):
        return section.max_prompt_length + section.sampling.max_new_tokens
    return section.length or config.model.max_length


def tokens_per_step(config: Config, stage: str) -> int:
    """Tokens of an update: of all responses to a prompt in reward and dpo."""
    section = getattr(config, stage)
    ranked = isinstance(section, PreferenceConfig)
    rows = section.batch_size * (config.sample.num_responses if ranked else 1)
    return rows * row_length(config, stage)


def _step(
    model: ModelConfig,
    mesh: Mapping[str, int],
    micro_tokens: float,
    tokens: float,
    length: int,
    chip: Chip,
) -> dict[str, Any]:
    """Bytes of temporaries and seconds of a step of so many tokens, in microbatches of so many."""
    shards, stages = (
        mesh["data"] * mesh["fsdp"] * mesh["expert"] * mesh["context"],
        mesh["pipeline"],
    )
    mine, tensor = micro_tokens / shards, mesh["tensor"]
    kept, own = _activations(model)
    layer = transformer.num_params(model) / model.num_layers / tensor / mesh["expert"]
    temporary = (
        2.0 * mine * (kept * model.num_layers / stages + own) / tensor + 2 * 2.0 * layer + 2**29
    )
    devices = shards * tensor * stages
    flops = transformer.flops_per_token(model, length) * tokens / devices * _RECOMPUTED[model.remat]
    parts = min(
        max(mine * mesh["context"] / length, 1), MICRO * stages
    )  # rows of a device, each a microbatch
    flops *= (parts + stages - 1) / parts
    moved = _moved(model, mesh, tokens / shards, tokens / micro_tokens)
    seconds = {"compute_seconds": flops / chip.flops, "link_seconds": moved / chip.link}
    step = max(seconds["compute_seconds"] / EFFICIENCY, seconds["link_seconds"])
    return {
        **{"flops_per_device": flops, "temp_bytes_per_device": int(temporary), **seconds},
        **{"predicted_step_seconds": step},
    }


def _activations(model: ModelConfig) -> tuple[float, float]:
    """Numbers of a token that are kept of every layer, and that are made in one."""
    c = model
    wide = c.moe.per_token * (c.moe.mlp_dim or c.mlp_dim) if c.moe.num_experts else c.mlp_dim
    products = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 2 * wide + 2 * c.embed_dim
    kept = {
        "full": c.embed_dim,
        "dots": c.embed_dim + products,
        "none": 3 * c.embed_dim + 2 * products,
    }
    kept |= {
        "attention": c.embed_dim + c.num_heads * c.head_dim,
        "offload": 0,
        "offload_dots": c.embed_dim,
    }
    return kept[c.remat], 3 * products


def _moved(model: ModelConfig, mesh: Mapping[str, int], mine: float, micros: float) -> float:
    """Bytes that leave a device in a step: weights forward, backward and as gradients; activations around each block."""
    share = {axis: (size - 1) / size for axis, size in mesh.items()}
    weights = (
        2.0 * transformer.num_params(model) / mesh["tensor"] / mesh["expert"] / mesh["pipeline"]
    )
    activations = 2.0 * mine * model.embed_dim * model.num_layers / mesh["pipeline"]
    total = 3 * micros * weights * share["fsdp"] + 2 * 2 * weights / mesh["fsdp"] * share["data"]
    total += 12 * activations * share["tensor"] + 6 * activations * (mesh["expert"] - 1) * bool(
        model.moe.num_experts
    )
    keys = 2.0 * mine * 2 * model.num_kv_heads * model.head_dim * model.num_layers
    return total + 3 * keys * (mesh["context"] - 1)


def candidates(
    config: Config, stage: str, devices: int, slices: int, chip: Chip
) -> list[tuple[Config, dict[str, Any]]]:
    """(config, what it changes) of all that may fit, by tokens per second, the highest first."""
    section, found = getattr(config, stage), []
    for mesh in _meshes(config.model, devices, slices):
        for remat, factor in itertools.product(("none", "dots", "full"), (0.5, 1, 2, 4)):
            batch = int(section.batch_size * factor)
            rows = devices // mesh["tensor"] // mesh["context"] * section.num_micro
            if batch < 1 or batch % rows:
                continue
            model, changed = (
                dataclasses.replace(config.model, remat=remat),
                dataclasses.replace(section, batch_size=batch),
            )
            new = dataclasses.replace(
                config, mesh=MeshConfig(**mesh), meshes=(), model=model, **{stage: changed}
            )
            tokens = tokens_per_step(new, stage)
            made = _step(
                model, mesh, tokens / section.num_micro, tokens, row_length(new, stage), chip
            )
            state = (
                16.0 * transformer.num_params(model) / (devices / mesh["data"] / mesh["context"])
            )
            if state + made["temp_bytes_per_device"] > chip.hbm:
                continue
            guess = {
                "mesh": {a: n for a, n in mesh.items() if n > 1},
                "remat": remat,
                "batch_size": batch,
            }
            found.append((tokens / made["predicted_step_seconds"], new, guess))
    return [(new, guess) for _, new, guess in sorted(found, key=lambda each: -each[0])]


def _meshes(model: ModelConfig, devices: int, slices: int) -> Iterator[dict[str, int]]:
    """Sizes of the axes worth a try: data over slices or more, tensor within the key heads, expert within the experts."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    tensors = [n for n in divisors if model.num_kv_heads % n == 0 and n <= 8]
    experts = [n for n in divisors if model.moe.num_experts and model.moe.num_experts % n == 0] or [
        1
    ]
    contexts = (
        [n for n in divisors if n <= 16 and model.max_length % (n * 128) == 0]
        if model.max_length > 32768
        else [1]
    )
    stages = (
        [1, slices]
        if slices > 1 and all(len(n) % slices == 0 for *_, n in transformer.stacks(model))
        else [1]
    )
    for tensor, expert, context, data, pipeline in itertools.product(
        tensors, experts, contexts, divisors, stages
    ):
        rest = devices // (tensor * expert * context * data * pipeline)
        whole = tensor * expert * context * data * pipeline * rest == devices
        if whole and (data % slices == 0 or pipeline == slices) and model.embed_dim % rest == 0:
            yield dict(zip(MESH_AXES, (data, pipeline, rest, context, expert, tensor), strict=True))
