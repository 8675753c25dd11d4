"""One strict table from logical to mesh axes; nothing replicates by accident; no involuntary rematerialization."""

import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxllm import sharding
from jaxllm.config import InputError
from jaxllm.models import scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import ACT_RULES, PARAM_RULES, spec


def test_every_rule_names_mesh_axes():
    for rules in (PARAM_RULES, ACT_RULES):
        for value in rules.values():
            for axis in (value,) if isinstance(value, str) else value or ():
                assert axis in sharding.MESH_AXES


def test_unknown_axis_and_axis_used_twice_raise():
    with pytest.raises(KeyError):
        spec(("embed", "hedas"), PARAM_RULES)
    with pytest.raises(ValueError, match="twice"):
        spec(("heads", "mlp"), PARAM_RULES)
    assert spec(("embed", None, "heads"), PARAM_RULES) == PartitionSpec(
        ("fsdp", "expert"), None, "tensor"
    )


def test_constrain_checks_the_rank():
    with pytest.raises(ValueError, match="2 axis names for an array of 1"):
        sharding.constrain(jnp.ones(3), "batch", "seq")


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1, 1, 1)),
        (MeshConfig(fsdp=2, tensor=2), (2, 1, 2, 1, 1, 2)),
        (MeshConfig(data=1, fsdp=-1), (1, 1, 8, 1, 1, 1)),
    ],
)
def test_mesh_takes_what_is_left(config, shape):
    assert make_mesh(config).devices.shape == shape


@pytest.mark.parametrize(
    "config", [MeshConfig(data=3), MeshConfig(tensor=3), MeshConfig(data=4, tensor=1)]
)
def test_mesh_that_does_not_divide_is_one_clear_line(config):
    with pytest.raises(InputError, match="does not divide the 8 devices") as error:
        make_mesh(config)
    assert "\n" not in str(error.value)


def test_a_size_that_does_not_divide_names_parameter_and_field():
    model = ModelConfig(
        vocab_size=50, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=64
    )
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    with pytest.raises(
        InputError, match=r"model\.\w+: \d+ does not divide over 8 shards .*in parameter"
    ):
        sharding.param_shardings(mesh, transformer.abstract(model), transformer.axes(model))


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_axes_fit_every_parameter_of_decoder_and_scalar_model(norm):
    gpt = (
        {"position": "learned", "mlp": "gelu", "bias": True, "tie_embeddings": False}
        if norm == "layernorm"
        else {}
    )
    model = ModelConfig(
        vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, norm=norm, **gpt
    )
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for family in (transformer, scalar):
        placed = sharding.param_shardings(mesh, family.abstract(model), family.axes(model))
        pairs = zip(jax.tree.leaves(family.abstract(model)), jax.tree.leaves(placed), strict=True)
        largest = sorted(pairs, key=lambda pair: -pair[0].size)[:3]
        # everything large is split over fsdp and tensor
        assert all(
            math.prod(where.shard_shape(leaf.shape)) * 4 == leaf.size for leaf, where in largest
        )


_PROGRAM = """
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 8)
from jaxllm import losses, output_layer, train
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.optim import OptimConfig, make_optimizer
from jaxllm.runtime.mesh import MeshConfig, make_mesh
from jaxllm.sharding import activation
model = ModelConfig(vocab_size=512, max_length=32, num_layers=2, embed_dim=64, num_heads=4, mlp_dim=128, tie_embeddings={tied})
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
def loss(params, batch, key):
    hidden = transformer.apply(params, model, batch)
    targets, mask = losses.next_token_targets(batch, jnp.ones_like(batch), batch >= 0)
    return losses.language_model(output_layer.token_logprobs(hidden, transformer.head(params), targets), mask)
tx = make_optimizer(OptimConfig(), 10, transformer.axes(model))
placed = train.state_layout(mesh, transformer.abstract(model), transformer.axes(model), tx)
with jax.set_mesh(mesh):
    batch = jax.ShapeDtypeStruct((16, 32), jnp.int32, sharding=activation(mesh, "batch", None))
    train.make_step(loss, tx, state_shardings=placed.shardings).lower(placed.abstract, batch).compile()
print("compiled")
"""


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.life)])
def test_no_involuntary_full_rematerialization(tied):
    """XLA prints this warning from C++, so the program runs in a separate process."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "0"}
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(tied=tied)], env=env, capture_output=True, text=True
    )
    assert "compiled" in run.stdout, run.stderr
    assert "rematerialization" not in run.stderr, run.stderr


@pytest.mark.parametrize(("context", "length"), [(2, 8), (4, 16)])
def test_zigzag_balances_causal_attention_and_is_undone(context, length):
    with jax.set_mesh(make_mesh(MeshConfig(context=context))):
        order = sharding.zigzag_order(length)
        assert order is not None
        restored = sharding.undo_zigzag(jnp.asarray(order)[None])
    if context == 2:
        assert order.tolist() == [0, 1, 6, 7, 2, 3, 4, 5]  # as its docstring draws
    keys_attended_to = (order + 1).reshape(context, -1).sum(axis=1)
    assert len(set(keys_attended_to.tolist())) == 1
    assert restored[0].tolist() == list(range(length))


def test_blocks_take_an_equal_share_of_each_shard():
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2))):
        blocks = sharding.in_blocks(jnp.arange(8)[None], 1, 2)
    assert blocks.tolist() == [[[0, 1, 4, 5]], [[2, 3, 6, 7]]]
