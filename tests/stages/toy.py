"""A stage from outside the package, for test_table.py: it learns where a point is, from noisy looks at it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import train
from jaxllm.config.ranges import PositiveInt
from jaxllm.data.sources import DataConfig
from jaxllm.metrics import Work
from jaxllm.models.parameters import Axes
from jaxllm.optim import OptimConfig, make_optimizer
from jaxllm.runtime.checkpoint import CheckpointConfig
from jaxllm.sharding import replicated
from jaxllm.stages import Stage
from jaxllm.workspace import Workspace

TARGET = np.array([1.0, -2.0, 0.5], np.float32)


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """How long to look."""

    num_steps: PositiveInt = 40
    """Updates."""
    batch_size: PositiveInt = 8
    """Looks per update."""
    num_micro: PositiveInt = 1
    """Microbatches per update."""
    log_every: PositiveInt = 10
    """Steps per logged interval."""
    eval_every: PositiveInt = 20
    """Steps between evaluations."""
    data: DataConfig = DataConfig()
    """No sources: what is looked at is made here."""
    optim: OptimConfig = OptimConfig(learning_rate=0.3, schedule="linear", weight_decay=0.0)
    """Optimizer and schedule."""
    checkpoint: CheckpointConfig = CheckpointConfig(save_every=10)
    """Saving."""


ROW = Stage(
    name="toy",
    kind="reward",
    help="learn where a point is",
    section="tests.stages.toy:ToyConfig",
    section_help="The toy.",
    run="tests.stages.toy:build",
    programs="tests.stages.toy:plan",
    title="Toy",
    by_default=False,
)


def _loss(params: Any, batch: jax.Array, key: Any) -> Any:
    del key
    error = jnp.square(params["scale"][None] - batch).sum(-1)
    return error.sum(), jnp.float32(len(batch)), {"loss": (error.sum(), jnp.float32(len(batch)))}


def _program(mesh: Any, config: ToyConfig) -> tuple[Any, train.StateLayout]:
    axes = {"scale": Axes((None,), decays=False)}
    tx = make_optimizer(config.optim, config.num_steps, axes)
    shapes = {"scale": jax.ShapeDtypeStruct((3,), jnp.float32)}
    placed = train.state_layout(mesh, shapes, axes, tx)
    return train.make_step(
        _loss, tx, state_shardings=placed.shardings, num_micro=config.num_micro
    ), placed


def build(workspace: Workspace, life: Any, stage: str) -> train.Training:
    config, mesh = getattr(life, stage), workspace.mesh
    step, placed = _program(mesh, config)

    def batch_at(number: int) -> jax.Array:
        noise = np.random.default_rng([life.seed, number]).normal(0.0, 0.1, (config.batch_size, 3))
        return jax.device_put(TARGET + noise.astype(np.float32), replicated(mesh))

    def evaluate(step: int, state: train.TrainState) -> dict[str, float]:
        return {"eval/distance": float(jnp.linalg.norm(state.params["scale"] - TARGET))}

    return train.Training(
        init=lambda: placed.init({"scale": jnp.zeros(3)}),
        abstract=placed.abstract,
        step=step,
        batch_at=batch_at,
        num_steps=config.num_steps,
        settings=config,
        data="looks",
        work=Work(config.batch_size),
        evaluate=evaluate,
        best="eval/distance",
        result=lambda state, metrics: {
            "distance": metrics["eval/distance"],
            "at": state.params["scale"].tolist(),
        },
    )


def plan(mesh: Any, life: Any, stage: str) -> tuple[list[train.Program], dict[str, Any]]:
    config = getattr(life, stage)
    step, placed = _program(mesh, config)
    batch = jax.ShapeDtypeStruct((config.batch_size, 3), jnp.float32, sharding=replicated(mesh))
    return [
        train.Program("step", step, (placed.abstract, batch), {}, 6.0 * 3 * config.batch_size)
    ], {"policy": placed.abstract}
