"""Config mechanism: YAML (with `extends:`) -> frozen dataclasses -> command-line overrides -> JSON.

Sections are frozen dataclasses that live beside the code that reads them; this file knows none of them.
A section class may define `expand(tree) -> tree`, a static method that completes its raw YAML mapping before
validation (model presets do). Every error is one line: where, what is wrong, how to mend it.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import tyro
import yaml

Tree = dict[str, Any]
Where = dict[tuple[Any, ...], str]


class Ending(Exception):
    """What ends the program with one line, its text, and with this exit code."""

    code = 1


class InputError(Ending):
    """Bad input from the user: config, data, checkpoint or command line. Its text is one complete line.

    What it quotes may hold anything: line breaks and control characters are spelled out.
    """

    code = 2

    def __init__(self, text: str):
        super().__init__(
            "".join(c if c.isprintable() or c in "\xa0\u3000" else f"{c!a}"[1:-1] for c in text)
        )


_MOST_KEYS = (
    100_000  # of a YAML file; a few lines of aliases can stand for more than any memory holds
)
_adapter: Any = functools.cache(pydantic.TypeAdapter)


def require(holds: bool, message: str) -> None:
    """A config's own check, "field: what is wrong": raise ValueError where it does not hold."""
    if not holds:
        raise ValueError(message)


