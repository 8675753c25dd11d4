"""The config of one model's life: common settings, and a section for every stage in the table."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxllm import stages
from jaxllm.config import require
from jaxllm.config.ranges import Seed, Threads
from jaxllm.models.config import ModelConfig
from jaxllm.models.parts_config import ScalingConfig
from jaxllm.runtime.config import LoggingConfig, MeshConfig, ProcessConfig
from jaxllm.stages import Stage, dial


@dataclasses.dataclass(frozen=True)
class StageMesh(MeshConfig):
    """The mesh of one stage, if it differs from that of the others."""

    stage: str = ""
    """Name of the stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = stages.names()
        require(self.stage in known, f"stage: {self.stage!r} is unknown; known: {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class Life:
    """The settings that all stages share."""

    name: str = "run"
    """Name of the run; its directory is runs/NAME."""
    run_dir: str = ""
    """Run directory, if not runs/NAME: a folder, gs://BUCKET/PATH or s3://BUCKET/PATH."""
    scratch: str = ""
    """With a run directory in a store: the folder of this machine below which the run works. By default JAXLLM_SCRATCH,
    or the system's temporary folder."""
    seed: Seed = 0
    """Seed of all random choices."""
    stages: tuple[str, ...] = ()
    """Stages of `jaxllm run`, in order. By default all but dpo, rloo, grpo and distill, which can replace or follow ppo."""
    cpu_devices: Threads = 0
    """Virtual devices on a CPU; 0: as many as the mesh asks for, or else one, which uses all cores and is fastest."""
    distributed: bool = False
    """Join the other processes of the job (jax.distributed): pod slices, Slurm, several processes."""
    deterministic: bool = False
    """On a GPU, use only kernels whose results are bit-identical every time (slower); CPUs and TPUs always do."""
    allow_change: tuple[str, ...] = ()
    """Names (pretrain.num_steps, data, code, ...) of what may have changed since a stage was started."""
    process: ProcessConfig = ProcessConfig()
    """The processes of a job, and when one of them gives up."""
    mesh: MeshConfig = MeshConfig()
    """How the devices form a mesh."""
    meshes: tuple[StageMesh, ...] = ()
    """Per-stage overrides of the mesh."""
    model: ModelConfig = ModelConfig()
    """The decoder."""
    logging: LoggingConfig = LoggingConfig()
    """Where metrics are written."""

    # Of several fields, or of values that no type describes; ranges are in the types.
    def __post_init__(self) -> None:
        require(bool(self.stages), "stages: is empty; name at least one, or leave the field out")
        for stage in self.stages:
            stages.named(stage)  # raises ValueError for an unknown one
        require(bool(self.name), "name: must not be empty")
        overridden = [override.stage for override in self.meshes]
        require(
            len(set(overridden)) == len(overridden), "meshes: a stage can have only one override"
        )

        # Sections of stages are fields of the class that `config_class` makes.
        scaled = self.model.scaling != ScalingConfig()
        for stage in stages.names():
            for name in ("optim", "actor", "critic"):
                optim = getattr(getattr(self, stage, None), name, None)
                if optim is not None:
                    optim.check_scaling(f"{stage}.{name}", scaled)

    @classmethod
    def expand(cls, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds the fields of pretrain that model.dial sets, where `tree` does not set them."""
        has_pretrain = any(field.name == "pretrain" for field in dataclasses.fields(cls))
        model = tree.get("model")
        # Before any field is checked: a section may be anything.
        is_set = isinstance(model, Mapping) and bool(model.get("dial"))
        return dial.fill(tree) if has_pretrain and is_set else tree

    def mesh_of(self, stage: str) -> MeshConfig:
        """Returns the mesh of a stage: its override, or the common one."""
        for override in self.meshes:
            if override.stage == stage:
                return override
        return self.mesh


def config_class(table: Sequence[Stage]) -> type:
    """Returns `Life` with a section for every row of a table of stages.

    The sections are fields of a class that is made here, so that a new stage needs a row in the table
    and nothing else:

        Config: name, run_dir, ..., model, logging | tokenizer, pretrain, sft, ..., evaluate
                             from Life             |        one for each row
    """
    # Declared again below, with the default that the table gives.
    default = tuple(stage.name for stage in table if stage.by_default)
    fields: list[Any] = [("stages", tuple[str, ...], dataclasses.field(default=default))]
    fields += map(_section, table)
    config = dataclasses.make_dataclass(
        "Config", fields, bases=(Life,), frozen=True, module=__name__
    )
    config.__doc__ = "The settings of one model's life."
    return config


def _section(stage: Stage) -> tuple[str, Any, Any]:
    """Returns (name, type with its help text, field with its default) of a stage's section."""
    # The table names a class, or an instance whose values are the defaults, as of rloo and grpo.
    section = stages.load(stage.section)
    default = section() if isinstance(section, type) else section
    help_text = tyro.conf.arg(help=stage.section_help)
    return stage.name, Annotated[type(default), help_text], dataclasses.field(default=default)


if TYPE_CHECKING:
    from etils import epath

    class Config(Life):
        """`Life` with the sections of the table, which a type checker cannot see."""

        def __getattr__(self, name: str) -> Any: ...

else:
    Config = config_class(stages.TABLE)


def with_defaults(config: Config) -> Config:
    """Fills in the data that a section takes from another section if it names none itself.

    Data of the tokenizer: that of pretrain. Prompts of PPO and its relatives, and of evaluate: those of
    sample. Pretraining mix of PPO (ptx, InstructGPT): the data of pretrain.
    """
    documents = config.pretrain.data
    prompts = config.sample.data
    filled: dict[str, Any] = {}
    if not config.tokenizer.data.sources:
        filled["tokenizer"] = dataclasses.replace(config.tokenizer, data=documents)
    for stage in ("rloo", "grpo", "ppo", "distill"):
        section = getattr(config, stage)
        if not section.ptx.data.sources:
            ptx = dataclasses.replace(section.ptx, data=documents)
            section = dataclasses.replace(section, ptx=ptx)
        if not section.data.sources:
            section = dataclasses.replace(section, data=prompts)
        filled[stage] = section
    if not config.evaluate.prompts.sources:
        filled["evaluate"] = dataclasses.replace(config.evaluate, prompts=prompts)
    return dataclasses.replace(config, **filled)


def run_directory(config: Config) -> "epath.Path":
    """Where a run keeps everything: `run_dir`, by default runs/NAME."""
    from etils import epath  # not above: its import takes a third of `--help`'s time

    return epath.Path(config.run_dir or f"runs/{config.name}").expanduser()
