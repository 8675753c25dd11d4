"""ModelScope, through modelscope_hub.

MODELSCOPE_ENDPOINT names another address, MODELSCOPE_API_TOKEN a user, MODELSCOPE_CACHE the cache; HF_HUB_OFFLINE=1
forbids the network here too. The hub does not say which commit a branch is at: the hashes of all files stand for it.
"""

import fnmatch
import hashlib
import os
from pathlib import Path
from typing import Any

from jaxllm.config import InputError
from jaxllm.runtime.files import sha256_of
from jaxllm.runtime.hubs.snapshot import Snapshot, Wanted


def fetch(wanted: Wanted) -> Snapshot:
    """Download files, or what is missing of them; errors as of `hugging_face.fetch`.

    Files that are not what the hub's hashes say are fetched again by its client, and refused in the end.
    """
    try:
        import modelscope_hub
    except ImportError:
        raise InputError(
            f"{wanted.source}: needs the hub's client; pip install 'jaxllm[modelscope]'"
        ) from None
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    revision = wanted.revision or "master"
    folder = _asked(
        wanted.source,
        lambda: modelscope_hub.HubApi().download_repo(
            wanted.repo,
            wanted.kind,
            revision=revision,
            allow_patterns=wanted.patterns,
            ignore_patterns=wanted.left_out,
            local_files_only=offline,
        ),
    )
    return Snapshot(folder, f"{revision}:{_content(folder, wanted.patterns)}")


def _content(folder: Path, patterns: list[str]) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            digest.update(f"{name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()[:12]


def _asked(source: str, ask: Any) -> Any:
    """The answer of the hub, whose refusals become one line."""
    from modelscope_hub import errors

    try:
        return ask()
    except (errors.AuthenticationError, errors.PermissionDeniedError):
        raise InputError(
            f"{source}: the hub does not show it to this user; accept its terms on its page, and set MODELSCOPE_API_TOKEN"
        ) from None
    except errors.NotExistError:
        raise InputError(
            f"{source}: the hub has no such repository or revision; check the name"
        ) from None
    except errors.CacheError:
        raise InputError(
            f"{source}: is not in the cache, and the network is forbidden (HF_HUB_OFFLINE)"
        ) from None
    except (errors.HubError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{source}: the hub answered {text}; try again later") from None