def load[T](cls: type[T], path: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> T:
    """Read a YAML config file into `cls`, `overrides` (a nested mapping) taking precedence.

    Raises InputError: missing file, bad YAML, unknown key, wrong type, failed cross-field check.
    """
    tree, where = read_yaml(Path(path))
    given = overrides or {}
    return build(cls, merge(tree, given), where | dict(_flags(given)), str(path))


def build[T](
    cls: type[T], tree: Mapping[str, Any], where: Where | None = None, name: str = "config"
) -> T:
    """Validate a nested mapping into the frozen dataclass `cls`; `where` maps key paths to "file:line"."""
    where = where or {}
    try:
        return _adapter(cls).validate_python(_expand(cls, tree, (), where, name))
    except pydantic.ValidationError as error:
        raise InputError(_one_line(error, where, name)) from None


def to_tree(config: Any) -> Tree:
    """The config as plain JSON types; `build(type(config), to_tree(config)) == config`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def complete(cls: type, sections: Mapping[str, Any]) -> Tree:
    """Sections of a config as an earlier version recorded them, with the defaults of fields that are new since then.

    Sections that the config no longer takes come back as they are: `differences` will name what has changed.
    """
    try:
        whole = to_tree(build(cls, sections))
    except InputError:
        return dict(sections)
    return {name: whole[name] for name in sections}


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted paths at which two JSON trees differ, with both values, in the order of `old` then `new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [
            d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}".lstrip("."))
        ]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def check_unchanged(
    old: Any,
    new: Mapping[str, Any],
    allowed: Sequence[str],
    where: str | os.PathLike,
    what: str = "something else",
) -> None:
    """Raise InputError listing field by field what has changed since a stage was begun, but for what is allowed.

    allowed: dotted names; one of them covers what is below it. old: None where there is nothing to compare with.
    """
    changes = [] if old is None else differences(old, dict(new))
    covered = lambda change, name: change.split(": ")[0] == name or change.startswith(f"{name}.")
    if refused := [c for c in changes if not any(covered(c, name) for name in allowed)]:
        names = " ".join(dict.fromkeys(c.split(": ")[0] for c in refused))
        raise InputError(
            f"{where}: was started with {what}: {'; '.join(refused)}. Choose another --run-dir, remove that "
            f"directory, or, to go on with it as it is now, add: --allow-change {names}"
        )


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Deep merge: mappings merge key by key, every other value of `over` replaces that of `base`."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if both else value
    return out


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> tuple[Tree, Where]:
    """The mapping in a YAML file merged over the file it `extends:`, and where each key stands."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file; see configs/ for examples") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    tree, where = _parse_yaml(text, path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, where
    parent_path = (path.parent / str(parent)).resolve()
    if parent_path in (*seen, path.resolve()):
        raise InputError(
            f"{where[('extends',)]}: extends: {parent} extends this file again; break the circle"
        )
    base, base_where = read_yaml(parent_path, (*seen, path.resolve()))
    return merge(base, tree), base_where | where


def _parse_yaml(text: str, path: Path) -> tuple[Tree, Where]:
    """The mapping in a YAML text, and where each key stands."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{path}: a config file must hold a mapping of `key: value`")
        where: Where = {}
        for key, place in _locate(node, (), path, ()):
            where[key] = place
            if len(where) > _MOST_KEYS:
                raise InputError(
                    f"{path}: holds more than {_MOST_KEYS:,} keys, aliases counted; make it smaller"
                )
        return yaml.SafeLoader("").construct_document(node), where
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply for a config file") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date or a number that is none
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def parse_overrides(cls: type, default: Any, args: Sequence[str], prog: str) -> Tree:
    """The fields given on the command line (`--section.field value`), as a nested mapping.

    tyro parses and explains them (`--help`); the values then take the same road as those of the file.
    """
    parsed = tyro_cli(cls, args, prog, default)
    tree: Tree = {}
    for flag in (arg.split("=")[0] for arg in args if arg.startswith("--")):
        _copy_field(flag[2:].replace("-", "_").split("."), parsed, tree)
    return tree


def tyro_cli(
    cls: Any, args: Sequence[str], prog: str, default: Any = None, description: str | None = None
) -> Any:
    """tyro.cli whose error is one line (an InputError) in place of a box."""
    kwargs = {} if default is None else {"default": default}
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            parsed = tyro.cli(cls, args=list(args), prog=prog, description=description, **kwargs)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(f"{prog}: {_without_box(err.getvalue())}") from None
    _check_ranges(parsed, ())
    return parsed


def _check_ranges(parsed: Any, path: tuple[Any, ...]) -> None:
    """Raise InputError where a field that came from a flag is not in the range of its type: tyro does not look."""
    hints = typing.get_type_hints(type(parsed), include_extras=True)
    for field in dataclasses.fields(parsed):
        value, here = getattr(parsed, field.name), (*path, field.name)
        if dataclasses.is_dataclass(value):
            _check_ranges(value, here)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for number, item in enumerate(value):
                _check_ranges(item, (*here, number))
        else:
            try:
                _adapter(hints[field.name]).validate_python(value)
            except pydantic.ValidationError as error:
                raise InputError(f"{_flag(here)}: {_complaint(error.errors()[0])}") from None


def _flag(path: tuple[Any, ...]) -> str:
    return f"--{'.'.join(map(str, path))}".replace("_", "-")


def _flags(
    tree: Mapping[str, Any], path: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], str]]:
    """(key path, flag) of what was given on the command line, as a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flags(value, (*path, key))
        else:
            yield (*path, key), _flag((*path, key))


def _without_box(text: str) -> str:
    """tyro's message as one line, a section's own complaint with its full path."""
    line = " ".join(word for word in text.split() if word.strip("─│╭╮╰╯-")).split(
        " For full helptext"
    )[0]
    return re.sub(r"^Value error Error parsing (\S+): (\w+): ", r"\1.\2: ", line)


def _copy_field(path: list[str], parsed: Any, tree: Tree) -> None:
    *sections, field = path
    for name in sections:
        parsed = getattr(parsed, name)
        if isinstance(parsed, tuple):  # an element of a list: the whole list is given
            tree[name] = [_plain(item) for item in parsed]
            return
        tree = tree.setdefault(name, {})
    if field.startswith("no_") and not hasattr(parsed, field):
        field = field.removeprefix("no_")
    tree[field] = _plain(getattr(parsed, field))


def _plain(value: Any) -> Any:
    return (
        dataclasses.asdict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else value
    )


def _locate(
    node: yaml.Node, path: tuple[Any, ...], file: Path, inside: tuple[yaml.Node, ...]
) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yield (key path, "file:line"); inside: the nodes around this one.

    Raises InputError where a key is given twice, of which PyYAML would keep the last, where it is not a plain word, and
    where an alias holds itself.
    """
    if node in inside:
        raise InputError(
            f"{file}:{node.start_mark.line + 1}: {'.'.join(map(str, path))} holds itself; mend the alias"
        )
    inside = (*inside, node)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            here = f"{file}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{here}: a key must be a plain word, not a list or a mapping")
            dotted = ".".join(map(str, (*path, key.value)))
            if key.value in seen:
                raise InputError(f"{here}: {dotted} is given twice; keep one")
            seen.add(key.value)
            yield (*path, key.value), here
            yield from _locate(value, (*path, key.value), file, inside)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield (*path, i), f"{file}:{value.start_mark.line + 1}"
            yield from _locate(value, (*path, i), file, inside)


def _expand(cls: Any, tree: Any, path: tuple[Any, ...], where: Where, name: str) -> Any:
    """Refuse unknown keys and let section classes complete themselves, from the outside in; `cls` is any type."""
    inner = typing.get_args(cls)
    if (
        typing.get_origin(cls) is tuple
        and dataclasses.is_dataclass(inner[0])
        and isinstance(tree, list | tuple)
    ):
        return [_expand(inner[0], item, (*path, i), where, name) for i, item in enumerate(tree)]
    if not dataclasses.is_dataclass(cls) or not isinstance(tree, Mapping):
        return tree
    if hasattr(cls, "expand"):
        try:
            tree = cls.expand(tree)  # type: ignore[attr-defined]
        except ValueError as error:
            raise InputError(f"{_place(path, where, name)}: {error}") from None
    hints = typing.get_type_hints(cls)
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    known, out = [*defaults], {}
    for key, value in tree.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            mend = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
            raise InputError(f"{_place((*path, str(key)), where, name)}: unknown key; {mend}")
        if isinstance(value, Mapping) and dataclasses.is_dataclass(default := defaults[key]):
            value = merge(_own_defaults(default), value)
        empty = value is None and dataclasses.is_dataclass(hints[key])
        out[key] = {} if empty else _expand(hints[key], value, (*path, key), where, name)
    return out


def _own_defaults(default: Any) -> Tree:
    """Fields of a default that differ from the class defaults; they apply unless the file sets them."""
    plain = type(default)()
    pairs = (
        (f.name, getattr(default, f.name), getattr(plain, f.name))
        for f in dataclasses.fields(default)
    )
    return {name: _plain(own) for name, own, other in pairs if own != other}


def _place(path: tuple[Any, ...], where: Where, name: str) -> str:
    """ "file:line: dotted.path" of the deepest part of `path` that the file holds; for a flag the flag."""
    known = next((where[path[:n]] for n in range(len(path), 0, -1) if path[:n] in where), name)
    return f"{known}: {'.'.join(map(str, path))}" if path and known != _flag(path) else known


def _one_line(error: pydantic.ValidationError, where: Where, name: str) -> str:
    first, *rest = error.errors()
    path, text = tuple(first["loc"]), _complaint(first)
    if first["type"] == "value_error" and ": " in text and " " not in text.split(": ")[0]:
        field, text = text.split(
            ": ", 1
        )  # a cross-field check names its field: "field: what is wrong"
        path = (*path, *field.split("."))
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{_place(path, where, name)}: {text}{more}"


# pydantic's kind of error -> what to say; {ge} and the like are its context.
_COMPLAINTS = {
    "greater_than_equal": "must be at least {ge:.10g}",
    "greater_than": "must be above {gt:.10g}",
    "less_than_equal": "must be at most {le:.10g}",
    "less_than": "must be below {lt:.10g}",
    "finite_number": "must be a finite number",
    **dict.fromkeys(
        ("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "must be an integer"
    ),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
}


def _complaint(error: Any) -> str:
    """One of pydantic's errors in our words, with the value that was given."""
    text = _COMPLAINTS.get(error["type"], "").format(**error.get("ctx", {}))
    text = text or error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("value_error", "missing") else f", not {error['input']!r:.80}"
    return f"{text[:1].lower()}{text[1:]}{given}"
