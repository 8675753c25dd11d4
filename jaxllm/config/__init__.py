"""Configs: YAML files and command-line flags become frozen dataclasses, and these become JSON.

    YAML (with `extends:`) -> tree -> merged with flags -> validated -> frozen dataclass -> JSON

Sections are frozen dataclasses in the config.py of the folder that reads them, which imports no JAX; this
package knows none of them. Every error is one line: where, what is wrong, how to fix it.

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
from jaxllm.config.trees import Tree, merge
from jaxllm.config.yaml_files import read_yaml
from jaxllm.errors import Ending, InputError, require

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
