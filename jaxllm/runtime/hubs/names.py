"""Names on hubs, and fetching what they name, with the cache, mirrors and offline mode of each hub's own library.

hf://ORG/NAME[@REVISION]                        a model
hf://datasets/ORG/NAME/PATH[@REVISION]          files of a data set; PATH may be a glob
modelscope://...                                the same on ModelScope
"""

import fnmatch
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxllm.config import InputError
from jaxllm.runtime.hubs import hugging_face, modelscope
from jaxllm.runtime.hubs.snapshot import Wanted

_HUBS = {"hf": hugging_face, "modelscope": modelscope}
_MODEL = re.compile(
    r"(?P<hub>\w+)://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<content>[0-9a-f]{12}))?"
)
_FILES = re.compile(
    r"(?P<hub>\w+)://datasets/(?P<repo>[\w.-]+/[\w.-]+)/(?P<path>[^@]+)(?:@(?P<revision>[\w./-]+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What an import reads: weights, config, tokenizer. Not the copies in other formats, which lie in subfolders.
_OF_A_MODEL = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_OF_A_TOKENIZER = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_IN_SUBFOLDERS = ["*/*"]


class Fetched(NamedTuple):
    """A downloaded model."""

    folder: Path
    # hf://ORG/NAME@COMMIT or modelscope://ORG/NAME@REVISION:CONTENT, which always means the same files.
    name: str


def is_on_hub(source: str) -> bool:
    """Whether a source is on a hub, and not a path."""
    hub, separator, _ = source.partition("://")
    return bool(separator) and hub in _HUBS


def is_pinned(source: str) -> bool:
    """Whether the name of a model always means the same files."""
    found = _parsed(_MODEL, source, "ORG/NAME")
    return bool(found["content"] or _COMMIT.fullmatch(found["revision"] or ""))


def fetch(source: str, *, weights: bool = True) -> Fetched:
    """Download a model, or what is missing of it, and check every file against the hub's hashes.

    weights: False leaves them out, for those who want the tokenizer alone.

    Raises:
        InputError: another form of name, a model that does not exist or is not open to this user, a hub that cannot be
            reached, or files that are not the hub's.
    """
    found = _parsed(_MODEL, source, "ORG/NAME")
    hub, repo, content = found["hub"], found["repo"], found["content"]
    patterns = _OF_A_MODEL if weights else _OF_A_TOKENIZER
    fetched = _HUBS[hub].fetch(
        Wanted(source, repo, "model", found["revision"], patterns, _IN_SUBFOLDERS)
    )
    if content and f":{content}" != fetched.version[-13:]:
        raise InputError(
            f"{source}: the hub has other files there now; give a revision that does not move"
        )
    return Fetched(fetched.folder, f"{hub}://{repo}@{fetched.version}")


@functools.cache
def fetch_files(source: str) -> tuple[str, ...]:
    """Download the files of a data set that a name means; their paths on this machine, sorted. Once in a process.

    Raises:
        InputError: as `fetch`, or none of the data set's files has such a name.
    """
    found = _parsed(_FILES, source, "datasets/ORG/NAME/PATH")
    path = found["path"]
    fetched = _HUBS[found["hub"]].fetch(
        Wanted(source, found["repo"], "dataset", found["revision"], [path], [])
    )
    paths = []
    for file in fetched.folder.rglob("*"):
        name = file.relative_to(fetched.folder).as_posix()
        if fnmatch.fnmatch(name, path) and file.is_file():
            paths.append(str(file))
    if not paths:
        raise InputError(f"{source}: the data set has no such file; check the path after its name")
    return tuple(sorted(paths))


def _parsed(form: re.Pattern[str], source: str, shown: str) -> re.Match[str]:
    found = form.fullmatch(source)
    if not found:
        hub = source.partition("://")[0]
        raise InputError(f"{source}: must be {hub}://{shown} or {hub}://{shown}@REVISION")
    return found


def upload(folder: Path, target: str, message: str) -> str:
    """Upload a folder as a model, which is made if it does not exist; returns the address of its page.

    Raises:
        InputError: another form of name, a hub that takes no uploads from here, or a refusal.
    """
    found = _parsed(_MODEL, target, "ORG/NAME")
    put: Callable[..., str] | None = getattr(_HUBS[found["hub"]], "upload", None)
    if put is None:
        raise InputError(f"{target}: only hf:// takes uploads; export to a folder instead")
    return put(target, folder, found["repo"], found["revision"], message)
