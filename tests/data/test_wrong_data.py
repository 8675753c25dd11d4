"""Null, tools and any value in any field of a record: an example, or one line that names the file and the line."""

import json

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import InputError
from jaxllm.data import messages, splits
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.messages import prompt_text
from jaxllm.evaluation import task_files
from jaxllm.stages import sample
from tests.data.test_formats import FEW, write

# --- null is absent

LETTERS = st.text('abc文"\n{}')
ALPACA = {"prompt": "{instruction}\n{input}", "response": "{output}"}


def examples(path, kind, **source):
    config = DataConfig((Source(str(path), **source),), held_out_fraction=0.0)
    return list(splits.examples(config, kind, "train"))


def one(tmp_path, kind, fields, **source):
    (example,) = examples(write(tmp_path / "a.jsonl", json.dumps(fields)), kind, **source)
    return example


def not_one(tmp_path, kind, fields, **source):
    """The line with which a record is refused, without the path; a good record stands before it, in line 1."""
    good = {
        "prompt": "q",
        "response": "r",
        "responses": ["a", "b"],
        "ranks": [1, 2],
        "text": "t",
        "body": "b",
    }
    good |= {"instruction": "q", "input": "i", "output": "r"}
    path = write(tmp_path / "a.jsonl", json.dumps(good) + "\n" + json.dumps(fields))
    with pytest.raises(InputError) as error:
        examples(path, kind, **source)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}:2: ")
    return str(error.value).removeprefix(f"{path}:2: ")


def contents(example):
    return [messages.message_text(m) for m in example.messages]


@pytest.mark.parametrize("null", [None, float("nan")], ids=str)
def test_a_null_field_of_a_template_is_empty_text(tmp_path, null):
    record = {"instruction": "Name a colour", "input": null, "output": "red"}
    assert contents(one(tmp_path, "chat", record, **ALPACA)) == ["Name a colour\n", "red"]
    assert one(tmp_path, "prompt", record, **ALPACA).answer == "red"
    system = {**ALPACA, "system": "{input}"}
    assert contents(one(tmp_path, "chat", record, **system)) == ["Name a colour\n", "red"]
    assert contents(one(tmp_path, "chat", {**record, "input": "one"}, **system))[0] == "one"


@pytest.mark.parametrize("null", [None, float("nan")], ids=str)
def test_null_is_absent_next_to_values(tmp_path, null):
    absent = dict.fromkeys(
        ("system", "messages", "tools", "split", "text", "scores", "answer", "annotator"), null
    )
    spoken = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    assert one(tmp_path, "chat", {"prompt": "q", "response": "r", **absent}).messages == spoken
    with_nulls = [
        {**m, "tool_calls": null, "name": null, "reasoning_content": null} for m in spoken
    ]
    nulls = {"prompt": null, "response": null, "system": null, "tools": null}
    assert one(tmp_path, "chat", {"messages": with_nulls, **nulls}).messages == spoken
    assert one(tmp_path, "prompt", {"prompt": "q", "response": null, "answer": null}).answer == ""
    ranking = {"prompt": "q", "responses": ["a", "b"], **absent}
    ranked = one(tmp_path, "ranked", {**ranking, "ranks": [2, 1]})
    assert (ranked.ranks, ranked.scores, ranked.annotator) == ([2, 1], (), "")
    assert one(tmp_path, "ranked", {**ranking, "ranks": null, "scores": [1, 2.5]}).ranks == [2, 1]


