"""YAML -> dataclass -> command line -> JSON; every mistake is one line that names its location."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import pytest

from jaxllm import config as c
from jaxllm.config import InputError, build, complete, load, parse_overrides, renames
from jaxllm.life import Config


@dataclasses.dataclass(frozen=True)
class Item:
    path: str = ""
    """Path."""
    weight: float = 1.0
    """Weight."""


@dataclasses.dataclass(frozen=True)
class Inner:
    num_steps: int = 1
    """Steps."""
    rate: float = 0.5
    """Rate."""
    on: bool = True
    """Switch."""
    items: tuple[Item, ...] = ()
    """Items."""

    def __post_init__(self):
        if self.num_steps < 0:
            raise ValueError("num_steps: must not be negative")


@dataclasses.dataclass(frozen=True)
class Sized:
    size: str = "small"
    """Preset."""
    width: int = 1
    """Width."""

    @staticmethod
    def expand(tree):
        return {"width": {"small": 1, "large": 9}[tree.get("size", "small")], **tree}


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str = "x"
    """Name."""
    inner: Inner = Inner()
    """Inner."""
    model: Sized = Sized()
    """Model."""


def write(path, text):
    path.write_text(text)
    return path


def test_file_overrides_and_json_round_trip(tmp_path):
    path = write(
        tmp_path / "a.yaml", "name: run\ninner: {num_steps: 3, rate: 1e-4, items: [{path: p}]}\n"
    )
    config = c.load(Outer, path, {"inner": {"rate": 2}})
    assert config == Outer("run", Inner(3, 2.0, True, (Item("p"),)))
    assert c.build(Outer, c.to_tree(config)) == config


def test_extends_merges_deeply(tmp_path):
    write(tmp_path / "base.yaml", "name: base\ninner: {num_steps: 3, rate: 0.1}\n")
    path = write(tmp_path / "child.yaml", "extends: base.yaml\ninner: {rate: 0.2}\n")
    assert c.load(Outer, path) == Outer("base", Inner(3, 0.2))
    circle = write(tmp_path / "circle.yaml", "extends: circle.yaml\n")
    with pytest.raises(InputError, match=r"circle.yaml:1: extends: .*circle"):
        c.load(Outer, circle)


def test_presets_expand_before_validation_and_under_overrides(tmp_path):
    path = write(tmp_path / "a.yaml", "model: {size: large}\n")
    assert c.load(Outer, path).model == Sized("large", 9)
    assert c.load(Outer, path, {"model": {"width": 4}}).model == Sized("large", 4)
    assert c.load(Outer, path, {"model": {"size": "small"}}).model == Sized("small", 1)


MISTAKES = {
    "nam: x\n": r"bad.yaml:1: nam: unknown key; did you mean name\?",
    "name: a\ninner:\n  num_step: 3\n": r"bad.yaml:3: inner.num_step: unknown key; did you mean num_steps\?",
    "inner:\n  num_steps: many\n": r"bad.yaml:2: inner.num_steps: .*integer.*'many'",
    "inner:\n  items:\n  - path: a\n  - pth: b\n": r"bad.yaml:4: inner.items.1.pth: unknown key; did you mean path",
    "inner: {num_steps: -1}\n": r"bad.yaml:1: inner.num_steps: must not be negative",
    "inner: 3\n": r"bad.yaml:1: inner: .*3",
    "name: a\nname: b\n": r"bad.yaml:2: name is given twice",
    "name: [a\n": r"bad.yaml: not valid YAML",
    "- a\n": r"bad.yaml: a config file must hold a mapping",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_with_its_location(tmp_path, text):
    with pytest.raises(InputError, match=MISTAKES[text]) as error:
        c.load(Outer, write(tmp_path / "bad.yaml", text))
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.yaml: no such config file"):
        c.load(Outer, tmp_path / "nowhere.yaml")


def test_command_line_takes_every_field_and_keeps_the_rest():
    default = Outer("x", Inner(3, 0.1, True, (Item("p"), Item("q"))))
    flags = ["--inner.num-steps", "7", "--inner.no-on", "--inner.items.1.weight", "0.5", "--name=y"]
    tree = c.parse_overrides(Outer, default, flags, "prog")
    assert tree["name"] == "y"
    assert tree["inner"]["num_steps"] == 7 and tree["inner"]["on"] is False
    assert [item["weight"] for item in tree["inner"]["items"]] == [1.0, 0.5]
    assert "rate" not in tree["inner"] and "model" not in tree


@pytest.mark.parametrize(
    "flags", [["--inner.num-stepz", "3"], ["--inner.num-steps", "many"], ["--inner.num-steps"]]
)
def test_a_wrong_flag_is_one_line(flags):
    with pytest.raises(InputError, match="num-step") as error:
        c.parse_overrides(Outer, Outer(), flags, "prog")
    assert "\n" not in str(error.value)


def test_differences_name_the_path():
    assert c.differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c: 2 -> 3",
        "d: None -> 4",
    ]


def test_a_sections_own_defaults_apply_unless_the_file_sets_them(tmp_path):
    from jaxllm.run import Config

    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {embed_dim: 256, num_heads: 4}\ngrpo: {num_steps: 3, actor: {learning_rate: 1.0e-3}}\n"
    )
    config = c.load(Config, path)
    assert (config.model.head_dim, config.model.num_kv_heads) == (
        64,
        4,
    )  # derived from the file's embed_dim, not from the default's
    assert (config.grpo.advantages, config.grpo.num_responses, config.grpo.num_steps) == (
        "grpo",
        8,
        3,
    )
    assert (config.grpo.actor.schedule, config.grpo.actor.learning_rate) == ("constant", 1e-3)
    assert config.ppo.advantages == "gae" and config.rloo.num_responses == 4


def test_a_config_that_an_earlier_version_recorded_is_completed_and_a_real_change_is_seen():
    now = {
        "name": "x",
        "inner": {"num_steps": 3, "rate": 0.5, "on": True, "items": [{"path": "p", "weight": 1.0}]},
    }
    old = {"inner": {"num_steps": 3, "items": [{"path": "p"}]}}
    assert c.complete(Outer, old) == {"inner": now["inner"]}
    assert c.differences(c.complete(Outer, old), {"inner": {**now["inner"], "rate": 0.7}}) == [
        "inner.rate: 0.5 -> 0.7"
    ]
    gone = {"inner": {"num_steps": 3, "former": 1}}
    assert c.complete(Outer, gone) == gone


# --- Keys with a better name today.


@dataclasses.dataclass(frozen=True)
class Renamed:
    RENAMED: ClassVar[Mapping[str, str]] = {"normalise": "normalize"}

    normalize: bool = True


@dataclasses.dataclass(frozen=True)
class Section:
    inner: Renamed = Renamed()


def test_an_old_key_keeps_working_in_files_records_and_flags(tmp_path, capsys):
    renames.print_once.cache_clear()
    (tmp_path / "x.yaml").write_text("inner: {normalise: false}")
    config = load(Section, tmp_path / "x.yaml")
    assert config == Section(Renamed(normalize=False))
    assert "normalise is now normalize; the old name keeps working" in capsys.readouterr().err
    assert complete(Section, {"inner": {"normalise": False}}) == {"inner": {"normalize": False}}
    for flag in ("--inner.no-normalise", "--inner.no-normalize"):
        overrides = parse_overrides(Section, Section(), [flag], "x")
        assert overrides == {"inner": {"normalize": False}}


def test_a_key_under_both_of_its_names_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("inner: {normalise: false, normalize: true}")
    with pytest.raises(
        InputError, match=r"x.yaml:1: inner: normalise is the old name of normalize"
    ):
        load(Section, tmp_path / "x.yaml")


def test_the_shipped_sections_accept_their_old_keys():
    config = build(Config, {
        "model": {"moe": {"normalise": False}},
        "reward": {"normalise": "centre"},
        "ppo": {"normalise_scores": True},
    })  # fmt: skip
    assert not config.model.moe.normalize and config.reward.normalize == "center"
    assert config.ppo.normalize_scores
