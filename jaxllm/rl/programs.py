"""The compiled programs that an update runs, each on the mesh of its role.

`update` calls them in order. `jaxllm plan` calls the same update with shapes instead of arrays, and so learns from it
which programs run, how often, and on what: there is no second list to keep in step.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm import losses, train
from jaxllm.engine import rollouts
from jaxllm.models import decode, lora, scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.optim import make_optimizer
from jaxllm.optim_config import OptimConfig
from jaxllm.rl.experience import (
    make_experience,
    response_values,
    reward_scores,
    shape_scores,
    step_scores,
)
from jaxllm.rl.layouts import REPLICATED, ROWS, STAY, MeshProgram
from jaxllm.rl.objectives import actor_loss, critic_loss, ptx_loss
from jaxllm.rl.roles import RunSpec, StateLayouts
from jaxllm.rl.sampler import Sampler
from jaxllm.rl.trainer_sampler import TrainerSampler
from jaxllm.sharding import constrain, place_params


class UpdatePrograms(NamedTuple):
    """In the order they run. Arguments are on the stage's mesh, except parameters, which are on that of their role."""

    weights: MeshProgram  # (trained, base) -> the policy's weights, on the mesh that samples
    rollout: Sampler | TrainerSampler  # (weights, prompts, key data uint32[2]) -> Rollout
    reward: MeshProgram  # (reward model, rollout) -> float32[B]
    step_scores: MeshProgram  # (reward model, rollout, ends bool[B, R]) -> float32[B, R]
    exchange: MeshProgram  # (pair of batches, rows int32[B] of both) -> those rows
    shape_scores: MeshProgram  # (scores, finished, moments) -> (scores, moments, metrics)
    values: MeshProgram  # ((trained, base) of the critic, rollout) -> float32[B, R]
    reference: MeshProgram  # (reference, rollout) -> log-probabilities float32[B, R]
    teachers: tuple[MeshProgram, ...]  # each (teacher, rollout) -> hidden states [B, R, D]
    experience: MeshProgram  # see `experience.make_experience`
    take: MeshProgram  # (experience, rows int32[b]) -> those rows of it
    actor_step: MeshProgram  # (state, minibatch, base=, teacher_heads=) -> (state, metrics)
    critic_step: MeshProgram | None  # the same without teacher_heads, of a separate critic


def build_programs(spec: RunSpec, meshes: Mapping[str, Any]) -> tuple[UpdatePrograms, StateLayouts]:
    """All programs of an update, not yet compiled, and where the states that they train live."""
    mesh = meshes["policy"]
    weights, rollout = _sampling_programs(spec, mesh, meshes["rollout"])
    actor_step, actor = _actor_step(spec, mesh)
    critic_step, critic = None, None
    if spec.config.has_critic:
        critic_step, critic = _critic_step(spec, mesh, meshes["critic"])
    programs = UpdatePrograms(
        weights=weights,
        rollout=rollout,
        **_judges(spec, meshes),
        **_stage_programs(spec, mesh),
        actor_step=actor_step,
        critic_step=critic_step,
    )
    return programs, StateLayouts(actor, critic, meshes["critic"])


def _judges(spec: RunSpec, meshes: Mapping[str, Any]) -> dict[str, Any]:
    """Programs of models that judge rollouts, by their field of `UpdatePrograms`.

    Each takes parameters on the mesh of its role, and returns a row of results for each response.
    """
    tokens = _num_tokens(spec)
    per_token = _FlopsPerToken(spec)

    def judge(
        name: str, role: str, function: Callable[..., jax.Array], flops: float, num_inputs: int = 1
    ) -> MeshProgram:
        """A program of (parameters, rollout) or of a further array of rows."""
        arguments = (STAY, *[ROWS] * num_inputs)
        run = jax.jit(function)
        return MeshProgram(
            name, run, meshes[role], meshes["policy"], arguments, ROWS, flops=flops * tokens
        )

    def values(critic: Any, rollout: rollouts.Rollout) -> jax.Array:
        trained, base = critic
        return response_values(lora.join(base, trained), rollout, model=spec.reward_model)

    def reference(params: Any, rollout: rollouts.Rollout) -> jax.Array:
        return spec.logprobs(params, rollout).logprob

    score = functools.partial(reward_scores, model=spec.reward_model)
    score_steps = functools.partial(step_scores, model=spec.reward_model)
    teachers = [
        judge(
            "teacher" if number == 1 else f"teacher_{number}",
            "teacher",
            functools.partial(rollouts.response_hidden, config=model),
            per_token.forward(model, scored=False),
        )
        for number, model in enumerate(spec.teachers, 1)
    ]
    return {
        "reward": judge("score", "reward", score, per_token.headless / 3),
        "step_scores": judge("score_steps", "reward", score_steps, per_token.headless / 3, 2),
        "values": judge("values", "critic", values, per_token.headless / 3),
        "reference": judge("reference", "reference", reference, per_token.scored / 3),
        "teachers": tuple(teachers),
    }


def _stage_programs(spec: RunSpec, mesh: Any) -> dict[str, Any]:
    """Programs that work on the stage's own mesh, by their field of `UpdatePrograms`."""

    def program(
        name: str, function: Callable[..., Any], num_inputs: int, results: Any, flops: float = 0.0
    ) -> MeshProgram:
        run = jax.jit(function)
        return MeshProgram(name, run, mesh, mesh, (STAY,) * num_inputs, results, flops=flops)

    shape = functools.partial(shape_scores, config=spec.config)
    experience = functools.partial(make_experience, spec=spec)
    flops = _FlopsPerToken(spec).scored / 3 * _num_tokens(spec)
    return {
        "exchange": program("exchange", _exchange, 2, STAY),
        "shape_scores": program("shape_scores", shape, 3, (ROWS, STAY, STAY)),
        "experience": program("experience", experience, 8, (ROWS, STAY), flops),
        "take": program("take", _take, 2, ROWS),
    }


