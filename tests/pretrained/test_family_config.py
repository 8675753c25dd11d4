"""config.json == `transformers`' reading of it, field by field (recorded by tests/oracles/config_defaults.py)."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import InputError
from jaxllm.pretrained import family_config
from jaxllm.pretrained.family_table import DEFAULTS, FAMILIES
from tests.oracles.config_defaults import HERE

RECORD = json.loads((HERE / "config_defaults.json").read_text())["families"]
FIELDS = [(family, field) for family, record in RECORD.items() for field in record["given"]]
# Fields that do not matter: the family's class does not read them, or no model of it has another value.
UNREAD = {
    "gpt2": {"initializer_range"},
    "mistral": {"attention_bias"},
    "mixtral": {"attention_bias"},
    "qwen2": {"attention_bias"},
    "gemma2": {"hidden_act"},
    "gemma3_text": {"hidden_act"},
    "qwen3_moe": {"max_window_layers"},
}
READ = [(family, field) for family, field in FIELDS if field not in UNREAD.get(family, ())]


def ours(family, config):
    """The model, or the one line that refuses it."""
    try:
        return family_config.from_hf({**config, "model_type": family}, "config.json")[0]
    except InputError as error:
        return str(error)


def expected(family, changed):
    """The model of what the class's own `to_dict` says, with these changes."""
    config = {**RECORD[family]["read"], **changed}
    for name in changed.get("gone", ()):
        del config[name]
    return ours(family, config)


def test_every_family_is_recorded():
    assert RECORD.keys() == FAMILIES.keys() == DEFAULTS.keys()


@pytest.mark.parametrize("family", RECORD)
def test_a_config_means_what_its_class_makes_of_it(family):
    assert ours(family, RECORD[family]["given"]) == expected(family, {})
    assert not isinstance(expected(family, {}), str)


@pytest.mark.parametrize("family, field", FIELDS)
def test_a_field_left_out_is_the_published_default(family, field):
    rest = {name: value for name, value in RECORD[family]["given"].items() if name != field}
    found, wanted = ours(family, rest), expected(family, RECORD[family]["left_out"][field])
    assert found == wanted
    if family == "deepseek_v2" and field in (
        "num_experts_per_tok",
        "n_group",
        "topk_group",
    ):  # null in the class
        assert f"has no {field!r}" in found
    else:
        assert not isinstance(found, str)


@pytest.mark.parametrize("family, field", FIELDS)
def test_null_is_what_the_class_makes_of_it_or_one_line_names_the_field(family, field):
    found = ours(family, {**RECORD[family]["given"], field: None})
    wanted = RECORD[family]["null"][field]
    if wanted == "refused" and field not in UNREAD.get(family, ()):
        assert isinstance(found, str) and field in found
    elif wanted != "refused" and not isinstance(found, str):
        assert found == expected(family, wanted)
    elif isinstance(found, str):  # the class reads it, and no model can be made of it
        assert field in found


@pytest.mark.parametrize("family", RECORD)
def test_a_config_without_sizes_is_the_class_itself(family):
    assert not isinstance(ours(family, {}), str) or family == "deepseek_v2"


ANYTHING = [[1], {"a": 1}, -1, -0.5, math.nan, math.inf, -math.inf, 10**400, "x", True, False]


def wrong_for(value):
    """Values of JSON (as Python reads it) that a field with this value can never have."""
    return [v for v in ANYTHING if not isinstance(value, bool) or not isinstance(v, bool)]


@pytest.mark.parametrize("family, field", READ)
def test_a_wrong_value_is_one_line_that_names_file_and_field(family, field):
    for wrong in wrong_for(RECORD[family]["given"][field]):
        found = ours(family, {**RECORD[family]["given"], field: wrong})
        assert isinstance(found, str), wrong
        assert found.startswith("config.json: ") and field in found and "\n" not in found


NAMES = sorted(
    {name for record in RECORD.values() for name in record["given"]}
    | {"rope_scaling", "rope_parameters"}
)
NAMES += [
    "layer_types",
    "dtype",
    "torch_dtype",
    "original_max_position_embeddings",
    "use_bidirectional_attention",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*NAMES, "type", "factor"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    family=st.sampled_from([*RECORD]),
    changed=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4),
)
def test_whatever_a_config_holds_it_is_a_model_or_one_line(family, changed):
    found = ours(family, {**RECORD[family]["given"], **changed})
    assert not isinstance(found, str) or (found.startswith("config.json: ") and "\n" not in found)


@pytest.mark.parametrize("model_type", [None, 3, ["llama"], {"a": 1}, "mamba"])
def test_an_unknown_family_is_one_line(model_type):
    assert "model_type" in ours(model_type, {})


@pytest.mark.parametrize("kind, given", [
    ("linear", {"factor": "8"}), ("linear", {}), ("llama3", {"factor": 8.0, "low_freq_factor": [1]}),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": -1}), (3, {"factor": 2.0}),
])  # fmt: skip
def test_wrong_rotary_settings_are_one_line(kind, given):
    found = ours("llama", {"rope_scaling": {"rope_type": kind, **given}})
    assert isinstance(found, str) and "config.json: " in found
    assert any(
        word in found for word in ("factor", "original_max_position_embeddings", "rope type")
    )


def test_old_and_new_rotary_settings_together_are_read_as_the_class_does():
    linear = {"rope_type": "linear", "factor": 2.0}
    found = ours("llama", {"rope_scaling": linear, "rope_parameters": {"rope_theta": 5.0}})
    assert (found.rope_scaling.kind, found.rope_theta) == ("linear", 10_000.0)
    found = ours(
        "gemma3_text",
        {"rope_scaling": linear, "rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
    )
    assert (found.rope_scaling.kind, found.rope_theta) == ("linear", 5.0)


def test_the_length_before_stretching_is_that_of_the_rotary_settings_else_the_contexts():
    """As the class reads it: a field of this name beside the rotary settings is not read."""
    beside = {"original_max_position_embeddings": 32, "max_position_embeddings": 64}
    for own, wanted in (({"original_max_position_embeddings": 16}, 16), ({}, 64)):
        found = ours(
            "llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **own}, **beside}
        )
        assert found.rope_scaling.original_length == wanted
