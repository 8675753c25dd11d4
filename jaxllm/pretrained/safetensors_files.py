"""Parameters out of safetensors files: each device's share is read for itself, a tensor at a time."""

import concurrent.futures
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jaxllm.config import InputError, build
from jaxllm.models.config import ModelConfig
from jaxllm.models.transformer import abstract
from jaxllm.pretrained.families import Place, file_shapes, places

# Buffers that old files hold; they are computed, not learnt.
BUFFERS = re.compile(r"(rotary_emb\.(\w*inv_freq|\w+_cached)|\.attn\.bias|\.attn\.masked_bias)$")
_THREADS = 4
KINDS = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}


class Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    kind: str  # as the format writes it: F32, BF16, ...
    shape: tuple[int, ...]
    start: int  # bytes


class Planned(NamedTuple):
    """A tensor to be written, made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _stored(path: Path) -> dict[str, Stored]:
    """{name: place} of a file: 8 bytes with the length of a JSON header, the header, the data."""
    with open(path, "rb") as file:
        length, whole = int.from_bytes(file.read(8), "little"), path.stat().st_size
        header = json.loads(file.read(length)) if length < whole else {}
    found = {}
    for name, about in header.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            found[name] = Stored(path, about["dtype"], tuple(about["shape"]), 8 + length + begin)
            size = (
                KINDS[about["dtype"]].itemsize * math.prod(about["shape"])
                if about["dtype"] in KINDS
                else end - begin
            )
            if not 0 <= begin <= end <= whole - 8 - length or size != end - begin:
                raise ValueError(f"{name} does not lie in it")
    if not found:
        raise ValueError("no tensors")
    return found


class Files:
    """The tensors of safetensors files, by name: of these paths, else of all files in a folder.

    They are read, not mapped: a mapped file counts as this process's memory, all of it in the end.
    """

    def __init__(self, folder: Path, paths: Sequence[Path] = ()):
        self.folder, self.paths = folder, list(paths) or sorted(folder.glob("*.safetensors"))
        self.where: dict[str, Stored] = {}
        for path in self.paths:
            try:
                stored = _stored(path)
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                RecursionError,
            ) as error:
                raise InputError(
                    f"{path}: not a whole safetensors file ({error}); fetch it again"
                ) from None
            if twice := stored.keys() & self.where.keys():
                raise InputError(
                    f"{path}: {min(twice)} is in another file as well; remove one of them"
                )
            self.where |= stored
        if "wte.weight" in self.where:  # GPT-2 as it was first published
            self.where = {f"transformer.{name}": place for name, place in self.where.items()}

    def get(self, name: str) -> np.ndarray:
        place = self.where[name]
        count = math.prod(place.shape)
        return np.fromfile(place.path, KINDS[place.kind], count, offset=place.start).reshape(
            place.shape
        )

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same values."""
        return name == other or np.array_equal(self.get(name), self.get(other))

    def check(self, model: ModelConfig, family: str) -> list[str]:
        """Names that are not needed. Raises InputError listing what is missing, not known, or of another shape."""
        wanted = file_shapes(model, family, abstract(model))
        extra = [name for name in self.where if name not in wanted]
        unused = [name for name in extra if BUFFERS.search(name)]
        table = next(iter(wanted))
        if (
            model.tie_embeddings
            and "lm_head.weight" in extra
            and self.equal("lm_head.weight", table)
        ):
            unused.append("lm_head.weight")
        copies = {"embed_tokens.weight": table, "shared_head.head.weight": "lm_head.weight"}
        copied = [
            (name, first) for name in wanted for end, first in copies.items() if name.endswith(end)
        ]
        faults = {
            "missing": [name for name in wanted if name not in self.where],
            "not known": [name for name in extra if name not in unused],
            "of another shape": [
                f"{name} {list(self.where[name].shape)} for {list(shape)}"
                for name, shape in wanted.items()
                if name in self.where and self.where[name].shape != shape
            ],
            "not the copies they should be": [
                name
                for name, first in copied
                if {name, first} <= self.where.keys() and not self.equal(name, first)
            ],
        }
        if text := "; ".join(
            f"{len(v)} {k}: {', '.join(v[:4])}{' ...' if len(v) > 4 else ''}"
            for k, v in faults.items()
            if v
        ):
            raise InputError(
                f"{self.folder}: not the tensors of this {family} model ({text}); check config.json"
            )
        return unused


def read(folder: Path, model: ModelConfig, family: str, wanted: Any) -> Any:
    """The parameters, like `wanted`: a tree of ShapeDtypeStructs with shardings, whole or a part of the tree.

    Leaf after leaf; of one leaf a process holds what its devices get, and the tensors that are just being read.
    """
    files, at = Files(folder), places(model, family)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        leaf = lambda path, want: _leaf(files, at[tuple(key.key for key in path)], want, pool)
        return jax.tree_util.tree_map_with_path(leaf, wanted)


def _leaf(files: Files, slices: Mapping[tuple[int, ...], Place], want: Any, pool: Any) -> jax.Array:
    lead = len(next(iter(slices)))
    spans = lambda index: tuple(
        s.indices(size)[:2] for s, size in zip(index, want.shape, strict=True)
    )
    devices = {
        d: spans(i) for d, i in want.sharding.addressable_devices_indices_map(want.shape).items()
    }
    shares = {
        span: np.empty([end - start for start, end in span], want.dtype)
        for span in devices.values()
    }

    def fill(numbers: tuple[int, ...]) -> None:
        inside = lambda span: all(
            start <= n < end for n, (start, end) in zip(numbers, span, strict=False)
        )
        if takers := [span for span in shares if inside(span)]:
            place = slices[numbers]
            ours = place.ours(files.get(place.tensor), want.shape[lead:])
            for span in takers:
                to = tuple(n - start for n, (start, _) in zip(numbers, span, strict=False))
                shares[span][to] = ours[tuple(slice(*ends) for ends in span[lead:])].astype(
                    want.dtype
                )

    list(pool.map(fill, slices))
    placed = {}
    for span in [*shares]:  # what is on the devices is freed before the next share is copied there
        share = shares.pop(span)
        placed |= {
            d: jax.device_put(share, d).block_until_ready() for d, s in devices.items() if s == span
        }
    return jax.make_array_from_single_device_arrays(
        want.shape, want.sharding, [placed[d] for d in devices]
    )


def read_imported(
    step_dir: Path, record: Mapping[str, Any], abstract: Any, path: Sequence[str]
) -> Any:
    """The parameters, or those at `path` below "params", of a model that `jaxllm import` made a stage directory of.

    record: what the seal of the step says, with the model's config and family. Arrays are sharded like `abstract`.
    """
    model = build(ModelConfig, record["model"], name=f"{step_dir}/seal.json")
    wanted = functools.reduce(lambda tree, key: {key: tree}, reversed(path[1:]), abstract)
    found = read(step_dir, model, record["family"], wanted)
    return functools.reduce(lambda tree, key: tree[key], path[1:], found)
