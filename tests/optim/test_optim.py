"""Every kind of optimizer: as its paper in NumPy, sharded as on one device, and with what surrounds it."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm import train
from jaxllm.config import build
from jaxllm.models import lora, scalar, transformer
from jaxllm.models.config import PRESETS, ModelConfig
from jaxllm.models.parameters import Axes
from jaxllm.models.parts_config import LoRAConfig, MoEConfig
from jaxllm.optim import make_optimizer
from jaxllm.optim.adafactor import scale_by_adafactor
from jaxllm.optim.muon import scale_by_muon
from jaxllm.optim_config import OptimConfig
from jaxllm.rl.config import PPOConfig
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from tests.optim.reference import KINDS, Adam

MODEL = ModelConfig(
    vocab_size=64,
    max_length=16,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    mlp_dim=24,
    moe=MoEConfig(num_experts=32, per_token=2, router="sigmoid", bias_rate=0.01),
)
# The leaves of a model that differ in their dimensions -> (stacked dimensions, inputs) of matrices; tables are their own.
ROLES = {
    ("embed", "tokens"): "table",
    ("layers", "attention", "q"): (1, 1),
    ("layers", "attention", "out"): (1, 2),
    ("layers", "mlp", "experts", "down"): (2, 1),
    ("layers", "mlp", "router"): (1, 1),
    ("layers", "mlp", "router_bias"): None,
    ("layers", "mlp_norm", "scale"): None,
}
BIAS = ("layers", "mlp", "router_bias")


def only(tree, paths=ROLES):
    """The leaves at these paths, as a tree."""
    found = {}
    for path in paths:
        branch = found
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = functools.reduce(lambda part, name: part[name], path, tree)
    return found


AXES, SHAPES = only(transformer.axes(MODEL)), only(transformer.abstract(MODEL))


def draw(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), SHAPES)


def loss(params, batch, key):
    """The gradient is params - the mean of the batch's rows: with one row the same bits on any mesh."""
    del key
    square = sum(
        jnp.square(p[None] - rows).sum()
        for p, rows in zip(jax.tree.leaves(params), jax.tree.leaves(batch), strict=True)
    )
    weight = jnp.float32(len(jax.tree.leaves(batch)[0]))
    return square / 2, weight, {"loss": (square, weight)}


def as_rows(*targets):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *targets)


def config(kind, **changes):
    # longest_basis: a side longer than the other one has null vectors at first, which any basis may turn.
    fields = {"learning_rate": 0.03, "schedule": "constant", "basis_every": 2, "longest_basis": 16}
    return OptimConfig(**{"kind": kind, **fields, **changes})


def run(settings, targets, sizes=(), axes=AXES, bias_rate=0.0, num_micro=1):
    """The state after an update for each target, on a mesh of these sizes."""
    sizes = dict(sizes)
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: math.prod(sizes.values())])
    tx = make_optimizer(settings, 10, axes, bias_rate)
    layout = train.state_layout(mesh, SHAPES, axes, tx)
    step = train.make_step(loss, tx, state_shardings=layout.shardings, num_micro=num_micro)
    with jax.set_mesh(mesh):
        state = layout.init(jax.device_put(draw(0), layout.shardings.params))
        for target in targets:
            state, _ = step(state, target)
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(layout.shardings), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return jax.tree.map(np.asarray, state)


