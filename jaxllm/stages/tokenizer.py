"""The tokenizer stage: train SentencePiece on the training split, measure compression on the held-out one."""

import dataclasses
import os
import random
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jax
from annotated_types import Ge, Le
from etils import epath
from rich.table import Table

from jaxllm.config.ranges import FINITE, NOT_BOOL, ByteCount, Seed, Threads
from jaxllm.data.sources import DataConfig
from jaxllm.data.store import load_texts
from jaxllm.runtime.console import console
from jaxllm.tokenizers.published import load_tokenizer
from jaxllm.tokenizers.trained import MAX_VOCAB_SIZE, RULE_OF_THUMB, compression, train
from jaxllm.workspace import Workspace


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A SentencePiece vocabulary with byte fallback: every Unicode string survives encoding and decoding."""

    init_from: str = ""
    """Stage directory, or folder of a downloaded model, whose tokenizer is taken; nothing is trained then."""
    data: DataConfig = DataConfig()
    """Text to train on; without sources that of pretrain."""
    vocab_size: Annotated[int, NOT_BOOL, Ge(270), Le(MAX_VOCAB_SIZE)] = 4096
    """Tokens, with the special ones and the 256 bytes."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """Byte-pair encoding or a unigram language model."""
    character_coverage: Annotated[float, NOT_BOOL, FINITE, Ge(0.9), Le(1.0)] = 0.9995
    """Share of the characters that get a token of their own; the rest is spelled in bytes."""
    sample_bytes: ByteCount = 100_000_000
    """Train on a random sample of at most this many bytes."""
    sample_seed: Seed = 0
    """Seed of that sample."""
    num_threads: Threads = 0
    """Training threads; 0: one per core."""


def build(workspace: Workspace, life: Any, stage: str) -> dict[str, Any]:
    """`run` with the stage's section."""
    return run(workspace, getattr(life, stage))


def run(workspace: Workspace, config: TokenizerConfig) -> dict[str, Any]:
    """Train, save and measure, on process 0; the result records the sample's size and seed."""
    if jax.process_index():
        return {}
    target, cache = workspace.stage_dir("tokenizer") / "tokenizer", workspace.run_dir / "cache"
    if config.init_from:
        folder = epath.Path(config.init_from).expanduser()
        inside = folder / "tokenizer"
        tokenizer = load_tokenizer(inside if inside.exists() else folder)
        tokenizer.save(target)
        return {"vocab_size": tokenizer.vocab_size, "init_from": config.init_from}
    texts, corpus_bytes = sample_texts(
        load_texts(config.data, "train", cache), config.sample_bytes, config.sample_seed
    )
    sample = {"sample_bytes": sum(len(t.encode()) for t in texts), "sample_documents": len(texts)}
    sample |= {"sample_seed": config.sample_seed, "corpus_bytes": corpus_bytes}
    console.print(
        f"tokenizer: {len(texts):,} of the texts ({sample['sample_bytes']:,} of {corpus_bytes:,} bytes)"
    )
    tokenizer = train(
        iter(texts),
        vocab_size=config.vocab_size,
        model_type=config.model_type,
        character_coverage=config.character_coverage,
        num_threads=config.num_threads or os.cpu_count() or 1,
    )
    tokenizer.save(target, {"model_type": config.model_type, **sample})
    measured = compression(tokenizer, load_texts(config.data, "held_out", cache))
    print_compression(measured)
    return {
        "vocab_size": tokenizer.vocab_size,
        "model_type": config.model_type,
        **sample,
        **measured,
    }


def sample_texts(texts: Iterator[str], max_bytes: int, seed: int) -> tuple[list[str], int]:
    """(a uniform sample of at most max_bytes, bytes of the whole corpus); memory stays near max_bytes.

    Every text gets a random number, and those below a falling threshold stay: the same sample in one pass as by
    sorting all of them. The sample keeps the corpus's order.
    """
    draw, threshold = random.Random(seed), 1.0
    kept: list[tuple[float, str, int]] = []
    total = kept_bytes = 0
    for text in texts:
        size = len(text.encode("utf-8", "surrogatepass"))
        total += size
        if (number := draw.random()) < threshold:
            kept.append((number, text, size))
            kept_bytes += size
        while kept_bytes > max_bytes and len(kept) > 1:
            threshold *= 0.9
            kept = [item for item in kept if item[0] < threshold] or [min(kept)]
            kept_bytes = sum(item[2] for item in kept)
    return [text for _, text, _ in kept], total


def print_compression(measured: dict[str, float | None]) -> None:
    table = Table("held-out text", "measured", "rule of thumb", title="tokenizer: compression")
    for name, value in measured.items():
        thumb = f"{RULE_OF_THUMB:,}" if name.startswith("tokens_per") else ""
        table.add_row(
            name.replace("_", " "), "no such text" if value is None else f"{value:,.2f}", thumb
        )
    console.print(table)
