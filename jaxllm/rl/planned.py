"""An update without devices: which programs it runs, how often, and on what. For `jaxllm plan`."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jaxllm import train
from jaxllm.losses import Metrics
from jaxllm.model_store import read_model_card
from jaxllm.models import next_token
from jaxllm.models.config import ModelConfig
from jaxllm.rl.config import PPOConfig
from jaxllm.rl.experience import StepRewards
from jaxllm.rl.layouts import MeshProgram, role_meshes, travel
from jaxllm.rl.programs import UpdatePrograms, build_programs
from jaxllm.rl.roles import FrozenModels, RunSpec, abstract_frozen, abstract_state, check_lengths
from jaxllm.rl.sampler import Sampler
from jaxllm.rl.trainer_sampler import TrainerSampler
from jaxllm.rl.update import HostWork, collect, minibatch_rows, optimize
from jaxllm.sharding import rows_like, with_shardings


class Recorder:
    """Stands in for `update.call`: notes every program with its arguments as shapes, and returns shapes."""

    def __init__(self) -> None:
        self._programs: dict[str, train.Program] = {}
        self._results: dict[str, Any] = {}

    def __call__(
        self, program: MeshProgram | Sampler | TrainerSampler, *arguments: Any, **resident: Any
    ) -> Any:
        if isinstance(program, Sampler | TrainerSampler):
            parts, rollout = program.planned(arguments[0])
            self._programs |= {part.name: part for part in parts}
            return rollout
        if not program.computes:
            return program.function(*arguments, **resident)
        name = program.name
        if name in self._programs:
            # Later calls of a program have arguments of the same shapes, so its results are known.
            seen = self._programs[name]
            self._programs[name] = seen._replace(times=seen.times + 1)
            return self._results[name]
        moved = arguments
        if program.mesh is not program.home:
            moved = travel(arguments, program.arguments, program.mesh, _move_shapes)
        self._programs[name] = train.Program(
            name, program.function, moved, resident, program.flops, mesh=program.mesh
        )
        # Under the mesh, since dtypes and kernels depend on its platform.
        with jax.set_mesh(program.mesh):
            shapes = jax.eval_shape(program.function, *moved, **resident)
        self._results[name] = travel(shapes, program.results, program.home, _move_shapes)
        return self._results[name]

    def programs(self) -> list[train.Program]:
        """The programs whose FLOPs count, in the order they first ran."""
        return [program for program in self._programs.values() if program.flops]


def _move_shapes(shapes: Any, mesh: Any, shardings: Any) -> Any:
    """`layouts.Move` for shapes: the same ones with the shardings they arrive in."""
    del mesh  # the shardings are of it
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return with_shardings(shapes, shardings)


def planned_update(
    mesh: jax.sharding.Mesh, stage: str, config: PPOConfig, model: ModelConfig, seed: int
) -> tuple[list[train.Program], dict[str, Any]]:
    """(the programs of an update, {role: its state}), as shapes with their shardings.

    Reward model and critic are taken to be of the policy's size, and so is a teacher that is not there yet.
    """
    teachers = tuple(_planned_teacher(teacher.stage_dir, model) for teacher in config.teachers)
    for each in (model, *teachers):
        check_lengths(config, each, stage)
    spec = RunSpec(config, model, model, stop_ids=(0,), pad_id=0, seed=seed, teachers=teachers)
    meshes = role_meshes(config, mesh)
    programs, layouts = build_programs(spec, meshes)
    state = abstract_state(layouts, config, mesh)
    frozen = abstract_frozen(spec, meshes)
    record = Recorder()
    host = _planned_host(mesh, config, model, programs, frozen)
    # On the host in a run, and therefore without a sharding.
    key_words = jax.ShapeDtypeStruct((2,), jnp.uint32)
    experience, _, _ = collect(
        config,
        record,
        programs,
        frozen,
        host,
        state,
        _prompts(config, mesh),
        lambda _: key_words,
    )
    # All updates have minibatches of the same size, so the first stands for every one.
    rows = minibatch_rows(spec, 0)
    optimize(record, programs, frozen, host, state.actor, state.critic, experience, rows)
    # What stays in memory between programs, whichever of them is running.
    held = {"policy": state.actor, "critic": state.critic, "ema": state.ema, **frozen._asdict()}
    return record.programs(), {role: tree for role, tree in held.items() if jax.tree.leaves(tree)}


def _planned_host(
    mesh: jax.sharding.Mesh,
    config: PPOConfig,
    model: ModelConfig,
    programs: UpdatePrograms,
    frozen: FrozenModels,
) -> HostWork:
    """What the host does in an update, of which only the programs that it runs and the shapes that it makes matter."""

    def score(run: Any, rollout: Any, prompts: Any) -> tuple[Any, Any, Metrics]:
        del prompts
        sources = [source.source for source in config.rewards]
        if "model" in sources:
            run(programs.reward, frozen.reward, rollout)
        if "model_steps" in sources:
            run(programs.step_scores, frozen.reward, rollout, rollout.mask)
        scores = jax.ShapeDtypeStruct((config.batch_size,), jnp.float32)
        steps = None
        if config.pays_steps:
            of_mask = lambda mask: StepRewards(mask.astype(jnp.float32), mask)
            steps = jax.eval_shape(of_mask, rollout.mask)
        return rows_like(mesh, scores), rows_like(mesh, steps), {}

    # Rows of PPO-ptx come from the host; their shapes are known without data.
    ptx_rows = None
    if config.ptx.coef:
        length = config.ptx.length or model.max_length
        ptx_rows = next_token.planned_rows(mesh, config.ptx.batch_size, length)
    return HostWork(
        prompts_of=lambda _: (),
        # One round of sampling: how many an update needs depends on the scores.
        more_prompts=None,
        score=score,
        end_responses=lambda rollout: rollout,
        ptx_rows_at=(lambda _: ptx_rows) if ptx_rows else None,
        ends_early=lambda _: False,
        log=None,
    )


def _planned_teacher(stage_dir: str, policy: ModelConfig) -> ModelConfig:
    """The config of a teacher; the policy's where its stage has not begun."""
    if not stage_dir or not (epath.Path(stage_dir).expanduser() / "model.json").exists():
        return policy
    return read_model_card(os.path.expanduser(stage_dir))[0]


def _prompts(config: PPOConfig, mesh: Any) -> Any:
    """A batch of prompts, as shapes with their shardings."""
    rows, length = config.num_prompts, config.max_prompt_length
    shapes = {
        "tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32),
        "mask": jax.ShapeDtypeStruct((rows, length), jnp.bool_),
        "index": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    return rows_like(mesh, shapes)
