"""Every family == `transformers`, from recordings made by tests/oracles/families.py."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import output_layer
from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.responses import complete
from jaxllm.engine.rollouts import left_pad
from jaxllm.models import transformer
from jaxllm.models.config import PRESETS, preset
from jaxllm.pretrained import families, family_config
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from tests.oracles.families import HERE, VOCAB, probe, tokens, weight

RECORD = json.loads((Path(HERE) / "families.json").read_text())["cases"]
ARRAYS = np.load(Path(HERE) / "families.npz")
CASES = pytest.mark.parametrize("case", RECORD)
# Decoding and padding of every part once; the other families are slow (-m "slow or not slow").
_PARTS = ("gpt2", "llama3", "gemma3", "deepseek_v3")
PARTS = pytest.mark.parametrize(
    "case", [c if c in _PARTS else pytest.param(c, marks=pytest.mark.life) for c in RECORD]
)
MOST = pytest.mark.parametrize(
    "case", [c if c in _PARTS else pytest.param(c, marks=pytest.mark.slow) for c in RECORD]
)


@functools.cache
def load(case: str):
    """(config, family, parameters) of a recorded model."""
    model, family = family_config.from_hf(RECORD[case]["config"], case)
    sizes = {name: tuple(shape) for name, shape in RECORD[case]["tensors"].items()}
    model = family_config.present(model, sizes)
    weights = {name: weight(name, shape) for name, shape in sizes.items()}
    return model, family, parameters(model, family, weights)


def parameters(model, family, weights):
    """Our parameters from a file's tensors {name: array}."""
    leaves = families.file_slices(model, family)

    def leaf(keys, shape):
        array = np.zeros(shape.shape, np.float32)
        path = tuple(key.key for key in keys)
        for index, source in leaves[path].items():
            array[index] = source.to_leaf(weights[source.tensor], shape.shape[len(index) :])
        return jnp.array(array)

    return jax.tree_util.tree_map_with_path(leaf, transformer.abstract(model))


def relative(got, want):
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


def logits_of(params, model, ids, **more):
    hidden = transformer.apply(params, model, ids, **more)
    logits = jnp.einsum("btd,vd->btv", hidden, transformer.head(params))
    return output_layer.softcap(logits, model.logit_softcap)


@CASES
def test_names_and_shapes_are_those_of_the_file(case):
    model, family, _ = load(case)
    want = {name: tuple(shape) for name, shape in RECORD[case]["tensors"].items()}
    assert families.file_shapes(model, family, transformer.abstract(model)) == want


@PARTS
def test_logits_and_every_layers_hidden_state(case):
    model, _, params = load(case)
    ids = jnp.array(tokens(0, 1))
    logits = jax.jit(functools.partial(logits_of, model=model))(params, ids=ids)[0]
    assert relative(logits, ARRAYS[f"{case}/logits"]) < 2e-4
    # The recording holds random projections of the states, which are 5 times smaller.
    mix = np.random.default_rng(7).normal(size=(32, 6)).astype(np.float32)
    states = jax.jit(functools.partial(residual_stream, model=model))(params, ids)
    for depth, (ours, want) in enumerate(zip(states, ARRAYS[f"{case}/hidden"], strict=True)):
        assert relative(ours[0] @ mix, want) < 2e-4, depth


def residual_stream(params, ids, *, model):
    """The hidden state before every layer and after the last one, where it is normalized, as in the recording."""
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    segments = jnp.ones_like(ids)
    states = [transformer.embed(params, model, ids, positions)]
    for name, block, numbers in transformer.stacks(model):
        for i, number in enumerate(numbers):
            weights = jax.tree.map(lambda stacked, i=i: stacked[i], params[name])
            layer = transformer.merge_module(transformer.Block, block, weights)
            states.append(layer(states[-1], positions, segments, model.windowed(number))[0])
    return [*states[:-1], transformer.apply(params, model, ids)]