def test_parquet_says_absent_by_null(tmp_path):
    import pyarrow
    import pyarrow.parquet

    called = {"id": None, "function": {"name": "f", "arguments": {"a": 1}}}
    rows = [
        {"prompt": "q", "response": "r", "messages": None},
        {
            "prompt": None,
            "response": None,
            "messages": [
                {"role": "user", "content": "q", "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [called]},
                {"role": "tool", "content": "3", "tool_calls": None},
                {"role": "assistant", "content": "three", "tool_calls": None},
            ],
        },
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = examples(tmp_path / "a.parquet", "chat")
    assert [m["content"] for m in first.messages] == ["q", "r"]
    assert [sorted(m) for m in second.messages][:2] == [["content", "role"], ["role", "tool_calls"]]
    assert second.messages[1]["tool_calls"] == [{"function": called["function"]}]


def test_nulls_in_the_arguments_of_a_call_stay(tmp_path):
    call = {"function": {"name": "f", "arguments": {"a": None}}}
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    assert one(tmp_path, "chat", {"messages": chat}).messages[-1]["tool_calls"] == [call]


REFUSED = [
    ("document", {"text": None}, {}, "a document needs the field 'text'"),
    (
        "document",
        {"text": "a", "body": None},
        {"text_field": "body"},
        "a document needs the field 'body'",
    ),
    ("prompt", {"body": None}, {"text_field": "body", "prompt": "{text}"}, "the prompt is empty"),
    ("chat", {"prompt": None, "response": "r"}, {}, 'has a "response" without a "prompt"'),
    ("chat", {"prompt": "q", "response": None}, {}, "must end with the assistant"),
    ("chat", {"prompt": "", "response": "r"}, {}, "the prompt is empty"),
    ("prompt", {"prompt": " "}, {}, "the prompt is empty"),
    ("prompt", {"prompt": None}, {}, "must end with the user"),
    ("prompt", {"messages": None}, {}, "must end with the user"),
    ("chat", {"messages": [{"role": "user", "content": None}]}, {}, "a message needs a role"),
    ("chat", {"messages": [None]}, {}, "messages.0: must be a valid object, not None"),
    (
        "chat",
        {"instruction": "a", "input": None, "output": None},
        ALPACA,
        "the last reply is empty",
    ),
    ("chat", {"instruction": None, "input": None, "output": "a"}, ALPACA, "the prompt is empty"),
    ("chat", {"instruction": None, "input": "", "output": "a"}, ALPACA, "the prompt is empty"),
    (
        "chat",
        {"instruction": "a", "output": "a"},
        ALPACA,
        "{input} is not a field; known: instruction, output",
    ),
    (
        "ranked",
        {"prompt": "q", "responses": ["a", None], "ranks": [1, 2]},
        {},
        "responses.1: must be",
    ),
    ("ranked", {"prompt": "q", "responses": None, "ranks": [1, 2]}, {}, "responses: is missing"),
    ("ranked", {"prompt": "q", "responses": ["a"], "ranks": [1]}, {}, "1 response without a label"),
    (
        "ranked",
        {"prompt": "q", "responses": ["a", "b"], "labels": [True]},
        {},
        "1 labels for 2 responses",
    ),
    (
        "ranked",
        {"prompt": "q", "response": "a", "label": "good"},
        {},
        "label: must be a valid boolean",
    ),
    ("ranked", {"prompt": "q", "label": True}, {}, 'has a "label" without a reply'),
    (
        "ranked",
        {"prompt": "q", "responses": ["a", "b"], "ranks": None},
        {},
        "0 ranks for 2 responses",
    ),
    (
        "ranked",
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, None]},
        {},
        "ranks.1: must be",
    ),
    (
        "ranked",
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2**40]},
        {},
        "ranks.1: must be",
    ),
    (
        "ranked",
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, None]},
        {},
        "scores.1: must be",
    ),
    (
        "ranked",
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 10**400]},
        {},
        "scores.1: must be",
    ),
    (
        "ranked",
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1e300]},
        {},
        "scores.1: must be",
    ),
    (
        "ranked",
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2], "scores": 5},
        {},
        "scores: must be a valid list",
    ),
]


@pytest.mark.parametrize(
    ("kind", "fields", "source", "message"), REFUSED, ids=lambda x: str(x)[:60]
)
def test_absent_where_it_is_required_is_refused_with_its_line(
    tmp_path, kind, fields, source, message
):
    assert message in not_one(tmp_path, kind, fields, **source)


