"""Models from and to the format of others: `jaxllm import` and `jaxllm export`.

An imported directory is a stage directory whose checkpoint is the safetensors files themselves, sealed
like any other; parameters are read from them straight onto the mesh. An export writes one leaf after
another, so that the whole model is never in memory.
"""

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxllm.config import InputError, to_tree
from jaxllm.model_store import load_model, read_model_card, write_model_card
from jaxllm.models import lora, scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.pretrained import downloads, model_card
from jaxllm.pretrained.adapters import write_adapters
from jaxllm.pretrained.families import file_shapes, file_value, pick, tensors
from jaxllm.pretrained.family_config import family_of, from_hf, present, to_hf
from jaxllm.pretrained.family_table import FAMILIES
from jaxllm.pretrained.safetensors_files import DTYPES, KINDS, Files, read_imported
from jaxllm.pretrained.safetensors_writer import LazyTensor, write_model
from jaxllm.runtime import checkpoint
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.console import console
from jaxllm.runtime.files import new_folder, read_json, write_json
from jaxllm.runtime.hubs import names
from jaxllm.runtime.mesh import make_mesh
from jaxllm.runtime.store.working import local_folder
from jaxllm.sharding import replicated
from jaxllm.tokenizers import hugging_face
from jaxllm.tokenizers.files import IDS
from jaxllm.tokenizers.published import load_tokenizer
from jaxllm.tokenizers.trained import Tokenizer

# From a leaf's path in the parameters to its float32 values.
_ReadLeaf = Callable[[tuple[str, ...]], np.ndarray]


def import_model(source: str, out: str) -> None:
    """Make the stage directory `out` of a published model.

    Args:
        source: a folder with config.json, *.safetensors and a tokenizer, a GGUF file, hf://ORG/NAME[@REVISION],
            or modelscope://ORG/NAME[@REVISION].

    Raises:
        InputError: `out` exists, the family is unknown, or a tensor is missing, unknown or misshapen.
    """
    target = Path(out).expanduser()
    if target.exists():
        raise InputError(f"{target}: exists already; give another directory, or remove it")
    make_stage(source, target)
    console.print(f"next: {_next_command(target)}")


def make_stage(source: str, target: Path) -> None:
    """Make a stage directory, which is not there yet; `source` and errors as of `import_model`."""
    if names.is_on_hub(source):
        folder, source = names.fetch(source)
        console.print(f"{source}, in {folder}", soft_wrap=True)
    else:
        folder = Path(source).expanduser()
    # An import that fails does not leave a half-written directory.
    with new_folder(target) as stage:
        if folder.suffix.lower() == ".gguf" and not folder.is_dir():
            _fill_stage(stage, _unpack_gguf(folder, stage / "gguf"), source, move=True)
            shutil.rmtree(stage / "gguf")
        else:
            _fill_stage(stage, folder, source, move=False)


def _next_command(stage: Path) -> str:
    """The command to try on an imported model."""
    if not (stage / "tokenizer").exists():
        return f"jaxllm export {stage} FOLDER"
    if load_tokenizer(stage / "tokenizer").chat_refusal:
        return f"jaxllm generate {stage} --prompt TEXT"
    return f"jaxllm chat {stage}"


