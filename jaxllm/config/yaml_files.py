"""Reads YAML config files, with `extends:`, and remembers the line of every key."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from jaxllm.config.trees import KeyPath, Locations, Tree, dotted, merge
from jaxllm.errors import InputError

# Per file, with aliases expanded: a few lines of nested aliases can stand for more keys than fit in
# memory ("billion laughs").
_MAX_KEYS = 100_000


def read_yaml(path: Path, children: tuple[Path, ...] = ()) -> tuple[Tree, Locations]:
    """Reads a YAML file and merges it over the file that its key `extends` names.

    Args:
        path: the file; `extends` is relative to its folder.
        children: files that extend this one, directly or not.

    Returns:
        The mapping, and the "file:line" of each of its keys.

    Raises:
        InputError: for a missing file, invalid YAML, a repeated key, or files that extend each other.
    """
    tree, locations = _parse(_read_text(path), path)
    # Popped: `extends` is about files and no field of a config.
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, locations
    parent_path = (path.parent / str(parent)).resolve()
    chain = (*children, path.resolve())
    if parent_path in chain:
        raise InputError(
            f"{locations[('extends',)]}: extends: {parent} extends this file again; break the circle"
        )
    base, base_locations = read_yaml(parent_path, chain)
    # A key that both files set was last set by the child: its line is the one to show.
    return merge(base, tree), base_locations | locations


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # "-sig": some editors write a byte order mark
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file; see configs/ for examples") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _parse(text: str, path: Path) -> tuple[Tree, Locations]:
    """Returns the mapping in a YAML text, and the location of each key."""
    locations: Locations = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{path}: a config file must hold a mapping of `key: value`")
        # Walks an anchor's values again at each alias, so the count is of the file with aliases expanded.
        for key_path, location in _locate(node, path):
            locations[key_path] = location
            if len(locations) > _MAX_KEYS:
                raise InputError(
                    f"{path}: holds more than {_MAX_KEYS:,} keys, counting aliases; make it smaller"
                )
        return yaml.SafeLoader("").construct_document(node), locations
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply for a config file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date or number
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _locate(
    node: yaml.Node, file: Path, path: KeyPath = (), ancestors: tuple[yaml.Node, ...] = ()
) -> Iterator[tuple[KeyPath, str]]:
    """Yields (key path, "file:line") of everything below a node.

    Raises:
        InputError: if an alias contains itself, or a mapping has an invalid or repeated key.
    """
    # compose() returns the same node for an anchor and its aliases, so `a: &x [*x]` is a circle.
    if node in ancestors:
        raise InputError(f"{_line(file, node)}: {dotted(path)} holds itself; fix the alias")
    for key, value, location in _items(node, file, path):
        yield (*path, key), location
        yield from _locate(value, file, (*path, key), (*ancestors, node))


def _items(node: yaml.Node, file: Path, path: KeyPath) -> Iterator[tuple[Any, yaml.Node, str]]:
    """Yields (key or index, value, "file:line") of a mapping or a list; nothing for a scalar."""
    if isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield index, value, _line(file, value)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            location = _line(file, key)
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{location}: a key must be a plain word, not a list or a mapping")
            if key.value in seen:  # PyYAML would silently keep the last one
                raise InputError(
                    f"{location}: {dotted((*path, key.value))} is given twice; keep one"
                )
            seen.add(key.value)
            yield key.value, value, location


def _line(file: Path, node: yaml.Node) -> str:
    return f"{file}:{node.start_mark.line + 1}"
