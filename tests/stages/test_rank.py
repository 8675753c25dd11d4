"""Ranking: nothing is lost, nothing leaks, a cut run goes on where it was, a bad line is refused by number."""

import dataclasses
import io
import json
import os
import select
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import InputError, build
from jaxllm.data.format import is_held_out
from jaxllm.data.sources import DataConfig
from jaxllm.stages import rank
from jaxllm.stages.rank import RankConfig, format_order, parse_order, read_rankings
from jaxllm.workspace import StageCut, Workspace

SIMULATED = RankConfig(annotator="jaxllm.demo.annotators:keyword_sentiment")
WORDS = ("good", "bad", "nice good", "ugly bad", "table", "很好", "[b]x[/b]", "not good")


@pytest.fixture
def workspace(tmp_path):
    return make_workspace(tmp_path / "run")


def make_workspace(run_dir, count=6):
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    workspace = Workspace(epath.Path(run_dir), mesh, 7, {})
    directory = workspace.stage_dir("sample")
    directory.mkdir(parents=True)
    lines = [
        {
            "messages": [{"role": "user", "content": f"prompt {i}\u2028 说"}],
            "responses": [f"{WORDS[(i * 3 + k) % 8]} {k}" for k in range(4)],
            **{
                "finished": [True] * 4,
                "split": "held_out" if i == 1 else "train",
                "source": "SECRET-SOURCE",
                "seed": 7,
            },
        }
        for i in range(count)
    ]
    (directory / "samples.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    workspace.finish("sample", {})
    return workspace


def answers_from(*texts):
    left = list(texts)

    def ask():
        if not left:
            raise EOFError
        return left.pop(0)

    return ask


def rankings(workspace) -> list[dict[str, Any]]:
    return read_rankings(workspace.stage_dir("rank") / "rankings.jsonl")


def samples(workspace) -> list[dict[str, Any]]:
    return [
        json.loads(x)
        for x in (workspace.stage_dir("sample") / "samples.jsonl").read_text().split("\n")[:-1]
    ]


def without_time(lines):
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


# orders


def dense(values):
    levels = sorted(set(values))
    return [levels.index(v) + 1 for v in values]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=26).map(dense))
def test_orders_round_trip(ranks):
    assert parse_order(format_order(ranks), len(ranks)) == ranks


@pytest.mark.parametrize("text", ["B>A=D>C", " b > a=d >c ", "Ｂ＞Ａ＝Ｄ＞Ｃ", "B>D=A>C"])
def test_orders_are_read_as_people_type_them(text):
    assert parse_order(text, 4) == [2, 1, 3, 2]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("A>B>C", "D is missing"),
        ("A>B>C>D>A", "A is given twice"),
        ("A>B>C>E", "'E' is not one of"),
        ("AB>C>D", "'AB'"),
        ("A>>B>C>D", "an empty place"),
        ("A>B>C>D=", "an empty place"),
        ("", "an empty place"),
        ("B A C D", "'BACD'"),
    ],
)
def test_bad_orders_get_one_clear_line(text, word):
    with pytest.raises(InputError, match=word) as caught:
        parse_order(text, 4)
    assert "\n" not in str(caught.value)


# a person


def test_person_ranks_what_was_shown_and_sees_no_source(workspace, capsys):
    result = rank.run(workspace, RankConfig(), answers_from(*["A>B>C=D"] * 6))
    shown = capsys.readouterr().err
    assert "SECRET-SOURCE" not in shown
    assert "SIMULATED" not in shown
    assert "[b]x[/b]" in shown  # a response is text, never markup
    orders = set()
    for index, (line, sample) in enumerate(
        zip(rankings(workspace), samples(workspace), strict=True)
    ):
        assert (line["messages"], line["responses"], line["split"]) == (
            sample["messages"],
            sample["responses"],
            sample["split"],
        )
        shuffle = np.random.default_rng([workspace.seed, index]).permutation(4)
        orders.add(tuple(shuffle))
        assert [line["ranks"][i] for i in shuffle] == [1, 2, 3, 3]
        first, second = (
            shown.index(sample["responses"][i], shown.index(f"prompt {index}")) for i in shuffle[:2]
        )
        assert first < second
    assert len(orders) > 1  # shuffled, each prompt in its own way
    assert result == {
        **{
            "prompts": 6,
            "train_prompts": 5,
            "held_out_prompts": 1,
            "skipped": 0,
            "responses_per_prompt": 4.0,
        },
        **{"tie_fraction": pytest.approx(1 / 6), "simulated": False, "annotator": "person"},
    }


