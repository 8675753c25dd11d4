"""Builds the frozen dataclasses of a config from trees, and trees from dataclasses."""

import dataclasses
import difflib
import functools
import json
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from jaxllm.config.messages import Origin, describe_errors
from jaxllm.config.renames import current_keys
from jaxllm.config.trees import KeyPath, Locations, Tree, flag_name, leaves, merge, plain
from jaxllm.config.yaml_files import read_yaml
from jaxllm.errors import InputError

# Making an adapter compiles a validator for the whole class, which takes far longer than using it.
adapter: Any = functools.cache(pydantic.TypeAdapter)


def load[T](cls: type[T], path: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> T:
    """Reads a YAML config file into `cls`.

    Args:
        cls: a frozen dataclass.
        path: the file.
        overrides: nested mapping of values that replace those of the file, named by their flags in
            errors.

    Raises:
        InputError: for a missing file, invalid YAML, an unknown key, a wrong type, or a failed check.
    """
    tree, locations = read_yaml(Path(path))
    overrides = overrides or {}
    for key_path in leaves(overrides):
        locations[key_path] = flag_name(key_path)
    return build(cls, merge(tree, overrides), locations, str(path))


def build[T](
    cls: type[T],
    tree: Mapping[str, Any],
    locations: Locations | None = None,
    name: str = "config",
) -> T:
    """Validates a tree and returns it as an instance of the frozen dataclass `cls`.

    Args:
        cls: the dataclass. It, and any dataclass below it, may have a static method
            `expand(tree) -> tree` that completes its part of the tree first, as model presets do.
        tree: nested mapping; fields that are missing get their defaults.
        locations: where each key was set, for errors.
        name: name of the tree, for errors about keys without a location.

    Raises:
        InputError: for an unknown key, a wrong type, or a failed check.
    """
    origin = Origin(locations or {}, name)
    try:
        return adapter(cls).validate_python(_expand(cls, tree, (), origin))
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error, origin)) from None


def to_tree(config: Any) -> Tree:
    """Returns a config as plain JSON types; `build(type(config), to_tree(config)) == config`."""
    # Through JSON: tuples become lists, as in a tree that was read from disk, so that they compare equal.
    return json.loads(json.dumps(dataclasses.asdict(config)))


def complete(cls: type, sections: Mapping[str, Any]) -> Tree:
    """Fills in fields that are newer than a recorded config.

    Args:
        cls: the config class of today.
        sections: some sections of a config, as an earlier version recorded them.

    Returns:
        The same sections, with the defaults of new fields. If `cls` no longer accepts them they are
        returned unchanged, and `differences` names what has changed.
    """
    try:
        completed = to_tree(build(cls, sections))
    except InputError:
        return dict(sections)
    return {name: completed[name] for name in sections}


def _expand(cls: Any, tree: Any, path: KeyPath, origin: Origin) -> Any:
    """Completes a tree from the outside in, and refuses unknown keys.

    cls: the type of the field at `path`: a dataclass, a tuple of dataclasses or anything else, whose
    values are returned unchanged for pydantic to judge.
    """
    item_class = _item_class(cls)
    if item_class and isinstance(tree, list | tuple):
        items = []
        for index, item in enumerate(tree):
            items.append(_expand(item_class, item, (*path, index), origin))
        return items
    if not dataclasses.is_dataclass(cls) or not isinstance(tree, Mapping):
        return tree
    if hasattr(cls, "expand"):
        try:
            tree = cls.expand(tree)  # type: ignore[attr-defined]
        except ValueError as error:
            raise InputError(f"{origin.describe(path)}: {error}") from None
    return _expand_fields(cls, tree, path, origin)


def _item_class(cls: Any) -> Any:
    """Returns the dataclass of the items of `tuple[Dataclass, ...]`, and None for other types."""
    if typing.get_origin(cls) is not tuple:
        return None
    item_class = typing.get_args(cls)[0]
    return item_class if dataclasses.is_dataclass(item_class) else None


def _expand_fields(cls: Any, tree: Mapping[str, Any], path: KeyPath, origin: Origin) -> Tree:
    # Field types are strings where a module postpones annotations; hints are the types themselves.
    hints = typing.get_type_hints(cls)
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    tree = current_keys(cls, tree, origin.describe(path))
    expanded = {}
    for key, value in tree.items():
        if key not in defaults:
            where = origin.describe((*path, str(key)))
            raise InputError(f"{where}: unknown key; {_suggest(str(key), list(defaults))}")
        default = defaults[key]
        if isinstance(value, Mapping) and dataclasses.is_dataclass(default):
            value = merge(_own_defaults(default), value)
        if value is None and dataclasses.is_dataclass(hints[key]):
            expanded[key] = {}  # `section:` with nothing below it
        else:
            expanded[key] = _expand(hints[key], value, (*path, key), origin)
    return expanded


def _suggest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"


def _own_defaults(default: Any) -> Tree:
    """Returns the fields of a default that differ from the class defaults.

    They apply unless the file sets them. Only these: with the others too, values that `expand` or
    `__post_init__` derives (a head size from a width) could not be derived from what the file sets.
    """
    class_defaults = type(default)()
    own = {}
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        if value != getattr(class_defaults, field.name):
            own[field.name] = plain(value)
    return own
