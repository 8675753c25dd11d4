"""What is saved comes back bit for bit, on any mesh; last N and best are kept; mistakes are one clear line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import checkpoint as c
from jaxllm.config import InputError
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.optim import OptimConfig, make_optimizer
from jaxllm.sharding import MeshConfig, make_mesh
from jaxllm.train import place_state

MODEL = ModelConfig(vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64)


def placed_on(config, model=MODEL):
    mesh = make_mesh(config)
    tx = make_optimizer(OptimConfig(), 10)
    return place_state(mesh, transformer.abstract(model), transformer.axes(model), tx)


def fresh(placed, model=MODEL):
    return placed.init(
        jax.jit(lambda: transformer.init(model, jax.random.key(0)), out_shardings=placed.shardings.params)()
    )


@pytest.fixture
def saved(tmp_path):
    """A stage directory with one checkpoint written on an 8-way data mesh, and its state."""
    state = fresh(placed_on(MeshConfig()))
    manager = c.open_manager(tmp_path / "checkpoints", c.CheckpointConfig())
    c.save(manager, 3, state._replace(step=jnp.int32(3)))
    manager.wait_until_finished()
    manager.close()
    return tmp_path, jax.tree.map(np.asarray, state._replace(step=jnp.int32(3)))


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str
)
def test_restored_on_another_mesh_it_is_the_same_state(saved, mesh):
    directory, state = saved
    placed = placed_on(mesh)
    manager = c.open_manager(directory / "checkpoints", c.CheckpointConfig())
    restored = c.restore_or_init(manager, placed.abstract, lambda: pytest.fail("must not start anew"))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, restored), state)
    for leaf, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(placed.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    params = c.load_params(directory, placed.abstract.params)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), state.params)


def test_last_and_best_are_kept(tmp_path):
    config = c.CheckpointConfig(keep_last=2, keep_best=1)
    for lower, want in ((True, [2, 4, 5]), (False, [3, 4, 5])):
        manager = c.open_manager(tmp_path / str(lower), config, "eval/loss", lower)
        for step, value in enumerate([3.0, 1.0, 4.0, 2.0, 2.5], start=1):
            c.save(manager, step, {"x": jnp.ones(3)}, {"eval/loss": value})
        manager.wait_until_finished()
        assert list(manager.all_steps()) == want


def test_an_empty_directory_starts_anew(tmp_path):
    manager = c.open_manager(tmp_path / "checkpoints", c.CheckpointConfig())
    assert c.restore_or_init(manager, None, lambda: "fresh") == "fresh"


def test_another_models_checkpoint_lists_both_sides(saved):
    directory, _ = saved
    other = ModelConfig(vocab_size=64, num_layers=2, embed_dim=16, num_heads=4, mlp_dim=64, mlp="gelu")
    with pytest.raises(InputError, match="the checkpoint is of another model") as error:
        c.load_params(directory, placed_on(MeshConfig(), other).abstract.params)
    text = str(error.value)
    assert "differ: " in text and "only in the checkpoint: layers.mlp.gate" in text and "\n" not in text


def test_what_a_killed_save_left_is_cleaned_and_the_last_whole_one_used(saved):
    directory, _ = saved
    (directory / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    manager = c.open_manager(directory / "checkpoints", c.CheckpointConfig())
    assert int(c.restore_or_init(manager, placed_on(MeshConfig()).abstract, dict).step) == 3
    assert not (directory / "checkpoints" / "9.orbax-checkpoint-tmp").exists()


def test_a_damaged_checkpoint_is_one_clear_line(saved):
    directory, _ = saved
    for file in (directory / "checkpoints" / "3").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(InputError, match=r"checkpoints/3: this checkpoint is damaged or half-written") as error:
        c.load_params(directory, placed_on(MeshConfig()).abstract.params)
    assert "\n" not in str(error.value)


def test_no_checkpoint_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="has no checkpoints"):
        c.load_params(tmp_path, None)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        c.load_params(tmp_path, None)