def _fill_stage(stage: Path, folder: Path, source: str, move: bool) -> None:
    """Fill the directory of a stage from a folder.

    Args:
        source: where the model is from, for the record.
        move: the folder's files are not needed there any more.
    """
    model, family, files = _read_folder(folder)
    unused = files.check(model, family)
    # Buffers and copies of the embedding go into the stage with their files, and are never read.
    if unused:
        console.print(f"not needed: {len(unused)} tensors ({', '.join(unused[:3])})")
    kinds = sorted({stored.kind for name, stored in files.where.items() if name not in unused})
    step = stage / "checkpoints" / "0"
    step.mkdir(parents=True)
    for path in files.paths:
        console.print(f"copying {path.name}")
        # The system copies: no byte passes through this process's memory.
        transfer = shutil.move if move else shutil.copyfile
        transfer(path, step / path.name)
    # No digests: the seal has the hash of every file, and no array of these was in memory.
    record = {"format": "safetensors", "family": family, "model": to_tree(model), "stored": kinds}
    checkpoint.write_seal(epath.Path(step), {"record": record, "digests": {}})
    _take_tokenizer(folder, stage, model)
    (stage / "hf").mkdir()
    # An export of the model starts from these, so that fields that we do not read survive.
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            shutil.copyfile(folder / name, stage / "hf" / name)
    write_model_card(epath.Path(stage), model, "policy", ("params",))
    count = transformer.num_params(model)
    result = {"parameters": count, "family": family, "source": source, "checkpoint": 0}
    write_json(stage / "result.json", result)
    console.print(f"{family}, {count:,} parameters, {', '.join(kinds)}")


def _read_folder(folder: Path) -> tuple[ModelConfig, str, Files]:
    """(config, family, tensors) of a downloaded model. Raises InputError if it cannot be read."""
    downloads.check_folder(folder)
    where = str(folder / "config.json")
    fix = "fetch it again"
    config = read_json(folder / "config.json", fix) or {}
    downloads.check_not_quantized(config, where)
    model, family = from_hf(config, where)
    files = downloads.model_files(folder, read_json(folder / downloads.INDEX, fix))
    downloads.check_kinds(files)
    model = present(model, files.where)
    downloads.check_tied(files, model, family, where)
    return model, family, files


def _unpack_gguf(file: Path, folder: Path) -> Path:
    """Make a folder of safetensors from a GGUF file, and return it."""
    from jaxllm.pretrained import gguf_files

    config, lazy_tensors, tokenizer = gguf_files.read(file)
    folder.mkdir(parents=True)
    write_model(folder, lazy_tensors, shard_gb=2.0)
    write_json(folder / "config.json", config)
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)
    return folder


def _take_tokenizer(folder: Path, stage: Path, model: ModelConfig) -> None:
    try:
        tokenizer = load_tokenizer(folder)
    except InputError as error:
        console.print(
            f"warning: no tokenizer ({error}); the model can be exported and trained further, but "
            "not used with text"
        )
        return
    # The reverse is common: models pad their vocabulary to a round number of rows.
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but the model "
            f"{model.vocab_size} rows; give the tokenizer of this model"
        )
    tokenizer.save(stage / "tokenizer")
    if tokenizer.chat_refusal:
        console.print(f"warning: no chats ({tokenizer.chat_refusal}); everything else works")


def export_model(
    stage_dir: str, out: str, dtype: str = "", shard_gb: float = 5.0, adapters: bool = False
) -> None:
    """Write a stage's model as safetensors with config.json and its tokenizer.

    A reward model is written as a classifier of one label.

    Args:
        out: a folder that does not exist yet, or hf://ORG/NAME, to which it is uploaded with a card.
        dtype: "float32", "bfloat16" or "float16"; empty: an imported model's own, bfloat16 for others.
        shard_gb: size of a file in 10^9 bytes, at most.
        adapters: write the LoRA adapters alone, in PEFT's format.

    Raises:
        InputError: `out` exists, an unknown dtype, or a model that no known family can express.
    """
    if names.is_on_hub(out):
        _export_to_hub(stage_dir, out, dtype, shard_gb, adapters)
        return
    source = local_folder(stage_dir)
    target = Path(out).expanduser()
    if target.exists():
        raise InputError(f"{target}: exists already; give another directory, or remove it")
    if dtype not in ("", *KINDS):
        raise InputError(f"--dtype: {dtype!r} is unknown; known: {', '.join(KINDS)}")
    model, record = read_model_card(source)
    if model.mtp_modules and family_of(model) != "deepseek_v3":
        console.print("left out: the MTP modules, which no file of this family has")
        model = dataclasses.replace(model, mtp_modules=0)
    config, family = to_hf(model)
    # One device: leaves are read to the host one at a time, whatever mesh they were trained on.
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with new_folder(target) as folder:
        if adapters:
            _export_adapters(source, record, model, family, mesh, folder)
        else:
            stored = _export_tensors(source, record, model, family, mesh, folder, dtype, shard_gb)
            given = read_json(source / "hf" / "config.json") or {}
            config = {**config, **given, "dtype": stored, "vocab_size": model.vocab_size}
            if record["kind"] == "reward":
                config |= _classifier_fields(family)
            _write_configs_and_tokenizer(source, folder, config)
    console.print(f"{target}: {family}{' adapters' if adapters else ''}")


