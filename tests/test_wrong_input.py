"""Each mistake gives one clear line with its location and the fix, and a non-zero exit; nothing is half-written."""

import json
import re
import shutil

import pytest
from etils import epath

from jaxllm.__main__ import main
from jaxllm.run import _prepare
from jaxllm.runtime import checkpoint
from tests.conftest import ROOT

TINY = (ROOT / "configs" / "tiny.yaml").read_text()


def refused(capsys, *argv, code=2):
    """The last line on standard error of a command that must fail."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, argv)])
    assert stop.value.code == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.out == ""
    last = captured.err.rstrip("\n").split("\n")[-1]
    assert last.startswith("jaxllm: ")
    return last


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Write a config file: the tiny one with lines added or replaced."""
    monkeypatch.chdir(ROOT)

    def write(extra="", **replace):
        text = TINY
        for old, new in replace.items():
            text = re.sub(old, new, text)
        path = tmp_path / "config.yaml"
        path.write_text(text + extra)
        return path

    return write


@pytest.fixture
def run_dir(tiny_run, tmp_path):
    """A copy of a finished tiny run, to be damaged."""
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    return copy


def test_unknown_config_key(capsys, config):
    line = refused(capsys, "run", config("ppo2: {}\n"))
    assert re.search(r"config.yaml:\d+: ppo2: unknown key; did you mean ppo\?", line)


def test_wrong_type(capsys, config):
    line = refused(capsys, "pretrain", config(**{"num_steps: 160": "num_steps: many"}))
    assert re.search(r"config.yaml:\d+: pretrain.num_steps: .*integer.*'many'", line)


def test_unknown_command_option_and_missing_config(capsys, config):
    assert "did you mean pretrain?" in refused(capsys, "pretrian", config())
    assert "num-stepz" in refused(capsys, "pretrain", config(), "--pretrain.num-stepz", 3)
    assert "no such config file" in refused(capsys, "run", "nowhere.yaml")
    assert "give a config file" in refused(capsys, "run")
    line = refused(capsys, "generate", "x", "--prompt", "a", "--temperature", -1)
    assert line == "jaxllm: --temperature: must be at least 0, not -1.0"
    assert "is not the directory of a trained stage" in refused(
        capsys, "generate", "x", "--prompt", "a"
    )


