"""Paths, JSON, JSON lines, and atomic writes: a reader sees the old content or the new, never a part of it."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from etils import epath

from jaxllm.config import InputError
from jaxllm.runtime.console import console


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in an object store (gs://, s3://), which has neither locks nor fsync."""
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that does not depend on the working directory."""
    path = epath.Path(path)
    return path if is_remote(path) else path.resolve()


def check_path(directory: epath.PathLike) -> None:
    """Raise InputError if Orbax could not read back what it writes into this directory.

    Orbax finds its own files with a glob that contains the directory's name unescaped: for `r[1]` it would look into
    `r1`. TensorStore accepts only names that are valid Unicode.
    """
    if "\0" in str(directory):
        raise InputError(
            f"{directory}: a directory's name cannot hold a NUL character; choose another --run-dir"
        )
    path = str(absolute(directory))
    pattern = re.search(r"[*?[\\]", path)
    if pattern:
        raise InputError(
            f"{directory}: the checkpoint library reads {pattern[0]!r} in a directory's name as a "
            f"pattern and would lose checkpoints; choose another --run-dir, or rename {path}"
        )
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{path!a}: this directory's name is not valid UTF-8; choose another --run-dir"
        ) from None


def sha256_of(path: epath.PathLike) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock_file(path: epath.PathLike, refusal: str) -> Iterator[None]:
    """Holds the lock of a file, which is made if it is missing. The lock ends with the process, even if killed.

    Raises:
        InputError: with the text `refusal`, if another process holds it.
    """
    # O_CLOEXEC: a child that outlives this process would keep the lock.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(refusal) from None
    else:
        yield
    finally:
        os.close(descriptor)


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Write a file atomically. Text is written as UTF-8; a lone surrogate becomes "?"."""
    path = epath.Path(path)
    # In the same folder: rename() is atomic only within a file system.
    partial = path.parent / f".{path.name}.partial"
    with partial.open("wb") as file:
        file.write(content.encode("utf-8", "replace") if isinstance(content, str) else content)
        file.flush()
        # Without fsync, a power cut after the rename can leave an empty file under the final name.
        if not is_remote(path):
            os.fsync(file.fileno())
    partial.replace(path)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder to fill, which becomes `target` if the block ends without an error.

    An older `target` is replaced. What an interrupted process left is removed by the next one that writes the target,
    so only one process may write it at a time.
    """
    partial = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        # A kill between the two renames leaves no target: a reader sees a missing folder, not a mixed one.
        if target.exists():
            # rename() cannot replace a folder that has files in it.
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(target, replaced)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def read_jsonl(
    path: epath.PathLike, damaged: Literal["refuse", "skip", "stop", "ignore"] = "refuse"
) -> list[dict[str, Any]]:
    """The objects in a JSONL file; an empty list if the file does not exist.

    A last line without a newline was interrupted while it was written and is left out.

    Args:
        path: the file.
        damaged: what to do about another line that is not a JSON object, as a power cut may leave it. "skip" leaves it
            out with a warning, "ignore" without one; "stop" leaves out this line and those after it, with a
            warning, for files in which the number of a line has a meaning.

    Raises:
        InputError: a line is damaged, and `damaged` is "refuse".
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    # Not splitlines(): a text may hold U+2028 and other separators, and a damaged file any byte.
    lines = path.read_bytes().split(b"\n")[:-1]
    values: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        value = _parse_object(line)
        if value is not None:
            values.append(value)
            continue
        where = f"{path}:{number}: not a JSON object"
        if damaged == "refuse":
            raise InputError(f"{where}; remove that line and run the same command again")
        if damaged == "skip":
            console.print(f"warning: {where}; that line is left out", soft_wrap=True)
        if damaged == "stop":
            console.print(
                f"warning: {where}; that line and those after it are left out", soft_wrap=True
            )
            break
    return values


def read_jsonl_tail(path: Path, most_bytes: int) -> list[dict[str, Any]]:
    """The objects in the last bytes of a local JSONL file; damaged and incomplete lines are left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        begin = max(0, os.fstat(file.fileno()).st_size - most_bytes)
        file.seek(begin)
        # The first line may be the end of one, which is no object.
        lines = file.read(most_bytes).split(b"\n")[:-1]
    return [value for line in lines if (value := _parse_object(line)) is not None]


def _parse_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode())
    except ValueError:  # not JSON, or not UTF-8
        return None
    return value if isinstance(value, dict) else None


def json_line(value: Any) -> str:
    """A line of a JSONL file of texts."""
    return json.dumps(value, ensure_ascii=False) + "\n"


# What a user would call a value of JSON.
_JSON_NAMES = {
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def read_json(
    path: epath.PathLike, fix: str = "remove the file to redo what wrote it"
) -> dict[str, Any] | None:
    """The JSON object in a file, None if the file does not exist; a byte order mark is skipped.

    Raises:
        InputError: the file cannot be read or holds anything else; the text ends in `fix`.
    """
    try:
        content = epath.Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):  # the latter: its parent is a file
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {fix}") from None
    return parse_json(content, str(path), fix)


def parse_json(content: bytes, where: str, fix: str) -> dict[str, Any]:
    """The JSON object of a file's content; a byte order mark is skipped.

    Raises:
        InputError: it holds anything else; the text begins with `where` and ends in `fix`.
    """
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise InputError(f"{where}: not valid JSON (nested too deeply); {fix}") from None
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error}); {fix}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: must hold a JSON object, not {_JSON_NAMES[type(value)]}; {fix}")
    return value


def write_json(path: epath.PathLike, value: Any) -> None:
    """Write a JSON file atomically."""
    # allow_nan=False: NaN is not JSON, and other programs read these files.
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
