"""What is asked of a hub, and what comes."""

from pathlib import Path
from typing import NamedTuple


class Wanted(NamedTuple):
    """Files of a repository on a hub."""

    source: str
    """As the user named it, for errors."""
    repo: str
    """ORG/NAME."""
    kind: str
    """"model" or "dataset"."""
    revision: str | None
    """A branch, a tag or a commit; None: the hub's default."""
    patterns: list[str]
    """Globs of files."""
    left_out: list[str]
    """Globs of files that are left out of them."""


class Snapshot(NamedTuple):
    """These files, downloaded."""

    folder: Path
    version: str
    """A commit; or REVISION:CONTENT, with 12 hex digits of the SHA-256 of all files."""
