"""What the stages that train on examples (pretrain, sft, reward, dpo) make of their common settings."""

from collections.abc import Callable
from typing import Any

import jax

from jaxllm import sharding, train
from jaxllm.models import lora
from jaxllm.optim import make_optimizer
from jaxllm.stages.config import TrainingConfig


def check_batch(config: TrainingConfig, mesh: jax.sharding.Mesh, stage: str) -> None:
    """Raise InputError if the devices cannot share the examples of a microbatch equally."""
    fields = f"{stage}.batch_size / {stage}.num_micro"
    sharding.check_batch(mesh, config.batch_size // config.num_micro, fields)


def count_steps(config: TrainingConfig, num_examples: float, stage: str) -> int:
    """The number of updates, given the number of training examples in one epoch.

    Raises InputError if they are more than devices can count.
    """
    # A fraction: the last batch of an epoch is completed from the next one.
    per_epoch = num_examples / config.batch_size
    return train.count_steps(config.num_steps, config.num_epochs, per_epoch, f"{stage}.num_epochs")


def make_step(
    config: TrainingConfig,
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
      config: of the stage.
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
    shapes, axes = lora.trained(config.lora, shapes, axes)
    tx = make_optimizer(config.optim, num_steps, axes, bias_rate)
    layout = train.state_layout(mesh, shapes, axes, tx)
    step = train.make_step(
        loss,
        tx,
        num_micro=config.num_micro,
        seed=seed,
        state_shardings=layout.shardings,
        spike_factor=config.optim.spike_factor,
    )
    return step, layout
