"""Command-line flags: tyro parses and explains them; ranges and errors are those of config files."""

import contextlib
import dataclasses
import io
import re
import typing
from collections.abc import Sequence
from typing import Any

import pydantic
import tyro

from jaxllm.config.build import adapter
from jaxllm.config.messages import complaint
from jaxllm.config.renames import current_flag
from jaxllm.config.trees import KeyPath, Tree, flag_name, plain
from jaxllm.errors import InputError


def parse_overrides(cls: type, default: Any, args: Sequence[str], prog: str) -> Tree:
    """Returns the fields that flags (`--section.field VALUE`) set, as a nested mapping.

    Only these: `load` merges them over the file, so that flags and files are validated the same way.

    Args:
        cls: the config class.
        default: the config that the file describes, whose values `--help` shows.
        args: the flags.
        prog: the name of the command in messages.

    Raises:
        InputError: for an unknown flag or a wrong value.
    """
    args = [current_flag(cls, arg) for arg in args]
    parsed = tyro_cli(cls, args, prog, default)
    tree: Tree = {}
    for arg in args:
        if arg.startswith("--"):
            flag = arg.split("=")[0]
            _copy_field(flag[2:].replace("-", "_").split("."), parsed, tree)
    return tree


def tyro_cli(
    cls: Any, args: Sequence[str], prog: str, default: Any = None, description: str | None = None
) -> Any:
    """Parses flags into a dataclass, as `tyro.cli` does, but with one-line errors.

    Raises:
        InputError: instead of tyro's box and exit.
        SystemExit: after `--help` was printed.
    """
    if default is None:
        default = tyro.MISSING_NONPROP
    # tyro prints errors in a box on standard error and exits.
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            parsed = tyro.cli(
                cls, args=list(args), prog=prog, default=default, description=description
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(f"{prog}: {_without_box(captured.getvalue())}") from None
    _check_ranges(parsed)
    return parsed


def _check_ranges(parsed: Any, path: KeyPath = ()) -> None:
    """Raises InputError if a value is outside the range of its type, which tyro does not check."""
    # include_extras: the limits are in the Annotated[...] that get_type_hints would strip.
    hints = typing.get_type_hints(type(parsed), include_extras=True)
    for field in dataclasses.fields(parsed):
        value = getattr(parsed, field.name)
        field_path = (*path, field.name)
        if dataclasses.is_dataclass(value):
            _check_ranges(value, field_path)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, item in enumerate(value):
                _check_ranges(item, (*field_path, index))
        else:
            try:
                adapter(hints[field.name]).validate_python(value)
            except pydantic.ValidationError as error:
                message = complaint(error.errors()[0])
                raise InputError(f"{flag_name(field_path)}: {message}") from None


def _without_box(text: str) -> str:
    """Returns the message in tyro's box as one line, without its title and the hint about --help."""
    # ╭─ Value error ───────────────────────────────────────╮
    # │ Error parsing pretrain: num_steps: must not be ...  │
    # │ ─────────────────────────────────────────────────── │
    # │ For full helptext, see jaxllm pretrain CONFIG --help│
    # ╰─────────────────────────────────────────────────────╯   (lines of - if stdout is not UTF-8)
    words = []
    for line in text.splitlines()[1:]:
        content = line.strip("│| ")
        if content.strip("─╰╯-"):
            words += content.split()
    message = " ".join(words).split(" For full helptext")[0]
    # A section's own check names the field only; tyro puts the section before it.
    return re.sub(r"^Error parsing (\S+): (\w+): ", r"\1.\2: ", message)


def _copy_field(path: list[str], parsed: Any, tree: Tree) -> None:
    """Copies the field at `path` of a parsed config into `tree`, creating the sections above it."""
    *sections, field = path
    for name in sections:
        parsed = getattr(parsed, name)
        if isinstance(parsed, tuple):
            # A flag that sets an item of a list (--meshes.0.data) gives the whole list: trees merge
            # mappings, not lists.
            tree[name] = [plain(item) for item in parsed]
            return
        tree = tree.setdefault(name, {})
    if field.startswith("no_") and not hasattr(parsed, field):
        field = field.removeprefix("no_")  # --no-FIELD sets a boolean to false
    tree[field] = plain(getattr(parsed, field))
