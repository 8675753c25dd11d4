"""The sampler that runs the trainer's program: its log-probabilities are those learned from, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.engine import rollouts
from jaxllm.engine.config import SamplingConfig
from jaxllm.models import scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.parts_config import LoRAConfig
from jaxllm.rl import layouts
from jaxllm.rl.config import PPOConfig, RoleMesh
from jaxllm.rl.programs import build_programs
from jaxllm.rl.roles import split_trainable, with_value_head
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import activation, param_shardings
from tests.engine import static
from tests.stages import worlds

MODEL = ModelConfig(
    vocab_size=24,
    max_length=32,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    mlp_dim=48,
    dtype="float32",
    init_std=0.3,
)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [14, 15], [3], [4, 5], [6, 6, 6], [7]]
CONFIG = PPOConfig(
    batch_size=16,
    num_responses=2,
    num_minibatches=2,
    sampling=SamplingConfig(7, 0.7),
    max_prompt_length=6,
    kl_coef=0.1,
)


def drawn_and_learned(sampler, mesh, model=MODEL, **more):
    """(rollout, the log-probabilities that an update would learn from) of an update's programs on this mesh."""
    spec = worlds.run_spec(dataclasses.replace(CONFIG, sampler=sampler, **more), model)
    config = spec.config
    family = scalar if config.shares_trunk else transformer
    policy = transformer.init(model, jax.random.key(0))
    start = with_value_head(policy, model) if config.shares_trunk else policy
    params, base = split_trainable(config.lora, start, family.axes(model))
    if not config.lora.rank:
        params = jax.device_put(params, param_shardings(mesh, params, family.axes(model)))
    tokens, mask = rollouts.left_pad(PROMPTS, config.max_prompt_length, spec.pad_id)
    rows = activation(mesh, "batch")
    prompts = jax.device_put(
        {"tokens": tokens, "mask": mask, "index": np.arange(len(PROMPTS), dtype=np.int32)}, rows
    )
    words = np.asarray(jax.random.key_data(jax.random.key(3)))
    with jax.set_mesh(mesh):
        programs, _ = build_programs(spec, layouts.role_meshes(config, mesh))
        rollout = programs.rollout(programs.weights(params, base), prompts, words)
        zeros = jax.device_put(jnp.zeros((config.batch_size, 7)), rows)
        scores = jax.device_put(jnp.zeros(config.batch_size), rows)
        experience, metrics = programs.experience(
            params, base, rollout, zeros, zeros, scores, jnp.float32(0)
        )
    return jax.device_get((rollout, experience.old_logprobs, metrics["sampler_drift"][0]))


@pytest.mark.parametrize(
    ("mesh", "more"),
    [
        (MeshConfig(data=1), {}),
        (MeshConfig(data=2, fsdp=2, tensor=2), {}),
        pytest.param(MeshConfig(data=4), {"critic_trunk": "shared"}, marks=pytest.mark.life),
        pytest.param(MeshConfig(data=4), {"lora": LoRAConfig(rank=2)}, marks=pytest.mark.life),
    ],
    ids=str,
)
def test_log_probabilities_are_those_learned_from_bit_for_bit(mesh, more):
    devices = jax.devices()[: 1 if mesh.data == 1 else 8 if mesh.fsdp > 1 else 4]
    mesh = make_mesh(mesh, devices)
    rollout, learned, drift = drawn_and_learned("trainer", mesh, **more)
    np.testing.assert_array_equal(rollout.logprobs, np.where(rollout.mask, learned, 0.0))
    assert drift == 0.0
    assert rollout.finished.any() and not rollout.finished.all()
    # The engine rounds differently, so that the equality above is no matter of course. It draws the same.
    other, _, drift = drawn_and_learned("engine", mesh, **more)
    assert 0.0 < drift < 1e-2
    for field in ("tokens", "prompt_mask", "mask", "finished"):
        np.testing.assert_array_equal(getattr(rollout, field), getattr(other, field))


def test_the_rows_are_those_of_the_slow_reference():
    rollout, _, _ = drawn_and_learned("trainer", make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    spec = worlds.run_spec(CONFIG, MODEL)
    # The reference takes a key; the update's is made of words.
    want = static.roll_out(
        transformer.init(MODEL, jax.random.key(0)),
        MODEL,
        PROMPTS,
        CONFIG.sampling,
        stop_ids=spec.stop_ids,
        pad_id=spec.pad_id,
        seed=3,
        num_samples=2,
        length=6,
    )
    np.testing.assert_array_equal(rollout.tokens, want.tokens)
    np.testing.assert_array_equal(rollout.mask, want.mask)
    np.testing.assert_array_equal(rollout.finished, want.finished)
    np.testing.assert_allclose(rollout.logprobs, np.where(want.mask, want.logprobs, 0), atol=1e-5)


def test_settings_that_the_loss_does_not_model_are_refused():
    with pytest.raises(ValueError, match="remove the role rollout"):
        dataclasses.replace(CONFIG, sampler="trainer", meshes=(RoleMesh(tensor=2),))
    for penalty in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.5}):
        with pytest.raises(ValueError, match="penalties must be off"):
            dataclasses.replace(CONFIG, sampling=SamplingConfig(7, 0.7, **penalty))