def _take(experience: Any, rows: jax.Array) -> Any:
    """A minibatch: these rows of every array, sharded like a batch."""

    def rows_of(x: jax.Array) -> jax.Array:
        return constrain(x[rows], "batch", *[None] * (x.ndim - 1))

    return jax.tree.map(rows_of, experience)


def _exchange(batches: tuple[Any, Any], rows: jax.Array) -> Any:
    """A batch of rows of two: row i of the first is number i, row i of the second number B + i."""
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)
    return _take(both, rows)


# --- Sampling.


def _sampling_programs(
    spec: RunSpec, mesh: Any, role_mesh: Any
) -> tuple[MeshProgram, Sampler | TrainerSampler]:
    """The program that gives the sampler its weights, and the sampler."""
    config, model = spec.config, spec.model
    per_token = _FlopsPerToken(spec).scored / 3
    prompts = per_token * config.num_prompts * config.max_prompt_length
    responses = per_token * config.batch_size * config.sampling.max_new_tokens
    pick = MeshProgram("weights", spec.policy, mesh, mesh, (STAY, STAY), computes=False)
    if config.sampler == "trainer":
        return pick, TrainerSampler(spec, mesh, per_token * _num_tokens(spec))
    sampler = Sampler(spec, role_mesh, mesh, prompts + responses, responses)
    if role_mesh is mesh:
        return pick, sampler

    shapes = jax.eval_shape(functools.partial(narrow, model), transformer.abstract(model))
    placed = place_params(role_mesh, shapes, transformer.axes(model))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
    prepare = jax.jit(lambda params, base: narrow(model, lora.merge(spec.policy(params, base))))
    return MeshProgram("weights", prepare, mesh, role_mesh, (STAY, STAY), shardings), sampler


def narrow(model: ModelConfig, params: Any) -> Any:
    """Matrices in the dtype they are decoded in, so that half as much is moved and kept.

    Norms and biases stay float32, as in `decode.unstack`.
    """
    dtype = decode.decoding_config(model).compute_dtype
    stacked = {name for name, *_ in transformer.stacks(model)}

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        vector_rank = 1 + (path[0].key in stacked)  # stacked layers add a dimension in front
        return leaf.astype(dtype) if leaf.ndim > vector_rank else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


# --- Training steps.


def _actor_step(spec: RunSpec, mesh: Any) -> tuple[MeshProgram, train.StateLayout]:
    config = spec.config
    family = scalar if config.shares_trunk else transformer
    mixed = None
    if config.ptx.coef:
        mixed = (functools.partial(ptx_loss, spec=spec), config.ptx.coef)
    step, layout = _train_step(spec, actor_loss, config.actor, family, spec.model, mesh, mixed)
    per_token = _FlopsPerToken(spec)
    # A teacher's trunk has run; here it is only multiplied with the vocabulary.
    heads = sum(
        per_token.forward(model) - per_token.forward(model, scored=False) for model in spec.teachers
    )
    flops = (per_token.scored + heads) * (_num_tokens(spec) / config.num_minibatches)
    program = MeshProgram("actor", step, mesh, mesh, (STAY, STAY), (STAY, STAY), flops=flops)
    return program, layout


def _critic_step(spec: RunSpec, mesh: Any, role_mesh: Any) -> tuple[MeshProgram, train.StateLayout]:
    config = spec.config
    step, layout = _train_step(
        spec, critic_loss, config.critic, scalar, spec.reward_model, role_mesh
    )
    flops = _FlopsPerToken(spec).headless * (_num_tokens(spec) / config.num_minibatches)
    program = MeshProgram(
        "critic", step, role_mesh, mesh, (STAY, ROWS), (STAY, REPLICATED), flops=flops
    )
    return program, layout


def _train_step(
    spec: RunSpec,
    loss: Callable[..., losses.Loss],
    optim: OptimConfig,
    family: Any,
    model: ModelConfig,
    mesh: Any,
    mixed: Any = None,
) -> tuple[Any, train.StateLayout]:
    """(update step, where its state lives) of a model of this family that learns from this loss."""
    config = spec.config
    shapes, axes = lora.trained(config.lora, family.abstract(model), family.axes(model))
    tx = make_optimizer(optim, config.num_steps * config.updates_per_step, axes)
    layout = train.state_layout(mesh, shapes, axes, tx)
    step = train.make_step(
        functools.partial(loss, spec=spec),
        tx,
        num_micro=config.num_micro,
        state_shardings=layout.shardings,
        mixed=mixed,
        spike_factor=optim.spike_factor,
    )
    return step, layout


# --- What a program costs.


class _FlopsPerToken:
    """Training FLOPs per token of the two kinds of model. A forward pass alone is a third of it."""

    def __init__(self, spec: RunSpec):
        length = spec.config.max_prompt_length + spec.config.sampling.max_new_tokens
        self.scored = transformer.flops_per_token(spec.model, length)
        """With the product with the vocabulary."""
        self.headless = transformer.flops_per_token(spec.reward_model, length, scored=False)
        """Without it, as in a model with a scalar head."""
        self._length = length

    def forward(self, model: ModelConfig, *, scored: bool = True) -> float:
        """Of one pass of another model."""
        return transformer.flops_per_token(model, self._length, scored=scored) / 3


def _num_tokens(spec: RunSpec) -> int:
    """Tokens of all prompts and responses of an update, padding included."""
    config = spec.config
    return config.batch_size * (config.max_prompt_length + config.sampling.max_new_tokens)