@PARTS
def test_loss_and_gradients(case):
    model, family, params = load(case)
    ids = jnp.array(tokens(0, 1))

    def loss(params):
        logprobs = jax.nn.log_softmax(logits_of(params, model, ids)[:, :-1], -1)
        return -jnp.take_along_axis(logprobs, ids[:, 1:, None], -1).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(float(value) - RECORD[case]["loss"]) < 1e-4
    shapes = families.file_shapes(model, family, transformer.abstract(model))
    leaf = lambda path: np.asarray(families.pick(grads, path))
    for tensor in families.tensors(model, family):
        found = families.file_value(tensor, shapes[tensor.name], leaf)
        # The recording holds one number per gradient: its product with random noise.
        product = float((found * probe(tensor.name, shapes[tensor.name])).sum())
        error = abs(product - RECORD[case]["gradients"][tensor.name])
        size = float(np.linalg.norm(found)) + 1e-6
        assert error < 1e-3 * size + 1e-5, tensor.name


@MOST
def test_prefill_and_decode_equal_the_full_forward(case):
    """Greedy tokens are those of `transformers`, in rows padded to different lengths."""
    model, _, params = load(case)
    prompt = tokens(0, 1)[0, :12].tolist()
    want = ARRAYS[f"{case}/greedy"].tolist()
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    prompts = [prompt, prompt[:5], [*prompt, *want[:9]]]
    with jax.set_mesh(mesh):
        responses = list(
            complete(
                params,
                model,
                prompts,
                sampling=SamplingConfig(20, 0.0),
                stop_ids=(VOCAB,),  # no token: every response has all 20
                mesh=mesh,
                seed=0,
            )
        )
    assert responses[0][0].ids == want
    assert responses[2][0].ids[:11] == want[9:]


@MOST
def test_left_padded_rows_equal_single_rows(case):
    model, _, params = load(case)
    rows = [tokens(0, 1)[0, :n].tolist() for n in (40, 23, 7)]
    ids, mask = left_pad(rows, 40, 0)
    segments = jnp.array(mask, jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, 1) - 1, 0)
    forward = jax.jit(functools.partial(logits_of, model=model))
    padded = forward(params, ids=jnp.array(ids), segment_ids=segments, positions=positions)
    for i, row in enumerate(rows):
        # One shape for all rows, so that there is one compilation; attention does not see what follows.
        right_padded = np.pad(np.array([row], np.int32), ((0, 0), (0, 40 - len(row))))
        alone = forward(params, ids=jnp.array(right_padded))[0, : len(row)]
        assert relative(padded[i, 40 - len(row) :], np.asarray(alone)) < 2e-5


@CASES
def test_to_file_is_the_inverse_of_from_file(case):
    model, family, params = load(case)
    shapes = families.file_shapes(model, family, transformer.abstract(model))
    leaf = lambda path: np.asarray(families.pick(params, path))
    for tensor in families.tensors(model, family):
        stored = weight(tensor.name, shapes[tensor.name])
        np.testing.assert_array_equal(families.file_value(tensor, stored.shape, leaf), stored)


# From the published files' index, the model cards and, rounded to 2.5%, GPT-3's paper (table 2.1).
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma3-1b": 999_885_952,
    "olmo2-7b": 7_298_617_344,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200,
}


ROUNDED = {
    "gpt3-125m": 125e6,
    "gpt3-350m": 350e6,
    "gpt3-760m": 760e6,
    "gpt3-1.3b": 1.3e9,
    "gpt3-2.7b": 2.7e9,
    "gpt3-6.7b": 6.7e9,
    "gpt3-13b": 13e9,
}


def test_presets_have_the_published_number_of_parameters():
    """DeepSeek-V3 without its MTP module."""
    ours = {"tiny-1m": (0.8e6, 1.4e6), "small-5m": (4e6, 7e6), "small-14m": (1e7, 1.5e7)}
    assert {*ours, *PUBLISHED, *ROUNDED} == PRESETS.keys()
    for name, count in PUBLISHED.items():
        assert transformer.num_params(preset(name)) == count, name
    for name, count in ROUNDED.items():
        assert abs(transformer.num_params(preset(name)) / count - 1) < 0.025, name
    for name, (low, high) in ours.items():
        assert low < transformer.num_params(preset(name, vocab_size=4096)) < high
