"""The tokenizer stage: train SentencePiece on the training split, measure compression on the held-out split."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from rich.table import Table

from jaxllm.data.store import load_texts
from jaxllm.runtime.console import console
from jaxllm.runtime.hardware import num_cores
from jaxllm.runtime.store.working import local_folder
from jaxllm.stages.config import TokenizerConfig
from jaxllm.tokenizers.published import load_tokenizer
from jaxllm.tokenizers.trained import RULE_OF_THUMB, compression, train
from jaxllm.workspace import Workspace


def run(workspace: Workspace, life: Any, stage: str) -> dict[str, Any]:
    """Train or copy the tokenizer, on process 0; the result holds the sample's size and seed, and the compression."""
    config: TokenizerConfig = getattr(life, stage)
    # SentencePiece knows no devices; the others read the files of process 0.
    if jax.process_index():
        return {}
    target = workspace.stage_dir(stage) / "tokenizer"
    if config.init_from:
        return _copy(config.init_from, target)
    return _train(config, target, workspace.run_dir / "cache")


def _copy(init_from: str, target: epath.Path) -> dict[str, Any]:
    """Save the tokenizer of a stage directory, which is in a subfolder, or of a downloaded model, which is not."""
    # Nothing is trained or measured: the text may not even be there.
    folder = local_folder(init_from)
    inside = folder / "tokenizer"
    tokenizer = load_tokenizer(inside if inside.exists() else folder)
    tokenizer.save(target)
    return {"vocab_size": tokenizer.vocab_size, "init_from": init_from}


def _train(config: TokenizerConfig, target: epath.Path, cache: epath.Path) -> dict[str, Any]:
    # A sample, so that time and memory of the training do not grow with the corpus.
    texts, corpus_bytes = sample_texts(
        load_texts(config.data, "train", cache), config.sample_bytes, config.sample_seed
    )
    sample = {
        "sample_bytes": sum(len(text.encode()) for text in texts),
        "sample_documents": len(texts),
        "sample_seed": config.sample_seed,
        "corpus_bytes": corpus_bytes,
    }
    console.print(
        f"tokenizer: {len(texts):,} of the texts ({sample['sample_bytes']:,} of {corpus_bytes:,} bytes)"
    )
    tokenizer = train(
        iter(texts),
        vocab_size=config.vocab_size,
        model_type=config.model_type,
        character_coverage=config.character_coverage,
        num_threads=config.num_threads or num_cores(),
    )
    tokenizer.save(target, {"model_type": config.model_type, **sample})
    # On held-out text, since a vocabulary fits the text that it was trained on best.
    measured = compression(tokenizer, load_texts(config.data, "held_out", cache))
    _print_compression(measured)
    return {
        "vocab_size": tokenizer.vocab_size,
        "model_type": config.model_type,
        **sample,
        **measured,
    }


def sample_texts(texts: Iterator[str], max_bytes: int, seed: int) -> tuple[list[str], int]:
    """(a uniform sample of the texts, of at most max_bytes; bytes of the whole corpus).

    Every text gets a random number, and the texts whose number is below a threshold are kept. The threshold falls
    whenever more than max_bytes are kept, so that one pass with memory for about max_bytes finds the sample that
    sorting all texts by their numbers would. A single text may exceed max_bytes. With room for two texts:

        number  0.42  0.91  0.30  0.85  0.11      the threshold falls to 0.9, 0.81, ..., 0.39
        kept      .     .     x     .     x       in the order of the corpus
    """
    rng = random.Random(seed)
    threshold = 1.0
    kept: list[tuple[float, str, int]] = []  # (number, text, bytes)
    total_bytes = 0
    kept_bytes = 0
    for text in texts:
        size = len(text.encode("utf-8", "surrogatepass"))  # a lone surrogate must not end the run
        total_bytes += size
        number = rng.random()
        if number < threshold:
            kept.append((number, text, size))
            kept_bytes += size
        while kept_bytes > max_bytes and len(kept) > 1:
            threshold *= 0.9
            # At least one text stays: the one that every lower threshold would keep longest.
            kept = [item for item in kept if item[0] < threshold] or [min(kept)]
            kept_bytes = sum(size for _, _, size in kept)
    return [text for _, text, _ in kept], total_bytes


def _print_compression(measured: Mapping[str, float | None]) -> None:
    """Print the measures of `compression`, those in tokens next to the rule of thumb."""
    # The rule of thumb is in tokens per text, so it has a value in those rows only.
    table = Table("held-out text", "measured", "rule of thumb", title="tokenizer: compression")
    for name, value in measured.items():
        number = "no such text" if value is None else f"{value:,.2f}"
        thumb = f"{RULE_OF_THUMB:,}" if name.startswith("tokens_per") else ""
        table.add_row(name.replace("_", " "), number, thumb)
    console.print(table)
