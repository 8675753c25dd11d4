"""Memory and time of import, of loading onto a mesh and of export, each in a process of its own.

    python tests/benchmarks/convert.py [--layers 16] [--width 2048] [--shards 5]

A Llama of 1.0 billion parameters in bfloat16 by default (2.1 GB in 5 files, in a temporary folder). Memory is the
most a process had (VmHWM) less what it has after importing jaxllm, against the largest file and against the largest
tensor; what is loaded counts as float32 on the devices, which are this machine's memory here.
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
from jaxllm.sharding import MeshConfig, make_mesh
kb = lambda name: int(re.search(name + r":\\s*(\\d+)", open("/proc/self/status").read())[1])
jax.block_until_ready(jax.numpy.zeros(8))
open("/proc/self/clear_refs", "w").write("5")  # the most so far is forgotten
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


def made_up(folder: Path, model: ModelConfig, shards: int) -> tuple[int, int]:
    """Write such a model; (bytes of the largest file, bytes of the largest tensor)."""
    config, family = family_config.to_hf(model)
    shapes = [*families.file_shapes(model, family, transformer.abstract(model)).items()]
    largest, rng = 0, np.random.default_rng(0)
    for i in range(shards):
        part = {
            name: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
            for name, shape in shapes[i::shards]
        }
        safetensors.numpy.save_file(
            part, folder / f"model-{i}.safetensors", metadata={"format": "pt"}
        )
        largest = max(largest, sum(value.nbytes for value in part.values()))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return largest, max(2 * int(np.prod(shape)) for _, shape in shapes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--shards", type=int, default=5)
    args = parser.parse_args()
    shape = {
        "num_heads": args.width // 64,
        "mlp_dim": 4 * args.width,
        "tie_embeddings": False,
        "dtype": "bfloat16",
    }
    model = ModelConfig(
        vocab_size=32_000, num_layers=args.layers, embed_dim=args.width, num_kv_heads=8, **shape
    )
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "in").mkdir()
        shard, tensor = made_up(root / "in", model, args.shards)
        count = transformer.num_params(model)
        print(
            f"{count:,} parameters, {2 * count / 1e9:.2f} GB; largest file {shard / 1e9:.2f} GB, tensor {tensor / 1e9:.2f} GB"
        )
        for what, source, out in (
            ("import", "in", "stage"),
            ("export", "stage", "out"),
            ("load", "stage", ""),
        ):
            command = [sys.executable, "-c", CHILD, what, str(root / source), str(root / out)]
            peak, seconds = map(
                float, subprocess.check_output(command, text=True).split("\n")[-2].split()
            )
            held = 4.0 * count if what == "load" else 0.0
            rest = f" beyond the {held / 1e9:.2f} GB of parameters" if held else ""
            print(
                f"{what}: {(peak - held) / 1e9:.2f} GB{rest} = {(peak - held) / shard:.2f} of the largest file, "
                f"{(peak - held) / tensor:.1f} of the largest tensor; {seconds:.1f} s"
            )
        same = lambda folder: {
            k: v
            for f in sorted(folder.glob("*.safetensors"))
            for k, v in safetensors.numpy.load_file(f).items()
        }
        ours, theirs = same(root / "out"), same(root / "in")
        equal = ours.keys() == theirs.keys() and all(
            ours[k].tobytes() == theirs[k].tobytes() for k in theirs
        )
        print(f"export(import(x)) has the bytes of x: {equal}")


if __name__ == "__main__":
    main()
