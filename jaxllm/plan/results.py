"""What compiling found out about programs, kept on this machine's disk.

JAX's own cache keeps programs for devices that are there; a program for a TPU that is not there would be written and
never read. What `plan` wants of one is a few numbers. They are kept under a hash of everything they depend on: the
lowered program with its shardings, the devices and their order, the compiler, its version and its settings.
"""

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import jax

from jaxllm.config import InputError
from jaxllm.runtime import compile_cache
from jaxllm.runtime.files import read_json, write_json

# Another number when `measure` finds out something else.
_VERSION = 4
_LIMIT = 64 << 20  # bytes of all results
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cudnn-cu13")
_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


class Results:
    """A folder of results, one JSON file for each program.

    Args:
        folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        if folder:
            compile_cache.shrink(folder, _LIMIT)

    def get(self, key: str) -> dict[str, Any] | None:
        """What was found out about a program, or None. A damaged file counts as none, and is replaced."""
        if self._folder is None:
            return None
        try:
            return read_json(self._folder / f"{key}.json")
        except InputError:
            return None

    def put(self, key: str, figures: dict[str, Any]) -> None:
        """Keeps what was found out. Where that is impossible, the next plan compiles again."""
        if self._folder is None:
            return
        try:
            write_json(self._folder / f"{key}.json", figures)
        except OSError as error:
            compile_cache.say_not_kept(self._folder, error)


def kept_results() -> Results:
    """The results in this user's cache (JAXLLM_CACHE; empty: none)."""
    return Results(compile_cache.folder("plans"))


def key_of(lowered: Any, mesh: Any, trips: int) -> str:
    """A name for a lowered program on the devices of a mesh, and for all that decides how it is compiled.

    trips: repetitions of its loops, which its collectives are counted for.
    """
    devices = []
    for device in mesh.devices.flatten().tolist():
        names = ("coords", "core_on_chip", "slice_index", "process_index")
        place = [getattr(device, name, None) for name in names]
        devices.append([device.id, device.device_kind, *place])
    about = {
        "version": _VERSION,
        "program": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        "trips": trips,
        "mesh": list(mesh.shape.items()),
        "devices": devices,
        "versions": list(map(_version, _COMPILERS)),
        "level": str(jax.config.jax_optimization_level),  # pyright: ignore[reportAttributeAccessIssue]
        "settings": [os.environ.get(name, "") for name in _SETTINGS],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
