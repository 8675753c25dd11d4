"""Parameters out of safetensors files: each device's share is read for itself, a tensor at a time."""

import concurrent.futures
import itertools
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from jaxllm.config import InputError
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import file_shapes, places
from jaxllm.models.transformer import abstract

# Buffers that old files hold; they are computed, not learnt.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias)$")
_THREADS = 4


class Files:
    """The tensors of all safetensors files in a folder, by name."""

    def __init__(self, folder: Path):
        self.folder, self.paths = folder, sorted(folder.glob("*.safetensors"))
        self.where: dict[str, Any] = {}
        for path in self.paths:
            try:
                file: Any = safetensors.safe_open(path, "np")
            except (OSError, safetensors.SafetensorError) as error:  # pyright: ignore
                raise InputError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
            for name in file.keys():  # noqa: SIM118
                if name in self.where:
                    raise InputError(f"{path}: {name} is in another file as well; remove one of them")
                self.where[name] = file
        if "wte.weight" in self.where:  # GPT-2 as it was first published
            self.where = {f"transformer.{name}": file for name, file in self.where.items()}

    def _own(self, name: str) -> str:
        return name if name in self.where[name].keys() else name.removeprefix("transformer.")  # noqa: SIM118

    def get(self, name: str) -> np.ndarray:
        return self.where[name].get_tensor(self._own(name))

    def about(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(type as safetensors writes it, shape)."""
        part = self.where[name].get_slice(self._own(name))
        return part.get_dtype(), tuple(part.get_shape())

    def _equal(self, name: str, other: str) -> bool:
        return name == other or np.array_equal(self.get(name), self.get(other))

    def check(self, model: ModelConfig, family: str) -> list[str]:
        """Names that are not needed. Raises InputError listing what is missing, not known, or of another shape."""
        wanted = file_shapes(model, family, abstract(model))
        extra = [name for name in self.where if name not in wanted]
        unused = [name for name in extra if _BUFFERS.search(name)]
        table = next(iter(wanted))
        if model.tie_embeddings and "lm_head.weight" in extra and self._equal("lm_head.weight", table):
            unused.append("lm_head.weight")
        copies = {"embed_tokens.weight": table, "shared_head.head.weight": "lm_head.weight"}
        copied = [(name, first) for name in wanted for end, first in copies.items() if name.endswith(end)]
        faults = {
            "missing": [name for name in wanted if name not in self.where],
            "not known": [name for name in extra if name not in unused],
            "of another shape": [
                f"{name} {list(self.about(name)[1])} for {list(shape)}"
                for name, shape in wanted.items()
                if name in self.where and self.about(name)[1] != shape
            ],
            "not the copies they should be": [
                name for name, first in copied if {name, first} <= self.where.keys() and not self._equal(name, first)
            ],
        }
        if text := "; ".join(
            f"{len(v)} {k}: {', '.join(v[:4])}{' ...' if len(v) > 4 else ''}" for k, v in faults.items() if v
        ):
            raise InputError(f"{self.folder}: not the tensors of this {family} model ({text}); check config.json")
        return unused


def read(folder: Path, model: ModelConfig, family: str, wanted: Any) -> Any:
    """The parameters, like `wanted`: a tree of ShapeDtypeStructs with shardings, whole or a part of the tree."""
    files, at = Files(folder), places(model, family)

    def leaf(path: Any, want: Any) -> jax.Array:
        slices = at[tuple(key.key for key in path)]
        lead = len(next(iter(slices)))

        def share(index: Any) -> np.ndarray:
            ranges = [range(*s.indices(size)) for s, size in zip(index, want.shape, strict=True)]
            out = np.empty([len(r) for r in ranges], want.dtype)
            for numbers in itertools.product(*(enumerate(r) for r in ranges[:lead])):
                place = slices[tuple(number for _, number in numbers)]
                ours = place.ours(files.get(place.tensor), want.shape[lead:])
                out[tuple(i for i, _ in numbers)] = ours[tuple(index[lead:])].astype(want.dtype)
            return out

        return jax.make_array_from_callback(want.shape, want.sharding, share)

    paths, tree = jax.tree_util.tree_flatten_with_path(wanted)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return jax.tree.unflatten(tree, pool.map(lambda pair: leaf(*pair), paths))
