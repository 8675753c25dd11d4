"""Compiled XLA programs, kept between test sessions in a folder outside the repository.

    <root>/<key>/jit_step-...-cache      the store: complete entries only
    <session>/compiled/...-cache         what one session reads and writes, linked to the store

JAX writes an entry in place, warns about a damaged one in every process and never replaces it. Tests
kill processes at any moment, and sessions run at the same time, so JAX does not write to the store.
(`jax_compilation_cache_max_size` would lock the folder against other writers, but not against SIGKILL,
and it lists all entries before each write.) A session links the store's entries into its own folder
and, when it ends, moves the new complete ones into the store, each with one rename.

`JAXLLM_TEST_CACHE` names another root; if it is empty, nothing is kept.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

_SUFFIX = "-cache"  # of JAX's entries
_MAX_AGE_DAYS = 30


def store(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Returns this machine's folder of compiled programs, or None if nothing can be kept."""
    base = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = environ.get("JAXLLM_TEST_CACHE", str(base / "jaxllm-tests"))
    if not root:
        return None
    folder = Path(root).expanduser() / _key()
    try:
        # Whoever can write here can run code in our processes: JAX loads entries unchecked.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _key() -> str:
    """A program compiled by other versions, or for a CPU with other instructions, must not be read."""
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")]
    words = [*versions, platform.python_version(), platform.machine(), _cpu_flags()]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _cpu_flags() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor()
    # "flags" on x86, "Features" on ARM; all cores have the same line.
    flags = re.search(r"^(flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return " ".join(sorted(flags[2].split())) if flags else ""


def borrow(kept: Path, session: Path) -> None:
    """Removes entries of the store that are too old, and links the others into a session's folder."""
    session.mkdir(parents=True, exist_ok=True)
    oldest = time.time() - _MAX_AGE_DAYS * 24 * 3600
    # Folders of other keys (an earlier jaxlib, another CPU that shares this home) age too.
    for entry in kept.parent.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):  # another session removes it
            if entry.stat().st_mtime < oldest:
                entry.unlink()
            elif entry.parent == kept and entry.name.endswith(_SUFFIX):
                _link_or_copy(entry, session / entry.name)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def give_back(kept: Path, session: Path) -> None:
    """Moves the complete entries that a session has added into the store."""
    for entry in session.glob(f"*{_SUFFIX}"):
        target = kept / entry.name
        if target.exists() or not _is_complete(entry):
            continue
        unfinished = kept / f".{entry.name}.{os.getpid()}"
        try:
            shutil.copyfile(entry, unfinished)
            unfinished.replace(target)
        except OSError:  # a full disk, say: the next session compiles again
            unfinished.unlink(missing_ok=True)
            return


def _is_complete(entry: Path) -> bool:
    """A process that was killed while JAX wrote leaves the beginning of a compressed file."""
    from jax._src import compilation_cache  # JAX has no public reader of an entry

    try:
        return bool(compilation_cache.decompress_executable(entry.read_bytes()))
    except Exception:  # zstd's or zlib's own error, whichever JAX has
        return False