def with_source(tmp_path, text, name="data.jsonl"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_missing_file(capsys, config, tmp_path):
    path = config(**{"configs/tiny/prose.txt": "nowhere/prose.txt"})
    assert "nowhere/prose.txt: no such file" in refused(
        capsys, "tokenizer", path, "--run-dir", tmp_path / "r"
    )
    assert not (tmp_path / "r" / "tokenizer" / "result.json").exists()


def test_malformed_jsonl_line(capsys, config, tmp_path):
    data = with_source(tmp_path, '{"text": "fine"}\n{"text": \n')
    path = config(**{"configs/tiny/prose.txt": str(data)})
    assert "data.jsonl:2: not valid JSON" in refused(
        capsys, "tokenizer", path, "--run-dir", tmp_path / "r"
    )


def test_empty_corpus(capsys, config, tmp_path):
    data = with_source(tmp_path, "\n\n", "empty.txt")
    path = config(**{r"configs/tiny/\w+.txt": str(data)})
    assert "not a single text example" in refused(
        capsys, "tokenizer", path, "--run-dir", tmp_path / "r"
    )


def test_vocabulary_larger_than_the_corpus_supports(capsys, config, tmp_path):
    path = config()
    line = refused(
        capsys, "tokenizer", path, "--run-dir", tmp_path / "r", "--tokenizer.vocab-size", 60000
    )
    assert re.search(
        r"tokenizer.vocab_size: 60000 is larger than the corpus supports; set it to at most \d+",
        line,
    )
    line = refused(
        capsys, "tokenizer", path, "--run-dir", tmp_path / "r", "--tokenizer.vocab-size", 300_000
    )
    assert line == "jaxllm: --tokenizer.vocab-size: must be at most 262144, not 300000"


def test_mesh_that_does_not_divide(capsys, config, tmp_path):
    assert "mesh: data 3 does not divide the 8 devices" in refused(
        capsys, "tokenizer", config(), "--mesh.data", 3
    )


def fresh(run_dir, *stages):
    for stage in stages:
        shutil.rmtree(run_dir / stage)


def test_batch_that_does_not_divide(capsys, config, run_dir):
    fresh(run_dir, "pretrain")
    line = refused(capsys, "pretrain", config(), "--run-dir", run_dir, "--pretrain.batch-size", 12)
    assert "pretrain.batch_size" in line and "12 does not divide over the 8 shards" in line


def test_parameters_that_do_not_divide(capsys, config, run_dir):
    fresh(run_dir, "pretrain")
    line = refused(capsys, "pretrain", config(), "--run-dir", run_dir, "--mesh.tensor", 8)
    assert re.search(r"model\.num_(kv_)?heads: \d does not divide over 8 shards", line)


def test_prompt_longer_than_the_context(capsys, run_dir):
    line = refused(
        capsys, "generate", run_dir / "sft", "--prompt", "long " * 80, "--max-new-tokens", 16
    )
    assert re.search(r"prompt: \d+ tokens and max_new_tokens 16 do not fit the context of 64", line)


def test_prompt_longer_than_the_limit_of_ppo(capsys, config, run_dir):
    fresh(run_dir, "ppo")
    line = refused(capsys, "ppo", config(), "--run-dir", run_dir, "--ppo.max-prompt-length", 8)
    assert re.search(r"txt:\d+: the prompt takes \d+ tokens and 8 fit next to the response", line)


def test_response_longer_than_the_limit(capsys, config, run_dir):
    fresh(run_dir, "reward")
    line = refused(capsys, "reward", config(), "--run-dir", run_dir, "--reward.length", 12)
    assert re.search(
        r"rankings.jsonl:\d+: prompt and response take \d+ tokens and the limit is 12", line
    )
    fresh(run_dir, "sft")
    line = refused(capsys, "sft", config(), "--run-dir", run_dir, "--sft.length", 12)
    assert re.search(r"txt:\d+: this conversation takes \d+ tokens and a row holds 12", line)


def test_all_masked_example(capsys, config, run_dir, tmp_path):
    fresh(run_dir, "sft")
    lines = [{"prompt": f"q{i}", "response": ""} for i in range(30)]
    data = with_source(tmp_path, "\n".join(map(json.dumps, lines)))
    source = f"sources: [{{path: {data}}}]\n  num_steps: 120"
    text = re.sub(r"sources:\n    - &positive.*?  num_steps: 120", source, TINY, flags=re.S).split(
        "sample:"
    )[0]
    path = tmp_path / "masked.yaml"
    path.write_text(text)
    assert "data.jsonl:1: the last reply is empty" in refused(
        capsys, "sft", path, "--run-dir", run_dir
    )


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo", "ppo"])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_rows_beyond_the_context_are_refused_in_every_stage(
    capsys, config, run_dir, stage, position
):
    shutil.rmtree(run_dir / stage, ignore_errors=True)
    field = "ppo.ptx.length" if stage == "ppo" else f"{stage}.length"
    flags = [f"--{field}", 65, "--model.position", position]
    line = refused(capsys, stage, config(), "--run-dir", run_dir, *flags)
    assert line.startswith(f"jaxllm: {field}: 65 tokens exceed model.max_length 64")


def test_a_planned_row_beyond_the_context_is_refused(capsys, config):
    path = config()
    path.write_text("model: {preset: tiny-1m, vocab_size: 512}\nreward: {length: 257}\n")
    line = refused(capsys, "plan", path, "--topology", "v5p:2x2x1", "--stage", "reward")
    assert line.startswith("jaxllm: reward.length: 257 tokens exceed model.max_length 256")


def test_checkpoint_from_another_model(capsys, config, run_dir):
    fresh(run_dir, "sft")
    line = refused(capsys, "sft", config(), "--run-dir", run_dir, "--model.embed-dim", 64)
    assert (
        "the checkpoint is of another model" in line
        and "[640, 96] here" in line
        and "[640, 64] wanted" in line
    )
    line = refused(capsys, "generate", run_dir / "reward", "--prompt", "x")
    assert "holds a reward model where a policy model is needed" in line


def test_half_written_checkpoint(capsys, run_dir):
    steps = run_dir / "sft" / "checkpoints"
    newest = max(steps.iterdir(), key=lambda p: int(p.name) if p.name.isdigit() else -1)
    for file in newest.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    line = refused(capsys, "generate", run_dir / "sft", "--prompt", "x")
    assert (
        f"checkpoints/{newest.name}: this checkpoint is damaged or half-written" in line
        and "`jaxllm run` makes it again" in line
    )


