"""Rankings from a file written elsewhere: taken over complete, or refused by the number of the bad line."""

import dataclasses
import json

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.config import InputError
from jaxllm.data.format import is_held_out
from jaxllm.ranking.records import read_rankings
from jaxllm.stages import rank
from jaxllm.stages.config import RankConfig
from tests.ranking.workspaces import (
    SIMULATED,
    make_workspace,
    rankings,
    run_rank,
    samples,
    without_time,
)

LINE = {
    "prompt": "问题",
    "responses": ["a", "b", "c"],
    "order": "B>A=C",
    "annotator": "Wang",
    "simulated": False,
}


@pytest.fixture
def workspace(tmp_path):
    return make_workspace(tmp_path / "run")


def write(path, *lines) -> RankConfig:
    """Write a rankings file of these lines; the config that imports it."""
    texts = [
        line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines
    ]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return RankConfig(annotator=f"file:{path}")


def without(name: str) -> dict:
    return {key: value for key, value in LINE.items() if key != name}


def test_file_is_taken_over_complete(workspace, tmp_path):
    full = {
        "messages": [{"role": "user", "content": "q"}],
        "responses": ["x", "y"],
        "ranks": [2, 1],
        "annotator": "Wang",
        "simulated": False,
        "time": "2026-01-31T12:00:00Z",
        "split": "held_out",
        "note": "both are short",
    }
    result = run_rank(workspace, write(tmp_path / "in.jsonl", LINE, full))
    first, second = rankings(workspace)
    assert first["ranks"] == [2, 1, 2]
    assert first["messages"] == [{"role": "user", "content": "问题"}]
    assert second == full
    assert result["prompts"] == 2
    assert result["responses_per_prompt"] == 2.5


def test_what_one_run_ranked_another_takes_over(tmp_path):
    source = make_workspace(tmp_path / "a")
    target = make_workspace(tmp_path / "b")
    result = run_rank(source, SIMULATED)
    path = source.stage_dir("rank") / "rankings.jsonl"
    assert run_rank(target, RankConfig(annotator=f"file:{path}")) == result
    assert rankings(target) == rankings(source)


def test_prompts_without_a_split_are_held_out_by_their_content(workspace, tmp_path):
    lines = [{**LINE, "prompt": f"question {i}"} for i in range(300)]
    result = run_rank(workspace, write(tmp_path / "in.jsonl", *lines, *lines))
    assert 20 < result["held_out_prompts"] < 100
    splits = [line["split"] for line in rankings(workspace)]
    assert splits[:300] == splits[300:]


def test_a_prompt_has_the_split_that_it_has_in_the_data_of_every_stage(workspace, tmp_path):
    lines = [{**LINE, "prompt": f"question {i}"} for i in range(200)]
    config = write(tmp_path / "in.jsonl", *lines)
    run_rank(workspace, dataclasses.replace(config, held_out=0.3))
    for i, line in enumerate(rankings(workspace)):
        assert (line["split"] == "held_out") == is_held_out(f"question {i}", 0.3)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{not json", "not valid JSON"),
        ("[1]", "JSON object"),
        ({**LINE, "prompt": 3}, "messages"),
        ({**LINE, "messages": [{"role": "user"}]}, "a message needs a role"),
        ({**LINE, "messages": 3}, "messages"),
        ({**LINE, "messages": []}, "messages"),
        ({**LINE, "prompt": None}, "messages"),
        ({**LINE, "responses": ["a", None, "c"]}, "responses"),
        ({**LINE, "responses": None}, "responses"),
        ({**LINE, "order": None}, "ranks"),
        ({**LINE, "annotator": None}, "annotator"),
        ({**LINE, "simulated": None}, "simulated"),
        ({**LINE, "ranks": [1, 10**15, 2]}, "without a gap"),
        (json.dumps({**LINE, "prompt": "half \ud800"}), "surrogate"),
        ("[" * 100_000, "nested"),
        ({**LINE, "responses": ["a"]}, "responses"),
        ({**LINE, "responses": ["a", 2, "c"]}, "responses"),
        ({**LINE, "order": "A>B"}, "C is missing"),
        ({**LINE, "ranks": [1, 2]}, "ranks"),
        ({**LINE, "ranks": [1, 3, 3]}, "without a gap"),
        ({**LINE, "ranks": [1, True, 2]}, "ranks"),
        ({**LINE, "ranks": []}, "ranks"),
        (without("order"), "ranks"),
        (without("annotator"), "annotator"),
        (without("simulated"), "simulated"),
        ({**LINE, "time": "yesterday"}, "time"),
        ({**LINE, "split": "test"}, "split"),
        ({**LINE, "note": 3}, "note"),
    ],
)
def test_malformed_line_is_refused_by_number_and_nothing_is_written(
    workspace, tmp_path, line, word
):
    config = write(tmp_path / "in.jsonl", LINE, line)
    with pytest.raises(InputError, match=word) as caught:
        run_rank(workspace, config)
    assert f"{tmp_path / 'in.jsonl'}:2: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (workspace.stage_dir("rank") / "rankings.jsonl").exists()


