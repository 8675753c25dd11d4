"""Tensors to safetensors files, one in memory at a time: the library's own writer takes all of them at once."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import InputError
from jaxllm.pretrained.safetensors_files import KINDS
from jaxllm.runtime.files import write_json


class LazyTensor(NamedTuple):
    """A tensor to be written, computed when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_model(folder: Path, tensors: Iterable[LazyTensor], shard_gb: float) -> None:
    """Write files of at most shard_gb each, and the index if there are several.

    A larger tensor has its own file.
    """
    shards = _shards(tensors, shard_gb * 10**9)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0])
        return
    file_of: dict[str, str] = {}
    total_size = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, shard)
        for tensor in shard:
            file_of[tensor.name] = name
            total_size += tensor.nbytes
    index = {"metadata": {"total_size": total_size}, "weight_map": file_of}
    write_json(folder / "model.safetensors.index.json", index)


def _shards(tensors: Iterable[LazyTensor], max_bytes: float) -> list[list[LazyTensor]]:
    # Tensors stay in order, so that one leaf of ours after another is read for them. With at most 5:
    #   sizes     3 1 4 9 2
    #   shards   [3 1][4][9][2]
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_file(path: Path, shard: Sequence[LazyTensor]) -> None:
    """Write one file: 8 bytes with the length of the header, the header as JSON, the data."""
    # `transformers` refuses a file without a format that it knows.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": KINDS[str(tensor.dtype)],
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # the data begins at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in shard:
            # One tensor at a time: `make` reads it or computes it now.
            value = np.ascontiguousarray(tensor.make().astype(tensor.dtype, copy=False))
            if value.shape != tensor.shape:
                sizes = f"is {list(value.shape)}, not {list(tensor.shape)}"
                raise InputError(f"{tensor.name}: {sizes}; the model's sizes do not fit")
            # A view, not tobytes(): that would copy the tensor once more.
            file.write(value.reshape(-1).view(np.uint8).data)
