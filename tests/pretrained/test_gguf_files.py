"""GGUF: the tensors, the config and the tokenizer that were written come out as a stage directory."""

import dataclasses
import json
import sys

import gguf
import jax
import numpy as np
import pytest
import tokenizers

from jaxllm.config import InputError
from jaxllm.model_store import load_model
from jaxllm.pretrained import family_config, gguf_files, gguf_tokenizer
from jaxllm.pretrained.checked_values import CheckedValues
from jaxllm.pretrained.convert import import_model
from jaxllm.pretrained.gguf_config import read_config
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.tokenizers.published import load_tokenizer
from jaxllm.tokenizers.trained import train
from tests.oracles.families import weight
from tests.pretrained.test_families import RECORD

ARCH = {
    "llama2": "llama",
    "llama3": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "mistral": "llama",
    "olmo2": "olmo2",
}
F32 = gguf.GGMLQuantizationType.F32
TEXTS = [
    "In spring the 12 birds sing, don't they?",
    "春天来了，鸟儿在唱歌。 1234567",
    "  def f(x):\n\treturn x  # é\n",
] * 9


def halves_to_pairs(rows, heads):
    """Rows in llama.cpp's order for the queries and keys of llama models."""
    #   safetensors    x0 x1 y0 y1
    #   GGUF           x0 y0 x1 y1
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def config_of(case):
    """The recorded config with only what GGUF can say: Llama 3's own scaling, Gemma's plain score scale."""
    config = {**RECORD[case]["config"]}
    if case == "llama3":
        config["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    if case in ("gemma2", "gemma3"):
        config["query_pre_attn_scalar"] = config["head_dim"]
    return config


def write_gguf(path, case, kind=F32, tokens=lambda writer: None):
    """Write a file as llama.cpp's converter does, of made-up weights; returns {name in safetensors: array}."""
    writer = gguf.GGUFWriter(path, ARCH[case])
    model = add_config(writer, case)
    tokens(writer)
    values = {name: weight(name, tuple(shape)) for name, shape in RECORD[case]["tensors"].items()}
    add_tensors(writer, ARCH[case], model, values, kind)
    close(writer)
    return values


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_config(writer, case):
    """Add the metadata of a recorded model; returns its config."""
    c = config_of(case)
    model, _ = family_config.from_hf(c, case)
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_key_length(model.head_dim)
    if model.window:
        writer.add_sliding_window(model.window)
    if case == "gemma2":
        writer.add_attn_logit_softcapping(c["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(c["final_logit_softcapping"])
    if case == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    if case == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(model.head_dim))
    if model.moe.num_experts:
        writer.add_expert_count(model.moe.num_experts)
        writer.add_expert_used_count(model.moe.per_token)
        writer.add_expert_feed_forward_length(model.moe.mlp_dim or model.mlp_dim)
    return model


def llama3_factors(head_dim):
    """What llama.cpp divides rotary frequencies by: 1 for short waves, 8 for long ones, mixed in between."""
    plain = 5e5 ** (-np.arange(0, head_dim, 2) / head_dim)
    waves = 2 * np.pi / plain
    longest = 8192 / 1.0
    shortest = 8192 / 4.0
    smooth = (8192 / waves - 1.0) / (4.0 - 1.0)
    mixed = 1 / ((1 - smooth) / 8.0 + smooth)
    factors = np.where(waves < shortest, 1.0, np.where(waves > longest, 8.0, mixed))
    return factors.astype(np.float32)


def add_tensors(writer, arch, model, values, kind):
    arch_key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(arch_key, model.num_layers)
    experts = {}
    for name, value in values.items():
        if arch == "llama" and ".q_proj." in name:
            value = halves_to_pairs(value, model.num_heads)
        if arch == "llama" and ".k_proj." in name:
            value = halves_to_pairs(value, model.num_kv_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if ".experts." in name:
            before, after = name.split(".experts.")
            experts.setdefault(f"{before}.experts.{after.split('.', 1)[1]}", []).append(value)
        else:
            add(writer, names, name, value, kind)
    for name, several in experts.items():
        add(writer, names, name, np.stack(several), kind)


def add(writer, names, name, value, kind):
    stem, suffix = name.rsplit(".", 1)
    # Formats quantize blocks of 32 values of a row.
    kind = kind if value.ndim > 1 and value.shape[-1] % 32 == 0 else F32
    writer.add_tensor(
        f"{names.get_name(stem)}.{suffix}", gguf.quants.quantize(value, kind), raw_dtype=kind
    )


@pytest.mark.parametrize("case", ARCH)
def test_tensors_and_config_come_out_as_they_went_in(tmp_path, case):
    values = write_gguf(tmp_path / "m.gguf", case)
    config, stored, _ = gguf_files.read(tmp_path / "m.gguf")
    found = {tensor.name: tensor.make() for tensor in stored}
    assert found.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_allclose(
            found[name], value, atol=2e-7 if "norm" in name else 0, err_msg=name
        )
    model = family_config.from_hf(config, "x")[0]
    want = family_config.from_hf(config_of(case), "y")[0]
    assert model.moe.num_experts == want.moe.num_experts
    assert model.moe.normalize == want.moe.normalize
    # GGUF says none of these.
    assert want == dataclasses.replace(
        model, dtype=want.dtype, init_std=want.init_std, moe=want.moe
    )


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_every_value_is_what_the_format_says(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    values = write_gguf(tmp_path / "m.gguf", "qwen2", kind)
    import_model(str(tmp_path / "m.gguf"), str(tmp_path / "stage"))
    params, _ = load_model(tmp_path / "stage", make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    up = values["model.layers.1.mlp.up_proj.weight"]
    stored = gguf.quants.dequantize(gguf.quants.quantize(up, kind), kind)
    np.testing.assert_array_equal(params["layers"]["mlp"]["up"][1], stored.T)
    assert 0 < np.abs(stored - up).max() < 0.2 * np.abs(up).max()
    assert not (tmp_path / "stage" / "gguf").exists()


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_byte_level_tokenizers_give_the_same_ids(tmp_path, pre):
    reference = byte_level_reference(pre)
    model = json.loads(reference.to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].__getitem__)

    def tokens(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(vocabulary)
        writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        writer.add_eos_token_id(0)
        writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")

    write_gguf(tmp_path / "m.gguf", "qwen2", tokens=tokens)
    ours = tokenizer_of(tmp_path, gguf_files.read(tmp_path / "m.gguf")[2])
    for text in TEXTS[:3]:
        assert ours.encode(text) == reference.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("<|im_end|>", parse_special=True) == [1]
    assert ours.stop_ids == (1, 0)


def byte_level_reference(pre):
    """A tokenizer of the library, trained on TEXTS, that splits text as `pre` says."""
    reference = tokenizers.Tokenizer(tokenizers.models.BPE())
    spec = json.dumps(gguf_tokenizer.byte_level(["a"], [1], [], pre))
    reference.pre_tokenizer = tokenizers.Tokenizer.from_str(spec).pre_tokenizer
    reference.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|im_end|>"],
        show_progress=False,
    )
    reference.train_from_iterator(TEXTS, trainer)
    return reference


def tokenizer_of(folder, files):
    """The tokenizer of {file name: content}, written to a folder."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return load_tokenizer(folder)


def test_sentencepiece_tokenizers_give_the_same_ids(tmp_path):
    sp = train(
        iter(TEXTS * 9), vocab_size=340, model_type="bpe", character_coverage=1.0, num_threads=1
    )._sp
    kinds = [
        6 if sp.is_byte(i) else 3 if sp.is_control(i) else 2 if sp.is_unknown(i) else 1
        for i in range(sp.vocab_size())
    ]

    def tokens(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([sp.id_to_piece(i) for i in range(sp.vocab_size())])
        writer.add_token_scores([sp.get_score(i) for i in range(sp.vocab_size())])
        writer.add_token_types(kinds)
        writer.add_unk_token_id(sp.unk_id())
        writer.add_bos_token_id(sp.bos_id())
        writer.add_eos_token_id(sp.eos_id())
        writer.add_add_space_prefix(False)

    write_gguf(tmp_path / "m.gguf", "llama2", tokens=tokens)
    ours = tokenizer_of(tmp_path, gguf_files.read(tmp_path / "m.gguf")[2])
    for text in TEXTS[:3]:
        assert ours.encode(text) == sp.encode(text) and ours.decode(ours.encode(text)) == text


def test_what_is_not_known_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(InputError, match="not a complete GGUF file"):
        import_model(str(tmp_path / "a.gguf"), str(tmp_path / "out"))
    close(gguf.GGUFWriter(tmp_path / "b.gguf", "mamba"))
    with pytest.raises(InputError, match="architecture 'mamba' is not known"):
        import_model(str(tmp_path / "b.gguf"), str(tmp_path / "out"))
    write_gguf(
        tmp_path / "c.gguf",
        "qwen2",
        tokens=lambda w: w.add_tensor("blk.0.strange.weight", np.ones(3, np.float32)),
    )
    with pytest.raises(InputError, match=r"unknown: .*strange"):
        import_model(str(tmp_path / "c.gguf"), str(tmp_path / "out"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'jaxllm\[gguf\]'"):
        import_model(str(tmp_path / "c.gguf"), str(tmp_path / "out"))
    assert not [*tmp_path.glob("*out*")]


def checked(values):
    return CheckedValues(values, gguf_files.FIX)


def metadata(path, case="qwen2", **more):
    """(metadata, tensors) of a file with a small SentencePiece tokenizer."""

    def tokens(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
        writer.add_token_scores([0.0, 0.0, 0.0, -1.0])
        writer.add_token_types([2, 3, 3, 1])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)
        writer.add_add_space_prefix(False)

    write_gguf(path, case, tokens=tokens)
    reader = gguf_files._open(gguf, path)
    return gguf_files._values(reader, path), {tensor.name: tensor for tensor in reader.tensors}


WRONG = ["x", -1, 1.5, True, [1, "a"], [-2.5], float("nan")]


def fits(value, wrong):
    """Whether a field with this value may have the wrong one as well."""
    numbers = isinstance(value, float) and type(wrong) in (int, float) and np.isfinite(wrong)
    return numbers or (type(value) is type(wrong) and not (type(value) is int and wrong < 0))


@pytest.mark.parametrize("case", ["mixtral", "gemma2", "gemma3"])
def test_metadata_of_a_wrong_type_is_one_line_that_names_the_key(tmp_path, case):
    values, held = metadata(tmp_path / "m.gguf", case)

    def read(values):
        read_config(checked(values), held)
        gguf_tokenizer.read_tokenizer(checked(values))

    read(values)
    for key, value in values.items():
        named = "architecture" if key == "general.architecture" else key
        for wrong in WRONG:
            if fits(value, wrong):
                continue
            if isinstance(value, list) and isinstance(wrong, list):
                wrong = [*wrong, None]
            with pytest.raises(ValueError, match=named):
                read({**values, key: wrong})


def test_ids_and_lists_that_do_not_fit_the_tokens_are_one_line(tmp_path):
    values, _ = metadata(tmp_path / "m.gguf")
    for key, wrong, error in (
        ("tokenizer.ggml.eos_token_id", 4, "is 4, and there are 4 tokens"),
        ("tokenizer.ggml.token_type", [1, 1], "2 values for 4 tokens"),
        ("tokenizer.ggml.scores", [0.5], "1 values for 4 tokens"),
    ):
        with pytest.raises(ValueError, match=f"{key} .*{error}"):
            gguf_tokenizer.read_tokenizer(checked({**values, key: wrong}))


def test_what_gemma_2_leaves_out_is_its_own_default(tmp_path):
    values, held = metadata(tmp_path / "m.gguf", "gemma2")
    left = {}
    for key, value in values.items():
        if "softcapping" not in key and "sliding_window" not in key:
            left[key] = value
    model = family_config.from_hf(read_config(checked(left), held), "x")[0]
    assert (model.window, model.attention_softcap, model.logit_softcap) == (4096, 50.0, 30.0)


BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
# (kind, how text is split, add_bos_token in the file) -> whether llama.cpp begins a text with BOS
BEGUN = {
    **{
        ("gpt2", pre, None): pre in ("llama-bpe", "llama3", "llama-v3")
        for pre in gguf_tokenizer.SPLITTINGS
    },
    ("gpt2", "llama-bpe", False): False,
    ("gpt2", "qwen2", True): True,
    ("llama", "", None): True,
    ("llama", "default", None): True,
    ("llama", "", False): False,
}


@pytest.mark.parametrize("kind, pre, flag", BEGUN)
def test_a_text_begins_as_llama_cpp_begins_it(tmp_path, kind, pre, flag):
    values = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTES],
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * len(BYTES)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.pre": pre or None,
        "tokenizer.ggml.add_bos_token": flag,
    }
    tokenizer = tokenizer_of(tmp_path, gguf_tokenizer.read_tokenizer(checked(values)))
    first = [1] if BEGUN[kind, pre, flag] else []
    assert tokenizer.prompt("ab") == [*first, *tokenizer.encode("ab")]
    assert tokenizer.prompt("") == [1] and tokenizer.start_id == tokenizer.bos_id == 1


def test_pieces_without_special_ids_have_those_of_llama_cpp(tmp_path):
    values, _ = metadata(tmp_path / "m.gguf")
    for key in list(values):
        if "_token" in key and "type" not in key:
            del values[key]
    tokenizer = tokenizer_of(tmp_path, gguf_tokenizer.read_tokenizer(checked(values)))
    assert (tokenizer.begin_ids, tokenizer.bos_id, tokenizer.eos_id) == ((1,), 1, 2)


def test_ends_of_a_turn_and_of_a_message_end_a_response(tmp_path):
    values, _ = metadata(tmp_path / "m.gguf")
    values |= {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 0}
    tokenizer = tokenizer_of(tmp_path, gguf_tokenizer.read_tokenizer(checked(values)))
    assert tokenizer.stop_ids == (2, 3, 0) and tokenizer.encode_document("a")[-1] == 2


def split(path, count):
    """The file's tensors in parts; the first has the metadata, as llama.cpp writes them."""
    reader = gguf.GGUFReader(path)
    names = [path.with_name(f"m-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    for number, name in enumerate(names):
        writer = gguf.GGUFWriter(name, reader.fields["general.architecture"].contents())
        if number == 0:
            copy_metadata(reader, writer)
        writer.add_uint16("split.count", count)
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data)
        close(writer)
    return names


def copy_metadata(reader, writer):
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            # A list has the type of its items as well.
            kind, *item_kind = field.types
            writer.add_key_value(key, field.contents(), kind, *item_kind[:1])


def test_a_file_in_parts_is_read_whole_from_any_of_them(tmp_path):
    values = write_gguf(tmp_path / "m.gguf", "qwen2")
    parts = split(tmp_path / "m.gguf", 3)
    expected, _, _ = gguf_files.read(tmp_path / "m.gguf")
    for part in parts:
        config, stored, _ = gguf_files.read(part)
        assert config == expected
        assert {tensor.name for tensor in stored} == values.keys()
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match=r"renamed\.gguf: is one of 3 parts"):
        gguf_files.read(tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match=r"m-00001-of-00003\.gguf: is missing, one of the 3 parts"):
        gguf_files.read(parts[2])
