"""Compiled programs, kept on this machine's disk for the processes that come after.

JAX decides what is kept, and under which key: the program, its options, the versions, the kind of device (its persistent
compilation cache). This module is the folder that it keeps them in, because JAX's own

- writes an entry in place, so that a kill leaves the beginning of one, and another process may read it;
- does not notice a changed byte in the machine code;
- never replaces a damaged entry, but compiles again in every process;
- grows without a limit, or else takes a lock that a killed process keeps.

Here an entry is written beside its place and renamed, is checked against its digest when it is read, and is removed if it
is damaged. The least recently used entries go when the folder is larger than `_LIMIT`.

Behind the folder there may be a store, for machines that come and go (JAXLLM_CACHE=gs://BUCKET/PATH): `RemotePrograms`.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import jax
from jax._src import compilation_cache  # JAX has no public way to put another cache in
from jax._src.compilation_cache_interface import CacheInterface

from jaxllm.runtime.console import console
from jaxllm.runtime.files import is_remote
from jaxllm.runtime.store.programs import RemotePrograms

_LIMIT = 4 << 30  # bytes of all entries
_SUFFIX = ".program"
_DIGEST = hashlib.sha256().digest_size  # an entry is its digest, then what JAX keeps


class ProgramCache(CacheInterface):
    """A folder of programs, which any number of processes may read and write at once."""

    def __init__(self, folder: Path, limit: int = _LIMIT, remote: RemotePrograms | None = None):
        self._path = folder
        self._remote = remote
        self.found = 0  # programs that need not be compiled
        self.compiled = 0  # programs that were compiled and could be kept
        self._failed = False  # whether a write has failed and was reported
        shrink(folder, limit)

    def get(self, key: str) -> bytes | None:
        """What was kept under the key, or None."""
        value = self._read(key)
        if value is None and self._remote and (content := self._remote.get(f"{key}{_SUFFIX}")):
            value = _checked(content)
            if value is not None:
                self._write(key, content)
        if value is not None:
            self.found += 1
        return value

    def _read(self, key: str) -> bytes | None:
        path = self._path / f"{key}{_SUFFIX}"
        try:
            value = _checked(path.read_bytes())
            if value is None:
                path.unlink(missing_ok=True)
                return None
            os.utime(path)  # it was used now
        except OSError:  # not there, or removed meanwhile by another process
            return None
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program. An entry of that key is replaced: whoever compiles could not use it."""
        self.compiled += 1
        content = hashlib.sha256(value).digest() + value
        self._write(key, content)
        if self._remote:
            self._remote.put(f"{key}{_SUFFIX}", content)

    def _write(self, key: str, content: bytes) -> None:
        partial = self._path / f".{key}.{os.getpid()}"
        try:
            partial.write_bytes(content)
            partial.replace(self._path / f"{key}{_SUFFIX}")
        except OSError as error:  # a full disk, say: the next process compiles again
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if not self._failed:
                say_not_kept(self._path, error)
            self._failed = True


def _checked(content: bytes) -> bytes | None:
    """The program in an entry; None if the entry is damaged."""
    value = content[_DIGEST:]
    return value if hashlib.sha256(value).digest() == content[:_DIGEST] else None


def say_not_kept(path: Path, error: OSError) -> None:
    """Tells the user why a folder keeps nothing."""
    console.print(f"note: compiled programs are not kept in {path}: {error.strerror}")


def enable(environ: Mapping[str, str] = os.environ) -> ProgramCache | None:
    """Makes JAX keep compiled programs in this user's folder; None if it does not.

    JAXLLM_CACHE names another folder, or a store behind this one; if it is empty, nothing is kept. A cache that was chosen by JAX's own settings
    (JAX_COMPILATION_CACHE_DIR) stays.
    """
    in_use = getattr(compilation_cache, "_cache", None)
    if isinstance(in_use, ProgramCache):
        return in_use
    if jax.config.jax_compilation_cache_dir or not hasattr(compilation_cache, "_cache"):
        return None
    programs = folder("programs", environ)
    if programs is None:
        return None
    # All programs: a small model has many that compile in less than JAX's limit of a second.
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()
    chosen = environ.get("JAXLLM_CACHE", "")
    cache = ProgramCache(programs, remote=RemotePrograms(chosen) if is_remote(chosen) else None)
    compilation_cache._cache = cache
    compilation_cache._cache_initialized = True
    return cache


def folder(name: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """A folder of this user's cache, made if it is missing; None if none is wanted, or none can be had."""
    base = Path(environ.get("XDG_CACHE_HOME") or "~/.cache")
    chosen = environ.get("JAXLLM_CACHE", str(base / "jaxllm"))
    if not chosen:
        return None
    if is_remote(chosen):
        chosen = str(base / "jaxllm")
    try:
        path = Path(chosen).expanduser() / name
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = path.stat()
    except (OSError, RuntimeError) as error:  # read-only, or a user without a home
        console.print(f"note: compiled programs are not kept: {error}; set JAXLLM_CACHE")
        return None
    # Programs are run as they are read: nobody else may write them.
    others = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if os.name == "posix" and (others or about.st_uid != os.geteuid()):
        console.print(
            f"note: compiled programs are not kept in {path}, which others can write; "
            "run chmod 700 on it, or set JAXLLM_CACHE to a folder of your own"
        )
        return None
    return path


def shrink(folder: Path, limit: int) -> None:
    """Removes entries, those first that were not used for the longest time, and what killed processes left."""
    entries = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # removed by another process
            about = path.stat()
            entries.append((about.st_mtime, about.st_size, path))
    total = sum(size for _, size, _ in entries)
    newest = max((time for time, _, _ in entries), default=0.0)
    for time, size, path in sorted(entries, key=lambda entry: entry[0]):
        left_over = path.name.startswith(".") and time < newest - 3600
        if total > limit or left_over:
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size
