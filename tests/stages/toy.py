"""A stage from outside the package, for test_table.py: it estimates a point from noisy observations of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import train
from jaxllm.config.ranges import PositiveInt
from jaxllm.data.config import DataConfig
from jaxllm.metrics import Work
from jaxllm.models.parameters import Axes
from jaxllm.optim import make_optimizer
from jaxllm.optim_config import OptimConfig
from jaxllm.runtime.config import CheckpointConfig
from jaxllm.sharding import replicated
from jaxllm.stages import Stage
from jaxllm.workspace import Workspace

TARGET = np.array([1.0, -2.0, 0.5], np.float32)


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """How many observations."""

    num_steps: PositiveInt = 40
    """Updates."""
    batch_size: PositiveInt = 8
    """Observations per update."""
    num_micro: PositiveInt = 1
    """Microbatches per update."""
    log_every: PositiveInt = 10
    """Steps per logged interval."""
    eval_every: PositiveInt = 20
    """Steps between evaluations."""
    data: DataConfig = DataConfig()
    """No sources: observations are made here."""
    optim: OptimConfig = OptimConfig(learning_rate=0.3, schedule="linear", weight_decay=0.0)
    """Optimizer and schedule."""
    checkpoint: CheckpointConfig = CheckpointConfig(save_every=10)
    """Saving."""


ROW = Stage(
    name="toy",
    kind="reward",
    help="estimate a point",
    section="tests.stages.toy:ToyConfig",
    section_help="The toy.",
    run="tests.stages.toy:build",
    programs="tests.stages.toy:plan",
    title="Toy",
    by_default=False,
)


def _loss(params: Any, batch: jax.Array, key: Any) -> Any:
    del key
    error = jnp.square(params["scale"][None] - batch).sum()
    weight = jnp.float32(len(batch))
    return error, weight, {"loss": (error, weight)}


def _program(mesh: Any, config: ToyConfig) -> tuple[Any, train.StateLayout]:
    axes = {"scale": Axes((None,), decays=False)}
    tx = make_optimizer(config.optim, config.num_steps, axes)
    shapes = {"scale": jax.ShapeDtypeStruct((3,), jnp.float32)}
    layout = train.state_layout(mesh, shapes, axes, tx)
    step = train.make_step(_loss, tx, state_shardings=layout.shardings, num_micro=config.num_micro)
    return step, layout


def build(workspace: Workspace, life: Any, stage: str) -> train.Training:
    config: ToyConfig = getattr(life, stage)
    mesh = workspace.mesh
    step, layout = _program(mesh, config)

    def batch_at(number: int) -> jax.Array:
        # A function of the step number alone, as of every stage: a resumed run gets the same batches.
        rng = np.random.default_rng([life.seed, number])
        noise = rng.normal(0.0, 0.1, (config.batch_size, 3))
        return jax.device_put(TARGET + noise.astype(np.float32), replicated(mesh))

    def evaluate(step: int, state: train.TrainState) -> dict[str, float]:
        return {"eval/distance": float(jnp.linalg.norm(state.params["scale"] - TARGET))}

    return train.Training(
        init=lambda: layout.init({"scale": jnp.zeros(3)}),
        abstract=layout.abstract,
        step=step,
        batch_at=batch_at,
        num_steps=config.num_steps,
        settings=config,
        data="observations",
        work=Work(config.batch_size),
        evaluate=evaluate,
        best="eval/distance",
        result=lambda state, metrics: {
            "distance": metrics["eval/distance"],
            "at": state.params["scale"].tolist(),
        },
    )


def plan(mesh: Any, life: Any, stage: str) -> tuple[list[train.Program], dict[str, Any]]:
    config: ToyConfig = getattr(life, stage)
    step, layout = _program(mesh, config)
    batch = jax.ShapeDtypeStruct((config.batch_size, 3), jnp.float32, sharding=replicated(mesh))
    flops = 6.0 * 3 * config.batch_size
    program = train.Program("step", step, (layout.abstract, batch), {}, flops)
    return [program], {"policy": layout.abstract}
