"""Import and export: the same bytes out as in, on any mesh, and one line on everything that does not fit."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from jaxllm.config import InputError
from jaxllm.model_store import load_model, write_model_card
from jaxllm.models import lora, scalar, transformer
from jaxllm.models.config import PRESETS, preset
from jaxllm.models.parts_config import LoRAConfig
from jaxllm.pretrained import families, family_config
from jaxllm.pretrained.convert import export_model, import_model
from jaxllm.runtime import checkpoint
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.files import write_json
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import param_shardings
from jaxllm.tokenizers.published import load_tokenizer
from tests.oracles.families import weight
from tests.pretrained.test_families import CASES, RECORD, load

BF16 = np.dtype(ml_dtypes.bfloat16)


def hf_folder(path, case, dtype=BF16, shards=1, **config):
    """A downloaded model: the recorded config, made-up weights, a small byte-level tokenizer."""
    path.mkdir()
    names = RECORD[case]["tensors"]
    values = {name: weight(name, tuple(shape)).astype(dtype) for name, shape in names.items()}
    for i in range(shards):
        part = dict([*values.items()][i::shards])
        safetensors.numpy.save_file(
            part, path / f"model-{i}.safetensors", metadata={"format": "pt"}
        )
    stored = {**RECORD[case]["config"], "dtype": str(dtype), **config}
    (path / "config.json").write_text(json.dumps(stored))
    vocabulary = {"<bos>": 1, "<eos>": 2, "<pad>": 0} | {chr(97 + i): i + 3 for i in range(26)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    model.save(str(path / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (path / "tokenizer_config.json").write_text(json.dumps(special))
    return path, values


def tensors_in(folder):
    """{name: array} of all files in a folder."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


@CASES
def test_export_of_import_is_the_same_bytes(tmp_path, case):
    folder, values = hf_folder(tmp_path / "in", case, shards=2)
    import_model(str(folder), str(tmp_path / "stage"))
    export_model(str(tmp_path / "stage"), str(tmp_path / "out"), shard_gb=2e-5)
    found = tensors_in(tmp_path / "out")
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == BF16 and found[name].tobytes() == value.tobytes(), name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == values.keys()
    vocabulary = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert vocabulary == (folder / "tokenizer.json").read_bytes()
    # The config that the export would write without the imported one says the same model.
    model = load(case)[0]
    config, _ = family_config.to_hf(model)
    assert family_config.from_hf(config | {"dtype": "float32"}, "x")[0].moe == model.moe


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, fsdp=2, expert=2),
        pytest.param(MeshConfig(), marks=pytest.mark.life),
        pytest.param(MeshConfig(data=-1, tensor=2, fsdp=2), marks=pytest.mark.life),
    ],
)
@pytest.mark.parametrize("case", ["gpt2", "mixtral", "deepseek_v3"])
def test_import_lands_on_any_mesh(tmp_path, case, mesh):
    folder, _ = hf_folder(tmp_path / "in", case, np.dtype(np.float32))
    import_model(str(folder), str(tmp_path / "stage"))
    mesh = make_mesh(mesh)
    params, model = load_model(tmp_path / "stage", mesh)
    shardings = param_shardings(mesh, transformer.abstract(model), transformer.axes(model))
    expected = load(case)[2]

    def check(got, want, sharding):
        assert got.sharding == sharding
        np.testing.assert_array_equal(got, want)

    jax.tree.map(check, params, expected, shardings)


