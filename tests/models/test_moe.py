"""Experts: dropless == a plain loop, sharded == single, capacity, balance; and training == a plain PyTorch loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import train
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.moe import Load, balance, moe, route
from jaxllm.models.next_token import loss
from jaxllm.models.parameters import Axes
from jaxllm.models.parts_config import MoEConfig
from jaxllm.optim import make_optimizer
from jaxllm.optim_config import OptimConfig
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import activation, param_shardings
from tests.oracles.families import BATCH, LENGTH, STEPS, TRAINED, tokens
from tests.pretrained.test_families import RECORD, load

E, D, F = 8, 16, 24
CONFIG = MoEConfig(
    num_experts=E,
    per_token=3,
    mlp_dim=F,
    router="sigmoid",
    num_groups=4,
    groups_per_token=2,
    scale=1.5,
)


def weights(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.array(rng.normal(size=shape) * 0.3, jnp.float32)
    experts = {"gate": draw(E, D, F), "up": draw(E, D, F), "down": draw(E, F, D)}
    return {"router": draw(D, E), "router_bias": draw(E), "experts": experts}


def loop(x, mask, w, config):
    """Token by token, expert by expert, in float64."""
    out, load = np.zeros(x.shape), np.zeros(E)
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), w)
    for b, t in zip(*np.nonzero(np.asarray(mask)), strict=True):
        token = np.asarray(x[b, t], np.float64)
        scores = 1 / (1 + np.exp(-token @ w["router"]))
        groups = (scores + w["router_bias"]).reshape(config.num_groups, -1)
        best = np.argsort(-np.sort(groups, -1)[:, -2:].sum(-1))[: config.groups_per_token]
        allowed = [g * groups.shape[1] + i for g in best for i in range(groups.shape[1])]
        chosen = sorted(allowed, key=lambda e: -(scores + w["router_bias"])[e])[: config.per_token]
        for e in chosen:
            gate, up = token @ w["experts"]["gate"][e], token @ w["experts"]["up"][e]
            hidden = gate / (1 + np.exp(-gate)) * up
            share = scores[e] / scores[chosen].sum() * config.scale
            out[b, t] += share * (hidden @ w["experts"]["down"][e])
            load[e] += 1
    return out, load


def inputs():
    x = jax.random.normal(jax.random.key(1), (8, 6, D))
    return x, jnp.arange(48).reshape(8, 6) % 7 != 0


MESHES = {
    "none": None,
    "data": MeshConfig(data=8),
    "expert": MeshConfig(data=1, expert=8),
    "mixed": MeshConfig(data=2, expert=2, tensor=2),
    "fsdp": MeshConfig(data=1, fsdp=2, expert=4),
    "context": MeshConfig(data=2, context=2, expert=2),
}


@pytest.mark.parametrize("capacity", [0.0, 8.0], ids=["dropless", "capacity"])
@pytest.mark.parametrize(
    "mesh",
    [m if m in ("none", "mixed") else pytest.param(m, marks=pytest.mark.life) for m in MESHES],
)
def test_experts_equal_a_plain_loop_on_any_mesh(mesh, capacity):
    """With room for all tokens the capacity variant is the dropless one."""
    config, w, (x, mask) = (
        dataclasses.replace(CONFIG, capacity_factor=capacity),
        weights(),
        inputs(),
    )
    run = jax.jit(functools.partial(moe, config=config))
    if MESHES[mesh] is None:
        y, load = run(x, mask, w)
    else:
        with jax.set_mesh(make_mesh(MESHES[mesh])):
            y, load = run(x, mask, w)
    want, counts = loop(x, mask, w, config)
    np.testing.assert_allclose(y, want, atol=2e-5)
    np.testing.assert_array_equal(load.load, counts)
    assert float(load.tokens) == float(mask.sum()) and float(load.dropped) == 0


def test_gradients_on_a_mesh_equal_those_on_one_device():
    w, (x, mask) = weights(), inputs()
    total = lambda w, x: jnp.square(moe(x, mask, w, CONFIG)[0]).sum()
    alone = jax.jit(jax.grad(total, (0, 1)))(w, x)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, tensor=2))):
        together = jax.jit(jax.grad(total, (0, 1)))(w, x)
    for a, b in zip(*map(jax.tree.leaves, (together, alone)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max() + 1))


def test_a_full_expert_drops_the_tokens_that_come_last():
    config = MoEConfig(num_experts=2, per_token=1, mlp_dim=F, capacity_factor=0.5)
    w = weights()
    w = {
        "router": jnp.zeros((D, 2)).at[0, 0].set(9.0),
        "experts": {k: v[:2] for k, v in w["experts"].items()},
    }
    x = jnp.ones((1, 8, D))
    y, load = jax.jit(functools.partial(moe, config=config))(x, jnp.ones((1, 8), bool), w)
    assert (
        float(load.dropped) == 6 and (np.abs(y[0]).sum(-1) > 0).tolist() == [True] * 2 + [False] * 6
    )


def test_the_one_token_of_a_decoding_step_is_on_every_shard_of_the_sequence():
    w, (x, mask) = weights(), inputs()
    with jax.set_mesh(make_mesh(MESHES["context"])):
        y, load = jax.jit(functools.partial(moe, config=CONFIG))(x[:, :1], mask[:, :1], w)
    want, counts = loop(x[:, :1], mask[:, :1], w, CONFIG)
    np.testing.assert_allclose(y, want, atol=2e-5)
    np.testing.assert_array_equal(load.load, counts)


def test_the_bias_moves_towards_balance_and_weighs_nothing():
    load = Load(jnp.array([10.0]), jnp.array([[8.0, 1.0, 1.0]]), jnp.zeros((1, 3)), jnp.zeros(1))
    config = MoEConfig(num_experts=3, per_token=1, router="sigmoid", bias_rate=0.01)
    bias = jnp.array([[0.5, 0.0, -0.5]])
    value, grad = jax.value_and_grad(lambda b: balance(load, b, config))(bias)
    assert float(value) == 0
    params = {"layers": {"mlp": {"router_bias": bias, "router": jnp.ones((1, 2, 3))}}}
    biases = Axes(("layers", "router"), decays=False)
    matrices = Axes(("layers", "embed", "router"), decays=True)
    axes = {"layers": {"mlp": {"router_bias": biases, "router": matrices}}}
    grads = {"layers": {"mlp": {"router_bias": grad, "router": jnp.ones((1, 2, 3))}}}
    tx = make_optimizer(OptimConfig(schedule="constant"), 10, axes, 0.01)
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes whole numbers and floats
        updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(
        updates["layers"]["mlp"]["router_bias"], [[-0.01, 0.01, 0.01]], rtol=1e-6
    )
    one = jax.random.normal(jax.random.key(0), (4, D))
    plain, biased = (
        route(one, weights()["router"], b, CONFIG) for b in (jnp.zeros(E), jnp.full(E, 0.3))
    )
    np.testing.assert_array_equal(plain[1], biased[1])
    np.testing.assert_allclose(plain[0], biased[0], rtol=1e-6)


MODEL = ModelConfig(
    vocab_size=40, max_length=16, num_layers=3, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48, dtype="float32",
    mtp_modules=1, moe=dataclasses.replace(CONFIG, first_dense=1, num_shared=1, aux_coef=0.01, bias_rate=0.01),
)  # fmt: skip


def two_updates(mesh_config, num_micro=1):
    """(losses, parameters) after two updates of packed, padded rows."""
    mesh = make_mesh(
        mesh_config, jax.devices()[: 1 if mesh_config.data == 1 and mesh_config.expert == 1 else 8]
    )
    whole, axes = transformer.abstract(MODEL), transformer.axes(MODEL)
    tx = make_optimizer(OptimConfig(learning_rate=1e-2, eps=1e-3), 10, axes, MODEL.moe.bias_rate)
    placed = train.state_layout(mesh, whole, axes, tx)
    ids = jax.random.randint(jax.random.key(3), (8, 16), 3, 40)
    segments = jnp.array([[1] * 6 + [2] * 7 + [0] * 3] * 8, jnp.int32)
    positions = jnp.array([[*range(6), *range(7), 0, 0, 0]] * 8, jnp.int32)
    batch = {
        "tokens": ids,
        "segment_ids": segments,
        "positions": positions,
        "loss_mask": segments > 0,
    }
    batch = {k: jax.device_put(v, activation(mesh, "batch", None)) for k, v in batch.items()}
    with jax.set_mesh(mesh):
        init = jax.jit(
            functools.partial(transformer.init, MODEL),
            out_shardings=param_shardings(mesh, whole, axes),
        )
        state = placed.init(init(jax.random.key(0)))
        run = functools.partial(loss, model=MODEL, mtp_coef=0.3)
        step = train.make_step(run, tx, num_micro=num_micro, state_shardings=placed.shardings)
        found = []
        for _ in range(2):
            state, metrics = step(state, batch, base={})
            found.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return found, jax.tree.map(np.asarray, state.params)


@pytest.mark.slow
def test_training_on_a_mesh_equals_one_device():
    """With a bias that balances and further predictions; every axis and several together: tests/test_sharded.py."""
    alone, params = two_updates(MeshConfig(data=1))
    together, sharded = two_updates(MESHES["mixed"])
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    bias = params["layers"]["mlp"]["router_bias"]
    assert (
        set(np.round(np.unique(np.abs(bias)), 4))
        <= {np.float32(0.0), np.float32(0.01), np.float32(0.02)}
        and bias.any()
    )
    for a, b in zip(*map(jax.tree.leaves, (sharded, params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "case", [c if c == "mixtral" else pytest.param(c, marks=pytest.mark.life) for c in TRAINED]
)
def test_fifty_steps_equal_a_plain_pytorch_loop(case):
    model, _, params = load(case)
    axes = transformer.axes(model)
    tx = make_optimizer(OptimConfig(learning_rate=1e-3, schedule="constant"), STEPS, axes)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    placed = train.state_layout(mesh, transformer.abstract(model), axes, tx)
    with jax.set_mesh(mesh):
        state = placed.init(jax.tree.map(jnp.copy, params))
        run = functools.partial(loss, model=model)
        step = train.make_step(run, tx, state_shardings=placed.shardings)
        ones, positions = (
            np.ones((BATCH, LENGTH), np.int32),
            np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)),
        )
        for number, want in enumerate(RECORD[case]["curve"]):
            batch = {
                "tokens": tokens(100 + number, BATCH),
                "segment_ids": ones,
                "positions": positions,
                "loss_mask": ones > 0,
            }
            state, metrics = step(state, batch, base={})
            assert abs(float(metrics["loss"][0] / metrics["loss"][1]) - want) < 1e-3, number
