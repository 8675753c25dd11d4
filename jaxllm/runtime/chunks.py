"""Which files of a checkpoint a process needs, where each chunk of an array is a file of its own.

So Orbax writes without OCDBT: every process the shards that it holds, in Zarr's format, version 2. Of float32[8, 4] in
two shards:

    params.w/.zarray    the shape of the array and of its chunks, written by process 0
    params.w/0.0        rows 0 to 3
    params.w/1.0        rows 4 to 7

A process reads the chunks that its own shards overlap, whatever the sharding was when they were written.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

_CHUNK = re.compile(r"(?P<array>[^/]+)/\d+(?:\.\d+)*")
# What Orbax says of the shards of one process.
_OF_PROCESS = re.compile(r"array_metadatas/process_\d+")


def is_chunk(file: str) -> bool:
    """Whether a file, by its name in the checkpoint's folder, is a chunk of an array."""
    return bool(_CHUNK.fullmatch(file))


def is_of_one_process(file: str) -> bool:
    """Whether each process writes files of this kind for itself, and not all of them the same one."""
    return is_chunk(file) or bool(_OF_PROCESS.fullmatch(file))


def needed(
    step_dir: Path, abstract: Any, path: Sequence[str], files: Sequence[str]
) -> Iterator[str]:
    """The files that this process reads to restore a subtree; all of them, if they are not chunks of this kind.

    Args:
        step_dir: the checkpoint's folder, which has the .zarray files.
        abstract: the tree to restore, of ShapeDtypeStructs with the target shardings.
        path: keys from the root of the saved tree to `abstract`.
        files: all files of the checkpoint.
    """
    if not any(file.endswith("/.zarray") for file in files):
        yield from files
        return
    wanted = set()
    for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name = ".".join([*path, *(_name_of(key) for key in keys)])
        wanted |= set(_chunks_of(step_dir / name, leaf)) if (step_dir / name).is_dir() else set()
    for file in files:
        if not is_chunk(file) or file in wanted:
            yield file


def _chunks_of(folder: Path, leaf: jax.ShapeDtypeStruct) -> Iterator[str]:
    """The chunks of an array that overlap the shards of this process."""
    sizes = json.loads((folder / ".zarray").read_bytes())["chunks"]
    assert leaf.sharding is not None
    for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
        ranges = []
        for part, length, size in zip(index or (), leaf.shape, sizes, strict=True):
            start, stop, _ = part.indices(length)
            ranges.append(range(start // size, -(-stop // size)))
        for position in itertools.product(*ranges):
            # Of a number, which has no position, the only chunk is called 0.
            yield f"{folder.name}/{'.'.join(map(str, position)) or '0'}"


def _name_of(key: Any) -> str:
    """The name of a key of a dict, an attribute or an index of a list, as Orbax writes it."""
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    raise TypeError(f"{key!r}: not the key of a dict, a class or a list")
