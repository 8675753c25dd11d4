"""The options of `jaxllm plan`."""

import dataclasses
from typing import Annotated

import tyro

from jaxllm.config.ranges import PositiveInt


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """Compile a stage's step for TPUs or GPUs that are not there: whether it fits, and what it costs. Flags with a
    section, such as --model.remat full, override fields of the config."""

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """Config file. It must set model.vocab_size, or a preset."""
    topology: Annotated[str, tyro.conf.arg(metavar="KIND:SHAPE")]
    """Kind and shape of a slice: v5p:4x4x4, v6e:16x16, v5e:16x16, v4:4x4x4, tpu7x:4x4x4. Of GPUs kind and number, in
    nodes of eight, or NODESxGPUS: h100:8, h200:64, a100:4x4, b200:2x8."""
    stage: str = "pretrain"
    """pretrain, sft, reward, dpo, rloo, grpo, ppo or distill."""
    slices: PositiveInt = 1
    """TPU slices joined by the data-center network; the mesh's data axis runs over them."""
    search: bool = False
    """Try meshes, remat policies and batch sizes, and rank those that fit by tokens per second."""
    tries: PositiveInt = 6
    """Candidates of a search that are compiled, the most promising first."""
    exact: bool = False
    """Compile exactly as training would. By default plan compiles at a low optimization level: about twice as fast, and
    memory may be underestimated by up to 8%. Above 85% of a device's memory it compiles again exactly."""
    json: bool = False
    """Print one JSON object instead of tables."""
    leaves: bool = False
    """Show the sharding of every parameter."""
    keep: bool = False
    """Keep the report in the run directory. The stage's result then shows it next to what was measured."""
