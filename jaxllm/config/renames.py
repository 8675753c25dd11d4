"""Config keys that have a better name today. The old one keeps working, in files, in records and as a flag.

A config class lists them as `RENAMED = {"old_name": "new_name"}`.
"""

import dataclasses
import functools
import sys
import typing
from collections.abc import Mapping
from typing import Any

from jaxllm.config.trees import Tree
from jaxllm.errors import InputError


def current_keys(cls: Any, tree: Mapping[str, Any], where: str) -> Tree:
    """A section's tree with its keys under today's names.

    Raises:
        InputError: a key is given under both names; `where` is the place of the section.
    """
    renamed: Mapping[str, str] = getattr(cls, "RENAMED", {})
    current: Tree = {}
    for key, value in tree.items():
        name = renamed.get(key, key)
        if name in current or (name != key and name in tree):
            raise InputError(f"{where}: {key} is the old name of {name}; give one of them")
        if name != key:
            say_renamed(key, name)
        current[name] = value
    return current


def current_flag(cls: Any, argument: str) -> str:
    """A command-line argument under today's names: --ppo.normalise-scores becomes --ppo.normalize-scores."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument[2:].partition("=")
    *sections, last = flag.split(".")
    for section in sections:
        if not dataclasses.is_dataclass(cls):
            return argument
        cls = typing.get_type_hints(cls).get(section.replace("-", "_"))
    # tyro turns a flag off by a prefix.
    prefix = "no-" if last.startswith("no-") else ""
    old = last.removeprefix("no-").replace("-", "_")
    new = getattr(cls, "RENAMED", {}).get(old, old)
    if new == old:
        return argument
    say_renamed(old, new)
    return f"--{'.'.join([*sections, prefix + new.replace('_', '-')])}{equals}{value}"


def say_renamed(old: str, new: str) -> None:
    """Says once that a name has changed."""
    print_once(f"{old} is now {new}; the old name keeps working")


@functools.cache
def print_once(line: str) -> None:
    """Prints a line to standard error, unless it was printed before."""
    print(line, file=sys.stderr, flush=True)
