"""Settings of scoring on task files, and the options of `jaxllm score`."""

import dataclasses
from pathlib import PurePath
from typing import Annotated, Literal

import tyro

from jaxllm.config.ranges import NonNegativeInt, PositiveInt, Seed
from jaxllm.engine.config import SamplingConfig
from jaxllm.runtime.config import MeshConfig


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """How models are asked the questions of task files."""

    shots: NonNegativeInt = 0
    """This many lines at the head of a file are shown, answered, before each question and not scored; not for perplexity."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Ask in the chat format; auto: every stage but pretrain."""
    delimiter: str = " "
    """Between question and answer if the chat format is not used."""
    batch_size: PositiveInt = 32
    """Rows per batch."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=64, temperature=0.0)
    """How answers are generated; greedily by default."""

    def chats(self, stage: str) -> bool:
        """Whether a stage, given by its name or directory, is asked in the chat format."""
        if self.chat == "auto":
            return PurePath(stage).name != "pretrain"
        return self.chat == "always"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreArgs(ScoringConfig):
    """Score stages' models on task files, side by side."""

    stage_dirs: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STAGE_DIR ...")
    ]
    """Directories of stages that trained a model, for example runs/quickstart/pretrain runs/quickstart/ppo."""
    task: tuple[str, ...]
    """Files in JSONL or another data format, one kind of line in each: multiple choice, perplexity or generation."""
    json: str = ""
    """File for the scores and their provenance."""
    mesh: MeshConfig = MeshConfig()
    """Device mesh."""
    seed: Seed = 0
    """Seed for sampling answers."""