@given(
    st.recursive(
        st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: (
            st.lists(inner | LETTERS | st.none()) | st.dictionaries(LETTERS, inner | st.none())
        ),
    )
)
@FEW
def test_values_stand_in_templates_as_json_spells_them(tmp_path, value):
    example = one(tmp_path, "prompt", {"value": value, "answer": value}, prompt="x {value} {")
    assert contents(example) == [f"x {example.answer} {{"]
    assert (
        json.loads(example.answer) == value
        and "None" not in example.answer
        and "True" not in example.answer
    )


def test_bytes_and_infinite_numbers_are_no_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = write(tmp_path / "a.jsonl", '{"value": 1e999}')
    with pytest.raises(InputError, match=r"a.jsonl:1: inf has no spelling as text"):
        examples(path, "prompt", prompt="{value}")
    pyarrow.parquet.write_table(pyarrow.table({"value": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet:1: b'x' has no spelling as text"):
        examples(tmp_path / "a.parquet", "prompt", prompt="{value}")


# --- tools

CALLS = [{"type": "function", "function": {"name": "warm", "arguments": {"place": "Rome"}}}]
SPELLED = '[{"type": "function", "function": {"name": "warm", "arguments": {"place": "Rome"}}}]'
USER, CALL = {"role": "user", "content": "how warm?"}, {"role": "assistant", "tool_calls": CALLS}
RESULT, REPLY = {"role": "tool", "content": "21"}, {"role": "assistant", "content": "21 degrees"}


@pytest.mark.parametrize(
    "call", [CALL, {**CALL, "content": None}, {**CALL, "content": ""}], ids=str
)
def test_calls_without_content_are_part_of_the_text(tmp_path, call):
    prompt = one(tmp_path, "prompt", {"messages": [USER, call]})
    assert (prompt.question(), prompt.answer) == ("how warm?", SPELLED)
    chat = one(tmp_path, "chat", {"messages": [call, REPLY]})
    assert (chat.question(), chat.target_text()) == (SPELLED, SPELLED + "21 degrees")
    assert prompt_text([USER, call]) == SPELLED and prompt_text([USER, call, RESULT]) == "21"
    chat = one(tmp_path, "chat", {"messages": [USER, call, RESULT, REPLY]})
    assert json.loads(chat.question()) == [
        USER,
        {k: v for k, v in call.items() if v is not None},
        RESULT,
    ]
    assert chat.full_text() == f"how warm?\n{SPELLED}\n21\n21 degrees"
    for kind, more in (("prompt", {}), ("ranked", {"responses": ["a", "b"], "ranks": [1, 2]})):
        asked = one(tmp_path, kind, {"messages": [USER, call, RESULT], **more})
        assert asked.messages[-1] == RESULT and asked.answer == ""


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        (
            {"role": "assistant", "content": "a", "tool_calls": "call"},
            "messages.1.tool_calls: must be a valid list",
        ),
        ({"role": "assistant", "tool_calls": [3]}, "messages.1.tool_calls: must be a valid object"),
        ({"role": "assistant", "tool_calls": []}, "a message needs a role"),
        ({"role": "user", "tool_calls": CALLS}, "a message needs a role"),
        ({"role": "user", "content": "a", "name": 3}, "messages.1.name: must be a valid string"),
        ({"role": ["user"], "content": "a"}, "a message needs a role"),
    ],
    ids=str,
)
def test_a_malformed_call_is_refused_with_its_line(tmp_path, message, wrong):
    for kind in ("chat", "prompt"):
        assert wrong in not_one(tmp_path, kind, {"messages": [USER, message, REPLY]})


# --- tasks


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "q", "answer": "a"},
        {"messages": [USER, CALL, RESULT], "answer": 3},
        {"question": "q", "choices": ["a", "b"], "answer": 1},
        {"text": "a"},
    ],
    ids=str,
)
def test_null_is_absent_in_tasks_and_required_where_it_is(tmp_path, line):
    nulls = dict.fromkeys(
        {"prompt", "messages", "question", "choices", "answer", "text"} - set(line)
    )
    read_all = lambda value: task_files.read_tasks(
        [write(tmp_path / "t.jsonl", json.dumps(value))], shots=0
    )
    (plain,), (with_nulls,) = read_all(line), read_all({**nulls, **line})
    assert plain.items == with_nulls.items and plain.kind == with_nulls.kind
    for name in line:
        with pytest.raises(InputError, match=r"t.jsonl:1: ") as error:
            read_all({**line, name: None} if name != "choices" else {**line, name: [None, "b"]})
        assert "None" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "text"), [("3", "3"), ("1e3", "1000.0"), ('"None"', "None"), ("0.50", "0.5")]
)
def test_answers_of_tasks_are_spelled_as_json_does(tmp_path, answer, text):
    path = write(tmp_path / "t.jsonl", f'\ufeff{{"prompt": "q", "answer": {answer}}}')
    assert task_files.read_tasks([path], shots=0)[0].items[0].answer == text


