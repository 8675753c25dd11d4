"""The models that are served, under their names."""

import dataclasses
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from jaxllm import stages
from jaxllm.config import InputError
from jaxllm.engine.config import EngineConfig
from jaxllm.engine.engine import Engine
from jaxllm.model_store import load_policy, read_model_card
from jaxllm.models import decode, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.files import is_remote
from jaxllm.runtime.hubs import names as hub_names
from jaxllm.runtime.mesh import make_mesh
from jaxllm.runtime.store.working import local_folder, local_run
from jaxllm.serve.config import ServeArgs
from jaxllm.tokenizers.published import load_tokenizer
from jaxllm.tokenizers.trained import Tokenizer

# Tokens between which requests come and go: few, so that a new one is heard soon.
_STEPS = 4
# Responses at full length that the cache has room for, if nothing is said.
_FULL_RESPONSES = 16
# A run in a store is looked at again after so many seconds.
_FETCH_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class Served:
    """A model with its engine."""

    name: str
    number: int
    """Of its engine, in the driver."""
    config: ModelConfig
    tokenizer: Tokenizer
    engine: Engine
    created: int
    """When its directory was made, in seconds since 1970."""


class Runs(Mapping[str, Path]):
    """Run directories by name, as local folders; those in a store are fetched again as they grow."""

    def __init__(self, directories: Mapping[str, str]):
        self._directories = directories
        self._fetched: dict[str, tuple[float, Path]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Path:
        """The folder of a run; it may have to be fetched."""
        directory = self._directories[name]
        if not is_remote(directory):
            return Path(directory).expanduser()
        with self._lock:
            when, folder = self._fetched.get(name, (-math.inf, Path()))
            if time.monotonic() - when > _FETCH_SECONDS:
                folder = Path(local_run(directory))
                self._fetched[name] = time.monotonic(), folder
            return folder

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._directories)

    def __len__(self) -> int:
        """How many runs there are."""
        return len(self._directories)


@dataclasses.dataclass(frozen=True)
class Found:
    """What directories hold."""

    stages: dict[str, str]
    """{name: directory of a stage with a policy}."""
    runs: Runs
    """Run directories, to be watched."""


def find(directories: Sequence[str]) -> Found:
    """The stages and runs in these directories.

    A stage has the name of its directory, with its run's name before it where two would have the same.

    Raises:
      InputError: a directory is neither a run nor a stage with a model that generates text.
    """
    if not directories:
        raise InputError("jaxllm serve: give a run or a stage, for example runs/quickstart")
    stage_dirs: list[str] = []
    runs: dict[str, str] = {}
    for directory in directories:
        inside = _stages_of(directory)
        if inside is None:
            _check_policy(directory)
            stage_dirs.append(directory)
        else:
            stage_dirs += inside
            name = directory if is_remote(directory) else str(Path(directory).resolve())
            runs[_free_name(name.rstrip("/").rpartition("/")[2], runs)] = directory
    return Found(_names_of(stage_dirs), Runs(runs))


def _stages_of(directory: str) -> list[str] | None:
    """The stages of a run that have a policy; None: it is no run directory."""
    if hub_names.is_on_hub(directory):
        return None
    folder = Path(local_run(directory))
    # A stage's folder has one that is called tokenizer, like a run's.
    is_stage = (folder / "model.json").exists()
    if is_stage or not any((folder / name).is_dir() for name in stages.names()):
        return None
    found = []
    for name in stages.names():
        stage_dir = f"{directory.rstrip('/')}/{name}"
        if (folder / name / "model.json").exists():
            _, card = read_model_card(stage_dir)
            if card["kind"] == "policy":
                found.append(stage_dir)
    return found


def _check_policy(directory: str) -> None:
    _, card = read_model_card(directory)
    if card["kind"] != "policy":
        raise InputError(f"{directory}: holds a {card['kind']} model, which generates no text")


def _names_of(stage_dirs: Sequence[str]) -> dict[str, str]:
    ends = [directory.rstrip("/").split("/") for directory in stage_dirs]
    short = [parts[-1] for parts in ends]
    names: dict[str, str] = {}
    for directory, parts in zip(stage_dirs, ends, strict=True):
        is_unique = short.count(parts[-1]) == 1
        name = parts[-1] if is_unique else "/".join(parts[-2:])
        names[_free_name(name, names)] = directory
    return names


def _free_name(name: str, taken: dict) -> str:
    """The name, or with a number where another directory has it."""
    numbered = (f"{name}-{i}" for i in range(2, len(taken) + 2))
    return next(each for each in (name, *numbered) if each not in taken)


def load(args: ServeArgs, stage_dirs: dict[str, str]) -> list[Served]:
    """The models of stages, each ready to answer.

    Raises:
      InputError: a directory has no model, or there are too few devices.
    """
    devices = jax.devices()
    if args.tensor > len(devices):
        raise InputError(f"--tensor: {args.tensor} devices, and there are {len(devices)}; lower it")
    mesh = make_mesh(MeshConfig(data=1, tensor=args.tensor), devices[: args.tensor])
    served = []
    for number, (name, stage_dir) in enumerate(stage_dirs.items()):
        params, config, tokenizer = load_policy(stage_dir, mesh)
        engine = Engine(
            params, config, mesh, settings=_settings(args, config, mesh), any_rules=True
        )
        created = int(Path(local_folder(stage_dir)).stat().st_mtime)
        served.append(Served(name, number, config, tokenizer, engine, created))
        engine.prepare()
    return served


def _settings(args: ServeArgs, config: ModelConfig, mesh: jax.sharding.Mesh) -> EngineConfig:
    settings = EngineConfig(slots=args.slots, steps=_STEPS, cache_gib=args.cache_gib)
    if args.cache_gib:
        return settings
    # A response is promised the blocks of its longest length: with the context for every slot most would be unused.
    with jax.set_mesh(mesh):
        size = decode.block_bytes(decode.decoding_config(config), settings.block)
    full = -(-config.max_length // settings.block) * size
    count = min(_FULL_RESPONSES, args.slots)
    return dataclasses.replace(settings, cache_gib=(count * full + size) / 2**30)


def load_tokenizers(sources: Sequence[str]) -> dict[str, Tokenizer]:
    """Published tokenizers by the last part of their name, or by all of it where two have the same last part.

    Raises:
        InputError: a folder has no tokenizer, or a hub does not give it.
    """
    short = [source.rstrip("/").rpartition("/")[2] for source in sources]
    found = {}
    for source, name in zip(sources, short, strict=True):
        is_on_hub = hub_names.is_on_hub(source)
        folder = hub_names.fetch(source, weights=False).folder if is_on_hub else source
        found[name if short.count(name) == 1 else source] = load_tokenizer(folder)
    return found


def describe(served: Served) -> dict[str, object]:
    """What a page says of a model."""
    tokenizer = served.tokenizer
    return {
        "name": served.name,
        "num_params": transformer.num_params(served.config),
        "max_length": served.config.max_length,
        "vocab_size": tokenizer.vocab_size,
        "chat_refusal": tokenizer.chat_refusal,
        "created": time.strftime("%Y-%m-%d %H:%M", time.gmtime(served.created)),
    }