def close(ours, theirs, limit):
    """Every leaf, against its own largest value."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.abs(x - y).max() / (np.abs(y).max() + 1e-12)
        assert error < limit, f"{jax.tree_util.keystr(path)}: {error}"


# --- The kinds.

CASES = [(kind, {}) for kind in KINDS]
CASES += [("muon", {"muon_scaling": "width"}), ("soap", {"rest_learning_rate": 0.01})]


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=str)
def test_updates_are_those_of_numpy_and_one_that_is_not_finite_is_skipped(kind, changes):
    settings = config(kind, clip_norm=0.0, **changes)
    targets = [draw(1 + n) for n in range(5)]
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), targets[0])
    # In the middle: those after it are as if it had never been.
    state = run(settings, [as_rows(target) for target in (*targets[:3], bad, *targets[3:])])
    assert (state.step, state.guard.taken) == (6, 5)
    for path, role in ROLES.items():
        reference = KINDS[kind]
        if kind in ("muon", "soap") and not isinstance(role, tuple):
            reference = Adam
        own = settings
        if reference is Adam and settings.rest_learning_rate:
            own = dataclasses.replace(settings, learning_rate=settings.rest_learning_rate)
        leaf = lambda tree, path=path: functools.reduce(lambda part, name: part[name], path, tree)
        want = reference(
            leaf(draw(0)), (0, 1) if role == "table" else role, own, decays=role is not None
        )
        for target in targets:
            # The gradient of a router's bias is taken where the bias is, also in schedule_free.
            point = want.x if path == BIAS else want.point()
            want.update(point - leaf(target))
        got = leaf(state.params)
        error = np.abs(got - want.x).max() / np.abs(want.x - leaf(draw(0))).max()
        assert error < 2e-4, f"{path}: {error}"


MESHES = [
    (("fsdp", 2), ("expert", 2), ("tensor", 2)),
    pytest.param((("pipeline", 2), ("data", 2), ("fsdp", 2)), marks=pytest.mark.life),
]


@functools.cache
def on_mesh(kind, sizes):
    # The clipped gradient depends on the order of a sum, and eigenvectors turn by far more than its last bit.
    settings = config(kind, clip_norm=0.0 if kind == "soap" else 1.0)
    # The state as well: it may come back on another mesh.
    return run(settings, [as_rows(draw(1 + n)) for n in range(4)], sizes)[1:3]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_equals_single_device(kind, sizes):
    close(on_mesh(kind, sizes), on_mesh(kind, ()), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_biases_of_routers_move_by_their_own_rule(kind):
    """Against the sign of their gradient, whatever else learns how; and the gradient is taken where they are."""
    targets = [draw(1 + n) for n in range(3)]
    state = run(config(kind), [as_rows(target) for target in targets], bias_rate=0.01)
    bias, *aims = (
        only(tree, [BIAS])["layers"]["mlp"]["router_bias"] for tree in (draw(0), *targets)
    )
    for aim in aims:
        bias = bias - np.float32(0.01) * np.sign(bias - aim)
    np.testing.assert_allclose(state.params["layers"]["mlp"]["router_bias"], bias, atol=1e-6)


@pytest.mark.parametrize("kind", ["muon", "adafactor", "schedule_free"])
def test_microbatches_add_up(kind):
    batch = as_rows(*[draw(1 + n) for n in range(4)])
    whole = run(config(kind), [batch, batch])
    close(run(config(kind), [batch, batch], num_micro=2).params, whole.params, 1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon", "lion", "sgd"])
def test_moments_in_bfloat16_take_half_the_bytes(kind):
    targets = [as_rows(draw(1 + n)) for n in range(3)]
    narrow = run(config(kind, state_dtype="bfloat16"), targets)
    wide = run(config(kind), targets)
    floats = lambda state: [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert {x.dtype.name for x in floats(narrow)} == {"bfloat16"}
    assert sum(x.nbytes for x in floats(wide)) == 2 * sum(x.nbytes for x in floats(narrow))
    # Lion takes signs, of which a few turn.
    moved = lambda state: np.concatenate(
        [
            np.ravel(x - y)
            for x, y in zip(*map(jax.tree.leaves, (state.params, draw(0))), strict=True)
        ]
    )
    error = np.linalg.norm(moved(narrow) - moved(wide)) / np.linalg.norm(moved(wide))
    assert error < (0.1 if kind == "lion" else 0.02)


# --- What is a matrix.

MATRICES = {"project", "q", "k", "v", "out", "gate", "up", "down", "router"}
MATRICES |= {"q_a", "q_b", "kv_a", "kv_b", "a", "b"}
MODELS = {name: build(ModelConfig, {"preset": name, "vocab_size": 256}) for name in PRESETS}
MODELS["mtp"] = build(ModelConfig, {"preset": "deepseek-v3", "mtp_modules": 1})


@pytest.mark.parametrize("name", MODELS)
def test_muon_gets_the_matrices_and_nothing_else(name):
    """Of layers, experts and adapters; never embeddings, the head, norms, biases or a scalar head."""
    model = MODELS[name]
    for family in (transformer, scalar):
        shapes, axes = family.abstract(model), family.axes(model)
        for trained, names in (
            (shapes, axes),
            lora.trained(LoRAConfig(rank=4), shapes, axes),
        ):
            tx = make_optimizer(config("muon"), 10, names)
            state = jax.eval_shape(tx.init, trained)
            muon = optax.tree.get(state, "momentum")
            want = {
                path
                for path, _ in jax.tree_util.tree_leaves_with_path(trained)
                if path[-1].key in MATRICES
            }
            assert {path for path, _ in jax.tree_util.tree_leaves_with_path(muon)} == want
            assert want


def test_shapes_alone_would_choose_wrongly():
    """Optax's Muon without dimension numbers: the embedding, and of the layers norms and router biases."""
    state = optax.contrib.muon(1e-3).init(jax.tree.map(jnp.asarray, draw(0)))
    momentum = optax.tree.get(state, "mu", filtering=lambda path, _: "'muon'" in str(path))
    taken = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(momentum)}
    assert taken == {"tokens", "router_bias", "scale"}


@pytest.mark.parametrize("name", MODELS)
def test_matrices_have_inputs_and_outputs(name):
    """num_inputs dimensions are summed over; stacked dimensions count layers, modules and experts, and nothing else."""
    for names in jax.tree.leaves(transformer.axes(MODELS[name])):
        if names.num_inputs:
            assert set(names.stack) <= {"layers", "modules", "experts"}
            assert not {"layers", "modules", "experts"} & {*names.inputs, *names.outputs}
            assert names.inputs and names.outputs
            assert ("embed" in names.inputs) != ("embed" in names.outputs) or "embed" not in names


# --- Optax's own, where it can say the same.


