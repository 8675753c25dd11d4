"""Sharded == single: hidden states, loss, gradients and one update, whatever the mesh, within 1e-5 in float32."""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest

from jaxllm import output_layer, train
from jaxllm.models import layers, moe, next_token, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.parts_config import MoEConfig
from jaxllm.optim import make_optimizer
from jaxllm.optim_config import OptimConfig
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import activation

B, T = 8, 16
DENSE = ModelConfig(
    vocab_size=64, max_length=T, num_layers=2, embed_dim=32, num_heads=8, num_kv_heads=4, mlp_dim=64, dtype="float32"
)  # fmt: skip
EXPERTS = MoEConfig(num_experts=8, per_token=3, mlp_dim=24, num_shared=1, aux_coef=0.1)
DROPLESS = dataclasses.replace(DENSE, moe=EXPERTS, tie_embeddings=False)
with_capacity = lambda factor: dataclasses.replace(
    DROPLESS, moe=dataclasses.replace(EXPERTS, capacity_factor=factor)
)
WINDOWED = dataclasses.replace(DENSE, num_layers=4, window=5, global_every=2)
ROOMY, TIGHT = with_capacity(8.0), with_capacity(0.5)  # room for all tokens; many are dropped

ALONE = [{"data": 8}, {"pipeline": 2}, {"fsdp": 8}, {"context": 8}, {"expert": 8}, {"tensor": 4}]
TOGETHER = [  # every pair of axes is in one of them
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "context": 2, "expert": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"context": 2, "expert": 2, "tensor": 2},
]
# A capacity is one of the tokens that meet on a device: the same ones are dropped only where all of them do.
MEETING = [{"expert": 4, "tensor": 2}, {"expert": 8}, {"tensor": 4}]
STAGES = [{"data": 2, "pipeline": 2, "tensor": 2}, {"pipeline": 2, "fsdp": 2, "context": 2}]
CASES = {
    "WINDOWED": [{"pipeline": 4, "fsdp": 2}, {"context": 4}],
    "DENSE": [*ALONE, *TOGETHER, *STAGES],
    "DROPLESS": [
        *ALONE[1:],
        {"pipeline": 2, "fsdp": 2, "expert": 2},
        TOGETHER[1],
        TOGETHER[3],
        TOGETHER[0],
        TOGETHER[2],
        TOGETHER[4],
        ALONE[0],
    ],
    "ROOMY": [TOGETHER[1], {"context": 8}],
    "TIGHT": MEETING,
}
IN_SUITE = {
    "WINDOWED": 1,
    "DENSE": 9,
    "DROPLESS": 6,
    "ROOMY": 0,
    "TIGHT": 1,
}  # so many from the beginning; the others are slow
DEFAULT = [("DENSE", TOGETHER[0]), ("DROPLESS", TOGETHER[3])]


def marks(name, number):
    """The default tier has one mesh of each kind of model, --life the first of each list, --slow all."""
    if (name, CASES[name][number]) in DEFAULT:
        return []
    return pytest.mark.life if number < IN_SUITE[name] else pytest.mark.slow


EVERY = [
    pytest.param(name, sizes, marks=marks(name, number))
    for name, meshes in CASES.items()
    for number, sizes in enumerate(meshes)
]


def rows(kind):
    """packed: three documents a row and padding behind them; padded: one, with padding before or behind it."""
    rng = np.random.default_rng(len(kind))
    places, cut = np.arange(T)[None], np.sort(rng.integers(1, T, size=(B, 3)), axis=1)
    ends = (places >= cut[:, :1]).astype(int) + (places >= cut[:, 1:2])
    segments = np.where(places < cut[:, 2:], ends + 1, 0)
    if kind == "padded":
        behind = places < cut[:, 1:2]
        segments = np.where(np.arange(B)[:, None] % 2 == 0, behind, behind[:, ::-1]).astype(int)
    starts = np.maximum.accumulate(
        np.where(np.diff(segments, axis=1, prepend=-1) != 0, places, 0), axis=1
    )
    mask = (segments > 0) & (rng.random((B, T)) < rng.random((B, 1)))
    mask[3] = False  # a row without a target
    tokens = rng.integers(0, DENSE.vocab_size, size=(B, T))
    whole = {
        "tokens": tokens,
        "segment_ids": segments,
        "positions": np.where(segments > 0, places - starts, 0),
    }
    return {**{k: v.astype(np.int32) for k, v in whole.items()}, "loss_mask": mask}


