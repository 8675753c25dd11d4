"""Settings of what a process needs around training: the mesh, the job's processes, checkpoints, logs.

Like every module with config classes, it does not import JAX: `--help` and errors in configs need it at once.
"""

import dataclasses
from typing import Literal

from jaxllm.config import require
from jaxllm.config.ranges import AxisSize, NonNegativeInt, PositiveInt, PositiveSeconds, Seconds


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices. One axis may be -1: the remaining devices."""

    data: AxisSize = -1
    """Replicas of the parameters, each with its share of the batch."""
    pipeline: AxisSize = 1
    """Pipeline stages, each with its share of the layers; rows pass through them in microbatches."""
    fsdp: AxisSize = 1
    """Shards of parameters and optimizer state, each with its share of the batch (ZeRO-3)."""
    context: AxisSize = 1
    """Shards of the sequence dimension."""
    expert: AxisSize = 1
    """Shards of the experts, each with its share of the batch."""
    tensor: AxisSize = 1
    """Shards of heads, MLP and vocabulary."""

    def __post_init__(self) -> None:
        # Of this class alone: a role's or a stage's mesh has its name as well.
        sizes = [getattr(self, field.name) for field in dataclasses.fields(MeshConfig)]
        require(sizes.count(-1) <= 1, "data: only one axis can be -1")


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """The processes of a job, and when one of them gives up."""

    coordinator: str = ""
    """host:port of process 0, which listens on this address only. Empty: JAX_COORDINATOR_ADDRESS, or what the cluster says."""
    join_seconds: PositiveSeconds = 300
    """How long to wait at the start for all processes of the job."""
    heartbeat_seconds: PositiveSeconds = 60
    """A process that sends no heartbeat for so long is lost: the others exit with an error."""
    lease_seconds: PositiveSeconds = 60
    """With a run directory in a store: how long another run waits for one that was killed, before it takes its place."""
    watchdog_seconds: Seconds = 1800
    """If a training loop makes no step for so long, dump every thread's stack and exit with status 1; 0: never."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep, and what to do about damage."""

    save_every: PositiveInt = 200
    """Steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_best: NonNegativeInt = 1
    """Number of checkpoints with the best held-out metric to keep in addition."""
    keep_every: NonNegativeInt = 0
    """Steps between checkpoints that are kept forever; 0: none."""
    damaged: Literal["fall_back", "stop"] = "fall_back"
    """If the newest checkpoint is damaged: resume from the newest good one, with a warning, or stop."""
    rewind_after: NonNegativeInt = 20
    """Skipped updates in a row (not finite, or a spike) after which training rewinds to a checkpoint; 0: never."""
    rewind_skip: NonNegativeInt = 100
    """Batches to skip beyond the last bad one after a rewind (PaLM: 200 to 500)."""
    max_rewinds: NonNegativeInt = 3
    """Number of rewinds after which training fails instead of rewinding again."""
    compare_replicas_every: NonNegativeInt = 0
    """Steps between comparisons of replicated arrays across devices, to find silent data corruption; 0: never."""


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go in addition to the progress line and metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files into STAGE/tensorboard."""
    wandb_project: str = ""
    """Weights & Biases project; empty: off. The same as `trackers: [wandb]` with this project."""
    trackers: tuple[Literal["wandb", "swanlab", "mlflow", "trackio"], ...] = ()
    """Experiment trackers that get the metrics as well, each an extra of the same name."""
    project: str = "jaxllm"
    """The trackers' project; a stage appears in it as RUN-STAGE."""
    profile_steps: tuple[PositiveInt, ...] = ()
    """[first, last]: record what the devices and the host do in these steps into STAGE/profile."""

    def __post_init__(self) -> None:
        steps = self.profile_steps
        ordered = len(steps) == 2 and steps[0] <= steps[1]
        require(not steps or ordered, "profile_steps: must be [first, last], as [100, 103]")
