"""Accumulated == whole, sharded == single, resumed == uninterrupted: properties of the one step maker."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm import losses, train
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.optim import DECAYED, OptimConfig, decay_mask, learning_rate, make_optimizer
from jaxllm.sharding import MeshConfig, activation, make_mesh

MODEL = ModelConfig(
    vocab_size=64, max_length=16, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=64, dtype="float32"
)


def loss(params, batch, key):
    del key
    hidden = transformer.apply(params, MODEL, batch["tokens"], batch["segment_ids"], batch["positions"])
    targets, mask = losses.next_token_targets(batch["tokens"], batch["segment_ids"], batch["loss_mask"])
    return losses.language_model(losses.token_logprobs(hidden, transformer.head(params), targets), mask, 1e-4)


def uneven_batch(seed, B=8, T=16):
    """Packed rows of two segments with padding and very uneven loss masks; one row has no target at all."""
    rng = np.random.default_rng(seed)
    cut, end = rng.integers(2, T // 2, size=(B, 1)), rng.integers(T // 2 + 1, T + 1, size=(B, 1))
    places = np.arange(T)[None]
    segments = np.where(places < cut, 1, np.where(places < end, 2, 0))
    mask = (rng.random((B, T)) < rng.random((B, 1))) & (segments > 0)
    mask[0] = False
    batch = {
        "tokens": rng.integers(0, 64, size=(B, T)),
        "segment_ids": segments,
        "positions": np.where(places < cut, places, places - cut),
    }
    return {k: jnp.array(v, jnp.int32) for k, v in batch.items()} | {"loss_mask": jnp.array(mask)}


def params(seed=0):
    return transformer.init(MODEL, jax.random.key(seed))


def close(a, b, rtol=1e-5):
    """Relative error of every leaf, against the leaf's own largest value."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.abs(x - y).max() / (np.abs(y).max() + 1e-12)
        assert error < rtol, f"{jax.tree_util.keystr(path)}: {error}"


@pytest.mark.parametrize("num_micro", [2, 4, 8])
def test_accumulated_gradient_equals_whole_with_uneven_masks(num_micro):
    batch, key = uneven_batch(0), jax.random.key(0)
    whole, weight, metrics = train.accumulate(loss, params(), batch, key, 1, {})
    parts, part_weight, part_metrics = train.accumulate(loss, params(), batch, key, num_micro, {})
    assert float(weight) == float(part_weight)
    close(parts, whole)
    np.testing.assert_allclose(part_metrics["loss"][0], metrics["loss"][0], rtol=1e-5)


def test_mean_of_means_would_be_wrong_here():
    """The batch above tells the two apart: the mean of microbatch means is off by more than 1%."""
    batch, key = uneven_batch(0), jax.random.key(0)
    whole, weight, _ = train.accumulate(loss, params(), batch, key, 1, {})
    halves = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    parts = [train.accumulate(loss, params(), half, key, 1, {}) for half in halves]
    mean = sum(optax.tree.norm(g) / w for g, w, _ in parts) / 2
    assert abs(float(mean / (optax.tree.norm(whole) / weight)) - 1) > 0.01


MESHES = [
    MeshConfig(),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=4, tensor=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=1, fsdp=4, tensor=2),
]


def one_update(mesh, num_micro=1):
    tx = make_optimizer(OptimConfig(learning_rate=1e-2, clip_norm=0.5), 10)
    placed = train.place_state(mesh, transformer.abstract(MODEL), transformer.axes(MODEL), tx)
    with jax.set_mesh(mesh):
        state = placed.init(jax.jit(lambda: params(), out_shardings=placed.shardings.params)())
        step = train.make_step(loss, tx, num_micro=num_micro, state_shardings=placed.shardings)
        batch = {k: jax.device_put(v, activation(mesh, "batch", None)) for k, v in uneven_batch(1).items()}
        state, metrics = step(state, batch)
    return state, metrics, placed


@pytest.mark.parametrize("config", MESHES, ids=str)
def test_sharded_update_equals_single_device(config):
    alone, metrics_alone, _ = one_update(make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    state, metrics, placed = one_update(make_mesh(config))
    np.testing.assert_allclose(metrics["loss"][0], metrics_alone["loss"][0], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"][0], metrics_alone["grad_norm"][0], rtol=1e-5)
    close(jax.tree.map(np.asarray, state.opt_state), jax.tree.map(np.asarray, alone.opt_state))
    for leaf, sharding in zip(jax.tree.leaves(state.params), jax.tree.leaves(placed.shardings.params), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_sharded_accumulation_equals_single_device():
    alone, _, _ = one_update(make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    state, _, _ = one_update(make_mesh(MeshConfig(data=2, tensor=4 // 2, fsdp=2)), num_micro=2)
    close(jax.tree.map(np.asarray, state.opt_state), jax.tree.map(np.asarray, alone.opt_state))


def run(state, num_steps, step, hooks=()):
    return train.fit(train.Run(state, step, uneven_batch, num_steps, hooks))


def test_resumed_equals_uninterrupted_bit_for_bit():
    tx = make_optimizer(OptimConfig(), 6)
    noisy = lambda p, b, key: loss(jax.tree.map(lambda x: x + 1e-3 * jax.random.normal(key, x.shape), p), b, key)
    step = train.make_step(noisy, tx, seed=3)
    whole = run(train.init_state(params(), tx), 6, step)
    half = jax.tree.map(np.asarray, run(train.init_state(params(), tx), 3, step))
    resumed = run(jax.tree.map(jnp.asarray, half), 6, step)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_hooks_run_on_their_interval_and_at_the_end():
    tx, seen = make_optimizer(OptimConfig(), 5), []
    hooks = [(1, lambda n, s, m: seen.append(("a", n))), (2, lambda n, s, m: seen.append(("b", n)))]
    run(train.init_state(params(), tx), 5, train.make_step(loss, tx), hooks)
    assert [n for name, n in seen if name == "a"] == [1, 2, 3, 4, 5]
    assert [n for name, n in seen if name == "b"] == [2, 4, 5]


def test_an_all_masked_batch_changes_nothing_but_the_optimiser_clock():
    tx = make_optimizer(OptimConfig(weight_decay=0.0), 5)
    batch = uneven_batch(0) | {"loss_mask": jnp.zeros((8, 16), bool)}
    before = params()
    state, _ = train.make_step(loss, tx)(train.init_state(params(), tx), batch)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_schedules_rise_then_fall_to_the_final_fraction(schedule):
    config = OptimConfig(learning_rate=1.0, schedule=schedule, warmup_steps=4, final_fraction=0.1, decay_fraction=0.25)
    rate = [float(learning_rate(config, 20)(n)) for n in range(21)]
    np.testing.assert_allclose(rate[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rate[20], 1.0 if schedule == "constant" else 0.1, rtol=1e-5)
    if schedule == "wsd":
        assert rate[4:16] == [1.0] * 12 and rate[16] < 1.0


def test_decay_covers_every_parameter_of_both_families_and_refuses_an_unknown_one():
    gpt = ModelConfig(vocab_size=8, norm="layernorm", position="learned", mlp="gelu", bias=True, tie_embeddings=False)
    for model in (MODEL, gpt):
        mask = decay_mask(transformer.abstract(model))
        for path, decays in jax.tree_util.tree_leaves_with_path(mask):
            name = path[-1].key
            assert decays == DECAYED[name] == (name not in ("scale", "bias") and not name.endswith("_bias"))
    with pytest.raises(KeyError):
        decay_mask({"mystery": jnp.zeros(3)})