def test_a_flipped_bit_is_found(tmp_path):
    folder, _ = hf_folder(tmp_path / "in", "llama3")
    import_model(str(folder), str(tmp_path / "stage"))
    file = next((tmp_path / "stage" / "checkpoints" / "0").glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 4
    file.write_bytes(raw)
    with pytest.raises(checkpoint.Damaged, match=r"model-0\.safetensors is not what was written"):
        load_model(tmp_path / "stage", make_mesh(MeshConfig()))


def test_what_does_not_fit_is_one_line(tmp_path):
    folder, values = hf_folder(tmp_path / "a", "llama3")
    left = {name: value for name, value in values.items() if "k_proj" not in name}
    left["model.extra"] = np.ones(3, np.float32)
    safetensors.numpy.save_file(left, folder / "model-0.safetensors")
    with pytest.raises(InputError, match=r"3 missing: .*k_proj.*; 1 not known: model\.extra"):
        import_model(str(folder), str(tmp_path / "out"))
    other, _ = hf_folder(tmp_path / "b", "llama3", intermediate_size=40)
    with pytest.raises(InputError, match=r"of another shape: .* \[48, 32\] for \[40, 32\]"):
        import_model(str(other), str(tmp_path / "out"))
    strange, _ = hf_folder(tmp_path / "c", "llama3", model_type="mamba")
    with pytest.raises(InputError, match="model_type 'mamba' is not known"):
        import_model(str(strange), str(tmp_path / "out"))
    (strange / "model-0.safetensors").unlink()
    (strange / "config.json").write_text(json.dumps(RECORD["llama3"]["config"]))
    (strange / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="pickles are not read"):
        import_model(str(strange), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, error", [
    (b"[]", "must hold a JSON object, not a list"), (b"null", "not null"), (b"3", "not a number"), (b"{", "not valid"),
    (b"\xff{}", "not valid JSON"), (b'{"a":' * 9999, "nested too deeply"), (b'{"model_type": []}', "model_type"),
])  # fmt: skip
def test_a_damaged_config_is_one_line(tmp_path, content, error):
    folder, _ = hf_folder(tmp_path / "in", "llama3")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"in/config\.json: .*{error}"):
        import_model(str(folder), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_byte_order_marks_are_skipped(tmp_path):
    folder, _ = hf_folder(tmp_path / "in", "llama3")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    import_model(str(folder), str(tmp_path / "stage"))
    assert load_tokenizer(tmp_path / "stage" / "tokenizer").vocab_size == 29
    export_model(str(tmp_path / "stage"), str(tmp_path / "out"))


def mistral(path):
    """A folder like Mistral's: shards with an index; next to them the same model in other names, and an adapter."""
    folder, values = hf_folder(path, "mistral", shards=2)
    index = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(values)}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    others = {"layers.0.attention.wk.weight": np.ones((2, 2), np.float32)}
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "other.safetensors"):
        safetensors.numpy.save_file(others, folder / name)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    return folder, values, index


def test_the_index_decides_which_files_are_the_model(tmp_path):
    folder, values, _ = mistral(tmp_path / "in")
    import_model(str(folder), str(tmp_path / "stage"))
    step = tmp_path / "stage" / "checkpoints" / "0"
    assert {p.name for p in step.glob("*.safetensors")} == {
        "model-0.safetensors",
        "model-1.safetensors",
    }
    export_model(str(tmp_path / "stage"), str(tmp_path / "out"))
    found = tensors_in(tmp_path / "out")
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].tobytes() == value.tobytes()


def test_an_index_that_does_not_fit_is_one_line(tmp_path):
    folder, _, index = mistral(tmp_path / "in")
    name = next(iter(index))
    path = folder / "model.safetensors.index.json"
    for content, error in (
        (
            {"weight_map": index | {"x": "model-7.safetensors"}},
            r"model-7\.safetensors: is missing, .*index\.json names",
        ),
        (
            {"weight_map": index | {"x": "model-0.safetensors"}},
            r"model-0\.safetensors: has no x, which .*puts there",
        ),
        (
            {"weight_map": index | {name: "model-1.safetensors"}},
            rf"model-1\.safetensors: has no {name}",
        ),
        (
            {"weight_map": index | {"x": "../model-0.safetensors"}},
            r"index\.json: names '\.\./model-0.* in the same folder",
        ),
        ({"weight_map": index | {"x": "/a.safetensors"}}, r"index\.json: names '/a\.safetensors'"),
        ({"weight_map": index | {"x": 3}}, r"index\.json: has no weight_map"),
        ({"weight_map": {}}, r"index\.json: has no weight_map"),
        ({}, r"index\.json: has no weight_map"),
        ([], r"index\.json: must hold a JSON object, not a list; fetch it again"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=error):
            import_model(str(folder), str(tmp_path / "out"))
    path.write_text("{")
    with pytest.raises(InputError, match=r"index\.json: not valid JSON .*fetch it again"):
        import_model(str(folder), str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_without_an_index_model_safetensors_is_the_model_else_all_files(tmp_path):
    folder, values = hf_folder(tmp_path / "in", "llama3", shards=2)
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        safetensors.numpy.save_file({"strange": np.ones(2, np.float32)}, folder / name)
    import_model(str(folder), str(tmp_path / "all"))
    for path in folder.glob("model-*"):
        path.rename(folder / f"part-0000{int(path.stem[-1]) + 1}-of-00002.safetensors")
    import_model(str(folder), str(tmp_path / "parts"))
    (folder / "part-00001-of-00002.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"part-00001-of-00002\.safetensors: is missing, one of the 2 parts"
    ):
        import_model(str(folder), str(tmp_path / "out"))
    safetensors.numpy.save_file(values, folder / "model.safetensors")
    import_model(str(folder), str(tmp_path / "one"))
    for name in ("all", "parts", "one"):
        assert load_model(tmp_path / name, make_mesh(MeshConfig()))[1].num_layers == 3


@pytest.mark.parametrize("config, error", [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "weights are quantized by gptq"),
    ({"quantization_config": {}}, "weights are quantized, which"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "quantized by compressed-tensors"),
])  # fmt: skip
def test_quantized_models_are_refused_by_their_method(tmp_path, config, error):
    folder, values = hf_folder(tmp_path / "in", "llama3", **config)
    values = {name: value.view(np.uint8) for name, value in values.items()}
    safetensors.numpy.save_file(values, folder / "model-0.safetensors")
    with pytest.raises(InputError, match=rf"config\.json: .*{error}.*dequantize"):
        import_model(str(folder), str(tmp_path / "out"))
    stored = json.loads((folder / "config.json").read_text())
    for name in config:
        stored[name] = None
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"in: tensors of type U8 \(.*weight\); known: F32"):
        import_model(str(folder), str(tmp_path / "out"))


