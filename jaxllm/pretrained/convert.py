"""Models from and to the format that others read: `jaxllm import` and `jaxllm export`.

An imported directory is a stage directory whose checkpoint is the safetensors files themselves, sealed like any other;
parameters are read from them straight onto the mesh. An export goes leaf by leaf, so that no whole model is in memory.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from jaxllm.config import InputError, to_tree
from jaxllm.model_store import load_model, read_model_card, write_model_card
from jaxllm.models import lora, scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.pretrained import downloads
from jaxllm.pretrained.families import file_shapes, file_value, pick, present, tensors
from jaxllm.pretrained.family_config import FAMILIES, family_of, from_hf, to_hf
from jaxllm.pretrained.safetensors_files import KINDS, Files, Planned, read_imported
from jaxllm.runtime import checkpoint
from jaxllm.runtime.console import console
from jaxllm.runtime.files import read_json, write_json
from jaxllm.runtime.mesh import MeshConfig, make_mesh
from jaxllm.sharding import replicated
from jaxllm.tokenizers.files import IDS
from jaxllm.tokenizers.published import load_tokenizer

_KINDS = {str(dtype): kind for kind, dtype in KINDS.items()}  # bfloat16 -> BF16, ...


def import_model(source: str, out: str) -> None:
    """Make the stage directory `out` of a folder with config.json, *.safetensors and a tokenizer, or of a GGUF file.

    Raises InputError where `out` exists, the family is not known, or a tensor is missing, unknown or misshapen.
    """
    folder, target = Path(source).expanduser(), Path(out).expanduser()
    if target.exists():
        raise InputError(f"{target}: exists already; give another directory, or remove it")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if folder.suffix.lower() == ".gguf" and not folder.is_dir():
            _fill(partial, _unpack(folder, partial / "gguf"), move=True)
        else:
            _fill(partial, folder, move=False)
        shutil.rmtree(partial / "gguf", ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(f"next: {_next(target)}")


def _next(stage: Path) -> str:
    """What can be done with an imported model."""
    if not (stage / "tokenizer").exists():
        return f"jaxllm export {stage} FOLDER"
    if load_tokenizer(stage / "tokenizer").chat_refusal:
        return f"jaxllm generate {stage} --prompt TEXT"
    return f"jaxllm chat {stage}"


def _fill(stage: Path, folder: Path, move: bool) -> None:
    """Put what is in the folder into the directory of a stage."""
    model, family, files = _read_folder(folder)
    unused = files.check(model, family)
    if unused:
        console.print(f"not needed: {len(unused)} tensors ({', '.join(unused[:3])})")
    kinds = sorted({place.kind for name, place in files.where.items() if name not in unused})
    step = stage / "checkpoints" / "0"
    step.mkdir(parents=True)
    for path in files.paths:  # the system copies them: nothing passes through this process
        console.print(f"copying {path.name}")
        (shutil.move if move else shutil.copyfile)(path, step / path.name)
    record = {"format": "safetensors", "family": family, "model": to_tree(model), "stored": kinds}
    checkpoint.write_seal(epath.Path(step), {"record": record, "digests": {}})
    _take_tokenizer(folder, stage, model)
    (stage / "hf").mkdir()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            shutil.copyfile(folder / name, stage / "hf" / name)
    write_model_card(epath.Path(stage), model, "policy", ("params",))
    count = transformer.num_params(model)
    write_json(stage / "result.json", {"parameters": count, "family": family, "checkpoint": 0})
    console.print(f"{family}, {count:,} parameters, {', '.join(kinds)}")


def _read_folder(folder: Path) -> tuple[ModelConfig, str, Files]:
    """(config, family, tensors) of a downloaded model. Raises InputError on all that cannot be read."""
    downloads.check_folder(folder)
    where, mend = str(folder / "config.json"), "fetch it again"
    config = read_json(folder / "config.json", mend) or {}
    downloads.check_not_quantized(config, where)
    model, family = from_hf(config, where)
    files = downloads.model_files(folder, read_json(folder / downloads.INDEX, mend))
    downloads.check_kinds(files)
    model = present(model, files.where)
    downloads.check_tied(files, model, family, where)
    return model, family, files


def _unpack(file: Path, folder: Path) -> Path:
    """Make a folder of safetensors from a GGUF file, and return it."""
    from jaxllm.pretrained import gguf_files

    config, named, tokenizer = gguf_files.read(file)
    folder.mkdir(parents=True)
    _write(folder, named, shard_gb=2.0)
    write_json(folder / "config.json", config)
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)
    return folder


def _take_tokenizer(folder: Path, partial: Path, model: ModelConfig) -> None:
    try:
        tokenizer = load_tokenizer(folder)
    except InputError as error:
        console.print(
            f"warning: no tokenizer ({error}); the model can be exported and started from, not talked to"
        )
        return
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size} rows"
        )
    tokenizer.save(partial / "tokenizer")
    if tokenizer.chat_refusal:
        console.print(f"warning: no chats ({tokenizer.chat_refusal}); everything else works")


def export_model(
    stage_dir: str, out: str, dtype: str = "", shard_gb: float = 5.0, adapters: bool = False
) -> None:
    """Write a stage's model as safetensors with config.json and its tokenizer; a reward model as a classifier.

    dtype: "float32", "bfloat16" or "float16"; empty: that of an imported model, else bfloat16.
    """
    source, target = epath.Path(stage_dir).expanduser(), Path(out).expanduser()
    if target.exists():
        raise InputError(f"{target}: exists already; give another directory, or remove it")
    if dtype not in ("", *_KINDS):
        raise InputError(f"--dtype: {dtype!r} is unknown; known: {', '.join(_KINDS)}")
    model, record = read_model_card(source)
    if model.mtp_modules and family_of(model) != "deepseek_v3":
        console.print(
            "left out: the modules that predict further tokens, which no file of this family has"
        )
        model = dataclasses.replace(model, mtp_modules=0)
    config, family = to_hf(model)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if adapters:
        _write_adapters(source, record, model, family, mesh, partial)
    else:
        step = (read_json(source / "result.json") or {}).get("checkpoint")
        step_dir = checkpoint.newest(source, step)
        seal = checkpoint.read_seal(step_dir)
        kinds = seal["record"].get("stored", [])  # of an imported model
        stored = dtype or (
            str(KINDS[kinds[0]]) if len(kinds) == 1 else "float32" if kinds else "bfloat16"
        )
        leaf, reward = _leaves(source, record, model, mesh, step), record["kind"] == "reward"
        if kinds:
            checkpoint.check_files(step_dir, seal)
            every = _as_imported(Files(Path(step_dir)), model, family, dtype)
        else:
            every = _of_leaves(model, family, leaf, KINDS[_KINDS[stored]], reward)
        _write(partial, every, shard_gb)
        given = read_json(source / "hf" / "config.json") or {}
        config = {**config, **given, "dtype": stored, "vocab_size": model.vocab_size}
        if reward:
            config |= {
                "architectures": [
                    FAMILIES[family].replace("ForCausalLM", "ForSequenceClassification")
                ]
            }
            config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}, "num_labels": 1}
            bias = float(leaf(("head", "bias")))
            console.print(
                f"a classifier's head has no bias: its scores are lower than the reward model's by {bias:.6g}"
            )
        _describe_tokens(source, partial, config)
    partial.rename(target)
    console.print(f"{target}: {family}{' adapters' if adapters else ''}")


def _leaves(
    source: epath.Path, record: Any, model: ModelConfig, mesh: Any, step: int | None
) -> Callable[[tuple[str, ...]], np.ndarray]:
    """A function from a leaf's path in the parameters to its float32 values, read when it is asked for.

    A model trained as adapters is put together first, in memory.
    """
    family = {"policy": transformer, "reward": scalar}[record["kind"]]
    if record.get("adapters"):
        whole = lora.merge(load_model(source, mesh, record["kind"])[0])
        return lambda path: np.asarray(pick(whole, path))
    shapes, everywhere = family.abstract(model), replicated(mesh)
    unchecked = [True]  # the files, until the first leaf is read

    def leaf(path: tuple[str, ...]) -> np.ndarray:
        want = pick(shapes, path)
        want = jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=everywhere)
        first = unchecked.pop() if unchecked else False
        return np.asarray(
            checkpoint.load_params(
                source, want, (*record["path"], *path), step, first, read_imported
            )
        )

    return leaf


def _as_imported(files: Files, model: ModelConfig, family: str, dtype: str) -> list[Planned]:
    """The tensors of an imported model, which are in its files by the same names; without a dtype as they are there."""
    shapes = file_shapes(model, family, transformer.abstract(model))
    kind = lambda name: KINDS[_KINDS[dtype] if dtype else files.where[name].kind]
    return [
        Planned(name, shape, kind(name), functools.partial(files.get, name))
        for name, shape in shapes.items()
    ]


def _of_leaves(
    model: ModelConfig, family: str, leaf: Any, dtype: np.dtype, reward: bool
) -> list[Planned]:
    """Every tensor of the file, leaf after leaf, so that one leaf of ours is in memory at a time."""
    shapes = file_shapes(model, family, transformer.abstract(model))
    held = functools.lru_cache(maxsize=3 if family == "gpt2" else 1)(
        leaf
    )  # GPT-2's tensors are made of three
    within = lambda path: held(("trunk", *path) if reward else path)
    stored = [
        Planned(
            t.name, shapes[t.name], dtype, functools.partial(file_value, t, shapes[t.name], within)
        )
        for t in sorted(tensors(model, family), key=lambda t: t.parts[0].path)
        if t.name != "lm_head.weight" or not reward
    ]
    if reward:
        stored.append(
            Planned(
                "score.weight", (1, model.embed_dim), dtype, lambda: held(("head", "kernel"))[None]
            )
        )
    return stored


def _write(folder: Path, stored: Iterable[Planned], shard_gb: float) -> None:
    """Files of at most shard_gb (a larger tensor is a file of its own) and their index."""
    shards: list[list[Planned]] = [[]]
    for tensor in stored:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > shard_gb * 10**9:
            shards.append([])
        shards[-1].append(tensor)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        where = {
            tensor.name: file for file, shard in zip(names, shards, strict=True) for tensor in shard
        }
        total = {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard)}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": total, "weight_map": where}
        )
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard)


def _write_file(path: Path, shard: Sequence[Planned]) -> None:
    """A safetensors file, a tensor at a time: the library's own writer copies all of them first."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in shard:
        offsets = [place, place + tensor.nbytes]
        header[tensor.name] = {
            "dtype": _KINDS[str(tensor.dtype)],
            "shape": tensor.shape,
            "data_offsets": offsets,
        }
        place += tensor.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, shape, dtype, make in shard:
            value = np.ascontiguousarray(make().astype(dtype, copy=False))
            if value.shape != shape:
                raise InputError(
                    f"{name}: is {list(value.shape)}, not {list(shape)}; the model's sizes do not fit"
                )
            file.write(value.reshape(-1).view(np.uint8).data)


