"""model.dial: one number makes a model and its pre-training, fields of the config win, and the numbers are those published."""

import math

import jax
import pytest

from jaxllm.config import InputError, build, load, to_tree
from jaxllm.life import Config
from jaxllm.models import transformer
from jaxllm.models.config import PRESETS, ModelConfig
from jaxllm.models.parts_config import ScalingConfig
from jaxllm.stages import dial
from tests.conftest import ROOT


def config(position, pretrain=None, **model):
    tree = {"model": {"dial": position, **model}}
    return build(Config, tree | ({"pretrain": pretrain} if pretrain else {}))


def in_matrices(model):
    """Parameters of the layers' matrices, counted in the model itself."""
    trees = transformer.abstract(model)["layers"], transformer.axes(model)["layers"]
    pairs = zip(*map(jax.tree.leaves, trees), strict=True)
    return sum(math.prod(leaf.shape) for leaf, axes in pairs if axes.num_inputs)


@pytest.mark.parametrize("position", [1, 2, 5, 12, 32])
def test_one_number_sets_shape_tokens_batch_and_optimizer(position):
    life = config(position)
    model, pretrain, optim = life.model, life.pretrain, life.pretrain.optim
    assert (model.num_layers, model.embed_dim) == (position, 64 * position)
    assert model.num_heads * 64 == model.num_kv_heads * 64 == model.embed_dim
    assert (model.head_dim, model.mlp_dim) == (64, 192 * position)
    assert model.scaling == ScalingConfig(256, 4)
    assert model.init_std == 1 / 16

    parameters = in_matrices(model)
    row = model.max_length
    # DeepSeek LLM's law is of the compute: 6 P per token, 20 P tokens. A power of two is at most sqrt(2) away.
    law = 0.2920 * (6 * parameters * 20 * parameters) ** 0.3271
    tokens = pretrain.batch_size * row
    assert 2**-0.51 < tokens / max(law, row) < 2**0.51
    assert pretrain.batch_size.bit_count() == 1
    steps = pretrain.num_steps
    assert (steps - 1) * tokens < 20 * parameters <= steps * tokens
    assert optim.warmup_steps == steps // 10
    assert (optim.schedule, optim.final_fraction) == ("linear", 0.0)
    assert optim.learning_rate == config(1).pretrain.optim.learning_rate
    # AdamW's average reaches back over a fifth of the steps.
    assert 1 / (optim.learning_rate * optim.weight_decay) == pytest.approx(steps / 5)


@pytest.mark.parametrize("preset", ["", "gpt2", "llama3-8b", "qwen3-8b"])
def test_it_sizes_any_dense_family(preset):
    model = config(3, preset=preset, vocab_size=100).model
    assert dial.matrix_parameters(model) == in_matrices(model)
    same = {
        "vocab_size",
        "num_layers",
        "embed_dim",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "mlp_dim",
    }
    for name in set(PRESETS.get(preset, {})) - same:
        assert getattr(model, name) == getattr(build(ModelConfig, {"preset": preset}), name)


def test_fields_of_the_config_win_and_the_others_follow_them():
    life = config(4, {"batch_size": 24, "length": 64}, num_layers=6, max_length=128)
    assert (life.model.num_layers, life.model.embed_dim) == (6, 256)
    assert life.pretrain.batch_size == 24
    assert life.pretrain.num_steps == math.ceil(20 * in_matrices(life.model) / (24 * 64))
    own = {"num_steps": 50, "optim": {"learning_rate": 0.5, "schedule": "cosine"}}
    optim = config(4, own).pretrain.optim
    assert (optim.learning_rate, optim.schedule, optim.warmup_steps) == (0.5, "cosine", 5)
    assert optim.weight_decay == pytest.approx(5 / (0.5 * 50))
    assert config(4, {"optim": {"weight_decay": 0.0}}).pretrain.optim.weight_decay == 0
    fewer = config(4, tokens_per_parameter=5)
    assert fewer.pretrain.num_steps * fewer.pretrain.batch_size * 256 < 6 * in_matrices(fewer.model)
    # Only pretrain is the dial's.
    assert life.sft == build(Config, {}).sft


def test_a_resolved_config_is_the_same_config():
    life = config(6)
    assert build(Config, to_tree(life)) == life
    assert build(ModelConfig, to_tree(life.model)) == life.model
    assert build(ModelConfig, {"dial": 6}) == life.model


def test_the_position_is_read_as_the_field_is():
    whole = build(Config, {"model": {"dial": 4}})
    assert build(Config, {"model": {"dial": 4.0}, "pretrain": None}) == whole
    for tree in ({"model": True}, {"model": {"dial": 4}, "pretrain": []}, {"model": [["dial", 4]]}):
        with pytest.raises(InputError, match="input should be a dictionary"):
            build(Config, tree)


def test_configs_without_a_dial_have_no_rules():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        model = load(Config, path).model
        assert (model.scaling != ScalingConfig()) == (path.stem == "dial")
        assert bool(model.dial) == (path.stem == "dial")


REFUSED = [
    ({"model": {"dial": -1}}, "model.dial: must be at least 0"),
    ({"model": {"dial": 2.5}}, "model.dial"),
    ({"model": {"dial": True}}, "model.dial"),
    ({"model": {"dial": 1000}}, "model.dial: must be at most 512"),
    ({"model": {"dial": 4, "tokens_per_parameter": 0}}, "model.tokens_per_parameter"),
    ({"model": {"dial": 4}, "pretrain": {"num_epochs": 2}}, "pretrain.num_epochs: model.dial counts tokens"),
    ({"model": {"dial": 4}, "pretrain": {"num_stepz": 2}}, "pretrain.num_stepz: unknown key"),
    ({"model": {"dial": 4}, "pretrain": {"length": 512}}, "pretrain.length: 512 tokens exceed"),
    ({"model": {"dial": 4}, "pretrain": {"optim": {"kind": "lion"}}}, "no learning rate for lion"),
    ({"model": {"dial": 4, "preset": "mixtral-8x7b"}}, "model.dial: sets the sizes of dense models"),
    ({"model": {"dial": 4}, "ppo": {"actor": {"kind": "sgd"}}}, "ppo.actor.kind: sgd has no rules"),
    ({"model": {"dial": 4, "preset": "gemma2-2b"}}, "norm_offset"),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "said"), REFUSED, ids=str)
def test_refused_in_one_line(tree, said):
    with pytest.raises(InputError, match=said) as error:
        build(Config, tree)
    assert "\n" not in str(error.value)


def test_another_kind_with_a_learning_rate_of_its_own():
    optim = {"kind": "lion", "learning_rate": 1e-3}
    assert config(4, {"optim": optim}).pretrain.optim.kind == "lion"
