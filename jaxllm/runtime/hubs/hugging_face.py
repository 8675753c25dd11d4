"""The Hugging Face hub and its mirrors, through huggingface_hub.

HF_ENDPOINT names a mirror, HF_TOKEN a user, HF_HOME the cache and HF_HUB_OFFLINE=1 forbids the network, as for every
program that uses the library.
"""

import hashlib
from pathlib import Path
from typing import Any

from jaxllm.config import InputError
from jaxllm.runtime.console import console
from jaxllm.runtime.files import sha256_of
from jaxllm.runtime.hubs.snapshot import Snapshot, Wanted


def fetch(wanted: Wanted) -> Snapshot:
    """Download files, or what is missing of them, and check them against the hub's hashes.

    Raises:
        InputError: see `names.fetch`.
    """
    # Its import takes a second, and it reads HF_ENDPOINT when it is imported.
    import huggingface_hub

    folder = Path(
        _asked(
            wanted.source,
            lambda: huggingface_hub.snapshot_download(
                wanted.repo,
                repo_type=wanted.kind,
                revision=wanted.revision,
                allow_patterns=wanted.patterns,
                ignore_patterns=wanted.left_out,
            ),
        )
    )
    # The cache has a folder for each commit.
    snapshot = Snapshot(folder, folder.name)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        console.print(
            f"note: {wanted.source}: offline, so that its files are not compared with the hub's hashes",
            soft_wrap=True,
        )
    else:
        _check(wanted, snapshot)
    return snapshot


def _check(wanted: Wanted, snapshot: Snapshot) -> None:
    """Compare the files with the hub's hashes; a wrong one is fetched again, once."""
    import huggingface_hub

    source, repo, kind = wanted.source, wanted.repo, wanted.kind
    folder, commit = snapshot
    info = _asked(
        source,
        lambda: huggingface_hub.HfApi().repo_info(
            repo, repo_type=kind, revision=commit, files_metadata=True
        ),
    )
    for entry in info.siblings or []:
        name = entry.rfilename
        if not (folder / name).exists() or _is_right(folder / name, entry):
            continue
        console.print(f"{name}: is not what the hub has; fetching it again", soft_wrap=True)
        _asked(
            source,
            lambda name=name: huggingface_hub.hf_hub_download(
                repo, name, repo_type=kind, revision=commit, force_download=True
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


def upload(target: str, folder: Path, repo: str, revision: str | None, message: str) -> str:
    """Upload a folder as a model, in one commit; returns the address of its page.

    Raises:
        InputError: the hub refuses, or cannot be reached.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    _asked(target, lambda: api.create_repo(repo, exist_ok=True))
    _asked(
        target,
        lambda: api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message=message
        ),
    )
    return f"{huggingface_hub.constants.ENDPOINT}/{repo}"


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
            f"{source}: the hub has no such repository, or does not show it to this user; check the name, or set HF_TOKEN"
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
