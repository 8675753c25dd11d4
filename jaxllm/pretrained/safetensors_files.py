"""Parameters from safetensors files onto a mesh: each process reads what its devices need, one tensor at a time."""

import concurrent.futures
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors

from jaxllm.config import InputError, build
from jaxllm.models.config import ModelConfig
from jaxllm.models.transformer import abstract
from jaxllm.pretrained.families import FileSlice, file_shapes, file_slices, pick

# Buffers in old files; they are computed, not trained.
BUFFERS = re.compile(r"(rotary_emb\.(\w*inv_freq|\w+_cached)|\.attn\.bias|\.attn\.masked_bias)$")
# The dtypes that are read and written: NumPy's by the format's name, and the reverse.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
KINDS = {str(dtype): kind for kind, dtype in DTYPES.items()}
_THREADS = 4  # tensors read at once: so many are in memory in addition to a leaf

# (start, end) on every axis: the part of a leaf that a device holds.
_Span = tuple[tuple[int, int], ...]


class Stored(NamedTuple):
    """Where a tensor is stored, and how."""

    path: Path
    key: str
    """Its name in the file."""
    kind: str
    """Its dtype as the format writes it: F32, BF16, ..."""
    shape: tuple[int, ...]


class Files:
    """The tensors of safetensors files by name."""

    def __init__(self, folder: Path, paths: Sequence[Path] = ()):
        """The tensors of `paths`, or of every file in `folder` if there are none."""
        self.folder = folder
        self.paths = list(paths) or sorted(folder.glob("*.safetensors"))
        self.where: dict[str, Stored] = {}
        self._readers: dict[Path, Any] = {}
        for path in self.paths:
            self._readers[path], stored = _open(path)
            duplicates = stored.keys() & self.where.keys()
            if duplicates:
                name = min(duplicates)
                raise InputError(f"{path}: {name} is in another file as well; remove one of them")
            self.where |= stored
        # GPT-2 as it was first published: the prefix of all its tensors is left out.
        if "wte.weight" in self.where:
            self.where = {f"transformer.{name}": at for name, at in self.where.items()}

    def get(self, name: str) -> np.ndarray:
        """Read a tensor."""
        stored = self.where[name]
        return self._readers[stored.path].get_tensor(stored.key)

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same values."""
        return name == other or np.array_equal(self.get(name), self.get(other))

    def check(self, model: ModelConfig, family: str) -> list[str]:
        """Check that these are the tensors of the model, and return the names of those it does not need.

        Raises:
            InputError: lists what is missing, unknown or of another shape.
        """
        wanted = file_shapes(model, family, abstract(model))
        unused = self._unused(model, wanted)
        misshapen = []
        for name, shape in wanted.items():
            if name in self.where and self.where[name].shape != shape:
                misshapen.append(f"{name} {list(self.where[name].shape)} for {list(shape)}")
        faults = {
            "missing": [name for name in wanted if name not in self.where],
            "not known": [n for n in self.where if n not in wanted and n not in unused],
            "of another shape": misshapen,
            "not the copies they should be": list(self._wrong_copies(wanted)),
        }
        described = []
        for fault, names in faults.items():
            if names:
                more = " ..." if len(names) > 4 else ""
                described.append(f"{len(names)} {fault}: {', '.join(names[:4])}{more}")
        if described:
            reason = "; ".join(described)
            raise InputError(
                f"{self.folder}: not the tensors of this {family} model ({reason}); check config.json"
            )
        return unused

    def _unused(self, model: ModelConfig, wanted: Mapping[str, Any]) -> list[str]:
        extra = [name for name in self.where if name not in wanted]
        unused = [name for name in extra if BUFFERS.search(name)]
        head = "lm_head.weight"
        # Some files repeat a tied embedding as the head. Another matrix there is an error: the model
        # would compute something else.
        if model.tie_embeddings and head in extra and self.equal(head, next(iter(wanted))):
            unused.append(head)
        return unused

    def _wrong_copies(self, wanted: Mapping[str, Any]) -> Iterator[str]:
        """Names of an MTP module's embedding or head that differs from the model's."""
        originals = {
            "embed_tokens.weight": next(iter(wanted)),
            "shared_head.head.weight": "lm_head.weight",
        }
        for name in wanted:
            for end, original in originals.items():
                both = name in self.where and original in self.where
                if name.endswith(end) and both and not self.equal(name, original):
                    yield name


def _open(path: Path) -> tuple[Any, dict[str, Stored]]:
    """(the library's reader of a file, its tensors). Raises InputError if the header does not fit the file."""
    try:
        # pread, not the default: pages of a mapped file count as this process's memory.
        reader = safetensors.safe_open(path, framework="np", backend="pread")
        stored: dict[str, Stored] = {}
        for key in reader.keys():  # noqa: SIM118  (the reader is no mapping)
            tensor = reader.get_slice(key)
            stored[key] = Stored(path, key, tensor.get_dtype(), tuple(tensor.get_shape()))
        if not stored:
            raise ValueError("no tensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path}: not a complete safetensors file ({error}); fetch it again"
        ) from None
    return reader, stored


def read(folder: Path, model: ModelConfig, family: str, wanted: Any) -> Any:
    """The parameters of the files in a folder, one leaf after another.

    Args:
        wanted: a tree of ShapeDtypeStructs with shardings: all parameters or a part of the tree.

    Returns:
        A tree of arrays like `wanted`. While a leaf is read, a process holds what its devices get of it,
        and the tensors that are being read.
    """
    files = Files(folder)
    slices = file_slices(model, family)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:

        def read_leaf(keys: Any, want: Any) -> jax.Array:
            path = tuple(key.key for key in keys)
            return _read_leaf(files, slices[path], want, pool)

        return jax.tree_util.tree_map_with_path(read_leaf, wanted)


def _read_leaf(
    files: Files,
    slices: Mapping[tuple[int, ...], FileSlice],
    want: jax.ShapeDtypeStruct,
    pool: concurrent.futures.Executor,
) -> jax.Array:
    """One leaf, sharded like `want`; slices: {index on its leading axes: where a file has it}."""
    # Every tensor is read once, and what devices hold of it is copied into one buffer per span. For
    # layers/mlp/up [3, D, M] of three layers, with fsdp = 2 on D:
    #   slices          (0,), (1,), (2,)             a tensor of a file each, [D, M]
    #   devices 0, 2    ((0, 3), (0, D/2), (0, M))   one buffer [3, D/2, M] for both
    #   devices 1, 3    ((0, 3), (D/2, D), (0, M))
    num_leading = len(next(iter(slices)))
    spans = _device_spans(want)
    buffers: dict[_Span, np.ndarray] = {}
    for span in spans.values():
        if span not in buffers:
            buffers[span] = np.empty([end - start for start, end in span], want.dtype)

    def read_slice(index: tuple[int, ...]) -> None:
        # With experts or stages over devices, this process may need nothing of a tensor: it is not read.
        takers = [span for span in buffers if _contains(span, index)]
        if not takers:
            return
        source = slices[index]
        values = source.to_leaf(files.get(source.tensor), want.shape[num_leading:])
        for span in takers:
            target = tuple(i - start for i, (start, _) in zip(index, span, strict=False))
            part = tuple(slice(start, end) for start, end in span[num_leading:])
            buffers[span][target] = values[part].astype(want.dtype)

    for _ in pool.map(read_slice, slices):
        pass  # waits, and raises what a thread raised
    arrays = {}
    for span in list(buffers):
        # A buffer is freed before the next one goes to devices, so that at most one exists twice.
        buffer = buffers.pop(span)
        for device, device_span in spans.items():
            if device_span == span:
                arrays[device] = jax.device_put(buffer, device).block_until_ready()
    return jax.make_array_from_single_device_arrays(
        want.shape, want.sharding, [arrays[device] for device in spans]
    )


def _device_spans(want: Any) -> dict[Any, _Span]:
    """{device of this process: the span of the leaf that it holds}."""
    spans: dict[Any, _Span] = {}
    for device, index in want.sharding.addressable_devices_indices_map(want.shape).items():
        axes = zip(index, want.shape, strict=True)
        spans[device] = tuple(axis.indices(size)[:2] for axis, size in axes)
    return spans


def _contains(span: _Span, index: tuple[int, ...]) -> bool:
    """Whether a slice at this index on the leading axes is inside the span."""
    return all(start <= i < end for i, (start, end) in zip(index, span, strict=False))


def read_imported(
    step_dir: Path, record: Mapping[str, Any], abstract: Any, path: Sequence[str]
) -> Any:
    """The parameters of an imported model, or those at `path`, which begins with "params".

    Args:
        step_dir: a checkpoint that `jaxllm import` made.
        record: from its seal: the model's config and family.
        abstract: ShapeDtypeStructs with shardings, the structure of the result.
    """
    model = build(ModelConfig, record["model"], name=f"{step_dir}/seal.json")
    keys = tuple(path[1:])
    # `read` finds a leaf by its whole path, so the structure goes back under the keys above it.
    wanted = abstract
    for key in reversed(keys):
        wanted = {key: wanted}
    return pick(read(step_dir, model, record["family"], wanted), keys)
