"""Files that are read by others while they are written: JSON, JSON lines, and whole-file writes."""

import json
import os
from typing import Any, Literal

from etils import epath

from jaxllm.config import InputError
from jaxllm.runtime.console import console


def read_metrics(
    path: epath.PathLike, damaged: Literal["refuse", "skip", "stop"] = "refuse"
) -> list[dict[str, Any]]:
    """The objects in a metrics.jsonl, or in another JSONL file; none where there is no file.

    A last line without its newline was cut and is left out. Another line that holds no object, as a power cut may leave
    one, raises InputError, or is left out with a warning: alone ("skip"), or with all that follow it ("stop", for files in
    which the number of a line means something).
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if (value := _object(line)) is not None:
            found.append(value)
            continue
        if damaged == "refuse":
            raise InputError(
                f"{path}:{number}: is no JSON object; remove that line and run the same command again"
            )
        rest = " and what follows it" if damaged == "stop" else ""
        console.print(
            f"warning: {path}:{number}: is no JSON object; that line{rest} is left out",
            soft_wrap=True,
        )
        if damaged == "stop":
            break
    return found


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def json_line(value: Any) -> str:
    """A line of a JSONL file of texts."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Write a file at once: a reader sees the old or the new one, never a half. A lone surrogate becomes "?"."""
    path = epath.Path(path)
    partial = path.parent / f".{path.name}.partial"
    with partial.open("wb") as file:
        file.write(content.encode("utf-8", "replace") if isinstance(content, str) else content)
        file.flush()
        if "://" not in str(path):  # on the disk before it takes the old one's place
            os.fsync(file.fileno())
    partial.replace(path)


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


_JSON_NAMES = {
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def write_json(path: epath.PathLike, value: Any) -> None:
    """Write a JSON file at once: a reader sees the old or the new one, never a half."""
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
