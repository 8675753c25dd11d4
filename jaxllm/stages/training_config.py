"""The config fields and checks that the stages share which train on examples: pretrain, sft, reward and dpo."""

import dataclasses

import jax

from jaxllm import train
from jaxllm.config import require
from jaxllm.config.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from jaxllm.data.sources import DataConfig
from jaxllm.models.lora import LoRAConfig
from jaxllm.optim import OptimConfig
from jaxllm.runtime.checkpoint import CheckpointConfig
from jaxllm.sharding import check_batch


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Data, batches, schedule and checkpoints of a training stage."""

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
        require(
            self.batch_size % self.num_micro == 0,
            f"num_micro: {self.num_micro} does not divide batch_size {self.batch_size}",
        )
        require(
            bool(self.num_steps or self.num_epochs),
            "num_steps: must be positive, or 0 with num_epochs above 0",
        )

    def check_batch(self, mesh: jax.sharding.Mesh, stage: str) -> None:
        """Raise InputError if the devices cannot share the examples of a microbatch equally."""
        fields = f"{stage}.batch_size / {stage}.num_micro"
        check_batch(mesh, self.batch_size // self.num_micro, fields)

    def count_steps(self, num_examples: float, stage: str) -> int:
        """The number of updates, given the number of training examples in one epoch.

        Raises InputError if they are more than devices can count.
        """
        per_epoch = num_examples / self.batch_size
        return train.count_steps(self.num_steps, self.num_epochs, per_epoch, f"{stage}.num_epochs")
