"""What users see and type: help, versions, paths with brackets, progress lines, chats, terminals without Chinese."""

import fnmatch
import io
import os
import re
import shutil
import subprocess
import sys
import types

import pytest

import jaxllm
from jaxllm import __main__ as cli
from jaxllm import chat, life, metrics, run, tools
from jaxllm.config import InputError, load
from jaxllm.engine.config import SamplingConfig
from jaxllm.runtime import hardware
from jaxllm.runtime.console import console
from jaxllm.tokenizers.trained import train
from tests.conftest import ROOT
from tests.conftest import jaxllm as start
from tests.tokenizers.test_trained import CORPUS

COMMANDS = {"run", *cli.stages.names(), *tools.TABLE}


def test_the_help_lists_every_command_and_its_arguments(capsys):
    cli.main(["--help"])
    shown = capsys.readouterr().out
    for line in (
        "import SOURCE STAGE_DIR",
        "export STAGE_DIR FOLDER",
        "plan CONFIG --topology",
        "score STAGE_DIR ... --task",
    ):
        assert f"jaxllm {line}" in shown
    assert {
        re.match(r"  jaxllm ([\w-]+) ", line)[1]
        for line in shown.split("\n")
        if line.startswith("  ")
    } == COMMANDS


def test_the_version_is_printed(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"jaxllm {jaxllm.__version__}\n"


@pytest.mark.parametrize("command", tools.TABLE)
def test_a_tools_help_names_its_arguments(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    usage = capsys.readouterr().out.split("\n")[0]
    for name in re.findall(r"STAGE_DIR|CONFIG|SOURCE|FOLDER", tools.TABLE[command].usage):
        assert name in usage


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_their_options(capsys, tmp_path):
    cli.main(["--tyro-print-completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "asked").write_text(
        f"source {tmp_path}/script\n"
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _jaxllm; echo "${COMPREPLY[*]}"\n'
    )

    def complete(*words):
        asked = ["bash", tmp_path / "asked", "jaxllm", *words]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()

    assert complete("lm") == ["lm_eval"]
    assert complete("generate", "runs/x/sft", "--top") == ["--top-p", "--top-k"]
    assert complete("sft", "tiny", "--sft.num-st") == ["--sft.num-steps"]
    assert complete("chat", "runs/") == []  # left to bash, which completes file names
    with pytest.raises(SystemExit) as stop:
        cli.main(["--tyro-print-completion", "csh"])
    assert stop.value.code == 2 and "must be bash, zsh or fish" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["runs[old]/x", "a[/b]c", ":car:", "[red]"])
def test_printed_text_is_never_markup(capsys, monkeypatch, name):
    console.print(f"data in {name}", soft_wrap=True)
    run.print_result("sft", {"init_from": name})
    shown = capsys.readouterr().err
    assert f"data in {name}" in shown and shown.count(name) == 2


def test_the_numbers_of_a_progress_line_have_distinct_names():
    values = {
        "ppo/score": 1.0,
        "ppo/kl": 2.0,
        "eval/score": 3.0,
        "eval/kl": 4.0,
        "ppo/entropy": 5.0,
    }
    line = metrics._line(values, ("ppo/score", "ppo/kl", "ppo/entropy", "eval/score", "eval/kl"))
    assert line == "score 1 · kl 2 · entropy 5 · eval/score 3 · eval/kl 4"
    names = [part.rsplit(" ", 1)[0] for part in line.split(" · ")]
    assert len({*names}) == len(names)


@pytest.fixture(scope="module")
def tokenizer():
    return train(
        iter(CORPUS), vocab_size=400, model_type="bpe", character_coverage=0.9995, num_threads=1
    )


@pytest.fixture
def converse(monkeypatch, tokenizer, capsys):
    """A conversation with a model that answers with its prompt's length; returns (stdout, stderr)."""
    model = types.SimpleNamespace(max_length=64)
    asked = []

    def stream(engine, ids, *, sampling, **settings):
        asked.append(len(ids))
        assert len(ids) + sampling.max_new_tokens <= 64
        return iter(tokenizer.encode("ok"))

    monkeypatch.setattr(chat, "load", lambda _: (None, model, tokenizer, None))
    monkeypatch.setattr(chat, "stream", stream)
    monkeypatch.setattr(chat, "stream_engine", lambda *_: None)
    monkeypatch.setattr(chat.jax, "set_mesh", lambda mesh: io.StringIO())

    def talk(typed, sampling=None, **settings):
        user = io.TextIOWrapper(io.BytesIO(typed))
        chat.converse(
            "stage", sampling or SamplingConfig(128), 0, user=user, **{"shorten": True, **settings}
        )
        captured = capsys.readouterr()
        return captured.out, captured.err, asked

    return talk


def test_a_line_that_is_not_utf_8_is_asked_for_again(converse):
    out, err, asked = converse(b"hello\n\xff\xfe\n\xe4\xbd\xa0\xe5\xa5\xbd\n")
    assert out == "ok\nok\n" and len(asked) == 2
    assert "not valid UTF-8" in err


def test_a_message_that_does_not_fit_ends_nothing(converse):
    out, err, asked = converse(b"hello\n" + b"the quick brown fox " * 60 + b"\nhello\n")
    assert out == "ok\nok\n" and asked[1] > asked[0]  # the conversation before it is kept
    assert re.search(r"this message takes \d+ tokens, and 32 fit next to the answer", err)


def test_a_message_that_the_template_refuses_ends_nothing(converse, tokenizer, monkeypatch):
    encode = tokenizer.encode_chat

    def refuse(messages, **settings):
        if "no" in messages[-1]["content"]:
            raise InputError("the chat template refuses the conversation (no)")
        return encode(messages, **settings)

    monkeypatch.setattr(tokenizer, "encode_chat", refuse)
    out, err, _ = converse(b"hello\nno\nhello\n")
    assert out == "ok\nok\n" and "refuses the conversation" in err
    with pytest.raises(InputError, match="refuses"):
        monkeypatch.setattr(
            tokenizer, "encode_chat", lambda messages, **_: refuse([{"content": "no"}])
        )
        converse(b"hello\n")


def test_the_default_answer_length_fits_every_context(converse):
    assert converse(b"hello\n")[0] == "ok\n"
    with pytest.raises(
        InputError,
        match="--max-new-tokens: 64 leaves no room for a message in the context of 64 tokens",
    ):
        converse(b"hello\n", SamplingConfig(64), shorten=False)


def test_the_default_completion_length_fits_the_context(tiny_run, capsys):
    cli.main(["generate", str(tiny_run / "sft"), "--prompt", "good " * 20])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("devices", "chosen"), [([], "cpu"), (["/dev/accel0"], None), (["/dev/nvidia0"], None)]
)
def test_without_an_accelerator_the_cpu_is_chosen_quietly(monkeypatch, devices, chosen):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(hardware.glob, "glob", lambda pattern: fnmatch.filter(devices, pattern))
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    monkeypatch.setattr(hardware.sys, "platform", "linux")
    hardware.choose_platform()
    assert os.environ.get("JAX_PLATFORMS") == chosen
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    hardware.choose_platform()
    assert os.environ["JAX_PLATFORMS"] == "tpu"


def test_a_command_prints_nothing_on_stderr_at_start(tiny_run):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [
        sys.executable,
        "-m",
        "jaxllm",
        "generate",
        str(tiny_run / "sft"),
        "--prompt",
        "x",
        "--max-new-tokens",
        "2",
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_without_chinese_shows_the_numbers_of_characters(tmp_path):
    script = "from jaxllm.__main__ import main; import sys; main(['--version']); print('你好', file=sys.stdout)"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.returncode == 0 and rb"\u4f60\u597d" in done.stdout


def test_a_stage_is_written_in_utf_8_in_every_locale(tmp_path, monkeypatch):
    ascii_locale = {
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
    }
    for name, value in ascii_locale.items():
        monkeypatch.setenv(name, value)
    process = start("tokenizer", "configs/tiny.yaml", "--run-dir", str(tmp_path / "run"))
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert "好" in (tmp_path / "run" / "tokenizer" / "config.json").read_text(encoding="utf-8")


TINY = (ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8")


def test_a_byte_order_mark_before_a_config_is_skipped(tmp_path):
    for name in ("plain", "marked"):
        (tmp_path / f"{name}.yaml").write_text(
            TINY, encoding="utf-8-sig" if name == "marked" else "utf-8"
        )
    assert load(run.Config, tmp_path / "marked.yaml") == load(run.Config, tmp_path / "plain.yaml")


WRONG_YAML = {
    "twice in an item": ("rank: {}\nmeshes:\n- stage: sft\n  data: 1\n  data: 2\n", r"x.yaml:5: meshes.0.data is given twice"),
    "an alias of itself": ("model: &m\n  preset: *m\n", r"x.yaml:1: model.preset holds itself"),
    "a list of itself": ("stages: &s [*s]\n", r"x.yaml:1: stages.0 holds itself"),
    "a list as a key": ("? [a, b]\n: 1\n", r"x.yaml:1: a key must be a plain word"),
    "a tag": ("name: !!python/object/apply:os.system [ls]\n", r"x.yaml: not valid YAML: could not determine"),
    "no date": ("name: 2024-13-45\n", r"x.yaml: not valid YAML: month must be in"),
    "deep": ("stages: " + "[" * 5000 + "]" * 5000 + "\n", r"x.yaml: (is nested too deeply|not valid YAML)"),
    "a bomb": (
        "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        r"x.yaml: holds more than 100,000 keys",
    ),
    "two documents": ("name: a\n---\nname: b\n", r"x.yaml: not valid YAML: expected a single document"),
    "a number as a key": ("1: 2\n", r"x.yaml:1: 1: unknown key"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_YAML)
def test_odd_yaml_is_one_line(tmp_path, case):
    text, message = WRONG_YAML[case]
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load(run.Config, tmp_path / "x.yaml")
    assert "\n" not in str(error.value)


def test_a_tilde_is_the_home_folder_for_runs_and_stages(monkeypatch, tmp_path, tiny_run, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tiny").symlink_to(tiny_run)
    cli.main(["generate", "~/tiny/sft", "--prompt", "x", "--max-new-tokens", "2"])
    assert life.run_directory(life.Config(run_dir="~/r")) == tmp_path / "r"
    cli.main(["export", "~/tiny/sft", "~/out"])
    assert (tmp_path / "out" / "config.json").exists()


def test_a_chat_without_standard_input_ends():
    assert chat._ask(None) is None