@functools.cache
def first_params(model):
    """Drawn by NumPy, norms and all: nothing to compile, and no scale is 1."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), transformer.abstract(model)
    )


@functools.cache
def outcome(model, sizes):
    """{kind of rows: {what: arrays}} on a mesh of these sizes."""
    mesh = make_mesh(
        MeshConfig(**{"data": 1, **dict(sizes)}), jax.devices()[: math.prod(n for _, n in sizes)]
    )
    # Adam's first update is g / (|g| + eps): with the usual eps the sign of g, which jumps where g is 0. With an eps as
    # large as gradients are it can be compared as they can.
    axes = transformer.axes(model)
    tx = make_optimizer(OptimConfig(learning_rate=0.1, schedule="constant", eps=1e-2), 10, axes)
    placed = train.state_layout(mesh, transformer.abstract(model), axes, tx)
    loss = functools.partial(next_token.loss, model=model, z_loss_coef=1e-3)
    step = train.make_step(loss, tx, state_shardings=placed.shardings)

    @jax.jit
    def measure(state, batch):
        hidden = transformer.apply(
            state.params, model, batch["tokens"], batch["segment_ids"], batch["positions"]
        )
        return hidden, *step(state, batch, base={})

    found = {}
    with jax.set_mesh(mesh):
        for kind in ("packed", "padded"):
            state = placed.init(jax.device_put(first_params(model), placed.shardings.params))
            batch = {
                k: jax.device_put(v, activation(mesh, "batch", None)) for k, v in rows(kind).items()
            }
            hidden, new, metrics = measure(state, batch)
            for leaf, sharding in zip(
                jax.tree.leaves(new), jax.tree.leaves(placed.shardings), strict=True
            ):
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            update = jax.tree.map(
                np.subtract, *jax.tree.map(np.asarray, (new.params, state.params))
            )
            # Adam's first moment is 0.1 of the gradient, clipped by the norm of all of it.
            gradient = optax.tree.get(new.opt_state, "mu")
            found[kind] = {
                "hidden": hidden,
                "metrics": metrics,
                "gradient": gradient,
                "update": update,
            }
    return jax.tree.map(np.asarray, found)


def close(ours, theirs, limit=1e-5):
    """Every leaf, against its own largest value."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.abs(x - y).max() / (np.abs(y).max() + 1e-12)
        assert error < limit, f"{jax.tree_util.keystr(path)}: {error}"


@pytest.mark.parametrize(("name", "sizes"), EVERY, ids=str)
def test_sharded_equals_single(name, sizes):
    model = globals()[name]
    close(outcome(model, tuple(sizes.items())), outcome(model, ()))


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        pytest.param({"fsdp": 2, "context": 2, "tensor": 2}, marks=pytest.mark.life),
        pytest.param({"fsdp": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.life),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "model", [DENSE, pytest.param(DROPLESS, marks=pytest.mark.life)], ids=["dense", "experts"]
)
def test_what_goes_in_blocks_equals_what_goes_at_once(model, sizes, monkeypatch):
    """Blocks of the vocabulary, one of them short, and with remat full of hidden units and of experts' tokens."""
    whole = dataclasses.replace(model, vocab_size=66)
    want, cut = outcome(whole, ()), dataclasses.replace(whole, remat="full")
    for module, name, size in (
        (output_layer, "_BLOCK_ELEMENTS", 2200),
        (layers, "_MLP_BLOCK", 16),
        (moe, "_ROWS", 24),
    ):
        monkeypatch.setattr(module, name, size)
    assert (
        output_layer.count_blocks(66, 4) == (6, 66)
        and output_layer.count_blocks(66, 7) == (11, 66)
        and output_layer.count_blocks(66, 12) == (22, 66)
    )
    scans = str(
        jax.make_jaxpr(lambda p: transformer.apply(p, cut, np.ones((B, T), np.int32)))(
            first_params(cut)
        )
    )
    assert scans.count("scan[") > 1  # the layers', and one within
    close(outcome(cut, tuple(sizes.items())), want)


@pytest.mark.life
def test_the_tight_capacity_drops_tokens():
    """Or its case would be the roomy one's."""
    for kind in ("packed", "padded"):
        dropped, wanted = outcome(TIGHT, ())[kind]["metrics"]["router/dropped"]
        assert 0.1 < dropped / wanted < 0.9
        assert outcome(ROOMY, ())[kind]["metrics"]["router/dropped"][0] == 0


@pytest.mark.parametrize("model", [DENSE, DROPLESS], ids=["dense", "experts"])
def test_every_parameter_takes_part(model):
    """Or sharding it wrongly would not show."""
    for kind in ("packed", "padded"):
        gradient = outcome(model, ())[kind]["gradient"]
        assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(gradient))
