"""The sections of the stages in the config, in the order of a model's life; those of rl/ are in rl/config.py."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le, Lt
from pydantic import BeforeValidator

from jaxllm.config import require
from jaxllm.config.functions import FunctionName
from jaxllm.config.ranges import (
    FINITE,
    NOT_BOOL,
    ByteCount,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveProportion,
    Proportion,
    ProportionBelowOne,
    Seed,
    Threads,
)
from jaxllm.data.config import DataConfig
from jaxllm.engine.config import EngineConfig, SamplingConfig
from jaxllm.evaluation.config import ScoringConfig
from jaxllm.models.parts_config import LoRAConfig
from jaxllm.optim_config import OptimConfig
from jaxllm.runtime.config import CheckpointConfig
from jaxllm.stages import names


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A SentencePiece vocabulary with byte fallback: every Unicode string survives encoding and decoding."""

    init_from: str = ""
    """Stage directory, or folder of a downloaded model, whose tokenizer is taken; nothing is trained then."""
    data: DataConfig = DataConfig()
    """Text to train on; without sources that of pretrain."""
    vocab_size: Annotated[int, NOT_BOOL, Ge(270), Le(262_144)] = 4096
    """Tokens, including the special ones and the 256 bytes."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """Byte-pair encoding or a unigram language model."""
    character_coverage: Annotated[float, NOT_BOOL, FINITE, Ge(0.9), Le(1.0)] = 0.9995
    """Share of the characters that get their own token; the rest is spelled in bytes."""
    sample_bytes: ByteCount = 100_000_000
    """Train on a random sample of at most this many bytes."""
    sample_seed: Seed = 0
    """Seed of that sample."""
    num_threads: Threads = 0
    """Training threads; 0: one per core."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Data, batches, schedule and checkpoints of a training stage."""

    # A stage declares a field again only where its default differs.
    data: DataConfig = DataConfig()
    """Training data, a share of it held out; reward and dpo without sources: the rankings of the rank stage."""
    init_from: str = ""
    """Stage directory to start from; empty: pretrain for sft, sft for reward and dpo, fresh parameters for pretrain."""
    num_steps: NonNegativeInt = 0
    """Optimizer updates; 0: as many as num_epochs takes."""
    num_epochs: NonNegativeFloat = 1.0
    """Passes over the data, if num_steps is 0; on rankings more than one soon overfits."""
    batch_size: PositiveInt = 16
    """Examples per update, over all devices and microbatches: rows, or prompts with all their responses."""
    num_micro: PositiveInt = 1
    """Microbatches per update (gradient accumulation)."""
    length: NonNegativeInt = 0
    """Tokens per row, or of the longest prompt and response; 0: model.max_length."""
    log_every: PositiveInt = 10
    """Steps per logged interval."""
    eval_every: PositiveInt = 200
    """Steps between evaluations on the held-out split."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    lora: LoRAConfig = LoRAConfig()
    """Train adapters on the initial model, instead of all parameters."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""

    def __post_init__(self) -> None:
        # What does not need the devices is checked here, so that the error names the line of the config file.
        divides = self.batch_size % self.num_micro == 0
        require(
            divides, f"num_micro: {self.num_micro} does not divide batch_size {self.batch_size}"
        )
        some = self.num_steps > 0 or self.num_epochs > 0
        require(some, "num_steps: must be positive, or 0 with num_epochs above 0")


@dataclasses.dataclass(frozen=True)
class KeptTeacher:
    """A model that looks at the training data once; what it finds likely at every target is kept and learned from."""

    stage_dir: str = ""
    """Stage directory of the teacher, whose tokenizer must be the student's; empty: none."""
    # Chosen: what is kept of a target is then 192 or 256 bytes.
    top_k: PositiveInt = 32
    """Tokens kept of every target, the likeliest; all others count together as one."""
    weight: PositiveProportion = 1.0
    """Share of the divergence from the teacher in the loss; the rest is the usual loss."""


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig(TrainingConfig):
    """Training on next tokens."""

    teacher: KeptTeacher = KeptTeacher()
    """Learn a teacher's distribution over each target."""
    z_loss_coef: NonNegativeFloat = 0.0
    """Coefficient of logsumexp^2 (PaLM)."""
    mtp_coef: NonNegativeFloat = 0.3
    """Weight of the losses of model.mtp_modules, together (DeepSeek-V3, eq. 25)."""
    eval_batches: PositiveInt = 16
    """Batches per evaluation during training; the final one uses the whole held-out split."""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Which prompts, and how many responses to each."""

    data: DataConfig = DataConfig()
    """Prompts."""
    init_from: str = ""
    """Stage directory of the model to sample from; empty: sft."""
    num_prompts: PositiveInt = 1000
    """Prompts of the training split to sample; fewer if there are fewer."""
    num_held_out: NonNegativeInt = 200
    """Prompts of the held-out split, for measuring the reward model."""
    num_responses: PositiveInt = 4
    """Responses sampled for each prompt (K)."""
    batch_size: PositiveInt = 32
    """Prompts per batch."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are sampled."""
    engine: EngineConfig = EngineConfig()
    """How many responses are decoded together, and with how much memory."""

    def __post_init__(self) -> None:
        require(
            self.num_responses >= 2, "num_responses: at least 2 responses are needed to rank them"
        )


