"""Models on a hub: hf://ORG/NAME[@REVISION], fetched by huggingface_hub, with its cache, mirrors and offline mode.

HF_ENDPOINT names a mirror, HF_TOKEN a user, HF_HOME the cache and HF_HUB_OFFLINE=1 forbids the network, as for every
program that uses the library.
"""

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import InputError
from jaxllm.runtime.console import console
from jaxllm.runtime.files import sha256_of

SCHEME = "hf://"
# What an import reads: weights, config, tokenizer. Not the copies in other formats, which lie in subfolders.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_NOT_WANTED = ["*/*"]


class Fetched(NamedTuple):
    """A downloaded model."""

    folder: Path
    name: str  # hf://ORG/NAME@COMMIT, which always means the same files


def is_on_hub(source: str) -> bool:
    """Whether a source is on a hub, and not a path."""
    return source.startswith(SCHEME)


def fetch(source: str) -> Fetched:
    """Download a model, or what is missing of it, and check every file against the hub's hashes.

    Raises:
        InputError: another form of name, a model that does not exist or is not open to this user, a hub that cannot be
            reached, or files that are not the hub's.
    """
    parsed = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if not parsed:
        raise InputError(f"{source}: must be hf://ORG/NAME or hf://ORG/NAME@REVISION")
    repo, revision = parsed.groups()
    # Its import takes a second, and it reads HF_ENDPOINT when it is imported.
    import huggingface_hub

    folder = Path(
        _asked(
            source,
            lambda: huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=_NOT_WANTED
            ),
        )
    )
    # The cache has a folder for each commit.
    commit = folder.name
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        console.print(
            f"note: {source}: offline, so that its files are not compared with the hub's hashes"
        )
    else:
        _check(source, repo, commit, folder)
    return Fetched(folder, f"{SCHEME}{repo}@{commit}")


def _check(source: str, repo: str, commit: str, folder: Path) -> None:
    """Compare the files with the hub's hashes; a wrong one is fetched again, once."""
    import huggingface_hub

    info = _asked(
        source,
        lambda: huggingface_hub.HfApi().model_info(repo, revision=commit, files_metadata=True),
    )
    for entry in info.siblings or []:
        name = entry.rfilename
        if not (folder / name).exists() or _is_right(folder / name, entry):
            continue
        console.print(f"{name}: is not what the hub has; fetching it again", soft_wrap=True)
        _asked(
            source,
            lambda name=name: huggingface_hub.hf_hub_download(
                repo, name, revision=commit, force_download=True
            ),
        )
        if not _is_right(folder / name, entry):
            raise InputError(
                f"{source}: {name} is not what the hub's hash says, fetched twice; try again later, or set HF_ENDPOINT "
                "to another mirror"
            )


def _is_right(file: Path, entry: Any) -> bool:
    """Whether a file has the hash that the hub gives: SHA-256 of a large file, git's of a small one."""
    size = file.stat().st_size
    if entry.lfs:
        return sha256_of(file) == entry.lfs.sha256
    if not entry.blob_id:
        return entry.size in (None, size)
    return hashlib.sha1(b"blob %d\0" % size + file.read_bytes()).hexdigest() == entry.blob_id


def _asked(source: str, ask: Any) -> Any:
    """The answer of the hub, whose refusals become one line. The library itself tries again what may pass."""
    from huggingface_hub import errors

    try:
        return ask()
    except errors.GatedRepoError:
        raise InputError(
            f"{source}: is gated: accept its terms on its page, then log in (hf auth login) or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{source}: the hub has no such model, or does not show it to this user; check the name, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"{source}: has no such revision; give a branch, a tag or a commit after the @"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise InputError(
            f"{source}: is not in the cache, and the hub cannot be reached; check the network, or set HF_ENDPOINT to a "
            "mirror"
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{source}: the hub answered {text}; try again later") from None