def test_commands_skip_undo_quit_help(workspace, capsys):
    quick = RankConfig(annotator_name="Lee")
    with pytest.raises(StageCut, match="3 of 6"):
        rank.run(
            workspace,
            quick,
            answers_from(
                "?", "u", "A>B>C>D", "s", "D>C>B>A", "u", "u", "nonsense", "ｓ", "A=B=C=D", "Q"
            ),
        )
    out = capsys.readouterr().err
    assert "nothing to undo" in out
    assert "NONSENSE" in out
    lines = rankings(workspace)
    assert [line["messages"][0]["content"][:8] for line in lines] == ["prompt 0", "prompt 2"]
    assert lines[1]["ranks"] == [1, 1, 1, 1]
    result = rank.run(workspace, quick, answers_from("A>B>C>D", "A>B>C>D", "A>B>C>D"))
    assert (result["prompts"], result["skipped"], result["annotator"]) == (5, 1, "Lee")
    assert len(rankings(workspace)) == 5


def test_end_of_input_and_interrupt_quit_without_loss(workspace):
    def interrupted():
        raise KeyboardInterrupt

    for ask, count in (
        (answers_from("A>B>C>D"), 1),
        (interrupted, 1),
        (answers_from("A>B>C>D"), 2),
    ):
        with pytest.raises(StageCut):
            rank.run(workspace, RankConfig(), ask)
        assert len(rankings(workspace)) == count


def test_every_answer_is_on_disk_before_the_next_question(workspace):
    count = 0

    def ask():
        nonlocal count
        path = workspace.stage_dir("rank") / "rankings.jsonl"
        assert path.read_bytes().count(b"\n") == count
        count += 1
        return "A>B>C>D"

    rank.run(workspace, RankConfig(), ask)
    assert count == 6


@given(cut=st.integers(1, 2000))
@settings(deadline=None)
def test_cut_at_any_byte_goes_on_exactly(tmp_path_factory, cut):
    workspace = make_workspace(tmp_path_factory.mktemp("cut") / "run", count=3)
    rank.run(workspace, SIMULATED)
    whole, path = rankings(workspace), workspace.stage_dir("rank") / "rankings.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - cut)])
    rank.run(workspace, SIMULATED)
    assert without_time(rankings(workspace)) == without_time(whole)


def test_half_written_line_is_noticed(workspace, capsys):
    with pytest.raises(StageCut):
        rank.run(workspace, RankConfig(), answers_from("A>B>C>D"))
    path = workspace.stage_dir("rank") / "rankings.jsonl"
    path.write_bytes(
        path.read_bytes() + '{"messages": [{"role": "user", "content": "说'.encode()[:-1]
    )
    with pytest.raises(StageCut):
        rank.run(workspace, RankConfig(), answers_from("A>B>C>D"))
    assert "cut in the middle" in capsys.readouterr().err
    assert len(rankings(workspace)) == 2


def test_other_samples_are_refused(workspace):
    rank.run(workspace, SIMULATED)
    path = workspace.stage_dir("sample") / "samples.jsonl"
    path.write_text(path.read_text().replace("prompt 3", "prompt three"))
    with pytest.raises(InputError, match="other samples"):
        rank.run(workspace, SIMULATED)


def test_all_skipped_is_an_error_with_its_mend(workspace):
    with pytest.raises(InputError, match=r"skipped\.jsonl"):
        rank.run(workspace, RankConfig(max_prompts=2), answers_from("s", "s"))


def test_without_a_terminal_says_how_to_rank(workspace, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("A>B>C>D\n"))
    with pytest.raises(InputError, match="file:"):
        rank.run(workspace, RankConfig())


def test_control_characters_of_a_response_do_not_reach_the_terminal(workspace, capsys):
    path = workspace.stage_dir("sample") / "samples.jsonl"
    path.write_text(path.read_text().replace("table", "\\u001b[2Jtable"))
    rank.run(workspace, RankConfig(), answers_from(*["A>B>C>D"] * 6))
    assert "\x1b[2J" not in capsys.readouterr().err


