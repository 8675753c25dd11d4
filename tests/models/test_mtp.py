"""Multi-token prediction: the paper's sums document by document, and DeepSeek-V3's file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxllm.config import InputError
from jaxllm.model_store import load_model
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig, preset
from jaxllm.models.next_token import loss
from jaxllm.pretrained import families, family_config
from jaxllm.pretrained.convert import export_model, import_model
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from tests.models.test_moe import CONFIG
from tests.oracles.families import weight
from tests.pretrained.test_families import RECORD

DENSE = ModelConfig(
    vocab_size=40, max_length=32, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48, init_std=0.2,
    mtp_modules=2, dtype="float32",
)  # fmt: skip
SPARSE = dataclasses.replace(DENSE, moe=CONFIG, tie_embeddings=False)
DOCUMENTS = [[5, 9, 3, 3, 17], [4, 11, 2], [7, 1, 1, 39, 22]]
IS_TARGET = [[0, 0, 1, 1, 1], [0, 1, 1], [0, 1, 1, 0, 1]]


def rms(x, scale, eps):
    return (
        np.asarray(x)
        / np.sqrt(np.square(np.asarray(x)).mean(-1, keepdims=True) + eps)
        * np.asarray(scale)
    )


def one_block(model, weights, x, positions):
    return transformer.merge_module(transformer.Block, model, weights)(
        x, positions, jnp.ones_like(positions), False
    )[0][0]


def in_the_papers_words(params, model, ids, is_target):
    """(sum of -log p over all modules, number of targets): module k runs over positions 1 .. n - k (section 2.2)."""
    states = np.asarray(
        jax.jit(transformer.apply, static_argnums=1)(params, model, jnp.array([ids], jnp.int32))[0]
    )
    table, nats, count = np.asarray(params["embed"]["tokens"]), 0.0, 0
    for k in range(1, model.mtp_modules + 1):
        module = jax.tree.map(lambda w, k=k: w[k - 1], params["mtp"])
        if len(ids) <= k:
            break
        embedded = rms(table[ids[k:]], module["embed_norm"]["scale"], model.norm_eps)
        hidden = rms(states[: len(ids) - k], module["hidden_norm"]["scale"], model.norm_eps)
        x = jnp.array(
            np.concatenate([embedded, hidden], -1) @ np.asarray(module["project"]), jnp.float32
        )[None]
        positions = jnp.arange(len(ids) - k, dtype=jnp.int32)[None]
        x = jax.jit(one_block, static_argnums=0)(model, module["block"], x, positions)
        states = rms(x, module["norm"]["scale"], model.norm_eps)
        logits = states @ np.asarray(transformer.head(params)).T
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for position in range(len(ids) - k - 1):
            nats -= is_target[position + k + 1] * logp[position, ids[position + k + 1]]
            count += is_target[position + k + 1]
    return nats, count


@pytest.mark.parametrize(
    "model", [pytest.param(DENSE, marks=pytest.mark.slow), SPARSE], ids=["dense", "sparse"]
)
def test_a_packed_row_has_the_papers_loss(model):
    params = transformer.init(model, jax.random.key(0))
    params = jax.tree.map(
        lambda x: x + 0.1 if x.ndim == 2 and x.shape[0] == 2 else x, params
    )  # scales other than 1
    row = lambda parts, rest: jnp.array(
        [[x for part in parts for x in part] + [rest] * 3] * 2, jnp.int32
    )
    batch = {
        "tokens": row(DOCUMENTS, 0),
        "segment_ids": row([[i + 1] * len(d) for i, d in enumerate(DOCUMENTS)], 0),
        "positions": row([range(len(d)) for d in DOCUMENTS], 0),
        "loss_mask": row(IS_TARGET, 0) > 0,
    }
    run = jax.jit(
        lambda *args: (
            loss(*args, None, {}, model=model),
            loss(*args, None, {}, model=model, mtp_coef=0.5),
        )
    )
    (plain, weight, _), (whole, same, metrics) = run(params, batch)
    pairs = [
        in_the_papers_words(params, model, *pair) for pair in zip(DOCUMENTS, IS_TARGET, strict=True)
    ]
    nats, count = 2 * sum(n for n, _ in pairs), 2 * sum(c for _, c in pairs)
    np.testing.assert_allclose(metrics["mtp_loss"], (nats, count), rtol=2e-5)
    np.testing.assert_allclose(whole - plain, 0.5 / 2 * nats, rtol=1e-4)
    assert weight == same


def published(path, change=lambda values: None):
    """A DeepSeek-V3 folder with its module for the token after next, and copies of embedding and head."""
    config = {**RECORD["deepseek_v3"]["config"], "num_nextn_predict_layers": 1}
    model, family = family_config.from_hf(config, "x")
    shapes = families.file_shapes(model, family, transformer.abstract(model))
    values = {name: weight(name, shape) for name, shape in shapes.items()}
    at = f"model.layers.{model.num_layers}."
    values[f"{at}embed_tokens.weight"] = values["model.embed_tokens.weight"]
    values[f"{at}shared_head.head.weight"] = values["lm_head.weight"]
    change(values)
    path.mkdir()
    safetensors.numpy.save_file(values, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path, values, at


def test_import_and_export_keep_the_module(tmp_path):
    folder, values, at = published(tmp_path / "in")
    assert {n.removeprefix(at) for n in values if n.startswith(at)} >= {
        *(
            "enorm.weight",
            "hnorm.weight",
            "eh_proj.weight",
            "shared_head.norm.weight",
            "mlp.gate.weight",
        ),
        *("self_attn.q_a_proj.weight", "embed_tokens.weight", "shared_head.head.weight"),
    }
    import_model(str(folder), str(tmp_path / "stage"))
    params, model = load_model(tmp_path / "stage", make_mesh(MeshConfig()))
    assert model.mtp_modules == 1
    width = model.embed_dim
    np.testing.assert_array_equal(params["mtp"]["project"][0], values[f"{at}eh_proj.weight"].T)
    assert params["mtp"]["project"].shape == (1, 2 * width, width)
    export_model(str(tmp_path / "stage"), str(tmp_path / "out"), "float32")
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == values.keys() and all(
        found[n].tobytes() == v.tobytes() for n, v in values.items()
    )
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    )


def test_a_file_without_the_module_is_a_model_without_it(tmp_path):
    drop = lambda values: [
        values.pop(name) for name in [*values] if name.startswith("model.layers.3.")
    ]
    folder, _, _ = published(tmp_path / "in", drop)
    import_model(str(folder), str(tmp_path / "stage"))
    assert load_model(tmp_path / "stage", make_mesh(MeshConfig()))[1].mtp_modules == 0


def test_a_copy_that_is_none_is_refused(tmp_path):
    def other(values):
        values["model.layers.3.shared_head.head.weight"] = values["lm_head.weight"] + 1

    with pytest.raises(
        InputError, match=r"1 not the copies they should be: model\.layers\.3\.shared_head\.head"
    ):
        import_model(str(published(tmp_path / "in", other)[0]), str(tmp_path / "stage"))


def test_deepseek_v3s_module_has_the_published_size():
    """11.5 billion parameters besides the embedding and the head that it shares (the model's card)."""
    one = transformer.num_params(preset("deepseek-v3", mtp_modules=1)) - transformer.num_params(
        preset("deepseek-v3")
    )
    assert abs(one / 11.5e9 - 1) < 0.01
