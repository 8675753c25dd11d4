"""Facts that parameters state where they are made: which ones decay, and how many dimensions an adapter sums over."""

import jax
import pytest

from jaxllm.config import build
from jaxllm.models import lora, scalar, transformer
from jaxllm.models.config import PRESETS, ModelConfig
from jaxllm.models.parameters import Axes
from jaxllm.models.parts_config import LoRAConfig
from jaxllm.optim import decay_mask
from jaxllm.pretrained import family_config
from tests.pretrained.test_families import RECORD

# By name, for comparison: optimizer states and adapters of earlier checkpoints depend on both.
MATRICES = {"tokens", "positions", "project", "q", "k", "v", "out", "gate", "up", "down", "router"}
MATRICES |= {"q_a", "q_b", "kv_a", "kv_b", "kernel", "a", "b"}
VECTORS = {"scale", "bias", "router_bias"}
VECTORS |= {f"{name}_bias" for name in ("q", "k", "v", "out", "gate", "up", "down")}
NUM_INPUTS = dict.fromkeys(LoRAConfig().targets, 1) | {"out": 2}

MODELS = {name: build(ModelConfig, {"preset": name, "vocab_size": 256}) for name in PRESETS}
MODELS |= {
    name: family_config.from_hf(record["config"], name)[0] for name, record in RECORD.items()
}
MODELS["mtp"] = build(ModelConfig, {"preset": "deepseek-v3", "mtp_modules": 1})
WITH_ADAPTERS = LoRAConfig(rank=4)


def check_decay(shapes, axes):
    """Every parameter has axes, one for each dimension, and decays if it is a matrix."""
    mask = decay_mask(axes)
    assert jax.tree.structure(mask) == jax.tree.structure(shapes) == jax.tree.structure(axes)
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    for (path, decays), leaf, names in zip(
        leaves, jax.tree.leaves(shapes), jax.tree.leaves(axes), strict=True
    ):
        assert decays == (path[-1].key in MATRICES) == (path[-1].key not in VECTORS)
        assert isinstance(names, Axes) and len(names) == leaf.ndim


def adapters_by_name(stack):
    """{path of a matrix: (shape of its adapter's a, of its b)}."""
    if "a" in stack:
        return {(): (stack["a"].shape, stack["b"].shape)}
    return {
        (name, *path): shapes
        for name, value in stack.items()
        for path, shapes in adapters_by_name(value).items()
    }


def matrices_by_name(stack):
    """{path: shape} of the matrices that have an adapter: all but those of routed experts."""
    matrices = {}
    for name, value in stack.items():
        if isinstance(value, dict) and name != "experts":
            matrices |= {(name, *path): shape for path, shape in matrices_by_name(value).items()}
        elif name in NUM_INPUTS:
            matrices[name,] = value.shape
    return matrices


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_that_decay_and_the_shapes_of_adapters(name):
    model = MODELS[name]
    for family in (transformer, scalar):
        shapes, axes = family.abstract(model), family.axes(model)
        check_decay(shapes, axes)
        own, own_axes = lora.trained(WITH_ADAPTERS, shapes, axes)
        check_decay(own, own_axes)
        adapters, params = (own["trunk"], shapes["trunk"]) if "trunk" in own else (own, shapes)
        assert adapters["lora"].keys() == {"dense_layers", "layers"} & params.keys()
        for stack, tree in adapters["lora"].items():
            want = {}
            for path, (depth, *dims) in matrices_by_name(params[stack]).items():
                inputs = NUM_INPUTS[path[-1]]
                want[path] = ((depth, *dims[:inputs], 4), (depth, 4, *dims[inputs:]))
            assert adapters_by_name(tree) == want
