"""Configs: YAML files and command-line flags become frozen dataclasses, and these become JSON.

    YAML (with `extends:`) -> tree -> merged with flags -> validated -> frozen dataclass -> JSON

Sections are frozen dataclasses that are defined next to the code that reads them; this package knows
none of them. Every error is one line: where, what is wrong, how to fix it.

- errors: `InputError` and what else ends the program; `require` for checks in config classes
- trees: nested mappings and key paths; `merge`
- yaml_files: `read_yaml`, which remembers the line of every key
- messages: locations and pydantic's findings as one line
- build: `load`, `build`, `to_tree`, `complete`
- differences: `differences`, `check_unchanged`
- command_line: `parse_overrides`, `tyro_cli`
- ranges: types of numeric fields
- functions: functions that a config names
- shipped: the configs that come with the package
"""

from jaxllm.config.build import build, complete, load, to_tree
from jaxllm.config.command_line import parse_overrides, tyro_cli
from jaxllm.config.differences import check_unchanged, differences
from jaxllm.config.errors import Ending, InputError, require
from jaxllm.config.trees import Tree, merge
from jaxllm.config.yaml_files import read_yaml

__all__ = [
    "Ending",
    "InputError",
    "Tree",
    "build",
    "check_unchanged",
    "complete",
    "differences",
    "load",
    "merge",
    "parse_overrides",
    "read_yaml",
    "require",
    "to_tree",
    "tyro_cli",
]