@pytest.mark.parametrize("case, tied", [("smollm2", True), ("llama3", False), ("gpt2", True)])
def test_another_head_than_the_config_says_is_one_line(tmp_path, case, tied):
    folder, values = hf_folder(tmp_path / "in", case)
    table = "transformer.wte.weight" if case == "gpt2" else "model.embed_tokens.weight"
    head = {"lm_head.weight": values[table] + values[table]} if tied else {}
    values = {name: value for name, value in values.items() if name != "lm_head.weight"} | head
    safetensors.numpy.save_file(values, folder / "model-0.safetensors")
    error = rf"true, and lm_head\.weight is another matrix than {table}; set it to false"
    with pytest.raises(
        InputError,
        match=error if tied else r"false, and the files have no lm_head\.weight; set it to true",
    ):
        import_model(str(folder), str(tmp_path / "out"))
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": not tied}
    (folder / "config.json").write_text(json.dumps(config))
    import_model(str(folder), str(tmp_path / "out"))


def test_buffers_and_a_copy_of_the_table_are_not_needed(tmp_path, capsys):
    folder, values = hf_folder(tmp_path / "in", "smollm2")
    at = "model.layers.0.self_attn.rotary_emb"
    buffers = {}
    for name in ("inv_freq", "cos_cached", "sin_cached"):
        buffers[f"{at}.{name}"] = np.ones(4, np.int64)
    copy = {"lm_head.weight": values["model.embed_tokens.weight"]}
    safetensors.numpy.save_file(values | buffers | copy, folder / "model-0.safetensors")
    import_model(str(folder), str(tmp_path / "out"))
    said = " ".join(capsys.readouterr().err.split())
    assert "not needed: 4 tensors" in said and "cos_cached" in said


