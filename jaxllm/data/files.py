"""Files by their paths: here, on an object store, or in an installed package; their bytes, decompressed."""

import bz2
import contextlib
import glob
import gzip
import importlib
import importlib.util
import io
import lzma
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from jaxllm.config import InputError
from jaxllm.config.shipped import find_data

COMPRESSIONS = {
    "gz": "gzip",
    "gzip": "gzip",
    "zst": "zstd",
    "zstd": "zstd",
    "bz2": "bzip2",
    "xz": "xz",
}


def compression_of(path: str) -> str:
    """How a file is compressed, by its name in any case: "gzip", "zstd", "bzip2" or "xz"; "" where it is not."""
    return COMPRESSIONS.get(_suffix(path), "")


def suffix_of(path: str) -> str:
    """The last part of a file's name in lower case, a compression's left out: "jsonl" of DIR/A.JSONL.GZ."""
    compressed = _suffix(path) in COMPRESSIONS
    return _suffix(str(PurePosixPath(path).with_suffix("")) if compressed else path)


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower().removeprefix(".")


def resolve(path: str) -> list[str]:
    """The files that a source's path names, sorted. Raises InputError where there is none, and for a folder."""
    if not path:
        raise InputError("data.sources: a source needs a path")
    if path.startswith("pkg://"):
        path = _package_path(path)
    found, is_folder = _remote(path) if "://" in path else _local(path)
    if is_folder:
        raise InputError(
            f"{path}: is a folder; give a glob of the files in it, such as {path.rstrip('/')}/*.jsonl"
        )
    if not found:
        raise InputError(f"{path}: no such file; give an existing one or a glob that matches one")
    return found


def _local(path: str) -> tuple[list[str], bool]:
    """(files, whether the path is a folder); a path that exists is taken as it is, whatever characters it has."""
    if "\0" in path:
        raise InputError(f"{path!r}: a path cannot hold a NUL character; remove it")
    path = find_data(path if os.path.exists(path) else os.path.expanduser(path))
    if os.path.exists(path):
        return ([path], False) if os.path.isfile(path) else ([], os.path.isdir(path))
    return [name for name in sorted(glob.glob(path, recursive=True)) if os.path.isfile(name)], False


def _remote(path: str) -> tuple[list[str], bool]:
    fs, name = filesystem(path)
    with readable(path):
        if glob.has_magic(name):
            return sorted(
                str(fs.unstrip_protocol(found)) for found in fs.glob(name) if fs.isfile(found)
            ), False
        if not fs.exists(name):
            return [], False
        if fs.isfile(name):
            return [str(fs.unstrip_protocol(name))], False
        return [], True


def _package_path(path: str) -> str:
    """Find a package's folder without importing it: its code is not run to read its data."""
    package, _, inside = path.removeprefix("pkg://").partition("/")
    spec = None
    with contextlib.suppress(
        ModuleNotFoundError, ValueError
    ):  # of the package above it; an empty name
        spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"{path}: package {package} is not installed; pip install {package} (demos: 'jaxllm[demo]')"
        )
    root = Path(spec.submodule_search_locations[0]).resolve()
    if not (root / inside).resolve().is_relative_to(root):
        raise InputError(f"{path}: leaves the package's folder; name a file inside it")
    return str(root / inside)


def filesystem(path: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the name there."""
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError:
        raise InputError(
            f"{path}: reading it needs another package; pip install 'jaxllm[data]'"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: {error}; give a file, gs://, s3://, pkg:// or py://") from None


def remote_info(path: str) -> dict[str, Any]:
    """What an object store says of an object: {"size": bytes, "version": what changes with the content}."""
    fs, name = filesystem(path)
    info = fs.info(name)
    known = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "created")
    return {"size": info["size"], "version": next((str(info[k]) for k in known if info.get(k)), "")}


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """What can go wrong with a file becomes one line with its name."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each of the packages has errors of its own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read: {reason}") from error


@contextlib.contextmanager
def opened(path: str) -> Iterator[Any]:
    """The bytes of a file, decompressed, here or on an object store."""
    with contextlib.ExitStack() as stack:
        fs, name = filesystem(path) if "://" in path else (None, path)
        file = stack.enter_context((fs.open if fs else open)(name, "rb"))
        if (compression := compression_of(path)) == "zstd":
            file = io.BufferedReader(_Zstd(file, extra("zstandard", path)), 1 << 20)
        elif compression:
            file = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[compression](file)
        yield stack.enter_context(file) if compression else file


class _Zstd(io.RawIOBase):
    """The content of a file's Zstandard frames; zstandard's own reader takes a cut file for a whole one."""

    def __init__(self, file: Any, zstandard: Any):
        self._file, self._new_frame = file, zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._ready = memoryview(b"")
        self._inside = False  # a frame that has begun and not ended

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and (data := self._frame.unused_data or self._file.read(1 << 17)):
            if self._frame.eof:
                self._frame = self._new_frame()
            self._ready = memoryview(self._frame.decompress(data))
            self._inside = not self._frame.eof
        if not self._ready and self._inside:
            raise EOFError("Compressed file ended before the end-of-stream marker was reached")
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def extra(name: str, path: str) -> Any:
    """A module of the extra [data], or an InputError that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise InputError(
            f"{path}: reading it needs {package}; pip install {package} or 'jaxllm[data]'"
        ) from None