@dataclasses.dataclass(frozen=True)
class RankConfig:
    """Who ranks the sampled responses."""

    annotator: FunctionName = "person"
    """person (asks in the terminal), browser (a page for one or more people; `jaxllm rank CONFIG --browser` also opens
    it), file:PATH (a rankings JSONL), or module:function (SIMULATED: scores responses)."""
    noise: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise added to the scores of a simulated annotator."""
    tie_margin: NonNegativeFloat = 0.0
    """Scores of a simulated annotator no further apart than this are a tie."""
    annotator_name: str = ""
    """Recorded with each ranking; empty: person, or the simulated annotator's module:function. In a browser, people
    give their names."""
    max_prompts: NonNegativeInt = 0
    """Rank only the first so many prompts; 0: all."""
    held_out: ProportionBelowOne = 0.1
    """Share of the prompts kept for evaluation, if the lines of a file name no split."""
    compare_with: FunctionName = ""
    """module:function that scores responses: the result says how often people order two of them as it does; empty: none."""
    overlap: Proportion = 0.0
    """Share of the prompts that several people rank, to measure how far they agree."""
    overlap_annotators: Annotated[int, NOT_BOOL, Ge(2), Le(100)] = 2
    """How many people rank each of those."""
    host: str = "127.0.0.1"
    """browser: address to listen on; 0.0.0.0 for people on other machines, who need the key in JAXLLM_API_KEY."""
    port: Annotated[int, NOT_BOOL, Ge(0), Le(65535)] = 8000
    """browser: port to listen on; 0: a free one."""
    guidelines: str = ""
    """browser: what people should look for, shown on the page as it is."""
    open_browser: bool = False
    """browser: open the page on this machine."""

    def __post_init__(self) -> None:
        # The form only: the function is imported when it is called, perhaps on another machine.
        people = self.annotator in ("person", "browser")
        known = people or re.fullmatch(r"file:.+|[\w.]+:\w+", self.annotator)
        require(
            bool(known),
            f"annotator: person, browser, file:PATH or module:function, not {self.annotator!r}",
        )
        require(
            people or not self.overlap,
            "overlap: only people share prompts (annotator: person or browser); remove it",
        )


def _current_value(value: Any) -> Any:
    return "center" if value == "centre" else value  # as configs spelled it once


@dataclasses.dataclass(frozen=True)
class PreferenceConfig(TrainingConfig):
    """Training on rankings. One prompt with all its responses is one example (Ouyang et al. 2022, section 3.5)."""

    RENAMED: ClassVar[Mapping[str, str]] = {"normalise": "normalize"}

    margin_coef: NonNegativeFloat = 0.0
    """pairwise, dpo: the better score must lead by this times the difference in given scores, or in rank."""
    label_smoothing: Annotated[float, NOT_BOOL, FINITE, Ge(0), Lt(0.5)] = 0.0
    """pairwise, dpo: the probability that a label is wrong."""
    weighting: Literal["prompt", "pair"] = "prompt"
    """What counts once: a prompt, however many responses it has, or each of its pairs (kto: of its responses)."""
    beta: PositiveFloat = 0.1
    """dpo: the implicit reward is beta * log(policy / reference); also of plackett_luce, ipo and kto."""
    normalize: Annotated[Literal["center", "unit", "none"], BeforeValidator(_current_value)] = (
        "center"
    )
    """reward: scores of the training responses are shifted to mean 0, also scaled to variance 1, or left unchanged."""
    log_every: PositiveInt = 5
    """Steps per logged interval."""
    eval_every: PositiveInt = 20
    """Steps between evaluations on held-out rankings."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-4, weight_decay=0.0)
    """Optimizer and schedule."""


