"""Settings of data: sources of text and of rankings, their weights, and the held-out share."""

import dataclasses
import re
from typing import Literal

from jaxllm.config import require
from jaxllm.config.functions import FunctionName
from jaxllm.config.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ProportionBelowOne,
    Threads,
)

Format = Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "array_record"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where records come from, and how a plain text becomes fields, a conversation or a prompt."""

    path: FunctionName = ""
    """File or glob, on this machine (~ is the home folder) or on an object store (gs://, s3://); pkg://PACKAGE/path/in/package;
    or py://module:function."""
    weight: NonNegativeFloat = 0.0
    """Share of the rows in a mixture, relative to the other sources; 0 (then for every source): weight sources by size."""
    epochs: PositiveFloat = 1.0
    """Passes over this source in one pass over the mixture, if sources are weighted by size."""
    format: Format = "auto"
    """Format of the files, compressed (.gz, .zst, .bz2, .xz) or not. auto: by their suffixes, in any case. .jsonl, .ndjson:
    one object per line; .json: a list of objects; .csv, .tsv: a table whose first line names the columns; .parquet;
    .array_record; everything else is text, but JSON or a table under an unknown suffix is refused."""
    record: Literal["line", "paragraph", "file"] = "line"
    """What one record of a plain text file is; paragraphs are separated by blank lines."""
    text_field: str = "text"
    """Field of the records that holds the text, if the files are not plain text."""
    replace: tuple[tuple[str, str], ...] = ()
    """Regular expressions and their replacements, applied to the text in order."""
    match: str = ""
    """Regular expression: texts without a match are dropped, and its named groups become fields for the templates."""
    system: str = ""
    """Template of the system message, with {field} placeholders; {text} is the whole text, and a field that is null is empty."""
    prompt: str = ""
    """Template of the user's message."""
    response: str = ""
    """Template of the assistant's message."""
    exclude: tuple[str, ...] = ()
    """Files whose texts are dropped from this source."""
    min_chars: NonNegativeInt = 1
    """Shorter texts are dropped."""
    max_chars: NonNegativeInt = 0
    """Longer texts are dropped; 0: no limit."""
    max_records: NonNegativeInt = 0
    """Take a sample of this many texts, those with the smallest hashes; 0: take all."""

    def __post_init__(self) -> None:
        # Epochs say how often rows are used when weights follow from sizes; a weight says it directly.
        require(not self.weight or self.epochs == 1, "epochs: must be 1 if a weight is given")
        _check_pattern("match", self.match, "")
        for pattern, replacement in self.replace:
            _check_pattern("replace", pattern, replacement)
        # With `match`, the fields of a template are known before any file is read.
        groups = re.compile(self.match).groupindex
        require(
            "text" not in groups,
            "match: a group cannot be called text, the whole text that decides the split",
        )
        if self.match:
            for name in ("system", "prompt", "response"):
                _check_template(name, getattr(self, name), {"text", *groups})
        require(
            bool(self.prompt or not self.response),
            "prompt: a response template needs a prompt template",
        )


def _check_pattern(field: str, pattern: str, replacement: str) -> None:
    try:
        # Applied once, which refuses references to groups that do not exist.
        re.compile(pattern).sub(replacement, "")
    except (re.error, IndexError) as error:
        raise ValueError(f"{field}: {pattern!r} -> {replacement!r}: {error}") from None


def _check_template(field: str, template: str, known: set[str]) -> None:
    for name in re.findall(r"\{(\w+)\}", template):
        names = ", ".join(sorted(known))
        require(name in known, f"{field}: {{{name}}} is not a group of `match`; known: {names}")


@dataclasses.dataclass(frozen=True)
class Phase:
    """Other weights from some step on."""

    step: PositiveInt = 1
    """The first step that uses these weights."""
    weights: tuple[NonNegativeFloat, ...] = ()
    """One for each source, in their order; 0 leaves a source out."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources, the held-out share, and what happens to examples that do not fit."""

    sources: tuple[Source, ...] = ()
    """Where the records come from."""
    curriculum: tuple[Phase, ...] = ()
    """Changes of the weights during training; each source continues at the row where it was."""
    workers: Threads = 1
    """Threads that prepare batches ahead of the step; 0: none, so that the loop waits for each batch."""
    held_out_fraction: ProportionBelowOne = 0.05
    """Share of the contents that is held out, chosen by their hashes."""
    split_salt: str = ""
    """Another salt gives another split; stages that share texts need the same one."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What to do with a conversation or prompt that is too long (documents are split)."""

    def __post_init__(self) -> None:
        # A weight of 0 would be read as "by size" next to weights that are shares.
        weighted = {source.weight > 0 for source in self.sources}
        require(len(weighted) <= 1, "sources: give every source a weight, or none")
        # From 0, where the weights of the sources themselves apply.
        steps = [0, *(phase.step for phase in self.curriculum)]
        require(steps == sorted(set(steps)), "curriculum: steps must be positive and rise")
        for phase in self.curriculum:
            require(
                len(phase.weights) == len(self.sources) and any(phase.weights),
                f"curriculum: step {phase.step} needs a weight for each of {len(self.sources)} "
                "sources, one above 0",
            )
