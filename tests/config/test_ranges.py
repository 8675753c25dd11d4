"""Every field of every config, with every kind of value: an invalid one is one line that names the field."""

import dataclasses
import math
import types
import typing

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.commands import ChatArgs, ExportArgs, GenerateArgs
from jaxllm.config import InputError, build, load, to_tree, tyro_cli
from jaxllm.evaluation.config import ScoreArgs
from jaxllm.life import Config
from jaxllm.plan.config import PlanArgs
from jaxllm.serve.config import ServeArgs

COMMANDS = {
    GenerateArgs: ["stage", "--prompt", "x"],
    ChatArgs: ["stage"],
    ExportArgs: ["stage", "out"],
    ScoreArgs: ["stage", "--task", "t"],
    ServeArgs: ["dir"],
    PlanArgs: ["config", "--topology", "v5p:2x2x1"],
}
# The fields for which a number below 0 means something.
MAY_BE_NEGATIVE = {
    "data",
    "pipeline",
    "fsdp",
    "context",
    "expert",
    "tensor",
    "missing_end_score",
    "weight",
    "presence_penalty",
    "frequency_penalty",
}
# What an item of a list needs in addition to the field that is tried.
NEEDED = {"meshes": {"stage": "sft"}, "sources": {"path": "x"}}


def fields(cls, path=()):
    """(path, type with its limits) of every field; a 0 in a path stands for an item of a list."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, here = hints[field.name], (*path, field.name)
        inner = typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, here)
        elif inner and dataclasses.is_dataclass(inner[0]):
            yield from fields(inner[0], (*here, 0))
        else:
            yield here, hint


ALL = dict(fields(Config))


def numeric(hint):
    """Whether values of this type are numbers, or lists of them."""
    base = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    if typing.get_origin(base) is tuple:
        return numeric(typing.get_args(base)[0])
    return base in (int, float)


def limits(hint):
    if typing.get_origin(hint) is tuple:
        return limits(typing.get_args(hint)[0])
    return [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Ge | Gt | Le | Lt)]


NUMERIC = [path for path, hint in ALL.items() if numeric(hint)]
dotted = lambda path: ".".join(map(str, path))


def tree_with(path, value):
    """The config that sets one field only."""
    *owners, key = path
    if key == 0:
        needed = NEEDED.get(owners[-1], {}) if isinstance(value, dict) else {}
        value = [{**needed, **value} if needed else value]
    else:
        value = {key: value}
    return tree_with(owners, value) if owners else value


def at(config, path):
    for key in path:
        config = config[key] if isinstance(key, int) else getattr(config, key)
    return config


def test_every_number_has_a_lower_and_an_upper_limit():
    assert len(NUMERIC) > 200
    commands = [pair for cls in COMMANDS for pair in fields(cls)]
    for path, hint in [*ALL.items(), *commands]:
        if numeric(hint):
            kinds = {type(limit) for limit in limits(hint)}
            assert kinds & {Ge, Gt} and kinds & {Le, Lt}, f"{dotted(path)} has no range"


def tried(path, value):
    """The field's value if it is accepted; if not, the error, which must be one line and name the field."""
    try:
        config = build(Config, tree_with(path, value))
    except InputError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 700, text
        assert path[-1] in text or path[0] in text, f"{dotted(path)}: {text}"
        return text
    assert build(Config, to_tree(config)) == config
    return at(config, path)


@pytest.mark.parametrize("path", NUMERIC, ids=dotted)
def test_invalid_numbers_are_refused(path):
    listed = (lambda x: [x]) if typing.get_origin(ALL[path]) is tuple else (lambda x: x)
    for wrong in (
        math.nan,
        math.inf,
        -math.inf,
        1e30,
        -1e30,
        10**400,
        True,
        "many",
        [],
        {},
        "1e400",
    ):
        assert isinstance(tried(path, listed(wrong)), str), f"{dotted(path)} accepts {wrong!r}"
    if path[-1] not in MAY_BE_NEGATIVE or "sources" in path:
        assert isinstance(tried(path, listed(-1)), str), f"{dotted(path)} accepts -1"
    for number in (0, 1, -1):
        taken = tried(path, listed(number))
        assert (
            isinstance(taken, str)
            or taken == (number,)
            or taken in (number, 0)
            or path[0] == "model"
        ), taken


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(path=st.sampled_from([*ALL]), value=JSON)
@settings(max_examples=300, deadline=None)
def test_any_value_in_any_field_is_accepted_or_refused_in_one_line(path, value):
    tried(path, value)


@given(path=st.sampled_from([*ALL]), value=JSON)
@settings(max_examples=100, deadline=None)
def test_any_value_in_any_section_of_a_file_is_accepted_or_refused_in_one_line(
    tmp_path_factory, path, value
):
    """The value replaces a section, a list or an item."""
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(
        yaml.safe_dump(tree_with(path[:-1], value) if len(path) > 1 else {path[0]: value})
    )
    try:
        load(Config, file)
    except InputError as error:
        assert "\n" not in str(error) and "any.yaml" in str(error)


COMMAND_FIELDS = [(cls, path) for cls in COMMANDS for path, hint in fields(cls) if numeric(hint)]


@pytest.mark.parametrize(
    ("cls", "path"), COMMAND_FIELDS, ids=lambda x: x.__name__ if isinstance(x, type) else dotted(x)
)
def test_invalid_flags_are_refused(cls, path):
    flag = f"--{dotted(path)}".replace("_", "-")
    wrongs = ["-3", "nan", "inf", "1e30", "9223372036854775808", "many"]
    for wrong in wrongs:
        with pytest.raises(InputError, match=flag) as error:
            tyro_cli(cls, [*COMMANDS[cls], f"{flag}={wrong}"], "jaxllm x")
        assert "\n" not in str(error.value)


def test_the_field_types_of_this_test_are_those_of_the_configs():
    known = (str, bool, int, float, types.UnionType)
    for path, hint in ALL.items():
        origin = typing.get_origin(hint)
        assert hint in known or origin in (tuple, typing.Literal, typing.Annotated), (
            f"{dotted(path)}: {hint}"
        )
