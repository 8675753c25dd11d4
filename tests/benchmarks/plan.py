"""`jaxllm plan` beside MaxText's train_compile: the same models, topologies, batches, lengths, full remat, float32 weights.

    python tests/benchmarks/plan.py                    all rows; makes an environment for MaxText (once, minutes)
    python tests/benchmarks/plan.py --rows llama3_8b:v5p --peer /path/to/maxtext/bin/python

Each command is timed whole, one after the other; with nothing else running the ratios are those of the two programs.
"""

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Row(NamedTuple):
    config: str
    topology: str  # ours
    peer_model: str
    peer_topology: str
    per_device: int  # rows of a batch on one device
    length: int
    target: float  # our temporaries over theirs, at most


ROWS = {
    "llama3_8b:v5p": Row("llama3_8b", "v5p:4x4x4", "llama3-8b", "v5p-128", 4, 8192, 0.6),
    "llama3_8b:v6e": Row("llama3_8b", "v6e:16x16", "llama3-8b", "v6e-256", 2, 8192, 0.6),
    "llama3_70b:v5p": Row("llama3_70b", "v5p:4x8x8", "llama3-70b", "v5p-512", 2, 8192, 0.8),
    "llama31_405b:v5p": Row("llama31_405b", "v5p:8x8x8", "llama3.1-405b", "v5p-1024", 1, 8192, 1.0),
    "mixtral_8x7b:v5p": Row("mixtral_8x7b", "v5p:4x4x4", "mixtral-8x7b", "v5p-128", 4, 4096, 1.0),
    "deepseek_v3:v5p": Row("deepseek_v3", "v5p:8x8x8", "deepseek3-671b", "v5p-1024", 1, 4096, 1.0),
}
VERSIONS = ["maxtext[tpu]==0.2.5", "jax==0.12.0.1", "jaxlib==0.12.0.1", "libtpu==0.0.50.1"]


def make_peer(where: Path) -> Path:
    """Python of an environment with MaxText in it."""
    python = where / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", where], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", VERSIONS[0]], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *VERSIONS[1:]], check=True)
    return python


def timed(command: list[str]) -> tuple[str, float, float]:
    """(all output, seconds, peak memory in GB) of a command."""
    # What was compiled before must not count.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "JAXLLM_CACHE": ""}
    began = time.monotonic()
    done = subprocess.run(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return (
        done.stdout,
        time.monotonic() - began,
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
    )


def planned(config: str, over: dict[str, Any], topology: str, *more: str) -> dict[str, Any]:
    """plan's report of a config with other fields in it, and the seconds and GB of memory of the command."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump({"extends": f"{ROOT}/configs/{config}.yaml", **over}, file)  # JSON is YAML
        file.flush()
        command = [
            sys.executable,
            "-m",
            "jaxllm",
            "plan",
            file.name,
            "--topology",
            topology,
            "--json",
            *more,
        ]
        out, seconds, memory = timed(command)
    report = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    if not report["fits"]:
        sys.exit(f"{config} {over} on {topology} does not fit: {report['reason']}")
    return {**report, "seconds": seconds, "memory": memory}


def ours(row: Row) -> dict[str, Any]:
    devices = math.prod(map(int, row.topology.partition(":")[2].split("x")))
    section = {"batch_size": row.per_device * devices, "length": row.length}
    report = planned(row.config, {"pretrain": section}, row.topology)
    sizes = (report["temp_bytes_per_device"] / 1e9, report["argument_bytes_per_device"] / 1e9)
    return {
        "temporaries": sizes[0],
        "arguments": sizes[1],
        "seconds": report["seconds"],
        "memory": report["memory"],
    }


def theirs(row: Row, python: Path) -> dict[str, Any]:
    settings = {
        **{
            "model_name": row.peer_model,
            "compile_topology": row.peer_topology,
            "compile_topology_num_slices": 1,
        },
        **{
            "per_device_batch_size": row.per_device,
            "max_target_length": row.length,
            "remat_policy": "full",
        },
        **{
            "attention": "flash",
            "weight_dtype": "float32",
            "dtype": "bfloat16",
            "run_name": "compiled",
        },
        **{
            "base_output_directory": "/tmp",
            "dataset_type": "synthetic",
            "enable_checkpointing": False,
        },
    }
    module = "maxtext.trainers.pre_train.train_compile"
    find = "import maxtext, pathlib; print(pathlib.Path(maxtext.__file__).parent / 'configs' / 'base.yml')"
    base = subprocess.run(
        [python, "-c", find], text=True, capture_output=True, check=True
    ).stdout.split()[-1]
    out, seconds, memory = timed(
        [str(python), "-m", module, base, *(f"{k}={v}" for k, v in settings.items())]
    )
    size = lambda name: int(re.search(rf"{name}_size_in_bytes=(\d+)", out)[1]) / 1e9  # type: ignore[index]
    return {
        "temporaries": size("temp"),
        "arguments": size("argument"),
        "seconds": seconds,
        "memory": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=[*ROWS])
    parser.add_argument(
        "--peer", type=Path, help="Python of an environment with MaxText; by default one is made"
    )
    args = parser.parse_args()
    python = args.peer or make_peer(Path(tempfile.gettempdir()) / "maxtext-0.2.5")
    print(
        "| model, topology | temporaries GB | MaxText | ratio (target) | arguments GB | MaxText | seconds | MaxText | ratio (0.5) |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.rows:
        row = ROWS[name]
        a, b = ours(row), theirs(row, python)
        ratio = {key: a[key] / b[key] for key in a}
        sizes = f"{a['temporaries']:.2f} | {b['temporaries']:.2f} | {ratio['temporaries']:.2f} ({row.target})"
        state = f"{a['arguments']:.2f} | {b['arguments']:.2f}"
        times = f"{a['seconds']:.0f} | {b['seconds']:.0f} | {ratio['seconds']:.2f}"
        print(
            f"| {name}, {row.per_device} x {row.length} | {sizes} | {state} | {times} |", flush=True
        )


if __name__ == "__main__":
    main()
