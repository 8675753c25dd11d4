"""Model families as published: their config.json and tensor names, to and from ours.

A family of known parts is an entry of FAMILIES and what is special about it in family_config.py. Names depend on the
parts a model has, so that `tensors` serves all families but GPT-2, whose matrices are fused and stored the other way
round.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxllm.models.config import ModelConfig
from jaxllm.models.transformer import stacks
from jaxllm.pretrained.family_config import FAMILIES, family_of, from_hf, present, to_hf

__all__ = [
    "FAMILIES",
    "Part",
    "Place",
    "Tensor",
    "family_of",
    "file_shapes",
    "file_value",
    "from_hf",
    "pick",
    "places",
]
__all__ += ["present", "tensors", "to_file", "to_hf", "to_ours"]


class Part(NamedTuple):
    """A leaf of ours, or one layer's (and expert's) slice of it."""

    path: tuple[str, ...]
    index: tuple[int, ...] = ()
    linear: bool = False  # stored [out, in]; ours is [in ..., out ...]
    interleaved: int = 0  # so many rotary dimensions at the end, whose pairs lie side by side


class Tensor(NamedTuple):
    """A tensor of a file, and the parts of ours it holds, side by side along its last axis."""

    name: str
    parts: tuple[Part, ...]


def to_ours(part: Part, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The part's slice of our leaf, of this shape, from what the file holds of it."""
    value = (value.T if part.linear else value).reshape(shape)
    if part.interleaved:
        rest, turned = value[..., : -part.interleaved], value[..., -part.interleaved :]
        value = np.concatenate([rest, turned[..., 0::2], turned[..., 1::2]], -1)
    return value


