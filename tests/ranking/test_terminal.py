"""A person in the terminal: nothing is lost, nothing leaks, and an interrupted session resumes."""

import io
import json
import os
import select
import subprocess
import sys
import time

import pytest

from jaxllm.config import InputError
from jaxllm.ranking.orders import shown_order
from jaxllm.stages.config import RankConfig
from jaxllm.workspace import StageCut
from tests.conftest import ROOT
from tests.ranking.workspaces import (
    answers_from,
    make_workspace,
    rankings,
    run_rank,
    samples,
)


@pytest.fixture
def workspace(tmp_path):
    return make_workspace(tmp_path / "run")


def test_person_ranks_what_was_shown_and_sees_no_source(workspace, capsys):
    result = run_rank(workspace, RankConfig(), answers_from(*["A>B>C=D"] * 6))
    shown = capsys.readouterr().err
    assert "SECRET-SOURCE" not in shown
    assert "SIMULATED" not in shown
    assert "[b]x[/b]" in shown  # a response is text, never markup
    orders = set()
    pairs = zip(rankings(workspace), samples(workspace), strict=True)
    for index, (ranking, sample) in enumerate(pairs):
        for name in ("messages", "responses", "split"):
            assert ranking[name] == sample[name]
        order = shown_order(workspace.seed, index, 4)
        orders.add(tuple(order))
        assert [ranking["ranks"][i] for i in order] == [1, 2, 3, 3]
        prompt = shown.index(f"prompt {index}")
        first = shown.index(sample["responses"][order[0]], prompt)
        second = shown.index(sample["responses"][order[1]], prompt)
        assert first < second
    assert len(orders) > 1  # each prompt is shuffled in its own way
    assert result == {
        "prompts": 6,
        "train_prompts": 5,
        "held_out_prompts": 1,
        "skipped": 0,
        "responses_per_prompt": 4.0,
        "tie_fraction": pytest.approx(1 / 6),
        "simulated": False,
        "annotator": "person",
        "annotators": 1,
    }


def test_commands_skip_undo_quit_help(workspace, capsys):
    config = RankConfig(annotator_name="Lee")
    typed = ["?", "u", "A>B>C>D", "s", "D>C>B>A", "u", "u", "nonsense", "ｓ", "A=B=C=D", "Q"]
    with pytest.raises(StageCut, match="3 of 6"):
        run_rank(workspace, config, answers_from(*typed))
    out = capsys.readouterr().err
    assert "nothing to undo" in out
    assert "NONSENSE" in out
    lines = rankings(workspace)
    assert [line["messages"][0]["content"][:8] for line in lines] == ["prompt 0", "prompt 2"]
    assert lines[1]["ranks"] == [1, 1, 1, 1]
    result = run_rank(workspace, config, answers_from("A>B>C>D", "A>B>C>D", "A>B>C>D"))
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
            run_rank(workspace, RankConfig(), ask)
        assert len(rankings(workspace)) == count


def test_every_answer_is_on_disk_before_the_next_question(workspace):
    count = 0

    def ask():
        nonlocal count
        path = workspace.stage_dir("rank") / "rankings.jsonl"
        assert path.read_bytes().count(b"\n") == count
        count += 1
        return "A>B>C>D"

    run_rank(workspace, RankConfig(), ask)
    assert count == 6


def test_half_written_line_is_noticed(workspace, capsys):
    with pytest.raises(StageCut):
        run_rank(workspace, RankConfig(), answers_from("A>B>C>D"))
    path = workspace.stage_dir("rank") / "rankings.jsonl"
    half = '{"messages": [{"role": "user", "content": "说'.encode()[:-1]
    path.write_bytes(path.read_bytes() + half)
    with pytest.raises(StageCut):
        run_rank(workspace, RankConfig(), answers_from("A>B>C>D"))
    assert "cut in the middle" in capsys.readouterr().err
    assert len(rankings(workspace)) == 2


def test_all_skipped_is_an_error_with_its_fix(workspace):
    with pytest.raises(InputError, match=r"skipped\.jsonl"):
        run_rank(workspace, RankConfig(max_prompts=2), answers_from("s", "s"))


def test_without_a_terminal_says_how_to_rank(workspace, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("A>B>C>D\n"))
    with pytest.raises(InputError, match="file:"):
        run_rank(workspace, RankConfig())


def test_control_characters_of_a_response_do_not_reach_the_terminal(workspace, capsys):
    path = workspace.stage_dir("sample") / "samples.jsonl"
    path.write_text(path.read_text().replace("table", "\\u001b[2Jtable"))
    run_rank(workspace, RankConfig(), answers_from(*["A>B>C>D"] * 6))
    assert "\x1b[2J" not in capsys.readouterr().err


def test_conversations_with_tools_are_shown_and_ranked(tmp_path, capsys):
    workspace = make_workspace(tmp_path / "run", count=1)
    call = {"function": {"name": "warm", "arguments": {"place": None}}}
    messages = [
        {"role": "user", "content": "how warm?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "21"},
    ]
    path = workspace.stage_dir("sample") / "samples.jsonl"
    path.write_text(json.dumps({**samples(workspace)[0], "messages": messages}) + "\n")
    run_rank(workspace, RankConfig(), answers_from("A>B>C>D"))
    assert '"name": "warm"' in capsys.readouterr().err
    assert rankings(workspace)[0]["messages"] == messages


PERSON = """
import sys
from jaxllm.stages.rank import RankConfig
from jaxllm.workspace import StageCut
from tests.ranking.workspaces import open_workspace, run_rank
try:
    print("RESULT", run_rank(open_workspace(sys.argv[1]), RankConfig())["prompts"])
except StageCut:
    sys.exit(3)
"""


class Terminal:
    """A process that ranks in a pseudo-terminal, as a person sees and uses it."""

    def __init__(self, run_dir):
        self.descriptor, follower = os.openpty()
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", PERSON, str(run_dir)],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUTF8": "1"},
        )
        os.close(follower)

    def wait_for(self, text: str) -> None:
        """Read until the text appears, for at most a minute; what is before it is forgotten."""
        end = time.monotonic() + 60
        while text.encode() not in self.seen:
            left = max(0.0, end - time.monotonic())
            readable, _, _ = select.select([self.descriptor], [], [], left)
            assert readable, self.seen.decode(errors="replace")
            self.seen += os.read(self.descriptor, 4096)
        self.seen = self.seen.split(text.encode(), 1)[1]

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())


def test_on_a_real_terminal_and_killed(tmp_path):
    """Killed with SIGKILL after the second answer: both are kept, and the session resumes with the third."""
    workspace = make_workspace(tmp_path / "run", count=3)
    path = workspace.stage_dir("rank") / "rankings.jsonl"
    terminal = Terminal(workspace.run_dir)
    for i in range(2):
        terminal.wait_for("order>")
        terminal.type("b＞a=c>d\n")
        terminal.wait_for(f"Prompt {i + 2} of 3")
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.descriptor)
    assert path.read_bytes().count(b"\n") == 2

    terminal = Terminal(workspace.run_dir)
    terminal.wait_for("Prompt 3 of 3")
    terminal.wait_for("order>")
    terminal.type("a>b>c>d\n")
    terminal.wait_for("RESULT 3")
    assert terminal.process.wait(30) == 0
    os.close(terminal.descriptor)
    assert len(rankings(workspace)) == 3
