"""Sampling responses: an interrupted run resumes at a full batch and writes the same bytes."""

import json
import shutil

import pytest
from etils import epath

from jaxllm import __main__ as cli
from jaxllm.stages import sample
from tests.conftest import ROOT

LINES = [json.dumps({"responses": [f"{i}"]}) + "\n" for i in range(5)]


@pytest.mark.parametrize(
    ("content", "batch_size", "kept"),
    [
        ("", 2, 0),
        ("".join(LINES), 1, 5),
        ("".join(LINES), 2, 4),
        ("".join(LINES), 5, 5),
        ("".join(LINES), 6, 0),
        ("".join(LINES[:4])[:-1], 2, 2),  # the fourth line was being written
        ("".join([*LINES[:3], "{broken\n", *LINES[3:]]), 1, 3),
    ],
)
def test_lines_after_the_last_full_batch_are_dropped(tmp_path, content, batch_size, kept):
    path = epath.Path(tmp_path / "samples.jsonl")
    path.write_text(content)
    assert sample._keep_whole_batches(path, batch_size) == kept
    assert path.read_text() == "".join(LINES[:kept])


def test_without_a_file_it_begins_at_the_first_prompt(tmp_path):
    path = epath.Path(tmp_path / "samples.jsonl")
    assert sample._keep_whole_batches(path, 4) == 0
    assert path.read_text() == ""


def test_an_interrupted_run_resumes_with_the_same_bytes(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for stage in ("tokenizer", "sft"):
        shutil.copytree(tiny_run / stage, tmp_path / stage)
    flags = """
        --sample.num-prompts 16 --sample.num-held-out 8 --sample.batch-size 8
        --sample.sampling.max-new-tokens 8
    """
    command = ["sample", "configs/tiny.yaml", "--run-dir", str(tmp_path), *flags.split()]
    cli.main(command)
    result = tmp_path / "sample" / "result.json"
    path = tmp_path / "sample" / "samples.jsonl"
    complete = path.read_bytes()
    lines = complete.splitlines(keepends=True)
    assert len(lines) == 24
    assert [json.loads(line)["split"] for line in lines] == ["train"] * 16 + ["held_out"] * 8

    path.write_bytes(b"".join(lines[:12]) + lines[12][:9])
    result.unlink()
    capsys.readouterr()
    cli.main(command)
    log = capsys.readouterr().err
    assert "sample 16/24 prompts" in log
    assert "sample 8/24 prompts" not in log
    assert path.read_bytes() == complete