def test_a_save_that_was_killed_is_ignored(run_dir, capsys):
    """Orbax's unfinished step directory is not a checkpoint: the last finished one is used."""
    steps = run_dir / "sft" / "checkpoints"
    newest = max(steps.iterdir(), key=lambda p: int(p.name) if p.name.isdigit() else -1)
    shutil.copytree(newest, steps / f"{int(newest.name) + 40}.orbax-checkpoint-tmp")
    main(["generate", str(run_dir / "sft"), "--prompt", "x", "--max-new-tokens", "2"])
    assert capsys.readouterr().err == ""


def test_an_earlier_stage_is_missing(capsys, config, tmp_path):
    line = refused(capsys, "sft", config(), "--run-dir", tmp_path / "r")
    assert "needs the tokenizer stage; run: jaxllm tokenizer" in line


def test_another_config_in_the_same_directory(capsys, config, run_dir):
    line = refused(capsys, "ppo", config(), "--run-dir", run_dir, "--ppo.kl-coef", 0.3)
    assert "was started with another config: ppo.kl_coef: 0.05 -> 0.3" in line


def test_prompt_and_response_beyond_the_context_in_ppo(capsys, config, run_dir):
    fresh(run_dir, "ppo")
    line = refused(
        capsys, "ppo", config(), "--run-dir", run_dir, "--ppo.sampling.max-new-tokens", 60
    )
    assert "ppo.max_prompt_length: 32 + max_new_tokens 60 exceed model.max_length 64" in line


@pytest.mark.parametrize("name", ["r[1]", "back\\slash", "every*", "what?", "\udcff"])
def test_a_run_directory_whose_name_is_a_pattern(capsys, config, tmp_path, name):
    line = refused(capsys, "run", config(), "--run-dir", tmp_path / name)
    assert "--run-dir" in line and not (tmp_path / name).exists()


@pytest.mark.parametrize("below", ["", "below"])
def test_a_run_directory_that_cannot_be_made(capsys, config, tmp_path, below):
    (tmp_path / "file").write_text("kept")
    line = refused(capsys, "run", config(), "--run-dir", tmp_path / "file" / below)
    assert re.search(
        r"file(/below)?: cannot be made \((File exists|Not a directory)\); choose another --run-dir",
        line,
    )
    assert (tmp_path / "file").read_text() == "kept"
    assert "cannot be made" in refused(capsys, "run", config(), "--run-dir", "/proc/jaxllm")


@pytest.mark.life
def test_a_stage_that_stays_damaged_is_made_again_once(capsys, config, run_dir, monkeypatch):
    calls = []
    broken = epath.Path(run_dir).resolve() / "sft" / "checkpoints" / "120"

    def prepare(workspace, row):
        calls.append(row.name)
        if row.name == "sample":
            raise checkpoint.Damaged(broken, "no manifest")
        return _prepare(workspace, row)

    fresh(run_dir, "sample")
    monkeypatch.setattr("jaxllm.run._prepare", prepare)
    line = refused(capsys, "sample", config(), "--run-dir", run_dir)
    assert calls == ["sample", "sft", "sample"]
    assert "is damaged again (no manifest), although sft was just made again" in line


@pytest.mark.parametrize(
    "stage",
    [
        "pretrain",
        "sft",
        "sample",
        "rank",
        "reward",
        "dpo",
        "rloo",
        "grpo",
        "ppo",
        "distill",
        "evaluate",
    ],
)
def test_a_stage_whose_input_was_never_made(capsys, config, tmp_path, stage):
    line = refused(capsys, stage, config(), "--run-dir", tmp_path / "r")
    assert re.search(
        r"needs the \w+ stage; run: jaxllm \w+|none of the stages .* has finished", line
    )


@pytest.mark.parametrize("line", ['run_dir: "a\\0b"', 'name: "a\\0b"', 'name: ""'])
def test_a_run_without_a_usable_name(capsys, tmp_path, line):
    (tmp_path / "config.yaml").write_text(line + "\n")
    shown = refused(capsys, "run", tmp_path / "config.yaml")
    assert ("must not be empty" if line.endswith('""') else "NUL character") in shown