def test_a_source_that_is_no_models_folder_is_one_line(tmp_path, monkeypatch):
    folder, _ = hf_folder(tmp_path / "in", "llama3")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "meta/base"}'
    )
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "a.gguf").write_bytes(b"")
    for source, error in (
        (folder / "model-0.safetensors", r"model-0\.safetensors: is a file; give the folder"),
        (folder / "config.json", r"config\.json: is a file; give the folder"),
        ("org/model", "org/model: no such folder; download the model"),
        (tmp_path / "adapter", "adapter: holds an adapter of meta/base and no model; merge it"),
        (tmp_path / "ggufs", r"but GGUF files; give one of them, as in .*a\.gguf"),
        (tmp_path, "has no config.json; give the folder of a downloaded model"),
    ):
        with pytest.raises(InputError, match=error):
            import_model(str(source), str(tmp_path / "out"))
    (tmp_path / "adapter" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(InputError, match="holds an adapter of meta/base and no model"):
        import_model(str(tmp_path / "adapter"), str(tmp_path / "out"))
    monkeypatch.setenv("HOME", str(tmp_path))
    import_model("~/in", "~/stage")
    export_model(str(tmp_path / "stage"), "~/out")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_damaged_file_is_one_line(tmp_path):
    folder, _ = hf_folder(tmp_path / "in", "llama3")
    file = folder / "model-0.safetensors"
    raw = file.read_bytes()
    empty = (2).to_bytes(8, "little") + b"{}"
    # Cut in the data, in the header and in its length; too long; not such a file; no tensors.
    for content in (raw[:-3], raw[:20], b"", raw + b"x", b"x" * 100, empty):
        file.write_bytes(content)
        with pytest.raises(
            InputError, match=r"model-0\.safetensors: not a complete safetensors .*fetch it again"
        ) as error:
            import_model(str(folder), str(tmp_path / "out"))
        assert "\n" not in str(error.value)


def save_stage(path, params, model, kind, **more):
    write_model_card(path, model, kind, ("params",), **more)
    checkpoints = checkpoint.Checkpoints(path / "checkpoints", checkpoint.CheckpointConfig())
    checkpoints.save_surely(3, {"params": params}, {})
    checkpoints.close()
    write_json(path / "result.json", {"checkpoint": 3})


def test_a_trained_model_exports_and_comes_back(tmp_path):
    for name, model in {"gpt": load("gpt2")[0], "moe": load("deepseek_v2")[0]}.items():
        model = dataclasses.replace(model, dtype="bfloat16")
        params = transformer.init(model, jax.random.key(0))
        (tmp_path / name).mkdir()
        save_stage(tmp_path / name, params, model, "policy")
        export_model(str(tmp_path / name), str(tmp_path / f"{name}-out"), "float32")
        import_model(str(tmp_path / f"{name}-out"), str(tmp_path / f"{name}-back"))
        mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        back, again = load_model(tmp_path / f"{name}-back", mesh)
        # A file says neither how the model is initialized nor how its experts are balanced.
        again = dataclasses.replace(again, dtype="bfloat16", init_std=model.init_std, moe=model.moe)
        assert again == model
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_reward_model_exports_as_a_classifier(tmp_path):
    model, _, trunk = load("llama3")
    params = scalar.init(trunk, model, jax.random.key(0))
    (tmp_path / "reward").mkdir()
    save_stage(tmp_path / "reward", params, model, "reward")
    export_model(str(tmp_path / "reward"), str(tmp_path / "out"), "float32")
    found = tensors_in(tmp_path / "out")
    np.testing.assert_array_equal(found["score.weight"][0], params["head"]["kernel"])
    assert "lm_head.weight" not in found
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_adapters_export_as_peft(tmp_path):
    model, _, base = load("qwen2")
    own = lora.init(
        LoRAConfig(rank=4, targets=("q", "out", "up")),
        base,
        jax.random.key(0),
        transformer.axes(model),
    )
    own = jax.tree.map(lambda x: x + 0.1, own)
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
    save_stage(tmp_path / "base", base, model, "policy")
    adapters = LoRAConfig(rank=4, targets=("q", "out", "up"))
    save_stage(
        tmp_path / "tuned", own, model, "policy", adapters=adapters, base=str(tmp_path / "base")
    )
    export_model(str(tmp_path / "tuned"), str(tmp_path / "peft"), adapters=True)
    export_model(str(tmp_path / "tuned"), str(tmp_path / "merged"), "float32")
    export_model(str(tmp_path / "base"), str(tmp_path / "plain"), "float32")
    found = tensors_in(tmp_path / "peft")
    merged = tensors_in(tmp_path / "merged")
    plain = tensors_in(tmp_path / "plain")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj", "q_proj", "up_proj"]
    scale = config["lora_alpha"] / config["r"]
    for module in {name.rsplit(".lora_", 1)[0] for name in found}:
        a = found[f"{module}.lora_A.weight"]
        b = found[f"{module}.lora_B.weight"]
        name = module.removeprefix("base_model.model.") + ".weight"
        np.testing.assert_allclose(plain[name] + b @ a * scale, merged[name], atol=1e-5)


def test_grown_rows_are_the_mean():
    model, _, params = load("llama2")
    grown = transformer.grow_vocab(params, model.vocab_size + 3)
    for name in ("embed", "head"):
        old = np.asarray(params[name]["tokens"])
        new = grown[name]["tokens"]
        np.testing.assert_array_equal(new[:-3], old)
        np.testing.assert_allclose(new[-1], old.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", [name for name in PRESETS if not name.startswith(("tiny", "small"))]
)
def test_every_preset_is_a_model_of_a_family(name):
    model = preset(name)
    again, _ = family_config.from_hf(family_config.to_hf(model)[0], name)
    shapes = families.file_shapes(
        model, family_config.family_of(model), transformer.abstract(model)
    )
    assert again.num_layers == model.num_layers
    assert sum(int(np.prod(s)) for s in shapes.values()) == transformer.num_params(model)