def _export_to_hub(stage_dir: str, out: str, dtype: str, shard_gb: float, adapters: bool) -> None:
    """Export into a folder that lives for as long as it takes to upload it, with a card."""
    with tempfile.TemporaryDirectory(prefix="jaxllm-") as base:
        folder = Path(base) / "model"
        export_model(stage_dir, str(folder), dtype, shard_gb, adapters)
        (folder / "README.md").write_text(
            model_card.text(local_folder(stage_dir)), encoding="utf-8"
        )
        page = names.upload(folder, out, f"jaxllm: {Path(stage_dir).name}")
    console.print(f"uploaded: {page}", soft_wrap=True)


def _export_tensors(
    source: epath.Path,
    record: Mapping[str, Any],
    model: ModelConfig,
    family: str,
    mesh: jax.sharding.Mesh,
    folder: Path,
    dtype: str,
    shard_gb: float,
) -> str:
    """Write the tensors of a stage's model; returns the name of their dtype."""
    step = (read_json(source / "result.json") or {}).get("checkpoint")
    step_dir = checkpoint.newest(source, step)
    seal = checkpoint.read_seal(step_dir)
    imported_kinds = seal["record"].get("stored", [])  # empty unless the model was imported
    # An imported model is in its files already: tensors are copied, if need be to another dtype.
    if imported_kinds:
        checkpoint.check(step_dir, seal)
        write_model(
            folder, _imported_tensors(Files(Path(step_dir)), model, family, dtype), shard_gb
        )
        if dtype:
            return dtype
        # Tensors of several dtypes keep them, but config.json can name only one.
        return str(DTYPES[imported_kinds[0]]) if len(imported_kinds) == 1 else "float32"
    stored = dtype or "bfloat16"
    is_reward = record["kind"] == "reward"
    leaf = _leaf_reader(source, record, model, mesh, step)
    lazy_tensors = _trained_tensors(model, family, leaf, DTYPES[KINDS[stored]], is_reward)
    write_model(folder, lazy_tensors, shard_gb)
    if is_reward:
        bias = float(leaf(("head", "bias")))
        console.print(
            "a classifier's head has no bias: its scores are lower than the reward model's by "
            f"{bias:.6g}"
        )
    return stored


def _classifier_fields(family: str) -> dict[str, Any]:
    """What a config.json says of a classifier with one label."""
    architecture = FAMILIES[family].replace("ForCausalLM", "ForSequenceClassification")
    return {
        "architectures": [architecture],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "num_labels": 1,
    }


def _leaf_reader(
    source: epath.Path,
    record: Mapping[str, Any],
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    step: int | None,
) -> _ReadLeaf:
    """A function that reads leaves of a stage's parameters, one at a time.

    A model trained as adapters is merged first, in memory.
    """
    if record.get("adapters"):
        merged = lora.merge(load_model(source, mesh, record["kind"])[0])
        return lambda path: np.asarray(pick(merged, path))
    module = {"policy": transformer, "reward": scalar}[record["kind"]]
    shapes = module.abstract(model)
    sharding = replicated(mesh)
    is_first = True

    def leaf(path: tuple[str, ...]) -> np.ndarray:
        nonlocal is_first
        shape = pick(shapes, path)
        want = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
        check = is_first  # the hashes of all files are checked once
        is_first = False
        at = (*record["path"], *path)
        return np.asarray(checkpoint.load_params(source, want, at, step, check, read_imported))

    return leaf


