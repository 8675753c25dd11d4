"""The config fields shared by the stages that train on examples (pretrain, sft, reward, dpo), and what follows from them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxllm import train
from jaxllm.config import require
from jaxllm.config.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from jaxllm.data.sources import DataConfig
from jaxllm.models import lora
from jaxllm.models.lora import LoRAConfig
from jaxllm.optim import OptimConfig, make_optimizer
from jaxllm.runtime.checkpoint import CheckpointConfig
from jaxllm.sharding import check_batch


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

    def check_batch(self, mesh: jax.sharding.Mesh, stage: str) -> None:
        """Raise InputError if the devices cannot share the examples of a microbatch equally."""
        fields = f"{stage}.batch_size / {stage}.num_micro"
        check_batch(mesh, self.batch_size // self.num_micro, fields)

    def count_steps(self, num_examples: float, stage: str) -> int:
        """The number of updates, given the number of training examples in one epoch.

        Raises InputError if they are more than devices can count.
        """
        # A fraction: the last batch of an epoch is completed from the next one.
        per_epoch = num_examples / self.batch_size
        return train.count_steps(self.num_steps, self.num_epochs, per_epoch, f"{stage}.num_epochs")

    def make_step(
        self,
        mesh: jax.sharding.Mesh,
        loss: Callable[..., Any],
        shapes: Any,
        axes: Any,
        *,
        num_steps: int,
        seed: int,
        bias_rate: float = 0.0,
    ) -> tuple[Callable[..., Any], train.StateLayout]:
        """The jitted step of a model, or of its adapters, and the layout of its state.

        Args:
          mesh: real devices, or a planned mesh.
          loss: (params, batch, key, **frozen) -> `losses.Loss`.
          shapes: abstract parameters of the model.
          axes: their logical axes.
          num_steps: length of the learning-rate schedule.
          seed: of the step's randomness.
          bias_rate: of the routers' biases (`make_optimizer`).

        Returns:
          (state, batch, **frozen) -> (state, metrics), and how the state is made and sharded.
        """
        # Optimizer state exists for trained parameters only, which is what makes adapters cheap.
        shapes, axes = lora.trained(self.lora, shapes, axes)
        tx = make_optimizer(self.optim, num_steps, axes, bias_rate)
        layout = train.state_layout(mesh, shapes, axes, tx)
        step = train.make_step(
            loss,
            tx,
            num_micro=self.num_micro,
            seed=seed,
            state_shardings=layout.shardings,
            spike_factor=self.optim.spike_factor,
        )
        return step, layout
