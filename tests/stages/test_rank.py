"""The rank stage: simulated annotators, resuming, and damaged files of the run. Orders, files and the terminal are
tested in tests/ranking."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import InputError, build
from jaxllm.demo.annotators import keyword_sentiment
from jaxllm.stages import rank
from jaxllm.stages.config import RankConfig
from tests.ranking.workspaces import (
    SIMULATED,
    answers_from,
    make_workspace,
    rankings,
    run_rank,
    samples,
    without_time,
)


@pytest.fixture
def workspace(tmp_path):
    return make_workspace(tmp_path / "run")


@given(cut=st.integers(1, 2000))
@settings(deadline=None)
def test_cut_at_any_byte_it_resumes_exactly(tmp_path_factory, cut):
    workspace = make_workspace(tmp_path_factory.mktemp("cut") / "run", count=3)
    run_rank(workspace, SIMULATED)
    expected = rankings(workspace)
    path = workspace.stage_dir("rank") / "rankings.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - cut)])
    run_rank(workspace, SIMULATED)
    assert without_time(rankings(workspace)) == without_time(expected)


def test_other_samples_are_refused(workspace):
    run_rank(workspace, SIMULATED)
    path = workspace.stage_dir("sample") / "samples.jsonl"
    path.write_text(path.read_text().replace("prompt 3", "prompt three"))
    with pytest.raises(InputError, match="other samples"):
        run_rank(workspace, SIMULATED)


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
        run_rank(workspace, SIMULATED)
    rankings_file = workspace.stage_dir("rank") / "rankings.jsonl"
    assert not rankings_file.exists() or not rankings_file.read_bytes()


def test_simulated_ranks_by_score_and_says_so(workspace, capsys):
    result = run_rank(workspace, SIMULATED)
    out = capsys.readouterr().err
    for line in rankings(workspace):
        assert line["simulated"] is True
        assert line["annotator"] == SIMULATED.annotator
        scores = [keyword_sentiment("", response) for response in line["responses"]]
        for rank_a, score_a in zip(line["ranks"], scores, strict=True):
            for rank_b, score_b in zip(line["ranks"], scores, strict=True):
                assert (rank_a < rank_b) == (score_a > score_b)
    assert result["simulated"] is True
    (line,) = [line for line in out.splitlines() if "to rank" in line]
    assert "SIMULATED" in line


def test_noise_is_seeded_by_prompt_and_changes_ranks(tmp_path):
    runs = {}
    for name, noise in (("plain", 0.0), ("once", 1.0), ("again", 1.0)):
        workspace = make_workspace(tmp_path / name)
        run_rank(workspace, dataclasses.replace(SIMULATED, noise=noise))
        runs[name] = [line["ranks"] for line in rankings(workspace)]
    assert runs["once"] == runs["again"] != runs["plain"]
    assert len({tuple(ranks) for ranks in runs["once"]}) > 1


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.floats(0, 1))
def test_scores_within_the_margin_of_the_best_of_their_group_tie(scores, margin):
    ranks = rank._rank_scores(np.array(scores), margin)
    assert sorted(set(ranks)) == list(range(1, max(ranks) + 1))
    for rank_a, score_a in zip(ranks, scores, strict=True):
        for rank_b, score_b in zip(ranks, scores, strict=True):
            if score_a - score_b > margin:
                assert rank_a < rank_b
            if score_a >= score_b:
                assert rank_a <= rank_b


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
        run_rank(workspace, RankConfig(annotator=spec))


def test_score_that_is_not_finite_is_refused(workspace, tmp_path, monkeypatch):
    source = "def score(prompt, response):\n    return float('nan')\n"
    (tmp_path / "odd_annotator.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="finite"):
        run_rank(workspace, RankConfig(annotator="odd_annotator:score"))
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


def test_people_are_compared_with_a_simulated_annotator(workspace):
    run_rank(workspace, SIMULATED)
    simulated = rankings(workspace)
    # Another run, in which a person types the simulated order of all prompts but the first, which is turned around.
    other = make_workspace(workspace.run_dir.parent / "other")
    path = other.stage_dir("rank") / "rankings.jsonl"
    path.parent.mkdir()
    lines = [{**line, "simulated": False, "annotator": "Lee"} for line in simulated]
    worst = max(lines[0]["ranks"])
    lines[0]["ranks"] = [worst + 1 - rank for rank in lines[0]["ranks"]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = RankConfig(compare_with="jaxllm.demo.annotators:keyword_sentiment")
    found = run_rank(other, config, answers_from())["agreement_with_simulated"]
    pairs = [
        sum(a != b for i, a in enumerate(line["ranks"]) for b in line["ranks"][:i])
        for line in lines
    ]
    assert found == pytest.approx(1 - pairs[0] / sum(pairs))
    # A program is not compared with itself.
    same = dataclasses.replace(SIMULATED, compare_with=config.compare_with)
    assert "agreement_with_simulated" not in run_rank(workspace, same)
