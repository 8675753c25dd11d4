"""The cost of preparing a corpus: seconds, MB/s, and memory, which must not grow with the corpus; padding of chats.

    python tests/benchmarks/data.py [--megabytes 100 1000] [--padding configs/quickstart.yaml]

The corpus is written to a temporary folder and prepared by a new process without JAX; another one then makes
batches. Peak memory is ru_maxrss of the process, and of the largest of its workers. With --padding: the share of
padding in the rows of a config's conversations, with a tokenizer trained as the config says.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxllm.data.loader import load_rows
from jaxllm.data.store import load_texts
from jaxllm.tokenizers import trained as tokenizers

LENGTH, BATCH, STEPS = 1024, 16, 200

COMMON = """
import json, resource, sys, time
from pathlib import Path
from jaxllm.data import loader, store
from jaxllm.data.sources import DataConfig, Source
from jaxllm.tokenizers.trained import Tokenizer
peak = lambda who: resource.getrusage(who).ru_maxrss / 1024
if __name__ == "__main__":
    folder, began = Path(sys.argv[1]), time.monotonic()
    data, tokenizer = DataConfig((Source(str(folder / "corpus.txt")),)), Tokenizer.load(folder / "tokenizer")
"""
PREPARE = """
    found = store.open_store(data, "document", tokenizer, folder / "cache")
    print(json.dumps({
        "seconds": time.monotonic() - began,
        "parent_mb": peak(resource.RUSAGE_SELF),
        "worker_mb": peak(resource.RUSAGE_CHILDREN),
        "examples": len(found["train"][0].table),
    }))
"""
DRAW = """
    import jax, numpy as np
    start = peak(resource.RUSAGE_SELF)
    mixture = loader.load_rows(data, "document", "train", tokenizer, LENGTH, folder / "cache")
    planned = time.monotonic() - began
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1]), jax.P("x"))
    batch_at = loader.make_batch_at(mixture, batch_size=BATCH, seed=0, sharding=sharding)
    batch_at(0)
    began = time.monotonic()
    for step in range(STEPS):
        batch_at(step * 7919)
    print(json.dumps({
        "plan_seconds": planned,
        "rows": mixture[0][0].num_rows,
        "milliseconds_per_batch": 1e3 * (time.monotonic() - began) / STEPS,
        "import_mb": start,
        "draw_mb": peak(resource.RUSAGE_SELF),
    }))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--padding", default="")
    args = parser.parse_args()
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            size = write_corpus(Path(folder), megabytes) / 1e6
            # Three processes: the first tokenizes, the second reads, the third finds all of it in the cache.
            prepared = run(PREPARE, folder)
            batches = run(f"    LENGTH, BATCH, STEPS = {LENGTH}, {BATCH}, {STEPS}" + DRAW, folder)
            again = run(PREPARE, folder)
        numbers = {"MB": size, "MB/s": size / prepared["seconds"], **prepared, **batches}
        numbers["open_seconds"] = again["seconds"]
        rounded = {name: round(value, 2) for name, value in numbers.items()}
        print(json.dumps(rounded), flush=True)
    if args.padding:
        print(json.dumps(padding(args.padding)))


def write_corpus(folder: Path, megabytes: int) -> int:
    """Lines of words by Zipf's law, 5% of them repeated; and a tokenizer trained on the first."""
    rng = random.Random(0)
    sampler = np.random.default_rng(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = np.array(["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(20_000)])
    # Zipf's law: the n-th word is n times rarer than the first.
    share = 1 / np.arange(1, len(words) + 1)
    first = []
    with open(folder / "corpus.txt", "w") as file:
        while file.tell() < megabytes * 1_000_000:
            picked = words[sampler.choice(len(words), (20_000, 15), p=share / share.sum())]
            block = list(map(" ".join, picked))
            first = first or block
            # The repeated lines make the store look for duplicates across all units.
            file.write("\n".join([*block, *first[:1000]]) + "\n")
    tokenizer = tokenizers.train(
        iter(first[:10_000]),
        vocab_size=4096,
        model_type="bpe",
        character_coverage=1.0,
        num_threads=2,
    )
    tokenizer.save(folder / "tokenizer")
    return (folder / "corpus.txt").stat().st_size


def run(script: str, folder: str) -> dict[str, float]:
    """The numbers that a script prints. A new process: the peak of memory cannot be reset."""
    path = Path(folder) / "script.py"
    path.write_text(COMMON + script)
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, str(path), folder], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def padding(config_path: str) -> dict[str, float]:
    """The share of padding in the training rows of a config's conversations."""
    from jaxllm.config import load
    from jaxllm.life import Config, with_defaults
    from jaxllm.stages.tokenizer import sample_texts

    config = with_defaults(load(Config, config_path))
    began = time.monotonic()
    settings = config.tokenizer
    texts, _ = sample_texts(load_texts(settings.data, "train"), settings.sample_bytes, 0)
    tokenizer = tokenizers.train(
        iter(texts),
        vocab_size=settings.vocab_size,
        model_type=settings.model_type,
        character_coverage=settings.character_coverage,
        num_threads=2,
    )
    length = config.sft.length or config.model.max_length
    num_rows = 0
    used = 0
    with tempfile.TemporaryDirectory() as folder:
        for rows, _ in load_rows(config.sft.data, "chat", "train", tokenizer, length, folder):
            num_rows += rows.num_rows
            for number in range(rows.num_rows):
                # Segment 0 is padding.
                used += int((rows.row(number)["segment_ids"] > 0).sum())
    seconds = time.monotonic() - began
    return {"rows": num_rows, "padding": 1 - used / (length * num_rows), "seconds": seconds}


if __name__ == "__main__":
    main()
