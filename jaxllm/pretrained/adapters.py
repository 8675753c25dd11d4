"""LoRA adapters in PEFT's format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from jaxllm.config import InputError
from jaxllm.models.config import ModelConfig
from jaxllm.pretrained.families import LeafSlice, tensors
from jaxllm.runtime.files import write_json


def write_adapters(
    folder: Path,
    adapters: Mapping[str, Any],
    model: ModelConfig,
    family: str,
    settings: Mapping[str, Any],
    base: str,
    where: str,
) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    Args:
        adapters: our tree of {"a", "b"} under the path of each adapted matrix.
        settings: the stage's `LoRAConfig` as a mapping.
        base: the model that they adapt, named in adapter_config.json.
        where: names the stage in an error.

    Raises:
        InputError: a matrix is adapted whose rotary pairs the file interleaves.
    """
    values: dict[str, np.ndarray] = {}
    modules: set[str] = set()
    for tensor in tensors(model, family):
        leaf_slice = tensor.slices[0]
        matrices = _adapter_of(adapters, leaf_slice)
        if matrices is None:
            continue
        # A low-rank factor of such a matrix would need its rows in the file's order as well.
        if leaf_slice.interleaved:
            raise InputError(
                f"{where}: {tensor.name} has interleaved rotary pairs, to which adapters cannot be "
                "converted; export the merged model without --adapters"
            )
        # PEFT's A is [rank, in] and B [out, rank]; ours are [in ..., rank] and [rank, out ...].
        layer = leaf_slice.index[0]
        a = np.asarray(matrices["a"][layer])
        b = np.asarray(matrices["b"][layer])
        module = tensor.name.removesuffix(".weight")
        prefix = f"base_model.model.{module}"
        values[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, a.shape[-1]).T)
        values[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b.reshape(b.shape[0], -1).T)
        modules.add(module.rsplit(".", 1)[1])
    path = folder / "adapter_model.safetensors"
    safetensors.numpy.save_file(values, path, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "target_modules": sorted(modules),
        "bias": "none",
        "base_model_name_or_path": base,
    }
    write_json(folder / "adapter_config.json", config)


def _adapter_of(adapters: Any, leaf_slice: LeafSlice) -> Mapping[str, Any] | None:
    """{"a", "b"} of the matrix, None if it is not adapted."""
    for key in leaf_slice.path:
        if not isinstance(adapters, dict) or key not in adapters:
            return None
        adapters = adapters[key]
    return adapters if isinstance(adapters, dict) and "a" in adapters else None