def to_file(part: Part, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_ours`: what the file holds of a slice of ours, in this shape."""
    if half := part.interleaved // 2:
        turned = np.stack([value[..., -2 * half : -half], value[..., -half:]], -1)
        value = np.concatenate(
            [value[..., : -2 * half], turned.reshape(*value.shape[:-1], 2 * half)], -1
        )
    return value.reshape(shape[::-1]).T if part.linear else value.reshape(shape)


def pick(tree: Any, path: tuple[str, ...]) -> Any:
    """What is at this path of nested mappings."""
    return functools.reduce(lambda inner, key: inner[key], path, tree)


def file_value(
    tensor: Tensor, shape: tuple[int, ...], leaf: Callable[[tuple[str, ...]], np.ndarray]
) -> np.ndarray:
    """The tensor as a file holds it, in this shape, from our leaves: path -> array."""
    part_shape = (*shape[:-1], shape[-1] // len(tensor.parts))
    return np.concatenate([to_file(p, leaf(p.path)[p.index], part_shape) for p in tensor.parts], -1)


def tensors(model: ModelConfig, family: str) -> Iterator[Tensor]:
    """Every tensor of a model of this family, in the order of its layers."""
    gpt2 = family == "gpt2"
    trunk = "transformer." if gpt2 else "model."
    one = lambda name, path, **how: Tensor(name, (Part(path, **how),))
    yield one(f"{trunk}{'wte' if gpt2 else 'embed_tokens'}.weight", ("embed", "tokens"))
    if model.position == "learned":
        yield one(f"{trunk}wpe.weight", ("embed", "positions"))
    number = 0
    for stack, block, numbers in stacks(model):
        for i in range(len(numbers)):
            prefix = f"{trunk}{'h' if gpt2 else 'layers'}.{number}."
            for name, parts in _gpt2_block() if gpt2 else _block(block, family):
                yield Tensor(
                    prefix + name,
                    tuple(p._replace(path=(stack, *p.path), index=(i, *p.index)) for p in parts),
                )
            number += 1
    for k in range(model.mtp_modules):  # with copies of the embedding and the head
        prefix = f"{trunk}layers.{number + k}."
        for name, parts in _ahead(model, family):
            yield Tensor(
                prefix + name,
                tuple(p._replace(path=("mtp", *p.path), index=(k, *p.index)) for p in parts),
            )
        yield one(f"{prefix}embed_tokens.weight", ("embed", "tokens"))
        yield one(
            f"{prefix}shared_head.head.weight",
            ("embed" if model.tie_embeddings else "head", "tokens"),
        )
    yield one(f"{trunk}{'ln_f' if gpt2 else 'norm'}.weight", ("norm", "norm", "scale"))
    if model.norm == "layernorm":
        yield one(f"{trunk}{'ln_f' if gpt2 else 'norm'}.bias", ("norm", "norm", "bias"))
    if not model.tie_embeddings:
        yield one("lm_head.weight", ("head", "tokens"))


def _gpt2_block() -> Iterator[tuple[str, list[Part]]]:
    for where, ours in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
        yield f"{where}.weight", [Part((ours, "scale"))]
        yield f"{where}.bias", [Part((ours, "bias"))]
    yield "attn.c_attn.weight", [Part(("attention", x)) for x in "qkv"]
    yield "attn.c_attn.bias", [Part(("attention", f"{x}_bias")) for x in "qkv"]
    for name, module, ours in (
        ("attn.c_proj", "attention", "out"),
        ("mlp.c_fc", "mlp", "up"),
        ("mlp.c_proj", "mlp", "down"),
    ):
        yield f"{name}.weight", [Part((module, ours))]
        yield f"{name}.bias", [Part((module, f"{ours}_bias"))]


def _block(block: ModelConfig, family: str) -> Iterator[tuple[str, list[Part]]]:
    before, after = _norm_names(block)
    for ours, name in {**before, **after}.items():
        yield f"{name}.weight", [Part((ours, "scale"))]
    yield from _latent(block) if block.mla.kv_rank else _attention(block)
    if block.moe.num_experts:
        yield from _experts(block, family)
    else:
        yield from _mlp("mlp", ("mlp",), block.bias)


def _ahead(model: ModelConfig, family: str) -> Iterator[tuple[str, list[Part]]]:
    for name, ours in (
        ("enorm", "embed_norm"),
        ("hnorm", "hidden_norm"),
        ("shared_head.norm", "norm"),
    ):
        yield f"{name}.weight", [Part((ours, "scale"))]
    yield "eh_proj.weight", [Part(("project",), linear=True)]
    for name, parts in _block(model, family):
        yield name, [part._replace(path=("block", *part.path)) for part in parts]


def _norm_names(block: ModelConfig) -> tuple[dict[str, str], dict[str, str]]:
    if block.norm_place == "before":
        return {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}, {}
    after = {
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    before = {"attention_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
    return (before if block.norm_place == "both" else {}), after


def _attention(block: ModelConfig) -> Iterator[tuple[str, list[Part]]]:
    for name, ours in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "out")):
        yield f"self_attn.{name}.weight", [Part(("attention", ours), linear=True)]
        if block.bias or (block.qkv_bias and ours != "out"):
            yield f"self_attn.{name}.bias", [Part(("attention", f"{ours}_bias"))]
    for ours in ("q_norm", "k_norm") if block.qk_norm != "none" else ():
        yield f"self_attn.{ours}.weight", [Part(("attention", ours, "scale"))]


def _latent(block: ModelConfig) -> Iterator[tuple[str, list[Part]]]:
    turned, at = block.mla.rope_dim, "self_attn."
    if block.mla.q_rank:
        yield f"{at}q_a_proj.weight", [Part(("attention", "q_a"), linear=True)]
        yield f"{at}q_a_layernorm.weight", [Part(("attention", "q_a_norm", "scale"))]
        yield f"{at}q_b_proj.weight", [Part(("attention", "q_b"), linear=True, interleaved=turned)]
    else:
        yield f"{at}q_proj.weight", [Part(("attention", "q"), linear=True, interleaved=turned)]
    yield (
        f"{at}kv_a_proj_with_mqa.weight",
        [Part(("attention", "kv_a"), linear=True, interleaved=turned)],
    )
    yield f"{at}kv_a_layernorm.weight", [Part(("attention", "kv_a_norm", "scale"))]
    yield f"{at}kv_b_proj.weight", [Part(("attention", "kv_b"), linear=True)]
    yield f"{at}o_proj.weight", [Part(("attention", "out"), linear=True)]


def _mlp(
    name: str,
    path: tuple[str, ...],
    bias: bool,
    index: tuple[int, ...] = (),
    names=("gate_proj", "up_proj", "down_proj"),
):
    for theirs, ours in zip(names, ("gate", "up", "down"), strict=True):
        yield f"{name}.{theirs}.weight", [Part((*path, ours), index, linear=True)]
        if bias:
            yield f"{name}.{theirs}.bias", [Part((*path, f"{ours}_bias"), index)]


def _experts(block: ModelConfig, family: str) -> Iterator[tuple[str, list[Part]]]:
    at, names = "mlp", ("gate_proj", "up_proj", "down_proj")
    if family == "mixtral":
        at, names = "block_sparse_moe", ("w1", "w3", "w2")
    yield f"{at}.gate.weight", [Part(("mlp", "router"), linear=True)]
    if block.moe.router == "sigmoid":
        yield f"{at}.gate.e_score_correction_bias", [Part(("mlp", "router_bias"))]
    for e in range(block.moe.num_experts):
        yield from _mlp(f"{at}.experts.{e}", ("mlp", "experts"), False, (e,), names)
    if block.moe.num_shared:
        yield from _mlp(f"{at}.shared_experts", ("mlp", "shared"), False)


class Place(NamedTuple):
    """Where a slice of a leaf of ours is in a file: part `number` of `count` along the tensor's last axis."""

    tensor: str
    part: Part
    number: int
    count: int

    def ours(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The slice, of this shape, from the whole tensor of the file."""
        return to_ours(self.part, np.split(value, self.count, -1)[self.number], shape)


def places(model: ModelConfig, family: str) -> dict[tuple[str, ...], dict[tuple[int, ...], Place]]:
    """{path of a leaf: {index of its slice (layer, expert): place}}: every leaf of ours, once."""
    found: dict[tuple[str, ...], dict[tuple[int, ...], Place]] = {}
    for tensor in tensors(model, family):
        for number, part in enumerate(tensor.parts):
            place = Place(tensor.name, part, number, len(tensor.parts))
            found.setdefault(part.path, {}).setdefault(
                part.index, place
            )  # others are copies of the first
    return found


def file_shapes(model: ModelConfig, family: str, shapes: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a file; shapes: `transformer.abstract(model)`."""
    sizes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors(model, family):
        ours = [pick(shapes, part.path).shape[len(part.index) :] for part in tensor.parts]
        part = tensor.parts[0]
        stored = [_stored(part, shape, family) for shape in ours]
        sizes[tensor.name] = (*stored[0][:-1], sum(shape[-1] for shape in stored))
    return sizes


def _stored(part: Part, shape: tuple[int, ...], family: str) -> tuple[int, ...]:
    """The shape in a file of a leaf of this shape: vectors flat, matrices two-dimensional."""
    inputs = 2 if part.path[-1] == "out" else 1
    if part.linear:
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    if family == "gpt2" and part.path[-1] in ("q", "k", "v", "out", "up", "down"):
        return math.prod(shape[:inputs]), math.prod(shape[inputs:])
    return shape if part.path[0] in ("embed", "head") else (math.prod(shape),)
