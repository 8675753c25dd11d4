"""Stage directories as models: a stage that trains a model writes model.json, by which it is loaded without a config.

    sft/model.json   {"kind": "policy", "path": ["params"], "model": {...}}

With LoRA the checkpoint holds the adapters only, and the card says where the base model is, relative to this directory:

    sft/model.json   {..., "adapters": {"rank": 8, ...}, "base": "../pretrain"}
"""

import os
from typing import Any

import jax
from etils import epath

from jaxllm.config import InputError, build, to_tree
from jaxllm.data.cache import key_of
from jaxllm.models import lora, scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.parts_config import LoRAConfig
from jaxllm.pretrained.safetensors_files import read_imported
from jaxllm.runtime import checkpoint
from jaxllm.runtime.files import is_remote, read_json, write_json
from jaxllm.runtime.seal import read_seal
from jaxllm.runtime.store.working import local_folder
from jaxllm.sharding import place_params
from jaxllm.tokenizers.published import load_tokenizer
from jaxllm.tokenizers.trained import Tokenizer

# Modules that describe their parameters with the same functions, `abstract` and `axes`.
_FAMILIES = {"policy": transformer, "reward": scalar}


def write_model_card(
    stage_dir: epath.Path,
    model: ModelConfig,
    kind: str,
    path: tuple[str, ...],
    adapters: LoRAConfig | None = None,
    base: str = "",
) -> None:
    """Write model.json.

    Args:
        stage_dir: the stage's directory.
        model: the model's config.
        kind: "policy" or "reward".
        path: keys to the parameters in the checkpoint's tree.
        adapters: if its rank is above 0, the parameters are adapters of this kind.
        base: then, the stage directory of the policy that they adapt.
    """
    record: dict[str, Any] = {"kind": kind, "path": list(path), "model": to_tree(model)}
    if adapters and adapters.rank:
        record["adapters"] = to_tree(adapters)
        # Relative, because the run directory may be moved.
        record["base"] = base if is_remote(base) else os.path.relpath(base, stage_dir)
    # One writer, since all processes see the same folder.
    if jax.process_index() == 0:
        write_json(stage_dir / "model.json", record)


def read_model_card(stage_dir: epath.PathLike) -> tuple[ModelConfig, dict[str, Any]]:
    """(the model's config, what `write_model_card` wrote). Raises InputError if the directory holds no model."""
    record = read_json(local_folder(stage_dir) / "model.json")
    if record is None:
        raise InputError(
            f"{stage_dir}: is not the directory of a trained stage (no model.json); "
            "give runs/NAME/STAGE"
        )
    return build(ModelConfig, record["model"], name=f"{stage_dir}/model.json"), record


def load_model(
    stage_dir: epath.PathLike,
    mesh: jax.sharding.Mesh,
    kind: str = "policy",
    bases: dict[str, Any] | None = None,
) -> tuple[Any, ModelConfig]:
    """(parameters, config) of the model in a stage directory, sharded over the mesh.

    A model that was trained as adapters comes as its base's parameters with the adapters added as further leaves;
    `transformer.apply` accepts them, and `lora.merge` folds them into the weights.

    Args:
        stage_dir: the stage's directory.
        mesh: the mesh to load the parameters onto.
        kind: the kind of model that is needed, "policy" or "reward".
        bases: {stage directory: parameters} of base models that are loaded already.

    Raises:
        InputError: the directory holds no model, or one of another kind.
    """
    stage_dir = local_folder(stage_dir)
    model, record = read_model_card(stage_dir)
    if record["kind"] != kind:
        raise InputError(
            f"{stage_dir}: holds a {record['kind']} model where a {kind} model is needed"
        )
    adapters = build(LoRAConfig, record.get("adapters", {}), name=f"{stage_dir}/model.json")
    family = _FAMILIES[kind]
    # With adapters, the checkpoint holds them and nothing of the base.
    shapes, axes = lora.trained(adapters, family.abstract(model), family.axes(model))
    params = checkpoint.load_params(
        stage_dir,
        place_params(mesh, shapes, axes),
        record["path"],
        _result_step(stage_dir),
        read_imported=read_imported,
    )
    if adapters.rank:
        base = _load_base(stage_dir, record["base"], mesh, bases or {})
        # A reward model is a decoder, its trunk, with a scalar head.
        frozen = lora.frozen(adapters, base if kind == "policy" else {"trunk": base})
        params = lora.join(frozen, params)
    return params, model


def weights_key(stage_dir: epath.PathLike) -> str:
    """A name for a model in a stage directory: for its config and the values of its weights, wherever they are stored.

    Raises:
        InputError: the directory holds no model, or none of its checkpoints is complete.
    """
    stage_dir = local_folder(stage_dir)
    _, record = read_model_card(stage_dir)
    seal = read_seal(checkpoint.newest(stage_dir, _result_step(stage_dir)))
    # Of an imported model no digests are taken; its files have hashes.
    values = checkpoint.digests_below(seal["digests"], record["path"]) or seal["files"]
    base = weights_key(_base_dir(stage_dir, record["base"])) if "base" in record else ""
    return key_of(record["model"], record.get("adapters"), values, base)


def _result_step(stage_dir: epath.Path) -> int | None:
    """The checkpoint that is the result of a finished stage; None: an unfinished one has a newest checkpoint."""
    return (read_json(stage_dir / "result.json") or {}).get("checkpoint")


def _base_dir(stage_dir: epath.Path, base: str) -> str:
    """The stage directory that a model card calls `base`."""
    return base if is_remote(base) else os.path.normpath(stage_dir / base)


def _load_base(
    stage_dir: epath.Path, base: str, mesh: jax.sharding.Mesh, loaded: dict[str, Any]
) -> Any:
    """Parameters of the policy that adapters belong to, its own adapters merged."""
    source = _base_dir(stage_dir, base)
    # PPO's reward model is loaded after the reference model, often its base: one copy serves both.
    for path, params in loaded.items():
        if os.path.normpath(path) == source:
            return params
    # The base may have been trained as adapters itself.
    return lora.merge(load_model(source, mesh)[0])


def load_policy(
    stage_dir: epath.PathLike, mesh: jax.sharding.Mesh
) -> tuple[Any, ModelConfig, Tokenizer]:
    """(parameters, config, tokenizer) of the policy in a stage directory, trained here or imported."""
    params, model = load_model(stage_dir, mesh)
    return params, model, load_tokenizer(local_folder(stage_dir) / "tokenizer")