def _imported_tensors(
    files: Files, model: ModelConfig, family: str, dtype: str
) -> list[LazyTensor]:
    """The tensors of an imported model, under the same names; without a dtype each keeps its own."""
    shapes = file_shapes(model, family, transformer.abstract(model))
    lazy_tensors = []
    for name, shape in shapes.items():
        kind = KINDS[dtype] if dtype else files.where[name].kind
        make = functools.partial(files.get, name)
        lazy_tensors.append(LazyTensor(name, shape, DTYPES[kind], make))
    return lazy_tensors


def _trained_tensors(
    model: ModelConfig, family: str, leaf: _ReadLeaf, dtype: np.dtype, is_reward: bool
) -> list[LazyTensor]:
    """Every tensor of the file, ordered by our leaves: one of them is in memory at a time."""
    shapes = file_shapes(model, family, transformer.abstract(model))
    # GPT-2's fused tensors are made of three leaves.
    cached = functools.lru_cache(maxsize=3 if family == "gpt2" else 1)(leaf)

    def trunk_leaf(path: tuple[str, ...]) -> np.ndarray:
        return cached(("trunk", *path) if is_reward else path)

    lazy_tensors = []
    # Tensors of a leaf (a slice per layer and expert) follow one another, so that it is read once.
    for tensor in sorted(tensors(model, family), key=lambda tensor: tensor.slices[0].path):
        # A reward model has no head over the vocabulary.
        if is_reward and tensor.name == "lm_head.weight":
            continue
        shape = shapes[tensor.name]
        make = functools.partial(file_value, tensor, shape, trunk_leaf)
        lazy_tensors.append(LazyTensor(tensor.name, shape, dtype, make))
    if is_reward:
        make = lambda: cached(("head", "kernel"))[None]
        lazy_tensors.append(LazyTensor("score.weight", (1, model.embed_dim), dtype, make))
    return lazy_tensors


def _write_configs_and_tokenizer(source: epath.Path, folder: Path, config: dict[str, Any]) -> None:
    """Write config.json, generation_config.json and the tokenizer's files."""
    generation = read_json(source / "hf" / "generation_config.json")
    directory = Path(source) / "tokenizer"
    if directory.exists():
        tokenizer = load_tokenizer(directory)
        ids = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": list(dict.fromkeys(tokenizer.stop_ids)),
            "pad_token_id": tokenizer.pad_id,
        }
        generation = generation or ids
        for name, value in ids.items():
            if config.get(name) is None:
                config[name] = value
        _write_tokenizer(tokenizer, directory, folder)
    write_json(folder / "config.json", config)
    if generation:
        write_json(folder / "generation_config.json", generation)


def _write_tokenizer(tokenizer: Tokenizer, directory: Path, folder: Path) -> None:
    """Write a tokenizer's files: those of a published model are its own."""
    # Our records of the tokenizer stay behind: no other program reads them.
    for path in sorted(directory.iterdir()):
        if path.name not in ("jaxllm.json", IDS):
            shutil.copyfile(path, folder / path.name)
    if tokenizer.kind == Tokenizer.kind:
        # One that was trained here needs its own to be imported again.
        (folder / Tokenizer.record).rename(folder / Tokenizer.exported_record)
        for name, content in hugging_face.files_of(tokenizer).items():
            (folder / name).write_text(content, encoding="utf-8")


def _export_adapters(
    source: epath.Path,
    record: Mapping[str, Any],
    model: ModelConfig,
    family: str,
    mesh: jax.sharding.Mesh,
    folder: Path,
) -> None:
    if not record.get("adapters") or record["kind"] != "policy" or family == "gpt2":
        raise InputError(
            f"{source}: --adapters needs a policy trained with lora.rank above 0 (and no fused "
            "matrices); leave it out"
        )
    adapters = load_model(source, mesh)[0]["lora"]
    settings = record["adapters"]
    write_adapters(folder, adapters, model, family, settings, record["base"], str(source))
