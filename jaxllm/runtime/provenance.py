"""With what a stage ran: the versions of the code and of its packages, the machine, the devices."""

import datetime
import functools
import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

_PACKAGE = Path(__file__).parents[1]
# Packages that can change results.
_RECORDED_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "sentencepiece",
    "numpy",
)


def provenance(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What provenance.json holds: time, command, code version, packages, devices."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "code": _git_version(),
        "code_version": code_version(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
    }


# Cached: the source is read once, as it was when the process began to use it.
@functools.cache
def code_version() -> dict[str, str]:
    """A hash of this package's source, and the versions of JAX: with config and data, they decide every bit."""
    source = hashlib.sha256()
    # In a fixed order, since a file system lists files in any.
    for file in sorted(_PACKAGE.rglob("*.py")):
        source.update(file.read_bytes())
    return {
        "jaxllm": source.hexdigest()[:16],
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
    }


def _git_version() -> str:
    # -C: the process may have been started in another repository.
    command = ["git", "-C", str(_PACKAGE), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "installed package, no git checkout"
