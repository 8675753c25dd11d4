"""Which files of a downloaded folder are the model, and what in it cannot be read. One line says what to do then."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import InputError
from jaxllm.models.config import ModelConfig
from jaxllm.pretrained.families import tensors
from jaxllm.pretrained.safetensors_files import BUFFERS, KINDS, Files

INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_model.safetensors"


def model_files(folder: Path, index: Mapping[str, Any] | None) -> Files:
    """The tensors of a downloaded model: the index decides; without one model.safetensors, else every other file.

    index: what INDEX holds, None where there is none. Raises InputError where there is nothing to read, or not all.
    """
    if index is not None:
        return _indexed(folder, index)
    found = sorted(path for path in folder.glob("*.safetensors") if path.name != _ADAPTER)
    paths = [path for path in found if path.name == "model.safetensors"]
    paths = paths or [path for path in found if not path.name.startswith("consolidated")] or found
    if not paths:
        raise InputError(f"{folder}: {_nothing(folder)}")
    for path in paths:
        _check_siblings(path)
    return Files(folder, paths)


def _check_siblings(path: Path) -> None:
    """Raise InputError where the file is one of several, NAME-00001-of-00003.safetensors, and not all are there."""
    if found := re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.safetensors", path.name):
        names = [
            f"{found[1]}{number:05}-of-{found[3]}.safetensors"
            for number in range(1, int(found[3]) + 1)
        ]
        _check_there(path.parent, names, f"the {len(names)} parts of the model")


def _check_there(folder: Path, names: Sequence[str], whole: str) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(
            f"{folder / missing[0]}: is missing{more}, one of {whole}; fetch it as well"
        )


def _indexed(folder: Path, index: Mapping[str, Any]) -> Files:
    place, where = folder / INDEX, index.get("weight_map")
    if (
        not isinstance(where, Mapping)
        or not where
        or not all(isinstance(file, str) for file in where.values())
    ):
        raise InputError(f"{place}: has no weight_map of tensors to files; fetch it again")
    names = sorted(set(where.values()))
    if outside := [
        name for name in names if Path(name).name != name or not name.endswith(".safetensors")
    ]:
        raise InputError(
            f"{place}: names {outside[0]!r:.80}, which is no safetensors file beside it; fetch it again"
        )
    _check_there(folder, names, f"those that {INDEX} names")
    files = Files(folder, [folder / name for name in names])
    for tensor, name in where.items():
        place = files.where.get(tensor) or files.where.get(
            f"transformer.{tensor}"
        )  # GPT-2 as it was first published
        if place is None or place.path.name != name:
            raise InputError(
                f"{folder / name}: has no {tensor}, which {INDEX} puts there; fetch both again"
            )
    return files


def _nothing(folder: Path) -> str:
    """Why a folder holds no model, and the mend."""
    if (folder / _ADAPTER).exists() or (folder / "adapter_config.json").exists():
        return _adapter_alone(folder)
    if [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]:
        pickles = "files of pickles are not read: they can run code"
        return f"has no *.safetensors ({pickles}); convert the model to safetensors"
    return "has no *.safetensors; convert the model to safetensors"


def _adapter_alone(folder: Path) -> str:
    try:
        about = json.loads((folder / "adapter_config.json").read_bytes())
        base = about.get("base_model_name_or_path") if isinstance(about, Mapping) else None
    except (OSError, ValueError, RecursionError):
        base = None
    of = f" of {base}" if isinstance(base, str) and base else ""
    return f"holds an adapter{of} and no model; merge it into its base, save that, and import the merged model"


def check_folder(folder: Path) -> None:
    """Raise InputError, with the mend, where this cannot be the folder of a downloaded model."""
    if folder.is_file():
        raise InputError(f"{folder}: is a file; give the folder it lies in (or a .gguf file)")
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; download the model and give the folder it lies in"
        )
    if (folder / "config.json").exists():
        return
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: {_adapter_alone(folder)}")
    if ggufs := sorted(folder.glob("*.gguf")):
        raise InputError(
            f"{folder}: has no config.json, but GGUF files; give one of them, as in {ggufs[0]}"
        )
    raise InputError(f"{folder}: has no config.json; give the folder of a downloaded model")


def check_not_quantized(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError where a config.json says that the weights are stored quantized."""
    for field in ("quantization_config", "compression_config"):
        if (about := config.get(field)) is not None:
            method = about.get("quant_method") if isinstance(about, Mapping) else None
            named = f" by {method}" if isinstance(method, str) else ""
            mend = "dequantize the model and save it, or import the model that it was made from"
            raise InputError(
                f"{where}: {field}: the weights are quantized{named}, which is not read; {mend}"
            )


def check_kinds(files: Files) -> None:
    """Raise InputError where a tensor of the model is stored in a type that is not known."""
    other = {name: place.kind for name, place in files.where.items() if place.kind not in KINDS}
    wrong = [name for name in other if not BUFFERS.search(name)]
    if wrong:
        kinds, known = ", ".join(sorted({other[name] for name in wrong})), ", ".join(KINDS)
        mend = "give the model in one of these"
        raise InputError(
            f"{files.folder}: tensors of type {kinds} ({wrong[0]}); known: {known}; {mend}"
        )


def check_tied(files: Files, model: ModelConfig, family: str, where: str) -> None:
    """Raise InputError where the files have another head than the config at `where` says."""
    table, head = next(tensors(model, family)).name, "lm_head.weight"
    field = f"{where}: tie_word_embeddings is {str(model.tie_embeddings).lower()}"
    if (
        model.tie_embeddings
        and {table, head} <= files.where.keys()
        and not files.equal(table, head)
    ):
        raise InputError(f"{field}, and {head} is another matrix than {table}; set it to false")
    if not model.tie_embeddings and table in files.where and head not in files.where:
        raise InputError(f"{field}, and the files have no {head}; set it to true")
