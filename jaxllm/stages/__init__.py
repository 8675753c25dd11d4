"""The table of stages: everything that makes a stage is in its row, and nowhere else.

To add a stage, write a module and add a row. The command line, the config, the run directory, `plan` and the report read
the table; none of them knows a stage by name. Rows name code as "module:name", which is imported when it is needed, so
that the table is cheap: `jaxllm --help` imports no JAX.
"""

import dataclasses
import importlib
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a model's life."""

    name: str
    """Its command, its section in the config and its folder in the run directory."""
    kind: Literal["data", "policy", "reward", "report"]
    """What it produces: data for later stages, a policy to talk to, a reward model, or a report."""
    help: str
    """What the command does, in a line."""
    section: str
    """The class of its config section, or an instance that holds the defaults."""
    run: str
    """(workspace, config, name) -> `train.Training` if the stage trains a model, else its result as a dict."""
    section_help: str
    """What its section of the config is, for `--help`."""
    programs: str = ""
    """What `plan` compiles: (mesh, config, name) -> (programs of an update, {role: state}); empty: not planned."""
    needs: tuple[str, ...] = ()
    """Stages that must be finished first, whatever the config says."""
    also: tuple[str, ...] = ()
    """Other sections of the config that influence its outcome."""
    title: str = ""
    """Name of its model in the report."""
    by_default: bool = True
    """Whether `jaxllm run` includes it if the config does not list stages."""

    @property
    def trains(self) -> bool:
        """Whether it trains a model, in steps and with checkpoints."""
        return self.kind in ("policy", "reward")

    @property
    def sections(self) -> tuple[str, ...]:
        """The parts of the config that decide its outcome. A run in which one of them changed does not resume."""
        return ("seed", *self.also, self.name)


def load(spec: str) -> Any:
    """The object named by "module:name"."""
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)


# In the order of a model's life. Alternatives to ppo come before it: the last finished policy is the one to chat with.
TABLE: tuple[Stage, ...] = (
    Stage(
        name="tokenizer",
        kind="data",
        help="train the tokenizer",
        section="jaxllm.stages.config:TokenizerConfig",
        section_help="Stage 1. Without data it trains on pretrain.data.",
        run="jaxllm.stages.tokenizer:run",
    ),
    Stage(
        name="pretrain",
        kind="policy",
        help="pretrain on documents",
        section="jaxllm.stages.config:LanguageModelConfig",
        section_help="Stage 2.",
        run="jaxllm.stages.language_model:build",
        programs="jaxllm.stages.language_model:plan",
        needs=("tokenizer",),
        also=("model",),
        title="Pre-trained",
    ),
    Stage(
        name="sft",
        kind="policy",
        help="supervised fine-tuning on conversations",
        section="jaxllm.stages.config:LanguageModelConfig",
        section_help="Stage 3.",
        run="jaxllm.stages.language_model:build",
        programs="jaxllm.stages.language_model:plan",
        needs=("tokenizer",),
        also=("model",),
        title="Fine-tuned (SFT)",
    ),
    Stage(
        name="sample",
        kind="data",
        help="sample K responses to each prompt",
        section="jaxllm.stages.config:SampleConfig",
        section_help="Stage 4.",
        run="jaxllm.stages.sample:run",
    ),
    Stage(
        name="rank",
        kind="data",
        help="rank the responses: a person, a file or a simulated annotator",
        section="jaxllm.stages.config:RankConfig",
        section_help="Stage 5.",
        run="jaxllm.stages.rank:run",
    ),
    Stage(
        name="reward",
        kind="reward",
        help="train the reward model on the rankings",
        section="jaxllm.stages.config:RewardConfig",
        section_help="Stage 6.",
        run="jaxllm.stages.preference:build",
        programs="jaxllm.stages.preference:plan",
        needs=("tokenizer",),
    ),
    Stage(
        name="dpo",
        kind="policy",
        help="train a policy directly on the rankings",
        section="jaxllm.stages.config:DPOConfig",
        section_help="Trains a policy from the rankings, without a reward model or sampling: DPO, IPO, KTO, ORPO or SimPO.",
        run="jaxllm.stages.preference:build",
        programs="jaxllm.stages.preference:plan",
        needs=("tokenizer",),
        title="DPO",
        by_default=False,
    ),
    Stage(
        name="rloo",
        kind="policy",
        help="reinforcement learning without a critic: REINFORCE, leave-one-out",
        section="jaxllm.rl.config:RLOO",
        section_help="As ppo, with advantages from a prompt's other responses instead of a critic.",
        run="jaxllm.stages.reinforce:build",
        programs="jaxllm.stages.reinforce:plan",
        needs=("tokenizer",),
        title="RLOO",
        by_default=False,
    ),
    Stage(
        name="grpo",
        kind="policy",
        help="reinforcement learning without a critic: scores normalized in groups",
        section="jaxllm.rl.config:GRPO",
        section_help="As ppo, with scores normalized within a prompt's responses instead of a critic.",
        run="jaxllm.stages.reinforce:build",
        programs="jaxllm.stages.reinforce:plan",
        needs=("tokenizer",),
        title="GRPO",
        by_default=False,
    ),
    Stage(
        name="ppo",
        kind="policy",
        help="reinforcement learning from the reward model",
        section="jaxllm.rl.config:PPOConfig",
        section_help="Stage 7.",
        run="jaxllm.stages.reinforce:build",
        programs="jaxllm.stages.reinforce:plan",
        needs=("tokenizer",),
        title="PPO",
    ),
    Stage(
        name="distill",
        kind="policy",
        help="distillation: learn from teachers on the policy's own responses",
        section="jaxllm.rl.config:DISTILL",
        section_help="As ppo, from the teachers' distributions over each token instead of a reward.",
        run="jaxllm.stages.reinforce:build",
        programs="jaxllm.stages.reinforce:plan",
        needs=("tokenizer",),
        title="Distilled",
        by_default=False,
    ),
    Stage(
        name="evaluate",
        kind="report",
        help="measure the models and write the report",
        section="jaxllm.stages.config:EvaluateConfig",
        section_help="Stage 8.",
        run="jaxllm.stages.evaluate:build",
    ),
)


def names(*kinds: str) -> tuple[str, ...]:
    """The names of the stages of these kinds, of all where none is given."""
    return tuple(stage.name for stage in TABLE if not kinds or stage.kind in kinds)


def named(name: str) -> Stage:
    """The row of a stage. Raises ValueError where the table has none of this name."""
    for stage in TABLE:
        if stage.name == name:
            return stage
    raise ValueError(f"stages: {name!r} is unknown; known: {', '.join(names())}")