@dataclasses.dataclass(frozen=True)
class RewardConfig(PreferenceConfig):
    """The reward model."""

    loss: Literal["pairwise", "plackett_luce", "regression"] = "pairwise"
    """All pairs (Bradley-Terry), the whole order (Plackett-Luce), or squared error to the records' own scores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.loss == "pairwise" or not (self.margin_coef or self.label_smoothing),
            "loss: margin_coef and label_smoothing belong to the pairwise loss",
        )


# The losses of dpo that read a field. With another loss it must keep its default.
_READ_BY = {
    "beta": ("dpo", "plackett_luce", "ipo", "kto"),
    "margin_coef": ("dpo",),
    "label_smoothing": ("dpo",),
    "kto_desirable_weight": ("kto",),
    "kto_undesirable_weight": ("kto",),
    "orpo_coef": ("orpo",),
    "simpo_beta": ("simpo",),
    "simpo_gamma": ("simpo",),
}


def _current_loss(value: Any) -> Any:
    return "dpo" if value == "pairwise" else value  # as configs named it when there was one other


@dataclasses.dataclass(frozen=True)
class DPOConfig(PreferenceConfig):
    """A policy that learns from the rankings directly; the objectives are in jaxllm/preference_losses.py."""

    loss: Annotated[
        Literal["dpo", "plackett_luce", "ipo", "kto", "orpo", "simpo"],
        BeforeValidator(_current_loss),
    ] = "dpo"
    """dpo, ipo and simpo compare pairs, plackett_luce the whole order; kto judges each response by itself, by its label if
    the record has labels; orpo compares pairs and imitates the better one. orpo and simpo have no reference."""
    # Ethayarajh et al. 2024, section 4: both are 1 unless data are unbalanced.
    kto_desirable_weight: PositiveFloat = 1.0
    """kto: weight of a desirable response, labeled so or better than more of the prompt's responses than are better
    (lambda_D); with unbalanced data such that, summed over responses, desirable ones weigh 1 to 1.5 times as much."""
    kto_undesirable_weight: PositiveFloat = 1.0
    """kto: weight of an undesirable response (lambda_U)."""
    # Hong et al. 2024: 0.1 for Mistral (7B).
    orpo_coef: PositiveFloat = 0.1
    """orpo: weight of the odds ratio beside imitation (lambda)."""
    # Meng et al. 2024, Llama 3 Base: beta 2, and a margin of half of it.
    simpo_beta: PositiveFloat = 2.0
    """simpo: the implicit reward is this times the mean log-probability of a response's tokens."""
    simpo_gamma: NonNegativeFloat = 1.0
    """simpo: by how much the better reward must lead."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-5, weight_decay=0.0)
    """Optimizer and schedule."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            losses = _READ_BY.get(field.name, (self.loss,))
            require(
                self.loss in losses or getattr(self, field.name) == field.default,
                f"{field.name}: is read by loss {' or '.join(losses)}, not by {self.loss}; remove it",
            )
        fewest = self.smallest_microbatch
        require(
            self.batch_size // self.num_micro >= fewest,
            f"batch_size: {self.loss} needs at least {fewest} prompts in a microbatch (batch_size / num_micro)",
        )

    @property
    def smallest_microbatch(self) -> int:
        """Prompts that a microbatch has at least."""
        # KTO pairs prompts with each other's responses.
        return 2 if self.loss == "kto" else 1


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to measure on held-out data, and on which stages' models."""

    stages: tuple[str, ...] = names("policy")
    """Stages whose models are measured; stages that have not run are left out."""
    accuracy: DataConfig = DataConfig()
    """Conversations whose last reply is a label, answered greedily; without sources accuracy is not measured."""
    max_accuracy_examples: PositiveInt = 1000
    """At most this many conversations of `accuracy`."""
    prompts: DataConfig = DataConfig()
    """Prompts for open answers; without sources those of the sample stage."""
    num_prompts: PositiveInt = 200
    """At most this many held-out prompts."""
    annotator: FunctionName = ""
    """module:function scoring (prompt, response): a SIMULATED annotator; empty: none."""
    sampling: SamplingConfig = SamplingConfig()
    """How open answers are sampled."""
    label_tokens: PositiveInt = 8
    """Longest label in tokens."""
    num_shown: NonNegativeInt = 8
    """Prompts whose answers are shown side by side."""
    batch_size: PositiveInt = 64
    """Prompts per batch."""
    contamination_n: NonNegativeInt = 13
    """Length in tokens of the n-grams of the evaluation sets that are searched for in the training data; 0: no search."""
    compare_xz: bool = True
    """Also measure bits per byte of xz -9 on the held-out documents, after the training documents."""
    tasks: tuple[str, ...] = ()
    """Task files of multiple choice, perplexity or generation, as for `jaxllm score`."""
    scoring: ScoringConfig = ScoringConfig()
    """How the questions of `tasks` are asked."""