PERSON = """
import sys
import jax
from etils import epath
from jaxllm.stages import rank
from jaxllm.workspace import Workspace, StageCut
mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
try:
    print("RESULT", rank.run(Workspace(epath.Path(sys.argv[1]), mesh, 7, {}), rank.RankConfig())["prompts"])
except StageCut as cut:
    sys.exit(3)
"""


def test_on_a_real_terminal_and_killed(tmp_path):
    """Driven through a pty, SIGKILLed after the second answer: both are kept, and it goes on with the third."""
    workspace = make_workspace(tmp_path / "run", count=3)
    path = workspace.stage_dir("rank") / "rankings.jsonl"

    def start():
        leader, follower = os.openpty()
        command = [sys.executable, "-c", PERSON, str(workspace.run_dir)]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUTF8": "1"}
        process = subprocess.Popen(
            command, stdin=follower, stdout=follower, stderr=follower, close_fds=True, env=env
        )
        os.close(follower)
        return process, leader

    seen = b""

    def wait_for(leader, text):
        nonlocal seen
        until = time.monotonic() + 60
        while (
            text not in seen
            and select.select([leader], [], [], max(0.0, until - time.monotonic()))[0]
        ):
            seen += os.read(leader, 4096)
        assert text in seen, seen.decode(errors="replace")
        seen = seen.split(text, 1)[1]

    process, leader = start()
    for i in range(2):
        wait_for(leader, b"order>")
        os.write(leader, "b＞a=c>d\n".encode())
        wait_for(leader, f"Prompt {i + 2} of 3".encode())
    process.kill()
    process.wait()
    os.close(leader)
    seen = b""
    assert path.read_bytes().count(b"\n") == 2
    process, leader = start()
    wait_for(leader, b"Prompt 3 of 3")
    wait_for(leader, b"order>")
    os.write(leader, b"a>b>c>d\n")
    wait_for(leader, b"RESULT 3")
    assert process.wait(30) == 0
    os.close(leader)
    assert len(rankings(workspace)) == 3


# simulated


def test_simulated_ranks_by_score_and_says_so(workspace, capsys):
    result = rank.run(workspace, SIMULATED)
    out = capsys.readouterr().err
    from jaxllm.demo.annotators import keyword_sentiment

    for line in rankings(workspace):
        assert line["simulated"] is True
        assert line["annotator"] == SIMULATED.annotator
        scores = [keyword_sentiment("", r) for r in line["responses"]]
        for a, x in zip(line["ranks"], scores, strict=True):
            for b, y in zip(line["ranks"], scores, strict=True):
                assert (a < b) == (x > y)
    assert result["simulated"] is True
    for line in out.splitlines():
        if "tied" in line or "ranked" in line or "to rank" in line:
            assert "SIMULATED" in line


def test_noise_is_seeded_by_prompt_and_changes_ranks(tmp_path):
    runs = {}
    for name, noise in (("plain", 0.0), ("once", 1.0), ("again", 1.0)):
        workspace = make_workspace(tmp_path / name)
        rank.run(workspace, dataclasses.replace(SIMULATED, noise=noise))
        runs[name] = [line["ranks"] for line in rankings(workspace)]
    assert runs["once"] == runs["again"] != runs["plain"]
    assert len({tuple(r) for r in runs["once"]}) > 1


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.floats(0, 1))
def test_scores_within_the_margin_of_the_best_of_their_group_tie(scores, margin):
    ranks = rank._rank_scores(np.array(scores), margin)
    assert sorted(set(ranks)) == list(range(1, max(ranks) + 1))
    for a, x in zip(ranks, scores, strict=True):
        for b, y in zip(ranks, scores, strict=True):
            if x - y > margin:
                assert a < b
            if x >= y:
                assert a <= b


@pytest.mark.parametrize(
    "spec",
    [
        "no_such_module_here:score",
        "jaxllm.demo.annotators:nothing",
        "jaxllm.demo.annotators:score_all.x",
    ],
)
def test_missing_annotator_is_refused(workspace, spec):
    with pytest.raises((InputError, ValueError), match="annotator"):
        rank.run(workspace, RankConfig(annotator=spec))


