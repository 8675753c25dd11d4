"""What a file of a run directory is, told by its name: PATH below the run directory, with slashes."""

import re

_STEP = re.compile(r"(?P<step>(?:.*/)?checkpoints/\d+)/(?P<file>.+)")
# Files that say that something is complete: uploaded after what they speak of, removed before it.
_SEAL = re.compile(r"(?:.*/)?checkpoints/\d+/seal\.json")
_RESULT = re.compile(r"[^/]+/result\.json")
# Of tokenized data, which only training needs.
CACHE = "cache/"
# Records of the files of one machine, which say nothing to another.
_OF_MACHINE = "cache/files/"
# Hidden files are not part of a run, but for those of arrays in a checkpoint.
_ARRAY_SHAPE = ".zarray"
# Folders that stay on this machine.
_LOCAL_FOLDERS = {"damaged"}


def is_seal(name: str) -> bool:
    return bool(_SEAL.fullmatch(name))


def is_result(name: str) -> bool:
    return bool(_RESULT.fullmatch(name))


def is_commit(name: str) -> bool:
    return is_seal(name) or is_result(name)


def is_plain(name: str) -> bool:
    return not is_commit(name)


def is_array(name: str) -> bool:
    """Whether it is a file of a checkpoint other than its seal."""
    return bool(_STEP.fullmatch(name)) and not is_seal(name)


def is_lazy(name: str) -> bool:
    """Whether it is fetched only when it is needed."""
    return is_array(name) or name.startswith(CACHE)


def is_shared_cache(name: str) -> bool:
    """Whether it is tokenized data, which any host may have made for all."""
    return name.startswith(CACHE) and not name.startswith(_OF_MACHINE)


def is_local(name: str) -> bool:
    """Whether a file or folder of this (last) name stays on this machine."""
    return (name.startswith(".") and name != _ARRAY_SHAPE) or name in _LOCAL_FOLDERS


def seal_of(array: str) -> str:
    """The seal of the checkpoint that an array belongs to."""
    return f"{_match(array)['step']}/seal.json"


def inside_step(array: str) -> str:
    """The name of a checkpoint's file below the checkpoint's folder."""
    return _match(array)["file"]


def part_of(seal: str, host: int) -> str:
    """What one host of several says of its part of a checkpoint."""
    return f"{seal.removesuffix('.json')}.{host}.json"


def _match(name: str) -> re.Match[str]:
    found = _STEP.fullmatch(name)
    assert found, name
    return found
