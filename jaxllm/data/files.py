"""Files by path: on this machine, on an object store, or in an installed package; and their bytes, decompressed."""

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
from jaxllm.runtime.hubs.names import fetch_files, is_on_hub

COMPRESSIONS = {
    "gz": "gzip",
    "gzip": "gzip",
    "zst": "zstd",
    "zstd": "zstd",
    "bz2": "bzip2",
    "xz": "xz",
}
_DECOMPRESSED = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
# Object stores name what changes with an object's content differently; the first that is set counts.
_VERSION_FIELDS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "created")


def compression_of(path: str) -> str:
    """How a file is compressed, by its suffix in any case: "gzip", "zstd", "bzip2" or "xz"; "" if it is not."""
    return COMPRESSIONS.get(_suffix(path), "")


def suffix_of(path: str) -> str:
    """A file's suffix in lower case, that of a compression left out: "jsonl" for DIR/A.JSONL.GZ."""
    if _suffix(path) in COMPRESSIONS:
        path = str(PurePosixPath(path).with_suffix(""))
    return _suffix(path)


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower().removeprefix(".")


def resolve(path: str) -> list[str]:
    """The files that a source's path names, sorted. Raises InputError if there are none, and for a folder."""
    if not path:
        raise InputError("data.sources: a source needs a path")
    if is_on_hub(path):
        return [*fetch_files(path)]
    # Inside a package a glob works as it does elsewhere.
    if path.startswith("pkg://"):
        path = _package_path(path)
    names, is_folder = _remote(path) if "://" in path else _local(path)
    if is_folder:
        raise InputError(
            f"{path}: is a folder; give a glob of the files in it, such as {path.rstrip('/')}/*.jsonl"
        )
    if not names:
        raise InputError(f"{path}: no such file; give an existing one or a glob that matches one")
    return names


def _local(path: str) -> tuple[list[str], bool]:
    """(files, whether the path is a folder)."""
    if "\0" in path:
        raise InputError(f"{path!r}: a path cannot hold a NUL character; remove it")
    # A path that exists is not expanded, whatever characters it has: [a].txt is not a glob then.
    path = find_data(path if os.path.exists(path) else os.path.expanduser(path))
    if os.path.isfile(path):
        return [path], False
    if os.path.exists(path):
        # A device or a pipe is neither a file nor a folder.
        return [], os.path.isdir(path)
    return [name for name in sorted(glob.glob(path, recursive=True)) if os.path.isfile(name)], False


def _remote(path: str) -> tuple[list[str], bool]:
    """(files, whether the path is a folder)."""
    fs, name = filesystem(path)
    with readable(path):
        if glob.has_magic(name):
            files = [match for match in fs.glob(name) if fs.isfile(match)]
            return sorted(str(fs.unstrip_protocol(file)) for file in files), False
        if not fs.exists(name):
            return [], False
        if fs.isfile(name):
            return [str(fs.unstrip_protocol(name))], False
        return [], True


def _package_path(path: str) -> str:
    """The path of a package's file, found without importing the package: reading its data does not run its code."""
    package, _, inside = path.removeprefix("pkg://").partition("/")
    spec = None
    # Of a missing parent package, and of an empty name.
    with contextlib.suppress(ModuleNotFoundError, ValueError):
        spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"{path}: package {package} is not installed; pip install {package} (demos: 'jaxllm[demo]')"
        )
    root = Path(spec.submodule_search_locations[0]).resolve()
    # pkg://PACKAGE/../.. would read any file.
    if not (root / inside).resolve().is_relative_to(root):
        raise InputError(f"{path}: leaves the package's folder; name a file inside it")
    return str(root / inside)


def filesystem(path: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the name of the file in it."""
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError:  # s3fs or gcsfs
        raise InputError(
            f"{path}: reading it needs another package; pip install 'jaxllm[data]'"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: {error}; give a file, gs://, s3://, pkg:// or py://") from None


def remote_info(path: str) -> dict[str, Any]:
    """{"size": bytes, "version": a text that changes with the content} of an object on an object store."""
    fs, name = filesystem(path)
    info = fs.info(name)
    version = next((str(info[field]) for field in _VERSION_FIELDS if info.get(field)), "")
    return {"size": info["size"], "version": version}


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns any error while a file is read into an InputError, one line with the file's path."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the packages that read have errors of many classes
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read: {reason}") from error


@contextlib.contextmanager
def opened(path: str) -> Iterator[Any]:
    """The bytes of a file, decompressed, on this machine or on an object store."""
    with contextlib.ExitStack() as stack:
        if "://" in path:
            fs, name = filesystem(path)
            file = stack.enter_context(fs.open(name, "rb"))
        else:
            file = stack.enter_context(open(path, "rb"))
        compression = compression_of(path)
        if compression == "zstd":
            frames = _Zstd(file, extra("zstandard", path))
            file = stack.enter_context(io.BufferedReader(frames, 1 << 20))
        elif compression:
            file = stack.enter_context(_DECOMPRESSED[compression](file))
        yield file


class _Zstd(io.RawIOBase):
    """The content of a file's Zstandard frames. zstandard's own reader does not report that a file was cut."""

    def __init__(self, file: Any, zstandard: Any):
        self._file = file
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._ready = memoryview(b"")
        self._inside = False  # a frame that has begun and not ended

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            # What is left behind the end of a frame begins the next one.
            data = self._frame.unused_data or self._file.read(1 << 17)
            if not data:
                break
            if self._frame.eof:
                self._frame = self._new_frame()
            # May be empty: a frame's header gives no bytes yet.
            self._ready = memoryview(self._frame.decompress(data))
            self._inside = not self._frame.eof
        if not self._ready and self._inside:
            raise EOFError("Compressed file ended before the end-of-stream marker was reached")
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def extra(name: str, path: str) -> Any:
    """A module of the extra [data]. Raises InputError, which says what to install, if it is missing."""
    # Imported when a file needs it: the base install has none of these packages.
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise InputError(
            f"{path}: reading it needs {package}; pip install {package} or 'jaxllm[data]'"
        ) from None
