"""Tensor names and shapes of the model families, and how their tensors map to our parameters.

Names depend on the modules that a model has, so one function serves all families except GPT-2, whose
matrices are fused and stored [in, out].
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxllm.models.config import ModelConfig
from jaxllm.models.transformer import stacks

# A tensor of a file holds one slice of one of our leaves, and GPT-2's fused one a slice of three:
#
#   tensor of a file                                 leaf of ours              index of the slice
#   model.layers.1.self_attn.q_proj.weight           layers/attention/q        (1,)    layer
#   model.layers.1.mlp.experts.5.gate_proj.weight    layers/mlp/experts/gate   (1, 5)  layer, expert
#   transformer.h.1.attn.c_attn.weight               layers/attention/q        (1,)
#   (three slices, side by side on its last axis)    layers/attention/k        (1,)
#                                                    layers/attention/v        (1,)

_MLP_NAMES = ("gate_proj", "up_proj", "down_proj")
_MLP_LEAVES = ("gate", "up", "down")


class LeafSlice(NamedTuple):
    """A leaf of our parameters, or the slice of it that belongs to one layer (and expert)."""

    path: tuple[str, ...]
    """Keys of the leaf in the tree of parameters."""
    index: tuple[int, ...] = ()
    """Layer and expert; empty: the whole leaf."""
    linear: bool = False
    """The file stores the matrix [out, in]; ours is [in ..., out ...]."""
    interleaved: int = 0
    """How many rotary dimensions at the end the file stores as pairs (see `from_file`)."""

    def inside(self, path: tuple[str, ...], index: tuple[int, ...]) -> "LeafSlice":
        """The same slice in a tree that is at `path`, stacked under `index`."""
        return self._replace(path=(*path, *self.path), index=(*index, *self.index))


class Tensor(NamedTuple):
    """A tensor of a file."""

    name: str
    slices: tuple[LeafSlice, ...]
    """The slices of our leaves that it holds, side by side along its last axis."""


class FileSlice(NamedTuple):
    """Where a file has a slice of a leaf: piece `number` of `count` equal ones of a tensor's last axis."""

    tensor: str
    leaf_slice: LeafSlice
    number: int
    count: int

    def to_leaf(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The slice of the leaf, of this shape, from the whole tensor of the file."""
        return from_file(self.leaf_slice, np.split(array, self.count, -1)[self.number], shape)


def from_file(leaf_slice: LeafSlice, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The slice of our leaf, of this shape, from the file's array of it."""
    if leaf_slice.linear:
        array = array.T
    array = array.reshape(shape)
    if leaf_slice.interleaved:
        # The two dimensions that are rotated together are neighbors in DeepSeek's files. With us they
        # are half a vector apart, behind the dimensions without position:
        #   the file    n0 n1 n2   x0 y0 x1 y1
        #   our leaf    n0 n1 n2   x0 x1 y0 y1
        plain = array[..., : -leaf_slice.interleaved]
        rotary = array[..., -leaf_slice.interleaved :]
        array = np.concatenate([plain, rotary[..., 0::2], rotary[..., 1::2]], -1)
    return array


def to_file(leaf_slice: LeafSlice, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `from_file`: the file's array, of this shape, from a slice of our leaf."""
    size = leaf_slice.interleaved
    if size:
        plain = array[..., :-size]
        first = array[..., -size : -size // 2]
        second = array[..., -size // 2 :]
        pairs = np.stack([first, second], -1).reshape(*array.shape[:-1], size)
        array = np.concatenate([plain, pairs], -1)
    return array.reshape(shape[::-1]).T if leaf_slice.linear else array.reshape(shape)


def pick(tree: Any, path: tuple[str, ...]) -> Any:
    """The entry of nested mappings at this path."""
    for key in path:
        tree = tree[key]
    return tree


def file_value(
    tensor: Tensor, shape: tuple[int, ...], leaf: Callable[[tuple[str, ...]], np.ndarray]
) -> np.ndarray:
    """The tensor as a file stores it, of this shape; leaf: from a path to our leaf's array."""
    piece_shape = (*shape[:-1], shape[-1] // len(tensor.slices))
    pieces = []
    for leaf_slice in tensor.slices:
        pieces.append(to_file(leaf_slice, leaf(leaf_slice.path)[leaf_slice.index], piece_shape))
    return np.concatenate(pieces, -1)


def file_slices(
    model: ModelConfig, family: str
) -> dict[tuple[str, ...], dict[tuple[int, ...], FileSlice]]:
    """{path of a leaf: {index of its slice: where a file has it}}, for every leaf of ours."""
    leaves: dict[tuple[str, ...], dict[tuple[int, ...], FileSlice]] = {}
    for tensor in tensors(model, family):
        count = len(tensor.slices)
        for number, leaf_slice in enumerate(tensor.slices):
            source = FileSlice(tensor.name, leaf_slice, number, count)
            # A slice may be in the file more than once (MTP modules copy the embedding): the first counts.
            leaves.setdefault(leaf_slice.path, {}).setdefault(leaf_slice.index, source)
    return leaves


def file_shapes(model: ModelConfig, family: str, shapes: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a file; shapes: `transformer.abstract(model)`."""
    sizes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors(model, family):
        stored: list[tuple[int, ...]] = []
        for leaf_slice in tensor.slices:
            shape = pick(shapes, leaf_slice.path).shape[len(leaf_slice.index) :]
            stored.append(_file_shape(leaf_slice, shape, family))
        sizes[tensor.name] = (*stored[0][:-1], sum(shape[-1] for shape in stored))
    return sizes


def _file_shape(leaf_slice: LeafSlice, shape: tuple[int, ...], family: str) -> tuple[int, ...]:
    """The shape in a file of a slice of this shape: vectors flat, matrices two-dimensional."""
    name = leaf_slice.path[-1]
    # The output projection of attention takes heads H and their dimensions d:
    # [H, d, D] is a matrix of H * d inputs; every other leaf has one axis of inputs.
    num_inputs = 2 if name == "out" else 1
    inputs = math.prod(shape[:num_inputs])
    outputs = math.prod(shape[num_inputs:])
    if leaf_slice.linear:
        return outputs, inputs
    if family == "gpt2" and name in ("q", "k", "v", "out", "up", "down"):
        return inputs, outputs
    if leaf_slice.path[0] in ("embed", "head"):
        return shape
    return (math.prod(shape),)


def tensors(model: ModelConfig, family: str) -> Iterator[Tensor]:
    """Every tensor of a model of this family, in the order of its layers."""
    return _gpt2_tensors(model) if family == "gpt2" else _decoder_tensors(model, family)


def _layers(model: ModelConfig) -> Iterator[tuple[str, int, ModelConfig]]:
    """(stack, index in it, config) of every layer; layers of the same kind are stacked."""
    for stack, block, numbers in stacks(model):
        for index in range(len(numbers)):
            yield stack, index, block


def _gpt2_tensors(model: ModelConfig) -> Iterator[Tensor]:
    yield _tensor("transformer.wte.weight", "embed", "tokens")
    yield _tensor("transformer.wpe.weight", "embed", "positions")
    # Files number layers through; we number them in each stack.
    for number, (stack, index, _) in enumerate(_layers(model)):
        for tensor in _gpt2_block():
            slices = tuple(inner.inside((stack,), (index,)) for inner in tensor.slices)
            yield Tensor(f"transformer.h.{number}.{tensor.name}", slices)
    yield _tensor("transformer.ln_f.weight", "norm", "norm", "scale")
    yield _tensor("transformer.ln_f.bias", "norm", "norm", "bias")
    if not model.tie_embeddings:
        yield _tensor("lm_head.weight", "head", "tokens")


def _gpt2_block() -> Iterator[Tensor]:
    """The tensors of a GPT-2 block, by their names in it."""
    for name, ours in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
        yield _tensor(f"{name}.weight", ours, "scale")
        yield _tensor(f"{name}.bias", ours, "bias")
    # Queries, keys and values are one matrix here, [D, 3 * D].
    for end, suffix in (("weight", ""), ("bias", "_bias")):
        fused = tuple(LeafSlice(("attention", f"{name}{suffix}")) for name in "qkv")
        yield Tensor(f"attn.c_attn.{end}", fused)
    for name, module, ours in (
        ("attn.c_proj", "attention", "out"),
        ("mlp.c_fc", "mlp", "up"),
        ("mlp.c_proj", "mlp", "down"),
    ):
        yield _tensor(f"{name}.weight", module, ours)
        yield _tensor(f"{name}.bias", module, f"{ours}_bias")


def _decoder_tensors(model: ModelConfig, family: str) -> Iterator[Tensor]:
    """Llama, and all families that name their tensors as it does."""
    yield _tensor("model.embed_tokens.weight", "embed", "tokens")
    for number, (stack, index, block) in enumerate(_layers(model)):
        for name, leaf_slice in _block(block, family):
            inside = leaf_slice.inside((stack,), (index,))
            yield Tensor(f"model.layers.{number}.{name}", (inside,))
    for module in range(model.mtp_modules):
        prefix = f"model.layers.{model.num_layers + module}."
        for name, leaf_slice in _mtp_module(model, family):
            yield Tensor(prefix + name, (leaf_slice.inside(("mtp",), (module,)),))
        # Each module comes with copies of the embedding and the head: with us they are the same leaf.
        yield _tensor(f"{prefix}embed_tokens.weight", "embed", "tokens")
        head = "embed" if model.tie_embeddings else "head"
        yield _tensor(f"{prefix}shared_head.head.weight", head, "tokens")
    yield _tensor("model.norm.weight", "norm", "norm", "scale")
    if not model.tie_embeddings:
        yield _tensor("lm_head.weight", "head", "tokens")


def _tensor(name: str, *path: str) -> Tensor:
    """A tensor that holds a whole leaf."""
    return Tensor(name, (LeafSlice(path),))


# The name of a tensor in a block, and the slice that it holds.
_Named = Iterator[tuple[str, LeafSlice]]


def _block(block: ModelConfig, family: str) -> _Named:
    for ours, name in _norm_names(block).items():
        yield f"{name}.weight", LeafSlice((ours, "scale"))
    yield from _latent_attention(block) if block.mla.kv_rank else _attention(block)
    if block.moe.num_experts:
        yield from _experts(block, family)
    else:
        yield from _mlp("mlp", LeafSlice(("mlp",)), block.bias)


def _mtp_module(model: ModelConfig, family: str) -> _Named:
    """A module that predicts one token further (DeepSeek-V3, section 2.2)."""
    yield "enorm.weight", LeafSlice(("embed_norm", "scale"))
    yield "hnorm.weight", LeafSlice(("hidden_norm", "scale"))
    yield "shared_head.norm.weight", LeafSlice(("norm", "scale"))
    yield "eh_proj.weight", LeafSlice(("project",), linear=True)
    for name, leaf_slice in _block(model, family):
        yield name, leaf_slice.inside(("block",), ())


def _norm_names(block: ModelConfig) -> dict[str, str]:
    """{our norm: its name in the file}."""
    # post_attention_layernorm is the norm before the MLP in Llama (it comes after attention), and one
    # of attention's output in Gemma 2 and OLMo 2.
    if block.norm_place == "before":
        return {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names = {}
    if block.norm_place == "both":
        names["attention_norm"] = "input_layernorm"
        names["mlp_norm"] = "pre_feedforward_layernorm"
    names["attention_post_norm"] = "post_attention_layernorm"
    names["mlp_post_norm"] = "post_feedforward_layernorm"
    return names


def _attention(block: ModelConfig) -> _Named:
    for name, ours in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "out")):
        yield f"self_attn.{name}.weight", LeafSlice(("attention", ours), linear=True)
        if block.bias or (block.qkv_bias and ours != "out"):
            yield f"self_attn.{name}.bias", LeafSlice(("attention", f"{ours}_bias"))
    if block.qk_norm != "none":
        for ours in ("q_norm", "k_norm"):
            yield f"self_attn.{ours}.weight", LeafSlice(("attention", ours, "scale"))


def _latent_attention(block: ModelConfig) -> _Named:
    """Multi-head latent attention (DeepSeek-V2, section 2.1)."""
    rotary = block.mla.rope_dim

    # Only the last dimensions of a query, and of the compressed key, have a position.
    def matrix(ours: str, interleaved: int = 0) -> LeafSlice:
        return LeafSlice(("attention", ours), linear=True, interleaved=interleaved)

    if block.mla.q_rank:
        yield "self_attn.q_a_proj.weight", matrix("q_a")
        yield "self_attn.q_a_layernorm.weight", LeafSlice(("attention", "q_a_norm", "scale"))
        yield "self_attn.q_b_proj.weight", matrix("q_b", rotary)
    else:
        yield "self_attn.q_proj.weight", matrix("q", rotary)
    yield "self_attn.kv_a_proj_with_mqa.weight", matrix("kv_a", rotary)
    yield "self_attn.kv_a_layernorm.weight", LeafSlice(("attention", "kv_a_norm", "scale"))
    yield "self_attn.kv_b_proj.weight", matrix("kv_b")
    yield "self_attn.o_proj.weight", matrix("out")


def _mlp(prefix: str, module: LeafSlice, bias: bool, names: tuple[str, ...] = _MLP_NAMES) -> _Named:
    """The matrices of a gated MLP; names: of gate, up and down."""
    for name, ours in zip(names, _MLP_LEAVES, strict=True):
        path = (*module.path, ours)
        yield f"{prefix}.{name}.weight", LeafSlice(path, module.index, linear=True)
        if bias:
            yield f"{prefix}.{name}.bias", LeafSlice((*module.path, f"{ours}_bias"), module.index)


def _experts(block: ModelConfig, family: str) -> _Named:
    mixtral = family == "mixtral"
    prefix = "block_sparse_moe" if mixtral else "mlp"
    names = ("w1", "w3", "w2") if mixtral else _MLP_NAMES  # gate, up, down
    yield f"{prefix}.gate.weight", LeafSlice(("mlp", "router"), linear=True)
    if block.moe.router == "sigmoid":
        # The bias that balances the load (DeepSeek-V3, section 2.1.2).
        yield f"{prefix}.gate.e_score_correction_bias", LeafSlice(("mlp", "router_bias"))
    for expert in range(block.moe.num_experts):
        module = LeafSlice(("mlp", "experts"), (expert,))
        yield from _mlp(f"{prefix}.experts.{expert}", module, False, names)
    if block.moe.num_shared:
        yield from _mlp(f"{prefix}.shared_experts", LeafSlice(("mlp", "shared")), False)
