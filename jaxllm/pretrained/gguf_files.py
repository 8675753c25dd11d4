"""GGUF files, read as if they were a downloaded folder. Needs `pip install jaxllm[gguf]`.

Tensors are dequantized exactly, so what is not stored as float16 or bfloat16 becomes float32.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import InputError
from jaxllm.models.config import ModelConfig
from jaxllm.models.transformer import abstract
from jaxllm.pretrained.checked_values import CheckedValues
from jaxllm.pretrained.families import file_shapes, tensors
from jaxllm.pretrained.family_config import from_hf
from jaxllm.pretrained.gguf_config import read_config
from jaxllm.pretrained.gguf_tokenizer import read_tokenizer
from jaxllm.pretrained.safetensors_files import DTYPES
from jaxllm.pretrained.safetensors_writer import LazyTensor

FIX = "fetch the file again"


def read(path: Path) -> tuple[dict[str, Any], Iterator[LazyTensor], dict[str, bytes]]:
    """(config.json, tensors by their names in safetensors, the tokenizer's files) of a GGUF file.

    A file that was split is read together with its other parts, in the same folder.

    Raises:
        InputError: damaged, a part is missing, an unknown architecture, metadata of a wrong type, or
            tensors that are missing, unknown or misshapen.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise InputError(
            f"{path}: reading GGUF needs another package; pip install 'jaxllm[gguf]'"
        ) from None
    readers = [_open(gguf, part) for part in _parts(path)]
    metadata = CheckedValues(_values(readers[0], path), FIX)
    held = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    try:
        _check_complete(metadata, len(readers))
        config = read_config(metadata, held)
        lazy_tensors = _tensors(gguf, held, config, metadata, str(path))
        return config, lazy_tensors, read_tokenizer(metadata)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _parts(path: Path) -> list[Path]:
    """The file, or all parts of the one that it is a part of: NAME-00001-of-00003.gguf, ..."""
    match = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    prefix, _, count = match.groups()
    parts = []
    for number in range(1, int(count) + 1):
        part = path.with_name(f"{prefix}{number:05}-of-{count}.gguf")
        if not part.exists():
            raise InputError(
                f"{part}: is missing, one of the {int(count)} parts of {path.name}; fetch it as well"
            )
        parts.append(part)
    return parts


def _check_complete(metadata: CheckedValues, num_parts: int) -> None:
    # The name of a renamed part does not tell its siblings; the metadata still counts them.
    count = metadata.integer("split.count", 1)
    if count not in (0, num_parts):
        raise ValueError(
            f"is one of {count} parts; put all of them into its folder, named "
            f"NAME-00001-of-{count:05}.gguf, ..."
        )


def _open(gguf: Any, path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise InputError(f"{path}: not a complete GGUF file ({error}); fetch it again") from None


def _values(reader: Any, path: Path) -> dict[str, Any]:
    """The metadata of a file by key."""
    values: dict[str, Any] = {}
    try:
        for name, field in reader.fields.items():
            if not name.startswith("GGUF."):
                values[name] = _as_written(field.contents())
    except ValueError as error:  # a text that is not UTF-8
        raise InputError(f"{path}: damaged metadata ({error}); fetch it again") from None
    return values


def _as_written(value: Any) -> Any:
    """The shortest decimal of a float32: 1e-6, and not 9.99999997e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _tensors(
    gguf: Any,
    held: Mapping[str, Any],
    config: Mapping[str, Any],
    metadata: CheckedValues,
    where: str,
) -> Iterator[LazyTensor]:
    """The model's tensors. Raises InputError if the file does not hold exactly these."""
    model, family = from_hf(config, where)
    arch = metadata.values["general.architecture"]
    arch_key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(arch_key, model.num_layers)
    sources: dict[str, tuple[str, int | None]] = {}
    for tensor in tensors(model, family):
        sources[tensor.name] = _gguf_name(names, tensor.name)
    # rope_freqs are in the config.json already.
    missing = [f"{source} ({name})" for name, (source, _) in sources.items() if source not in held]
    unknown = held.keys() - {source for source, _ in sources.values()} - {"rope_freqs.weight"}
    if missing or unknown:
        raise InputError(
            f"{where}: not the tensors of a {family} model; missing: {missing[:4]}, unknown: "
            f"{unknown}; fetch it again"
        )
    shapes = file_shapes(model, family, abstract(model))
    # Lazily: dequantized, a model is several times as large as its file.
    for name, (source, expert) in sources.items():
        stored = held[source]
        dtype = DTYPES.get(stored.tensor_type.name, np.dtype(np.float32))
        make = functools.partial(_dequantize, gguf, stored, expert, name, model, arch)
        yield LazyTensor(name, shapes[name], dtype, make)


def _dequantize(
    gguf: Any, stored: Any, expert: int | None, name: str, model: ModelConfig, arch: str
) -> np.ndarray:
    """The tensor `name` as safetensors hold it; expert: its number in the stored tensor, None for all of it."""
    # An expert is a part of the stored blocks, so the others are not dequantized.
    data = stored.data if expert is None else stored.data[expert]
    array = gguf.quants.dequantize(data, stored.tensor_type)
    if arch == "llama" and ".q_proj." in name:
        array = _pairs_to_halves(array, model.num_heads)
    if arch == "llama" and ".k_proj." in name:
        array = _pairs_to_halves(array, model.num_kv_heads)
    if model.norm_offset and name.endswith("norm.weight"):
        array = array - np.float32(1)  # GGUF stores Gemma's scales with the 1 added
    return array


def _gguf_name(names: Any, name: str) -> tuple[str, int | None]:
    """(name of the GGUF tensor, number of the expert in it) of a tensor of a safetensors file."""
    # GGUF stacks all experts of a layer:
    #   model.layers.1.mlp.experts.5.up_proj.weight -> ("blk.1.ffn_up_exps.weight", 5)
    #   model.layers.1.self_attn.q_proj.weight      -> ("blk.1.attn_q.weight", None)
    stem, kind = name.rsplit(".", 1)
    block, _, expert_matrix = stem.partition(".experts.")
    if not expert_matrix:
        return f"{names.get_name(stem)}.{kind}", None
    expert, _, matrix = expert_matrix.partition(".")
    return f"{names.get_name(f'{block}.experts.{matrix}')}.{kind}", int(expert)


def _pairs_to_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head: GGUF's llama files store rotary pairs as neighbors."""
    #   GGUF           x0 y0 x1 y1
    #   safetensors    x0 x1 y0 y1
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
