"""Which chunks of an array a process reads: those that its shards overlap, and no others."""

import itertools
import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.runtime import chunks
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh


class OfOneProcess:
    """A sharding of which this process holds some devices only, as in a job of several processes."""

    def __init__(self, sharding, devices):
        self.sharding = sharding
        self.devices = devices

    def addressable_devices_indices_map(self, shape):
        everything = self.sharding.devices_indices_map(shape)
        return {device: everything[device] for device in self.devices}


class Leaf:
    def __init__(self, shape, sharding):
        self.shape = shape
        self.sharding = sharding


def written(folder, name, shape, sizes):
    """The names of all chunks of an array, which are written here but for their content."""
    directory = folder / name
    directory.mkdir(parents=True)
    (directory / ".zarray").write_text(json.dumps({"shape": shape, "chunks": sizes}))
    grid = [range(-(-length // size)) for length, size in zip(shape, sizes, strict=True)]
    return [f"{name}/{'.'.join(map(str, place)) or '0'}" for place in itertools.product(*grid)]


@pytest.mark.parametrize("spec", [(), ("data",), (None, "data"), ("tensor", "data")], ids=str)
@pytest.mark.parametrize("sizes", [(16, 8), (4, 8), (16, 1), (5, 3), (2, 2)], ids=str)
@pytest.mark.parametrize("first", [0, 5])
def test_a_process_reads_what_its_shards_overlap(tmp_path, spec, sizes, first):
    """Against the definition: an element that the process holds is in a chunk that it reads."""
    shape = (16, 8)
    mesh = make_mesh(MeshConfig(data=4, tensor=2), jax.devices()[:8])
    devices = list(mesh.devices.flat)[first : first + 2]
    sharding = OfOneProcess(NamedSharding(mesh, PartitionSpec(*spec)), devices)
    files = ["_METADATA", "params.w/.zarray", *written(tmp_path, "params.w", shape, sizes)]
    held = np.zeros(shape, bool)
    for index in sharding.addressable_devices_indices_map(shape).values():
        held[index] = True
    wanted = {f"params.w/{i // sizes[0]}.{j // sizes[1]}" for i, j in np.argwhere(held)}
    tree = {"w": Leaf(shape, sharding)}
    found = [*chunks.needed(tmp_path, tree, ("params",), files)]
    assert set(found) == {"_METADATA", "params.w/.zarray"} | wanted
    assert len(found) == len(set(found))


def test_a_number_has_one_chunk(tmp_path):
    files = written(tmp_path, "step", (), ())
    mesh = make_mesh(MeshConfig(data=8), jax.devices()[:8])
    tree = {
        "step": jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    }
    assert [*chunks.needed(tmp_path, tree, (), files)] == ["step/0"]


def test_files_of_other_kinds_are_all_read(tmp_path):
    files = [
        "manifest.ocdbt",
        "d/0123abcd",
        "d/01234567",
        "ocdbt.process_0/d/77",
        "model-00001.safetensors",
    ]
    mesh = make_mesh(MeshConfig(data=8), jax.devices()[:8])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    tree = {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)}
    assert [*chunks.needed(tmp_path, tree, (), files)] == files


@pytest.mark.parametrize(
    "file, is_chunk, of_one",
    [
        ("params.w/0.12.3", True, True),
        ("step/0", True, True),
        ("params.w/.zarray", False, False),
        ("array_metadatas/process_3", False, True),
        ("_METADATA", False, False),
        ("d/0123abcd", False, False),
    ],
)
def test_what_each_process_writes_for_itself(file, is_chunk, of_one):
    assert chunks.is_chunk(file) is is_chunk
    assert chunks.is_of_one_process(file) is of_one