def _describe_tokens(source: epath.Path, folder: Path, config: dict[str, Any]) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    generation = read_json(source / "hf" / "generation_config.json")
    if (Path(source) / "tokenizer").exists():
        tokenizer = load_tokenizer(Path(source) / "tokenizer")
        stops = [*dict.fromkeys(tokenizer.stop_ids)]
        ids = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": stops,
            "pad_token_id": tokenizer.pad_id,
        }
        generation = generation or ids
        config |= {name: value for name, value in ids.items() if config.get(name) is None}
        for path in sorted((Path(source) / "tokenizer").iterdir()):
            if path.name not in ("jaxllm.json", IDS):
                shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", config)
    if generation:
        write_json(folder / "generation_config.json", generation)


def _write_adapters(
    source: epath.Path, record: Any, model: ModelConfig, family: str, mesh: Any, folder: Path
) -> None:
    """LoRA adapters in PEFT's format."""
    if not record.get("adapters") or record["kind"] != "policy" or family == "gpt2":
        raise InputError(
            f"{source}: --adapters needs a policy trained with lora.rank above 0 (and no fused matrices)"
        )
    own = load_model(source, mesh)[0]["lora"]
    values, modules = {}, set()
    for tensor in tensors(model, family):
        part = tensor.parts[0]
        found = functools.reduce(
            lambda tree, key: tree.get(key, {}) if isinstance(tree, dict) else {}, part.path, own
        )
        if not isinstance(found, dict) or "a" not in found:
            continue
        if part.interleaved:
            raise InputError(
                f"{source}: {tensor.name} has rotary pairs side by side, which adapters cannot be turned into"
            )
        a, b = (np.asarray(found[name][part.index[0]]) for name in "ab")
        name = f"base_model.model.{tensor.name.removesuffix('.weight')}"
        values[f"{name}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, a.shape[-1]).T)
        values[f"{name}.lora_B.weight"] = np.ascontiguousarray(b.reshape(b.shape[0], -1).T)
        modules.add(name.rsplit(".", 1)[1])
    settings = record["adapters"]
    safetensors.numpy.save_file(
        values, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
    }
    about |= {
        "target_modules": sorted(modules),
        "bias": "none",
        "base_model_name_or_path": record["base"],
    }
    write_json(folder / "adapter_config.json", about)
