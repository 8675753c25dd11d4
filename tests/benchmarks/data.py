"""The cost of preparing a corpus beside the tokenizer library's own speed; memory, which must not grow; padding of chats.

    python tests/benchmarks/data.py [--megabytes 100 1000] [--texts english chinese]
        [--tokenizers sentencepiece json tiktoken] [--rounds 2] [--padding configs/quickstart.yaml]

The corpus is written to a temporary folder. In each round a new process encodes it with the library alone, on all
cores, and another one prepares it: reads, hashes, splits, tokenizes, removes repetitions, writes. One more makes
batches of what was prepared, and one finds all of it in the cache. Peak memory is ru_maxrss of the process, and of
the largest of its workers. With --padding: the share of padding in the rows of a config's conversations, with a
tokenizer trained as the config says.
"""

import argparse
import base64
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

LENGTH, BATCH, STEPS = 1024, 16, 200

COMMON = """
import json, resource, sys, time
from pathlib import Path
from jaxllm.data import store
from jaxllm.data.config import DataConfig, Source
from jaxllm.tokenizers.published import load_tokenizer
peak = lambda who: resource.getrusage(who).ru_maxrss / 1024
if __name__ == "__main__":
    folder, began = Path(sys.argv[1]), time.monotonic()
    data, tokenizer = DataConfig((Source(str(folder / "corpus.txt")),)), load_tokenizer(folder / "tokenizer")
"""
LIBRARY = """
    texts = (folder / "corpus.txt").read_text().splitlines()
    began = time.monotonic()
    for start in range(0, len(texts), 8192):
        tokenizer.encode_batch(texts[start : start + 8192], num_threads=-1)
    print(json.dumps({"seconds": time.monotonic() - began}))
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
    from jaxllm.data import loader
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
    parser.add_argument("--texts", nargs="*", choices=list(TEXTS), default=list(TEXTS))
    parser.add_argument("--tokenizers", nargs="*", choices=list(KINDS), default=["sentencepiece"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--padding", default="")
    args = parser.parse_args()
    for megabytes, text, kind in itertools.product(args.megabytes, args.texts, args.tokenizers):
        numbers = measure(megabytes, text, kind, args.rounds)
        rounded = {name: round(value, 2) for name, value in numbers.items()}
        print(json.dumps({"text": text, "tokenizer": kind, **rounded}), flush=True)
    if args.padding:
        print(json.dumps(padding(args.padding)))


def measure(megabytes: int, text: str, kind: str, rounds: int) -> dict[str, float]:
    """The medians of all rounds; "of library": speed of the preparation, as a share of the library's."""
    alone = []
    prepared = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In another process: what is measured starts with the peak of the process that starts it.
        maker = multiprocessing.get_context("spawn").Process(
            target=make, args=(folder, megabytes, text, kind)
        )
        maker.start()
        maker.join()
        size = (folder / "corpus.txt").stat().st_size / 1e6
        for _ in range(rounds):
            alone.append(run(LIBRARY, folder)["seconds"])
            shutil.rmtree(folder / "cache", ignore_errors=True)
            prepared.append(run(PREPARE, folder))
        batches = run(f"    LENGTH, BATCH, STEPS = {LENGTH}, {BATCH}, {STEPS}" + DRAW, folder)
        again = run(PREPARE, folder)
    seconds = statistics.median(each["seconds"] for each in prepared)
    library = statistics.median(alone)
    return {
        "MB": size,
        "MB/s": size / seconds,
        "library_MB/s": size / library,
        "of library": library / seconds,
        **prepared[-1],
        **batches,
        "open_seconds": again["seconds"],
    }


def make(folder: Path, megabytes: int, text: str, kind: str) -> None:
    """Writes corpus.txt, and a tokenizer trained on its first block."""
    first = write_corpus(folder / "corpus.txt", TEXTS[text], megabytes)
    (folder / "tokenizer").mkdir()
    KINDS[kind](folder / "tokenizer", first)


def english(sampler: np.random.Generator) -> list[str]:
    """20,000 lines of 15 words by Zipf's law."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    rng = random.Random(0)
    words = np.array(["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(20_000)])
    return list(map(" ".join, words[by_zipf(sampler, len(words), (20_000, 15))]))


def chinese(sampler: np.random.Generator) -> list[str]:
    """10,000 lines of 20 to 120 characters, as long as reviews are."""
    characters = np.array([chr(0x4E00 + 5 * number) for number in range(3000)])
    # As frequent as in Chinese text, roughly.
    characters[[3, 15]] = ["，", "。"]
    lines = characters[by_zipf(sampler, len(characters), (10_000, 120))]
    lengths = sampler.integers(20, 121, len(lines))
    return ["".join(line[:length]) for line, length in zip(lines, lengths, strict=True)]


def by_zipf(sampler: np.random.Generator, count: int, shape: tuple[int, int]) -> np.ndarray:
    """Zipf's law: the n-th item is n times rarer than the first."""
    share = 1 / np.arange(1, count + 1)
    return sampler.choice(count, shape, p=share / share.sum())


def write_corpus(path: Path, block: Callable[[np.random.Generator], list[str]], megabytes: int):
    """Writes blocks of lines, 5% of them repeated, and returns the first block."""
    sampler = np.random.default_rng(0)
    first: list[str] = []
    with open(path, "w") as file:
        while file.tell() < megabytes * 1_000_000:
            lines = block(sampler)
            first = first or lines
            # The repeated lines make the store look for duplicates across all units.
            file.write("\n".join([*lines, *first[: len(lines) // 20]]) + "\n")
    return first


def sentencepiece(folder: Path, texts: list[str]) -> None:
    """A tokenizer as the tokenizer stage trains it."""
    from jaxllm.tokenizers.trained import train

    train(
        iter(texts[:10_000]),
        vocab_size=4096,
        model_type="bpe",
        character_coverage=0.9995,
        num_threads=2,
    ).save(folder)


def json_file(folder: Path, texts: list[str]) -> None:
    """A byte-level tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:10_000], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')


def tiktoken(folder: Path, texts: list[str]) -> None:
    """GPT-2's number of ranks: bytes and pairs of bytes."""
    del texts
    pairs = itertools.product(range(256), repeat=2)
    tokens = [*(bytes([byte]) for byte in range(256)), *map(bytes, pairs)][:50_256]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (folder / "gpt2.tiktoken").write_bytes(b"\n".join(lines) + b"\n")


TEXTS = {"english": english, "chinese": chinese}
KINDS = {"sentencepiece": sentencepiece, "json": json_file, "tiktoken": tiktoken}


def run(script: str, folder: Path) -> dict[str, float]:
    """The numbers that a script prints. A new process: the peak of memory cannot be reset."""
    path = folder / "script.py"
    path.write_text(COMMON + script)
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, str(path), str(folder)],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(out.stdout.splitlines()[-1])


def padding(config_path: str) -> dict[str, float]:
    """The share of padding in the training rows of a config's conversations."""
    from jaxllm.config import load
    from jaxllm.data.loader import load_rows
    from jaxllm.data.store import load_texts
    from jaxllm.life import Config, with_defaults
    from jaxllm.stages.tokenizer import sample_texts
    from jaxllm.tokenizers.trained import train

    config = with_defaults(load(Config, config_path))
    began = time.monotonic()
    settings = config.tokenizer
    texts, _ = sample_texts(load_texts(settings.data, "train"), settings.sample_bytes, 0)
    tokenizer = train(
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
