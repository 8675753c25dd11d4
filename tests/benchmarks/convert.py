"""Memory and time of import, of loading onto a mesh and of export, each in its own process.

    python tests/benchmarks/convert.py [--layers 16] [--width 2048] [--shards 5]

A Llama of 1.1 billion parameters in bfloat16 by default (2.2 GB in 5 files, in a temporary folder). Memory is the
most that a process had (VmHWM) less what it has after importing jaxllm, relative to the largest file and to the
largest tensor. Loaded parameters count as float32 on the devices, which are this machine's memory here.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.pretrained import families, family_config

CHILD = """
import re, sys, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
from jaxllm import workspace
from jaxllm.pretrained import convert
from jaxllm.runtime.mesh import MeshConfig, make_mesh
kb = lambda name: int(re.search(name + r":\\s*(\\d+)", open("/proc/self/status").read())[1])
jax.block_until_ready(jax.numpy.zeros(8))
open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM
before, began = kb("VmRSS"), time.monotonic()
what, source, out = sys.argv[1:]
if what == "import":
    convert.import_model(source, out)
elif what == "export":
    convert.export_model(source, out, shard_gb=float("inf"))
else:
    params, _ = workspace.load_model(source, make_mesh(MeshConfig(data=1, fsdp=8)))
    jax.block_until_ready(params)
print(1024 * (kb("VmHWM") - before), time.monotonic() - began)
"""


def write_model(folder: Path, model: ModelConfig, num_shards: int) -> tuple[int, int]:
    """Write a model of random weights; returns (bytes of the largest file, bytes of the largest tensor)."""
    folder.mkdir()
    config, family = family_config.to_hf(model)
    shapes = list(families.file_shapes(model, family, transformer.abstract(model)).items())
    rng = np.random.default_rng(0)
    largest_file = 0
    largest_tensor = 0
    for number in range(num_shards):
        tensors = {}
        for name, shape in shapes[number::num_shards]:
            tensors[name] = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
            largest_tensor = max(largest_tensor, tensors[name].nbytes)
        path = folder / f"model-{number}.safetensors"
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
        largest_file = max(largest_file, sum(value.nbytes for value in tensors.values()))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return largest_file, largest_tensor


def measure(what: str, source: Path, out: Path) -> tuple[float, float]:
    """(bytes of memory, seconds) of an import, an export or a load in a new process."""
    command = [sys.executable, "-c", CHILD, what, str(source), str(out)]
    last_line = subprocess.check_output(command, text=True).splitlines()[-1]
    peak, seconds = map(float, last_line.split())
    return peak, seconds


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--shards", type=int, default=5)
    args = parser.parse_args()
    model = ModelConfig(
        vocab_size=32_000,
        num_layers=args.layers,
        embed_dim=args.width,
        num_heads=args.width // 64,
        num_kv_heads=8,
        mlp_dim=4 * args.width,
        tie_embeddings=False,
        dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        file_size, tensor_size = write_model(root / "in", model, args.shards)
        count = transformer.num_params(model)
        sizes = f"largest file {file_size / 1e9:.2f} GB, tensor {tensor_size / 1e9:.2f} GB"
        print(f"{count:,} parameters, {2 * count / 1e9:.2f} GB; {sizes}")
        for what, source, out in (
            ("import", "in", "stage"),
            ("export", "stage", "out"),
            ("load", "stage", "unused"),
        ):
            peak, seconds = measure(what, root / source, root / out)
            beyond = ""
            if what == "load":
                peak -= 4 * count
                beyond = f" beyond the {4 * count / 1e9:.2f} GB of parameters"
            print(
                f"{what}: {peak / 1e9:.2f} GB{beyond} = {peak / file_size:.2f} of the largest file, "
                f"{peak / tensor_size:.1f} of the largest tensor; {seconds:.1f} s"
            )
        exported = tensors_in(root / "out")
        imported = tensors_in(root / "in")
        equal = exported.keys() == imported.keys()
        for tensor, value in imported.items():
            equal = equal and exported[tensor].tobytes() == value.tobytes()
        print(f"export(import(x)) has the bytes of x: {equal}")


if __name__ == "__main__":
    main()
