"""The local folder that a run with its directory in a store works in."""

import contextlib
import getpass
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jaxllm.config import InputError
from jaxllm.runtime.files import lock_file

# What the store and the scratch agreed on, in the scratch.
MANIFEST = ".mirror.json"
_LOCK = ".mirror.lock"
# Folders of other runs that nobody has used for so long are removed when a run starts.
_KEPT_SECONDS = 7 * 24 * 3600


def default_folder() -> Path:
    """Below which runs of this user have their scratch: JAXLLM_SCRATCH, or a folder in the system's temporary one."""
    given = os.environ.get("JAXLLM_SCRATCH")
    return Path(given) if given else Path(tempfile.gettempdir()) / f"jaxllm-{getpass.getuser()}"


def folder_of(url: str, parent: Path, number: int = 0) -> Path:
    """The scratch of a run directory: the same for the same URL, so that a run that comes back finds it.

    number: among the processes of one job on this machine.
    """
    name = re.sub(r"[^\w.-]+", "-", url.partition("://")[2])[-60:].strip("-")
    suffix = f"-{number}" if number else ""
    return parent / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}{suffix}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds its lock, which ends with the process.

    Raises:
        InputError: another process works in it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be made ({error.strerror}); set `scratch` or JAXLLM_SCRATCH"
        ) from None
    refusal = (
        f"{folder}: another process of this machine works on the same run; wait for it or stop it"
    )
    with lock_file(folder / _LOCK, refusal):
        os.utime(folder / _LOCK)
        yield


def clean(parent: Path, used: Path) -> None:
    """Remove the folders of other runs that were last used long ago."""
    for folder in parent.iterdir() if parent.exists() else ():
        lock = folder / _LOCK
        if (
            folder == used
            or not lock.exists()
            or time.time() - lock.stat().st_mtime < _KEPT_SECONDS
        ):
            continue
        with contextlib.suppress(InputError, OSError), locked(folder):
            shutil.rmtree(folder)
