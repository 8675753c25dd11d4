"""Post-training that starts from a published model: configs/imported.yaml, as a user runs it."""

import json
import shlex

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.pretrained import families, family_config
from jaxllm.pretrained.convert import export_model, import_model
from tests.conftest import ROOT, jaxllm

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A stage directory of a Qwen3 of random weights with a byte-level tokenizer and a ChatML template."""
    folder = tmp_path_factory.mktemp("downloaded") / "in"
    folder.mkdir()
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(ROOT / "configs" / "tiny" / "prose.txt")], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    model = ModelConfig(
        vocab_size=512,
        max_length=256,
        num_layers=2,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=128,
        qk_norm="head",
        dtype="float32",
    )
    config, family = family_config.to_hf(model)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    params = transformer.init(model, jax.random.key(0))
    leaf = lambda path: np.asarray(families.pick(params, path))
    shapes = families.file_shapes(model, family, params)
    values = {}
    for tensor in families.tensors(model, family):
        value = families.file_value(tensor, shapes[tensor.name], leaf)
        values[tensor.name] = np.ascontiguousarray(value)  # save_file ignores strides
    safetensors.numpy.save_file(values, folder / "model.safetensors")
    import_model(str(folder), str(folder.parent / "stage"))
    return folder.parent / "stage"


def run(command, *args):
    process = jaxllm(command, *map(str, args))
    out, log = process.communicate(timeout=500)
    assert process.returncode == 0, log
    return out, log


@pytest.mark.life
def test_tuning_takes_the_imported_model_its_tokenizer_and_its_template(tmp_path, imported):
    overrides = shlex.split("--stages tokenizer sft --sft.num-steps 4 --sft.eval-batches 1")
    where = ["configs/imported.yaml", "--run-dir", tmp_path / "run"]
    run("run", *where, "--tokenizer.init-from", imported, "--sft.init-from", imported, *overrides)
    directory = tmp_path / "run" / "sft"
    record = json.loads((directory / "model.json").read_text())
    assert record["model"]["qk_norm"] == "head" and record["model"]["vocab_size"] == 512
    kept = (directory / "tokenizer" / "tokenizer_config.json").read_bytes()
    assert kept == (imported / "tokenizer" / "tokenizer_config.json").read_bytes()
    export_model(str(directory), str(tmp_path / "adapters"), adapters=True)
    names = safetensors.numpy.load_file(tmp_path / "adapters" / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in names
    reply, _ = run("generate", directory, "--prompt", "The soup", "--chat", "--max-new-tokens", 4)
    assert "im_start" not in reply


@pytest.mark.slow
def test_the_whole_life_of_an_imported_model(tmp_path, imported):
    where = ["configs/imported.yaml", "--run-dir", tmp_path / "run"]
    run("run", *where, "--tokenizer.init-from", imported, "--sft.init-from", imported)
    result = json.loads((tmp_path / "run" / "evaluate" / "result.json").read_text())
    assert [*result["stages"]] == ["sft", "ppo"]
    losses = []
    for line in (tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if "train/loss" in metrics:
            losses.append(metrics["train/loss"])
    assert losses[-1] < losses[0] - 0.01
    run("export", tmp_path / "run" / "ppo", tmp_path / "out")
    run("import", tmp_path / "out", tmp_path / "again")
    ask = ["--prompt", "The soup", "--chat", "--max-new-tokens", 4]
    reply, _ = run("generate", tmp_path / "again", *ask)
    assert reply
