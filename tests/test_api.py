"""The library: a notebook gets the same results as the commands, and importing the package costs nothing."""

import json
import subprocess
import sys

import numpy as np
import pytest

import jaxllm
from jaxllm import __main__ as cli
from jaxllm.config import InputError
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def model(tiny_run):
    return jaxllm.load(tiny_run / "sft")


def test_importing_the_package_imports_no_jax():
    script = "import sys, jaxllm; print('jax' in sys.modules, jaxllm.__version__, sorted(jaxllm.__all__)[1])"
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert shown.stdout == f"False {jaxllm.__version__} __version__\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jaxllm.nothing


def test_it_completes_and_answers_like_the_command(model, tiny_run, capsys):
    asked = [
        "generate",
        str(tiny_run / "sft"),
        "--prompt",
        "The soup",
        "--temperature",
        "0",
        "--max-new-tokens",
        "12",
    ]
    cli.main(asked)
    assert (
        capsys.readouterr().out
        == model.generate("The soup", temperature=0.0, max_new_tokens=12)[0] + "\n"
    )
    cli.main([*asked, "--chat"])
    messages = [{"role": "user", "content": "The soup"}]
    assert (
        capsys.readouterr().out == model.chat(messages, temperature=0.0, max_new_tokens=12) + "\n"
    )
    several = model.generate("The soup", num_samples=3, max_new_tokens=4)
    assert (
        several == model.generate("The soup", num_samples=3, max_new_tokens=4) and len(several) == 3
    )
    with pytest.raises(InputError, match="sampling: temperature: must be at least 0"):
        model.generate("The soup", temperature=-1.0)


def test_log_probabilities_add_up_to_the_scores(model):
    tokens, logprobs = model.logprobs("The soup is good")
    assert (
        b"".join(tokens) == b"The soup is good"
        and logprobs.shape == (len(tokens),)
        and (logprobs < 0).all()
    )
    (total,) = model.score("", ["The soup is good"])
    np.testing.assert_allclose(logprobs.sum(), total, rtol=1e-4)
    (good,) = model.score("The soup is", [" good"])
    before, _ = model.logprobs("The soup is")
    assert tokens[: len(before)] == before
    np.testing.assert_allclose(logprobs[len(before) :].sum(), good, rtol=1e-4)
    with pytest.raises(InputError, match="text: takes 0 tokens"):
        model.logprobs("")


def test_configs_are_read_by_name_and_stages_run(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = jaxllm.read_config("tiny", {"seed": 3})
    assert (config.seed, config.name) == (3, "tiny")
    jaxllm.run_stages("tiny", ["tokenizer"], {"run_dir": str(tmp_path / "run")})
    made = json.loads((tmp_path / "run" / "tokenizer" / "result.json").read_text())
    assert (
        made["vocab_size"]
        == json.loads((tiny_run / "tokenizer" / "result.json").read_text())["vocab_size"]
    )
    assert jaxllm.read_metrics(tiny_run / "sft" / "metrics.jsonl")[-1]["eval/bits_per_byte"] > 0


def test_an_unknown_stage_is_refused_before_anything_runs(tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(InputError, match="stages: 'pretrian' is unknown; known: tokenizer, "):
        jaxllm.run_stages("tiny", ["tokenizer", "pretrian"], {"run_dir": str(run_dir)})
    with pytest.raises(InputError, match="stages: is empty; name at least one"):
        jaxllm.run_stages("tiny", overrides={"run_dir": str(run_dir), "stages": []})
    assert not run_dir.exists()


def test_shipped_configs_are_listed_and_shown(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cli.main(["configs"])
    shown = capsys.readouterr().out
    for file in (ROOT / "configs").glob("*.yaml"):
        assert f"{file.stem}\n" in shown
    cli.main(["config", "tiny"])
    assert "max_length: 64" in capsys.readouterr().out
    cli.main(["config", "tiny", "--sft.num-steps", "7", "--diff", "tiny"])
    assert capsys.readouterr().out == "sft.num_steps: 120 -> 7\n"
    with pytest.raises(SystemExit):
        cli.main(["run", "tinny"])
    assert "no shipped config; shipped: addition, " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sft", "ppo", "run"])
def test_a_stages_help_explains_what_it_reads(capsys, command):
    lengths = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, flag])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        lengths.append(shown.count("\n"))
        assert "--model.num-layers" in shown and "--run-dir" in shown
        assert ("--evaluate.num-prompts" in shown) == (flag == "--help-all")
        assert f"--{command}.num-steps" in shown or command == "run"
    assert 2 * lengths[0] < lengths[1]


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_runs_the_shipped_life(tmp_path):
    run = lambda *command, **more: subprocess.run(
        command, check=True, capture_output=True, timeout=600, **more
    )
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "wheels", ROOT)
    (wheel,) = (tmp_path / "wheels").iterdir()
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        tmp_path / "installed",
        wheel,
    )
    (tmp_path / "empty").mkdir()
    environment = {
        "PYTHONPATH": str(tmp_path / "installed"),
        "JAX_PLATFORMS": "cpu",
        "PATH": "/usr/bin:/bin",
    }
    run(sys.executable, "-m", "jaxllm", "run", "tiny", cwd=tmp_path / "empty", env=environment)
    assert (tmp_path / "empty" / "runs" / "tiny" / "report.html").exists()
