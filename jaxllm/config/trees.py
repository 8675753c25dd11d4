"""Config trees: nested mappings of plain values, as in YAML and JSON, and key paths into them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

Tree = dict[str, Any]
KeyPath = tuple[Any, ...]
"""Keys and list indices from the root: ("meshes", 0, "stage")."""
Locations = dict[KeyPath, str]
"""Where each key was set: "file:line", or the name of a flag."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Merges two trees: mappings key by key; every other value of `over` replaces that of `base`."""
    # For example {a: {x: 1, y: [2]}} and {a: {y: [3]}} give {a: {x: 1, y: [3]}}.
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def leaves(tree: Mapping[str, Any], path: KeyPath = ()) -> Iterator[KeyPath]:
    """Yields the key path of every value that is not a mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def plain(value: Any) -> Any:
    """Returns a dataclass as nested dicts, and any other value unchanged."""
    # is_dataclass is true of the class as well as of its instances.
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def dotted(path: KeyPath) -> str:
    """Returns a key path as text: "meshes.0.stage"."""
    return ".".join(map(str, path))


def flag_name(path: KeyPath) -> str:
    """Returns the command-line flag of a key path: "--meshes.0.stage"."""
    return f"--{dotted(path)}".replace("_", "-")