def test_muon_is_that_of_optax_with_dimension_numbers():
    paths = [path for path, role in ROLES.items() if isinstance(role, tuple)]
    axes = only(transformer.axes(MODEL), paths)
    numbers = jax.tree.map(
        lambda names: optax.contrib.MuonDimensionNumbers(
            tuple(range(names.num_stacked, names.num_stacked + names.num_inputs)),
            tuple(range(names.num_stacked + names.num_inputs, len(names))),
        ),
        axes,
    )
    theirs = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=numbers),
        optax.contrib._muon.scale_by_shape(numbers, consistent_rms=0.2),
    )
    params = only(draw(0), paths)
    ours = scale_by_muon(0.95, "rms", axes)
    mine, other = ours.init(params), theirs.init(params)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for n in range(3):
            grads = jax.tree.map(jnp.asarray, only(draw(1 + n), paths))
            moves, mine = ours.update(grads, mine)
            want, other = theirs.update(grads, other)
            close(moves, want, 1e-4)


def test_schedule_free_is_that_of_optax():
    settings = config("schedule_free", weight_decay=0.0, clip_norm=0.0)
    paths = ROLES.keys() - {BIAS}  # whose gradient is taken where it is
    ours = make_optimizer(settings, 10, only(transformer.axes(MODEL), paths))
    theirs = optax.contrib.schedule_free_adamw(settings.learning_rate, b1=0.9, b2=0.95)
    x = y = jax.tree.map(jnp.asarray, only(draw(0), paths))
    mine, other = ours.init(x), theirs.init(y)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for n in range(5):
            close(ours.gradient_point(x, mine), y, 1e-5)
            grads = jax.tree.map(jnp.asarray, only(draw(1 + n), paths))
            moves, mine = ours.update(grads, mine, x)
            x = optax.apply_updates(x, moves)
            moves, other = theirs.update(grads, other, y)
            y = optax.apply_updates(y, moves)
            close(x, optax.contrib.schedule_free_eval_params(other, y), 1e-5)


def test_adafactor_is_that_of_optax_for_one_matrix():
    theirs = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0)
    )
    ours = scale_by_adafactor({"x": Axes(("embed", "mlp"), decays=True, num_inputs=1)})
    rng = np.random.default_rng(0)
    params = {"x": jnp.zeros((24, 16))}
    mine, other = ours.init(params), theirs.init(params)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for _ in range(4):
            grads = {"x": jnp.asarray(rng.standard_normal((24, 16)), jnp.float32)}
            moves, mine = ours.update(grads, mine)
            want, other = theirs.update(grads, other, params)
            close(moves, want, 1e-5)


def test_adafactor_keeps_rows_and_columns_only():
    state = jax.eval_shape(scale_by_adafactor(AXES).init, SHAPES)
    size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    assert size(state) < 0.2 * size(SHAPES)
    q = lambda tree: tree["layers"]["attention"]["q"]
    assert (q(state.row_mean).shape, q(state.column_mean).shape) == ((2, 16), (2, 4, 4))


# --- What Muon's matrices cost on a mesh.


def test_no_device_gathers_a_stack():
    """Shards are exchanged: all-to-all, and no all-gather."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices())
    paths = [path for path, role in ROLES.items() if isinstance(role, tuple)]
    axes, shapes = only(transformer.axes(MODEL), paths), only(SHAPES, paths)
    tx = make_optimizer(config("muon", clip_norm=0.0), 10, axes)
    layout = train.state_layout(mesh, shapes, axes, tx)
    with jax.set_mesh(mesh):
        abstract = layout.abstract
        with jax.numpy_dtype_promotion("standard"):
            lowered = jax.jit(
                tx.update, out_shardings=(layout.shardings.params, layout.shardings.opt_state)
            ).lower(abstract.params, abstract.opt_state, abstract.params)
        text = lowered.compile().as_text()
    assert re.search(r"\ball-to-all(-start)?\(", text)
    assert not re.search(r"\ball-gather(-start)?\(", text)


# --- Refusals.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "schedule_free"}, "schedule: schedule_free averages instead of decaying"),
        ({"rest_learning_rate": 1e-3}, "rest_learning_rate: adamw has one learning rate"),
        *(
            ({"kind": kind, "state_dtype": "bfloat16", "schedule": "constant"}, f"state of {kind}")
            for kind in ("soap", "adafactor", "schedule_free")
        ),
        (
            {"kind": "sgd", "momentum": 0.999, "state_dtype": "bfloat16"},
            "bfloat16 needs momentum of at most 0.99",
        ),
        (
            {"kind": "lion", "b2": 0.999, "state_dtype": "bfloat16"},
            "bfloat16 needs b2 of at most 0.99",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OptimConfig(**fields)


def test_a_policy_that_samples_is_the_one_that_learns():
    averaged = OptimConfig(kind="schedule_free", schedule="constant")
    for role in ("actor", "critic"):
        with pytest.raises(ValueError, match=f"{role}.kind: schedule_free"):
            PPOConfig(**{role: averaged})
