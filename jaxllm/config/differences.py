"""Compares configs: what has changed since a stage was started."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.errors import InputError


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lists where two trees differ, as "dotted.path: old -> new", in the order of `old`, then `new`."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
    changes = []
    # dict.fromkeys: a set that keeps its order.
    for key in dict.fromkeys([*old, *new]):
        changes += differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    return changes


def check_unchanged(
    old: Any,
    new: Mapping[str, Any],
    allowed: Sequence[str],
    where: str | os.PathLike,
    what: str = "something else",
) -> None:
    """Checks that nothing has changed since a stage was started, except for what is allowed to.

    Args:
        old: the tree that was recorded then; None if there is nothing to compare with.
        new: the same tree now.
        allowed: dotted names of what may change; each of them covers everything below it.
        where: the stage directory.
        what: what `old` describes, for the message.

    Raises:
        InputError: listing every change that is not allowed, and how to allow it.
    """
    if old is None:
        return
    refused = []
    for change in differences(old, dict(new)):
        if not any(_covers(name, change) for name in allowed):
            refused.append(change)
    if refused:
        names = dict.fromkeys(change.split(": ")[0] for change in refused)
        raise InputError(
            f"{where}: was started with {what}: {'; '.join(refused)}. Choose another --run-dir, remove "
            f"that directory, or accept the change and resume with --allow-change {' '.join(names)}"
        )


def _covers(name: str, change: str) -> bool:
    """Whether a dotted name is the one that changed, or a section that contains it."""
    # The dot keeps `model` from covering `model_path`.
    return change.split(": ")[0] == name or change.startswith(f"{name}.")
