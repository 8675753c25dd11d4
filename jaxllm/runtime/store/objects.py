"""Objects below one prefix of a store, through fsspec's clients: gcsfs for gs://, s3fs for s3://."""

import concurrent.futures
import posixpath
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import InputError
from jaxllm.runtime.store.retry import repeated

SCHEMES = ("gs", "s3")
# Transfers at a time. Each holds one part of a file in memory, so that this bounds the memory as well.
_TRANSFERS = 8
_PART = 16 << 20  # bytes


class Object(NamedTuple):
    """What the store says of an object."""

    size: int
    version: str  # GCS: the generation; S3: the ETag. Another one after every write


class Store:
    """The objects below a URL.

    Args:
        url: gs://BUCKET/PREFIX or s3://BUCKET/PREFIX.

    Raises:
        InputError: of a URL that has another form, and where the client of its store is not installed.
    """

    def __init__(self, url: str):
        scheme, _, rest = url.partition("://")
        bucket, _, prefix = rest.partition("/")
        if scheme not in SCHEMES or not bucket or not prefix.strip("/"):
            raise InputError(f"{url}: must be gs://BUCKET/PATH or s3://BUCKET/PATH")
        self.url = f"{scheme}://{bucket}/{prefix.strip('/')}"
        self._root = f"{bucket}/{prefix.strip('/')}"
        self._fs = _client(scheme, url)

    def __str__(self) -> str:
        return self.url

    def list(self, folder: str = "") -> dict[str, Object]:
        """Every object below a folder by its name below the URL; {} if there are none."""

        def find() -> Mapping[str, Any]:
            self._fs.invalidate_cache()
            return self._fs.find(self._path(folder), detail=True)

        try:
            listed = self._repeated("list", folder, find)
        except FileNotFoundError:
            raise self._no_bucket() from None
        found = {}
        for path, info in listed.items():
            name = posixpath.relpath(path, self._root)
            if info.get("type") == "file" and name != ".":
                found[name] = _described(info)
        return found

    def look(self, name: str) -> Object | None:
        """What the store says of an object; None if it does not exist."""

        def info() -> Mapping[str, Any]:
            self._fs.invalidate_cache()
            return self._fs.info(self._path(name))

        try:
            found = self._repeated("look at", name, info)
        except FileNotFoundError:
            return None
        return _described(found) if found.get("type") == "file" else None

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if it does not exist."""
        try:
            return self._repeated("read", name, lambda: self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def create(self, name: str, content: bytes) -> bool:
        """Write an object that must not exist yet; False if it does. Of several that try, one succeeds."""

        def write() -> None:
            self._fs.pipe_file(self._path(name), content, mode="create")

        try:
            self._repeated("create", name, write)
        except FileExistsError:
            # An attempt may have succeeded although its answer was lost.
            return self.read(name) == content
        except FileNotFoundError:
            raise self._no_bucket() from None
        return True

    def write(self, name: str, content: bytes) -> Object:
        """Write an object, in place of an older one."""

        def write() -> Object:
            self._fs.pipe_file(self._path(name), content)
            return self._written(name, len(content))

        try:
            return self._repeated("write", name, write)
        except FileNotFoundError:
            raise self._no_bucket() from None

    def upload(self, file: Path, name: str) -> Object:
        """Write an object with the content of a file, which must not change meanwhile."""

        def put() -> Object:
            self._fs.put_file(str(file), self._path(name), chunksize=_PART)
            return self._written(name, file.stat().st_size)

        return self._repeated("write", name, put)

    def download(self, name: str, file: Path, size: int | None = None) -> None:
        """Write a file with the content of an object.

        Args:
            size: of the object, if it is known: an answer that is shorter is asked for again.

        Raises:
            FileNotFoundError: there is no such object.
        """
        file.parent.mkdir(parents=True, exist_ok=True)

        def get() -> None:
            self._fs.get_file(self._path(name), str(file))
            if size is not None and file.stat().st_size != size:
                raise OSError(f"{file.stat().st_size:,} of {size:,} bytes")

        self._repeated("read", name, get)

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that do not exist are none the less removed."""

        def remove(name: str) -> None:
            try:
                self._repeated("delete", name, lambda: self._fs.rm_file(self._path(name)))
            except FileNotFoundError:
                return

        in_parallel(remove, names)

    def _no_bucket(self) -> InputError:
        bucket = self._root.partition("/")[0]
        return InputError(
            f"{self.url}: there is no bucket {bucket}, or it is not shown to this user; make it, or give another one"
        )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _repeated(self, verb: str, name: str, run: Any) -> Any:
        return repeated(f"{verb} {self.url}/{name}".rstrip("/"), run)

    def _written(self, name: str, size: int) -> Object:
        """What was just written, as the store has it. Raises OSError if it is not what was sent."""
        found = self.look(name)
        if found is None or found.size != size:
            raise OSError(f"the store has {found} of {size:,} bytes")
        return found


def in_parallel(run: Any, items: Iterable[Any]) -> list[Any]:
    """The results of a function of each item, a few at a time; the first error is raised."""
    with concurrent.futures.ThreadPoolExecutor(_TRANSFERS) as pool:
        return list(pool.map(run, items))


def _described(info: Mapping[str, Any]) -> Object:
    version = info.get("generation") or info.get("ETag") or ""
    return Object(int(info["size"]), str(version).strip('"'))


def _client(scheme: str, url: str) -> Any:
    import fsspec

    try:
        # Own instances: others keep listings, and would show an old state.
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except ImportError:
        raise InputError(
            f"{url}: a run directory in a store needs its client; pip install 'jaxllm[data]'"
        ) from None