def test_score_that_is_not_finite_is_refused(workspace, tmp_path, monkeypatch):
    (tmp_path / "odd_annotator.py").write_text(
        "def score(prompt, response):\n    return float('nan')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="finite"):
        rank.run(workspace, RankConfig(annotator="odd_annotator:score"))
    assert rankings(workspace) == []


@pytest.mark.parametrize(
    "bad",
    [
        {"annotator": "nobody"},
        {"annotator": "file:"},
        {"noise": -1.0},
        {"tie_margin": -0.1},
        {"held_out": 1.0},
    ],
)
def test_config_names_the_bad_field(bad):
    with pytest.raises(InputError, match=f"^config: {next(iter(bad))}: "):
        build(RankConfig, bad)


# a file

LINE = {
    "prompt": "问题",
    "responses": ["a", "b", "c"],
    "order": "B>A=C",
    "annotator": "Wang",
    "simulated": False,
}


def write(path, *lines):
    path.write_text(
        "".join(
            (x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)) + "\n" for x in lines
        ),
        encoding="utf-8",
    )
    return RankConfig(annotator=f"file:{path}")


def test_file_is_taken_over_whole(workspace, tmp_path):
    full = {
        "messages": [{"role": "user", "content": "q"}],
        "responses": ["x", "y"],
        "ranks": [2, 1],
        "annotator": "Wang",
    }
    full |= {"simulated": False, "time": "2026-01-31T12:00:00Z", "split": "held_out"}
    result = rank.run(workspace, write(tmp_path / "in.jsonl", LINE, full))
    first, second = rankings(workspace)
    assert first["ranks"] == [2, 1, 2]
    assert first["messages"] == [{"role": "user", "content": "问题"}]
    assert second == full
    assert result["prompts"] == 2
    assert result["responses_per_prompt"] == 2.5


def test_what_one_run_ranked_another_takes_over(tmp_path):
    source, target = make_workspace(tmp_path / "a"), make_workspace(tmp_path / "b")
    result = rank.run(source, SIMULATED)
    path = source.stage_dir("rank") / "rankings.jsonl"
    assert rank.run(target, RankConfig(annotator=f"file:{path}")) == result
    assert rankings(target) == rankings(source)


def test_prompts_without_a_split_are_held_out_by_their_content(workspace, tmp_path):
    lines = [{**LINE, "prompt": f"question {i}"} for i in range(300)]
    result = rank.run(workspace, write(tmp_path / "in.jsonl", *lines, *lines))
    assert 20 < result["held_out_prompts"] < 100
    splits = [line["split"] for line in rankings(workspace)]
    assert splits[:300] == splits[300:]


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
        ({k: v for k, v in LINE.items() if k != "order"}, "ranks"),
        ({k: v for k, v in LINE.items() if k != "annotator"}, "annotator"),
        ({k: v for k, v in LINE.items() if k != "simulated"}, "simulated"),
        ({**LINE, "time": "yesterday"}, "time"),
        ({**LINE, "split": "test"}, "split"),
    ],
)
def test_malformed_line_is_refused_by_number_and_nothing_is_written(
    workspace, tmp_path, line, word
):
    config = write(tmp_path / "in.jsonl", LINE, line)
    with pytest.raises(InputError, match=word) as caught:
        rank.run(workspace, config)
    assert f"{tmp_path / 'in.jsonl'}:2: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (workspace.stage_dir("rank") / "rankings.jsonl").exists()


def test_missing_empty_and_binary_files_are_refused(workspace, tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        rank.run(workspace, RankConfig(annotator=f"file:{tmp_path}/none.jsonl"))
    with pytest.raises(InputError, match="no rankings"):
        rank.run(workspace, write(tmp_path / "empty.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        rank.run(workspace, RankConfig(annotator=f"file:{tmp_path}/b.jsonl"))


# null, formats and tools

TOOL_CHAT = [
    {"role": "user", "content": "how warm?"},
    {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "warm", "arguments": {"place": None}}}],
    },
    {"role": "tool", "content": "21"},
]


def test_null_is_absent(workspace, tmp_path):
    nulls = {"messages": None, "ranks": None, "time": None, "split": None}
    result = rank.run(
        workspace, write(tmp_path / "in.jsonl", {**LINE, **nulls}, {**LINE, "finished": None})
    )
    first, second = rankings(workspace)
    assert {**first, "time": 0} == {**second, "time": 0}
    assert first["messages"] == [{"role": "user", "content": "问题"}] and result["prompts"] == 2


