"""Calls of tools are read in the formats of the families, in whatever parts they come; other text stays text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.serve.tool_calls import ToolCallReader, for_template, parse

ADD = {"name": "add", "arguments": {"a": 1, "b": [2, "三"]}}
SUB = {"name": "sub", "arguments": {}}
dumps = lambda value: json.dumps(value, ensure_ascii=False)
LLAMA = dumps({"name": "add", "parameters": ADD["arguments"]})
CALLS = {
    "hermes": (f"<tool_call>\n{dumps(ADD)}\n</tool_call>", [ADD]),
    "two": (f"<tool_call>{dumps(ADD)}</tool_call>\n<tool_call>{dumps(SUB)}</tool_call>", [ADD, SUB]),
    "not closed": (f"<tool_call>{dumps(SUB)}", [SUB]),
    "llama": (LLAMA, [ADD]),
    "llama, two": (f"{LLAMA}; {dumps(SUB)}", [ADD, SUB]),
    "python tag": (f"<|python_tag|>{LLAMA}", [ADD]),
    "mistral": (f" {dumps([ADD, SUB])}", [ADD, SUB]),
}  # fmt: skip


def read(parts):
    reader = ToolCallReader()
    text = "".join(map(reader.add, parts))
    rest, calls = reader.finish()
    return text + rest, calls


def plain(calls):
    return [
        {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
        for call in calls
    ]


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
def test_calls_are_read_however_they_are_cut(name, data):
    text, calls = CALLS[name]
    before = data.draw(st.sampled_from(["", "I add. "])) if text.startswith("<tool") else ""
    whole = before + text
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    shown, found = read(parts)
    assert shown == before and plain(found) == calls
    assert [call["index"] for call in found] == list(range(len(calls)))
    assert len({call["id"] for call in found}) == len(calls)


@given(st.text(alphabet='<tol_ca>{}[]"x ', max_size=40) | st.sampled_from([
    '{"name": 3}', "[1, 2]", "{}", "[]", '{"name": "a"}', '{"name": "a", "arguments": 3}', "<tool_call>nothing</tool_call>",
    '<tool_call>{"name": "a", "arguments": {}}</tool_call> and more',
]), st.integers(1, 5))  # fmt: skip
def test_other_text_stays_as_it_is(text, size):
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    assert read(parts) == (text, []) and parse(text) == []


def test_templates_get_arguments_as_objects():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    [changed] = for_template([call])
    assert changed["function"] == {"name": "add", "arguments": {"a": 1}} and changed["id"] == "1"
    # What is no object is left to the template.
    for odd in (
        {"function": {"arguments": "no JSON"}},
        {"function": 3},
        "text",
        {"function": {"arguments": "3"}},
    ):
        assert for_template([odd]) == [odd]
