"""Data: sources -> examples -> tokens -> rows -> batches. Each step is a pure function of the one before."""

from jaxllm.data.format import Example, examples, is_held_out, load_texts, shuffled
from jaxllm.data.loader import (
    PromptExample,
    RankedExample,
    Rows,
    epoch_batches,
    load_prompts,
    load_ranked,
    load_rows,
    make_batch_at,
    make_prompt_batch_at,
    make_ranked_batch_at,
    ranked_epoch,
)
from jaxllm.data.sources import DataConfig, Record, Source, read_records

__all__ = [
    "DataConfig",
    "Example",
    "PromptExample",
    "RankedExample",
    "Record",
    "Rows",
    "Source",
    "epoch_batches",
    "examples",
    "is_held_out",
    "load_prompts",
    "load_ranked",
    "load_rows",
    "load_texts",
    "make_batch_at",
    "make_prompt_batch_at",
    "make_ranked_batch_at",
    "ranked_epoch",
    "read_records",
    "shuffled",
]
