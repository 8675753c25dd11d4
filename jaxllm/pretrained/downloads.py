"""Which files of a downloaded folder are the model, and why a folder cannot be read: one line with the fix."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import InputError
from jaxllm.models.config import ModelConfig
from jaxllm.pretrained.families import tensors
from jaxllm.pretrained.safetensors_files import BUFFERS, DTYPES, Files
from jaxllm.runtime.files import read_json

INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"


def model_files(folder: Path, index: Mapping[str, Any] | None) -> Files:
    """The tensors of a downloaded model.

    The index decides which files are read. Without one it is model.safetensors, and without that every
    safetensors file except adapters and consolidated.*.

    Args:
        index: the content of INDEX, None if the folder has none.

    Raises:
        InputError: no model in the folder, or a file of it is missing.
    """
    if index is not None:
        return _indexed(folder, index)
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != _ADAPTER)
    paths = [path for path in files if path.name == "model.safetensors"]
    # Mistral publishes the same model twice, consolidated.* in other names.
    if not paths:
        paths = [path for path in files if not path.name.startswith("consolidated")]
    paths = paths or files
    if not paths:
        raise InputError(f"{folder}: {_why_no_model(folder)}")
    # A download that stopped in between: without an index only the names tell.
    for path in paths:
        _check_siblings(path)
    return Files(folder, paths)


def _check_siblings(path: Path) -> None:
    """Raise InputError if the file is one of several, NAME-00001-of-00003.safetensors, and some are missing."""
    match = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.safetensors", path.name)
    if match:
        prefix, _, count = match.groups()
        names = [f"{prefix}{i:05}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
        _check_all_exist(path.parent, names, f"the {len(names)} parts of the model")


def _check_all_exist(folder: Path, names: Sequence[str], what: str) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        path = folder / missing[0]
        raise InputError(f"{path}: is missing{more}, one of {what}; fetch it as well")


def _indexed(folder: Path, index: Mapping[str, Any]) -> Files:
    file_of = index.get("weight_map")
    no_map = f"{folder / INDEX}: has no weight_map of tensors to files; fetch it again"
    if not isinstance(file_of, Mapping) or not file_of:
        raise InputError(no_map)
    if not all(isinstance(name, str) for name in file_of.values()):
        raise InputError(no_map)
    names = sorted(set(file_of.values()))
    for name in names:
        # A name with a folder in it could point anywhere on this machine.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{folder / INDEX}: names {name!r:.80}, which is not a safetensors file in the same "
                "folder; fetch it again"
            )
    _check_all_exist(folder, names, f"those that {INDEX} names")
    files = Files(folder, [folder / name for name in names])
    for tensor, name in file_of.items():
        # The second spelling: GPT-2 as it was first published.
        stored = files.where.get(tensor) or files.where.get(f"transformer.{tensor}")
        if stored is None or stored.path.name != name:
            raise InputError(
                f"{folder / name}: has no {tensor}, which {INDEX} puts there; fetch both again"
            )
    return files


def _why_no_model(folder: Path) -> str:
    """Why a folder without safetensors files holds no model, and the fix."""
    if (folder / _ADAPTER).exists() or (folder / _ADAPTER_CONFIG).exists():
        return _adapter_alone(folder)
    pickles = [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    reason = " (files of pickles are not read: they can run code)" if pickles else ""
    return f"has no *.safetensors{reason}; convert the model to safetensors"


def _adapter_alone(folder: Path) -> str:
    try:
        base = (read_json(folder / _ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
    except InputError:
        base = None  # a damaged file only makes the message shorter
    of_base = f" of {base}" if isinstance(base, str) and base else ""
    fix = "merge it into its base, save that, and import the merged model"
    return f"holds an adapter{of_base} and no model; {fix}"


def check_folder(folder: Path) -> None:
    """Raise InputError, with the fix, if this cannot be the folder of a downloaded model."""
    if folder.is_file():
        raise InputError(f"{folder}: is a file; give the folder that it is in (or a .gguf file)")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; download the model and give its folder")
    if (folder / "config.json").exists():
        return
    if (folder / _ADAPTER_CONFIG).exists():
        raise InputError(f"{folder}: {_adapter_alone(folder)}")
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        raise InputError(
            f"{folder}: has no config.json, but GGUF files; give one of them, as in {ggufs[0]}"
        )
    raise InputError(f"{folder}: has no config.json; give the folder of a downloaded model")


def check_not_quantized(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError if a config.json says that the weights are stored quantized."""
    # The tensors of a quantized model have other names and types; this says why.
    for field in ("quantization_config", "compression_config"):
        settings = config.get(field)
        if settings is None:
            continue
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        by_method = f" by {method}" if isinstance(method, str) else ""
        fix = "dequantize the model and save it, or import the model that it was made from"
        raise InputError(
            f"{where}: {field}: the weights are quantized{by_method}, which is not read; {fix}"
        )


def check_kinds(files: Files) -> None:
    """Raise InputError if a tensor of the model is stored in a type that is not known."""
    unknown: dict[str, str] = {}
    for name, stored in files.where.items():
        # Buffers are not read, whatever their type.
        if stored.kind not in DTYPES and not BUFFERS.search(name):
            unknown[name] = stored.kind
    if unknown:
        kinds = ", ".join(sorted(set(unknown.values())))
        example = next(iter(unknown))
        raise InputError(
            f"{files.folder}: tensors of type {kinds} ({example}); known: {', '.join(DTYPES)}; "
            "give the model in one of these"
        )


def check_tied(files: Files, model: ModelConfig, family: str, where: str) -> None:
    """Raise InputError if the files have another head than the config at `where` says."""
    table = next(tensors(model, family)).name
    head = "lm_head.weight"
    has_table = table in files.where
    has_head = head in files.where
    # Both would import, and the model would compute something else.
    if model.tie_embeddings and has_table and has_head and not files.equal(table, head):
        raise InputError(
            f"{where}: tie_word_embeddings is true, and {head} is another matrix than {table}; "
            "set it to false"
        )
    if not model.tie_embeddings and has_table and not has_head:
        raise InputError(
            f"{where}: tie_word_embeddings is false, and the files have no {head}; set it to true"
        )