def test_tasks_in_a_table_are_read_and_wrong_answers_refused(tmp_path):
    path = write(tmp_path / "t.CSV", "prompt,answer\nq,3\n")
    assert task_files.read_tasks([path], shots=0)[0].items[0].answer == "3"
    for answer in ("true", "1e999", "NaN", "[1]", "null"):
        path = write(tmp_path / "t.jsonl", f'{{"prompt": "q", "answer": {answer}}}')
        with pytest.raises(InputError, match=r"t.jsonl:1: "):
            task_files.read_tasks([path], shots=0)


@pytest.mark.parametrize("content", [b'{"responses": [\n', b"caf\xe9\n"])
def test_damaged_samples_of_a_killed_run_are_drawn_again_from_there(tmp_path, content, capsys):
    whole = b'{"responses": []}\n'
    path = epath.Path(write(tmp_path / "samples.jsonl", whole + content + whole))
    assert sample._keep_whole_batches(path, 1) == 1
    assert path.read_bytes() == whole
    assert (
        "samples.jsonl:2: not a JSON object; that line and those after it are left out"
        in capsys.readouterr().err
    )


# --- any value in any field

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "a", "train", "user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "tool_calls", "name", "function", "a"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool"])},
        optional={
            "content": st.just("hi") | VALUES,
            "tool_calls": st.just(CALLS) | VALUES,
            "name": VALUES,
        },
    ),
    max_size=4,
)
RIGHT = {
    "document": {"text": "hi"},
    "chat": {"prompt": "hi", "response": "ho"},
    "prompt": {"prompt": "hi", "answer": "ho"},
    "ranked": {"prompt": "hi", "responses": ["a", "b"], "ranks": [1, 2]},
    "task": {"question": "hi", "choices": ["a", "b"], "answer": 1},
}
NAMES = (
    "text",
    "prompt",
    "response",
    "system",
    "split",
    "answer",
    "annotator",
    "question",
    "other",
    "tools",
    "choices",
)
FIELDS = dict.fromkeys(NAMES, VALUES) | {
    "messages": MESSAGES | VALUES,
    "responses": st.lists(VALUES, max_size=3),
    "ranks": st.lists(st.integers() | VALUES, max_size=3),
    "scores": st.lists(st.floats() | st.integers() | VALUES, min_size=2, max_size=2),
}
CHANGES = st.lists(st.sampled_from([*FIELDS]), max_size=3).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)


@pytest.mark.parametrize("kind", RIGHT)
@given(changes=CHANGES, template=st.sampled_from(["", "{text}", "{other} {answer}"]))
@settings(FEW, max_examples=150)
def test_any_value_in_any_field_gives_an_example_or_one_line(tmp_path, kind, changes, template):
    fields = RIGHT[kind] | changes
    path = write(tmp_path / "a.jsonl", json.dumps(fields))
    try:
        if kind == "task":
            found = task_files.read_tasks([path], shots=0)[0].items
        else:
            templates = {"prompt": template, "response": template} if template else {}
            found = examples(path, kind, min_chars=0, **templates)
    except InputError as error:
        assert "\n" not in str(error) and str(error).startswith(path)
        return
    for example in found:
        words = [
            example.answer,
            example.annotator,
            example.text,
            *contents(example),
            *example.responses,
        ]
        assert all(isinstance(word, str) and "None" not in word for word in words)
        assert (example.digest() and len(example.ranks) == len(example.responses)) or kind == "task"
