"""The config of one model's life: common settings, and a section for every stage in the table."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from etils import epath

from jaxllm import stages
from jaxllm.config import require
from jaxllm.config.ranges import Seed, Threads
from jaxllm.metrics import LoggingConfig
from jaxllm.models.config import ModelConfig
from jaxllm.runtime.processes import ProcessConfig
from jaxllm.sharding import MeshConfig
from jaxllm.stages import Stage


@dataclasses.dataclass(frozen=True)
class StageMesh(MeshConfig):
    """Another layout of the same devices for one stage."""

    stage: str = ""
    """The stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.stage in stages.names(),
            f"stage: {self.stage!r} is unknown; known: {', '.join(stages.names())}",
        )


@dataclasses.dataclass(frozen=True)
class Life:
    """One model's life."""

    name: str = "run"
    """Name of the run; its directory is runs/NAME."""
    run_dir: str = ""
    """Run directory, in place of runs/NAME."""
    seed: Seed = 0
    """Seed of every random choice."""
    stages: tuple[str, ...] = ()
    """Stages of `jaxllm run`, in order; without any all but dpo, rloo and grpo, which may replace or join ppo."""
    cpu_devices: Threads = 0
    """Virtual devices on a CPU; 0: one per core, the fastest."""
    distributed: bool = False
    """Join the other processes of the job (jax.distributed): pod slices, Slurm, several processes."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same bits every time (slower); a CPU and a TPU do anyway."""
    allow_change: tuple[str, ...] = ()
    """Names (pretrain.num_steps, data, code, ...) of what may differ from what a stage was begun with."""
    process: ProcessConfig = ProcessConfig()
    """The processes of a job, and when one of them gives up."""
    mesh: MeshConfig = MeshConfig()
    """How devices are laid out."""
    meshes: tuple[StageMesh, ...] = ()
    """Overrides of the mesh for single stages."""
    model: ModelConfig = ModelConfig()
    """The decoder."""
    logging: LoggingConfig = LoggingConfig()
    """Where metrics go."""

    def __post_init__(self) -> None:
        require(bool(self.stages), "stages: is empty; name at least one, or leave the field out")
        for stage in self.stages:
            stages.named(stage)
        require(bool(self.name), "name: must not be empty")
        overridden = [each.stage for each in self.meshes]
        require(len({*overridden}) == len(overridden), "meshes: a stage can have one layout only")

    def mesh_of(self, stage: str) -> MeshConfig:
        """How devices are laid out in a stage."""
        return next((each for each in self.meshes if each.stage == stage), self.mesh)


def config_class(table: Sequence[Stage]) -> type:
    """`Life` with a section for every row of a table of stages."""
    default = tuple(stage.name for stage in table if stage.by_default)
    common = [("stages", tuple[str, ...], dataclasses.field(default=default))]
    made = dataclasses.make_dataclass(
        "Config", [*common, *map(_section, table)], bases=(Life,), frozen=True, module=__name__
    )
    made.__doc__ = Life.__doc__
    return made


def _section(stage: Stage) -> tuple[str, Any, Any]:
    """(name, type with its help, field with its default) of a stage's section."""
    given = stages.load(stage.section)
    kind, default = (given, given()) if isinstance(given, type) else (type(given), given)
    help_line = tyro.conf.arg(help=stage.section_help)
    return stage.name, Annotated[kind, help_line], dataclasses.field(default=default)


if TYPE_CHECKING:

    class Config(Life):
        """`Life` with the sections of the table, which a type checker cannot see."""

        def __getattr__(self, name: str) -> Any: ...

else:
    Config = config_class(stages.TABLE)


def with_defaults(config: Config) -> Config:
    """Fill in the data that a section takes from another one."""
    fill = dataclasses.replace
    prompts = config.sample.data
    if not config.tokenizer.data.sources:
        config = fill(config, tokenizer=fill(config.tokenizer, data=config.pretrain.data))
    for stage in ("rloo", "grpo", "ppo"):
        section = getattr(config, stage)
        ptx = (
            section.ptx
            if section.ptx.data.sources
            else fill(section.ptx, data=config.pretrain.data)
        )
        config = fill(
            config,
            **{
                stage: fill(
                    section, data=section.data if section.data.sources else prompts, ptx=ptx
                )
            },
        )
    if not config.evaluate.prompts.sources:
        config = fill(config, evaluate=fill(config.evaluate, prompts=prompts))
    return config


def run_directory(config: Config) -> epath.Path:
    """Where a run keeps everything: `run_dir`, by default runs/NAME."""
    return epath.Path(config.run_dir or f"runs/{config.name}").expanduser()