def test_missing_empty_and_binary_files_are_refused(workspace, tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        run_rank(workspace, RankConfig(annotator=f"file:{tmp_path}/none.jsonl"))
    with pytest.raises(InputError, match="no rankings"):
        run_rank(workspace, write(tmp_path / "empty.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        run_rank(workspace, RankConfig(annotator=f"file:{tmp_path}/b.jsonl"))


def test_null_is_absent(workspace, tmp_path):
    nulls = {"messages": None, "ranks": None, "time": None, "split": None}
    lines = ({**LINE, **nulls}, {**LINE, "finished": None})
    result = run_rank(workspace, write(tmp_path / "in.jsonl", *lines))
    first, second = rankings(workspace)
    assert {**first, "time": 0} == {**second, "time": 0}
    assert first["messages"] == [{"role": "user", "content": "问题"}]
    assert result["prompts"] == 2


def test_rankings_are_read_from_other_formats_with_a_byte_order_mark_too(workspace, tmp_path):
    import pyarrow
    import pyarrow.parquet

    lines = [
        {**LINE, "messages": None},
        {**LINE, "prompt": None, "messages": [{"role": "user", "content": "q"}]},
    ]
    text = "\ufeff" + "".join(json.dumps(line) + "\n" for line in lines)
    results = []
    for name in ("a.jsonl", "a.txt", "a.rankings", "a.json", "a.parquet"):
        if name == "a.parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / name)
        else:
            (tmp_path / name).write_text(text, encoding="utf-8")
        run_rank(workspace, RankConfig(annotator=f"file:{tmp_path / name}"))
        results.append(without_time(rankings(workspace)))
    assert results == [results[0]] * 5
    assert results[0][1]["messages"] == [{"role": "user", "content": "q"}]


def test_conversations_with_tools_are_taken_over(tmp_path):
    call = {"function": {"name": "warm", "arguments": {"place": None}}}
    asked = {"role": "user", "content": "how warm?"}
    silent = {"role": "assistant", "tool_calls": [call]}
    messages = [asked, silent, {"role": "tool", "content": "21"}]
    workspace = make_workspace(tmp_path / "file", count=1)
    run_rank(workspace, write(tmp_path / "in.jsonl", {**LINE, "messages": messages}))
    assert rankings(workspace)[0]["messages"] == messages
    workspace = make_workspace(tmp_path / "samples", count=1)
    path = workspace.stage_dir("sample") / "samples.jsonl"
    path.write_text(json.dumps({**samples(workspace)[0], "messages": [asked, silent]}) + "\n")
    assert run_rank(workspace, SIMULATED)["prompts"] == 1


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "a", "train", "A>B=C", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner)
    ),
    max_leaves=5,
)
FIELDS = [*LINE, "messages", "ranks", "time", "split", "other"]


@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_any_value_in_any_field_of_a_ranking_is_taken_over_or_one_line(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("any")
    config = write(folder / "in.jsonl", LINE | changes)
    written = epath.Path(folder / "rankings.jsonl")
    try:
        rank._import_file(written, config)
    except InputError as error:
        assert str(error).startswith(f"{folder}/in.jsonl:1: ")
        assert "\n" not in str(error)
        assert not written.exists()
    else:
        (line,) = read_rankings(written)
        assert all(isinstance(response, str) for response in line["responses"])