def test_rankings_are_read_from_other_formats_with_a_byte_order_mark_too(workspace, tmp_path):
    import pyarrow
    import pyarrow.parquet

    lines = [
        {**LINE, "messages": None},
        {**LINE, "prompt": None, "messages": [{"role": "user", "content": "q"}]},
    ]
    text = "\ufeff" + "".join(json.dumps(line) + "\n" for line in lines)
    wanted = None
    for name in ("a.jsonl", "a.txt", "a.rankings", "a.json", "a.parquet"):
        if name == "a.parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / name)
        else:
            (tmp_path / name).write_text(text, encoding="utf-8")
        rank.run(workspace, RankConfig(annotator=f"file:{tmp_path / name}"))
        found = without_time(rankings(workspace))
        wanted = wanted or found
        assert found == wanted and found[1]["messages"] == [{"role": "user", "content": "q"}]


def test_conversations_with_tools_are_shown_and_ranked(tmp_path, capsys):
    workspace = make_workspace(tmp_path / "run", count=1)
    path = workspace.stage_dir("sample") / "samples.jsonl"
    path.write_text(json.dumps({**samples(workspace)[0], "messages": TOOL_CHAT}) + "\n")
    rank.run(workspace, RankConfig(), answers_from("A>B>C>D"))
    assert '"name": "warm"' in capsys.readouterr().err
    assert rankings(workspace)[0]["messages"] == TOOL_CHAT
    again = make_workspace(tmp_path / "again", count=1)
    rank.run(again, write(tmp_path / "in.jsonl", {**LINE, "messages": TOOL_CHAT}))
    assert rankings(again)[0]["messages"] == TOOL_CHAT
    third = make_workspace(tmp_path / "third", count=1)
    path = third.stage_dir("sample") / "samples.jsonl"
    silent = [*TOOL_CHAT[:1], TOOL_CHAT[1]]
    path.write_text(json.dumps({**samples(third)[0], "messages": silent}) + "\n")
    assert rank.run(third, SIMULATED)["prompts"] == 1


def test_a_prompt_is_on_the_side_it_has_in_the_data_of_every_stage(workspace, tmp_path):
    lines = [{**LINE, "prompt": f"question {i}"} for i in range(200)]
    rank.run(workspace, dataclasses.replace(write(tmp_path / "in.jsonl", *lines), held_out=0.3))
    data = DataConfig(held_out_fraction=0.3)
    for i, line in enumerate(rankings(workspace)):
        assert (line["split"] == "held_out") == is_held_out(f"question {i}", data.held_out_fraction)


@pytest.mark.parametrize(("name", "line"), [("sample", {"split": "test"}), ("rank", {"number": 3})])
def test_a_damaged_file_of_the_run_is_one_line_and_nothing_is_written(workspace, name, line):
    if name == "sample":
        path = workspace.stage_dir("sample") / "samples.jsonl"
        path.write_text(json.dumps({**samples(workspace)[0], **line}) + "\n")
    else:
        workspace.stage_dir("rank").mkdir()
        path = workspace.stage_dir("rank") / "skipped.jsonl"
        path.write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=f"{path}:1: (split|index): must be"):
        rank.run(workspace, SIMULATED)
    rankings_file = workspace.stage_dir("rank") / "rankings.jsonl"
    assert not rankings_file.exists() or not rankings_file.read_bytes()


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
NAMES = (
    "prompt",
    "messages",
    "responses",
    "order",
    "ranks",
    "annotator",
    "simulated",
    "time",
    "split",
    "other",
)


@given(changes=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
def test_any_value_in_any_field_of_a_ranking_is_taken_over_or_one_line(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("any")
    config, written = write(folder / "in.jsonl", LINE | changes), folder / "rankings.jsonl"
    try:
        rank._import_file(folder / "in.jsonl", epath.Path(folder), config)
    except InputError as error:
        assert (
            str(error).startswith(f"{folder}/in.jsonl:1: ")
            and "\n" not in str(error)
            and not written.exists()
        )
    else:
        (line,) = read_rankings(written)
        assert all(isinstance(response, str) for response in line["responses"])
