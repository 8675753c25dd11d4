"""The whole program: one life from text to PPO, run twice, killed in every stage; then its models are used."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess

import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxllm.__main__ import main
from jaxllm.life import Config
from tests.conftest import ROOT, jaxllm

LIFE = Config().stages


def test_every_stage_writes_its_result_and_prints_the_next_command(tiny_run):
    log = (tiny_run / "log.txt").read_text()
    for stage, following in itertools.pairwise(LIFE):
        for name in ("result.json", "config.json"):
            assert (tiny_run / stage / name).exists()
        assert f"next: jaxllm {following} configs/tiny.yaml" in " ".join(log.split())
    for name in ("report.html", "report.md", "report.json"):
        assert (tiny_run / name).stat().st_size > 500
    assert "SIMULATED" in log


def test_the_numbers_of_the_tiny_life_are_those_of_a_trained_model(tiny_run):
    result = json.loads((tiny_run / "evaluate" / "result.json").read_text())
    stages = result["stages"]
    assert stages["pretrain"]["bits_per_byte"] < result["xz_bits_per_byte"]
    assert stages["sft"]["accuracy"] > 0.9 > stages["sft"]["majority"]
    assert json.loads((tiny_run / "reward" / "result.json").read_text())["accuracy"] > 0.75
    assert result["annotator_gain"] > 0.1
    assert stages["ppo"]["kl_to_sft"] < 15


def test_a_second_run_does_nothing_and_says_so(tiny_run):
    before = {
        p: p.stat().st_mtime_ns
        for p in tiny_run.rglob("*")
        if p.name not in ("config.json", "provenance.json")
    }
    process = jaxllm("run", "configs/tiny.yaml", "--run-dir", str(tiny_run))
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0 and "Nothing to do" in log, log
    assert log.count("finished already") == len(LIFE)
    after = {p: p.stat().st_mtime_ns for p in before}
    assert {p for p in before if p.is_file() and before[p] != after[p]} == set()


# A line that each stage prints halfway; the process is killed when it appears.
MIDDLE = {
    "tokenizer": "tokenizer: ",
    "pretrain": "pretrain 90/160",
    "sft": "sft 50/120",
    "sample": "sample 32/64",
    "rank": "rank: SIMULATED",
    "reward": "reward 15/",
    "ppo": "ppo 6/12",
    "evaluate": "evaluate: sft",
}


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(["pretrain", "rank", "ppo"], marks=pytest.mark.life),
        pytest.param(LIFE, marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_killed_in_some_or_every_stage_it_ends_with_the_same_bits(tiny_run, tmp_path, stages):
    directory = tmp_path / "run"
    log = ""
    for stage in stages:
        process = jaxllm(
            "run", "configs/tiny.yaml", "--run-dir", str(directory), stdout=subprocess.DEVNULL
        )
        assert process.stderr is not None
        for line in process.stderr:
            log += line
            if MIDDLE[stage] in line:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait(timeout=60)
        process.stderr.close()
        assert process.returncode == -signal.SIGKILL, log
        assert not (directory / stage / "result.json").exists(), (
            f"{stage} had finished when it was killed"
        )
    process = jaxllm("run", "configs/tiny.yaml", "--run-dir", str(directory))
    _, rest = process.communicate(timeout=200)
    assert process.returncode == 0, rest
    for stage in ("pretrain", "sft", "reward", "ppo"):
        same_checkpoint(tiny_run / stage, directory / stage)
    for name in ("sample/samples.jsonl", "rank/rankings.jsonl"):
        expected = [outcome(line) for line in json_lines(tiny_run / name)]
        assert [outcome(line) for line in json_lines(directory / name)] == expected
    for stage in ("pretrain", "ppo"):
        name = f"{stage}/metrics.jsonl"
        expected = [metrics(line) for line in json_lines(tiny_run / name)]
        assert [metrics(line) for line in json_lines(directory / name)] == expected


def test_killed_in_pretraining_it_resumes_and_ends_with_the_same_bits(tiny_run, tmp_path):
    directory = tmp_path / "run"
    for name in ("tokenizer", "cache"):
        shutil.copytree(tiny_run / name, directory / name)
    command = ("pretrain", "configs/tiny.yaml", "--run-dir", str(directory))
    process = jaxllm(*command, stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    for line in process.stderr:
        if MIDDLE["pretrain"] in line:
            os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (directory / "pretrain" / "result.json").exists()
    process = jaxllm(*command)
    _, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    same_checkpoint(tiny_run / "pretrain", directory / "pretrain")
    series = [json_lines(d / "pretrain" / "metrics.jsonl") for d in (tiny_run, directory)]
    assert [metrics(line) for line in series[0]] == [metrics(line) for line in series[1]]


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.life
def test_killed_between_the_last_step_and_the_result_it_only_writes_the_result(tiny_run, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(tiny_run, directory)
    for stage in ("pretrain", "sft", "reward", "ppo"):
        (directory / stage / "result.json").unlink()
    process = jaxllm("run", "configs/tiny.yaml", "--run-dir", str(directory))
    _, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    for stage in ("pretrain", "sft", "reward", "ppo"):
        same_checkpoint(tiny_run / stage, directory / stage)
        written = json.loads((directory / stage / "result.json").read_text())
        expected = json.loads((tiny_run / stage / "result.json").read_text())
        assert outcome(written) == outcome(expected)


# What differs between two runs with the same outcome.
OWN = {"time", "source", "wall_seconds", "peak_memory_bytes"}


def outcome(record):
    return {name: value for name, value in record.items() if name not in OWN}


def metrics(line):
    return {
        name: value for name, value in outcome(line).items() if not name.startswith("throughput")
    }


def same_checkpoint(directory, other):
    """The newest checkpoints of two stage directories hold the same bits, optimizer state included."""
    step, leaves = newest_checkpoint(directory)
    other_step, other_leaves = newest_checkpoint(other)
    assert step == other_step
    assert leaves.keys() == other_leaves.keys()
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, other_leaves[name], err_msg=f"{directory.name}: {name}")


def newest_checkpoint(directory):
    """(step, {name: NumPy array}) of a stage directory, read by Orbax alone."""
    import jax

    entries = (directory / "checkpoints").iterdir()
    step = max(int(entry.name) for entry in entries if entry.name.isdigit())
    path = (directory / "checkpoints" / str(step)).resolve()
    handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        handler.metadata(path).item_metadata.tree,
    )
    tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return step, {jax.tree_util.keystr(key): leaf for key, leaf in leaves}


def generate(*args):
    process = jaxllm("generate", *map(str, args))
    out, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    return out


def test_generate_prints_only_text_and_repeats_itself(tiny_run):
    greedy = ["--chat", "--temperature", 0, "--max-new-tokens", 12]
    answer = generate(tiny_run / "sft", "--prompt", "The soup tastes great. I love it.", *greedy)
    assert answer.strip() == "good 好"
    sampled = ["--prompt", "The", "--num-samples", 3, "--max-new-tokens", 8, "--seed", 7]
    first = generate(tiny_run / "pretrain", *sampled)
    assert first == generate(tiny_run / "pretrain", *sampled)
    assert len(first.splitlines()) >= 3


@pytest.mark.slow
def test_the_best_of_n_is_the_one_the_reward_model_scores_highest(tiny_run):
    options = ["--chat", "--max-new-tokens", 8, "--temperature", 1.5]
    asked = ["--prompt", "The soup tastes great.", *options]
    sampled = generate(tiny_run / "sft", *asked, "--num-samples", 6).splitlines()
    best_of = ["--best-of", 6, "--reward-from", tiny_run / "reward"]
    (best,) = generate(tiny_run / "sft", *asked, *best_of).splitlines()
    assert best in sampled
    assert len(set(sampled)) > 1
    process = jaxllm("generate", str(tiny_run / "sft"), "--prompt", "x", "--best-of", "4")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 2 and "--reward-from" in log


@pytest.mark.slow
def test_the_rest_of_the_family_runs_from_the_command_line(tiny_run, tmp_path):
    """DPO as adapters, RLOO as adapters on top of it, PPO with adapters on both models: all are models afterwards."""
    directory = tmp_path / "run"
    shutil.copytree(tiny_run, directory, ignore=shutil.ignore_patterns("ppo", "evaluate", "reward"))
    overrides = shlex.split("""
        --dpo.lora.rank 4 --dpo.num-steps 6 --dpo.loss plackett_luce
        --reward.lora.rank 4 --reward.normalise unit
        --rloo.num-steps 2 --rloo.lora.rank 2 --rloo.sampler trainer
        --ppo.num-steps 2 --ppo.lora.rank 4 --ppo.ptx.coef 0.5 --ppo.ema-decay 0.5
        --evaluate.num-prompts 8 --evaluate.max-accuracy-examples 16
    """)
    overrides += ["--run-dir", str(directory), "--rloo.init-from", str(directory / "dpo")]
    stages = ["--stages", "reward", "rloo", "ppo", "evaluate"]
    for command in (["dpo", "configs/tiny.yaml"], ["run", "configs/tiny.yaml", *stages]):
        process = jaxllm(*command, *overrides)
        _, log = process.communicate(timeout=300)
        assert process.returncode == 0, log
    result = json.loads((directory / "evaluate" / "result.json").read_text())
    assert list(result["stages"]) == ["pretrain", "sft", "dpo", "rloo", "ppo"]
    assert json.loads((directory / "dpo" / "result.json").read_text())["accuracy"] > 0.5
    assert generate(
        directory / "rloo", "--prompt", "The soup", "--chat", "--max-new-tokens", 4
    ).strip()
    # Adapters and all, the trainer's own program draws what the trainer learns from.
    assert json.loads((directory / "rloo" / "result.json").read_text())["sampler_drift"] == 0.0
    assert "RLOO" in (directory / "report.md").read_text()
    rollouts = json_lines(directory / "ppo" / "rollouts.jsonl")
    assert {line["step"] for line in rollouts} == {1, 2}
    assert all(line["prompt"] for line in rollouts)


def test_chat_streams_and_keeps_the_conversation(tiny_run):
    greedy = ["--temperature", "0", "--max-new-tokens", "16"]
    process = jaxllm("chat", str(tiny_run / "ppo"), *greedy, stdin=subprocess.PIPE)
    turns = [
        "The soup is bad. I hate it.",
        "",
        "/reset",
        "这家酒店很好，下次还会来。",
        "The room is dirty and broken. I want a refund.",
        "/quit",
    ]
    out, log = process.communicate("".join(f"{turn}\n" for turn in turns), timeout=120)
    assert process.returncode == 0, log
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[:2] == ["bad 差", "good 好"]
    assert log.count("forgotten") == 1  # the third message does not fit along with the second turn


def test_every_config_loads_round_trips_and_has_a_model():
    from jaxllm.config import build, load, to_tree
    from jaxllm.life import Config
    from jaxllm.models import transformer
    from jaxllm.stages.language_model import resolve_model

    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert files
    for file in files:
        config = load(Config, file)
        assert build(Config, to_tree(config)) == config
        model = resolve_model(config.model, config.tokenizer.vocab_size)
        assert transformer.num_params(model) > 0


@pytest.mark.parametrize("command", ["run", "generate", "chat", "ppo"])
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    text = "\n".join(line.strip("│| ") for line in out.splitlines())
    options = re.split(r"^(?=--\w)", text, flags=re.MULTILINE)[1:]
    assert len(options) >= 6
    # A sentence comes before the default; an option without help has the default alone.
    for option in options:
        assert re.search(r"\w.?\.\s+\((default|required)", option), f"not explained: {option}"
