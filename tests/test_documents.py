"""Every page is true: its links, file names, config fields, commands, configs and records exist in the code.

Commands are parsed by the programs that they call, in this process; nothing is run. A Chinese page has the same
headings and commands as the English one.
"""

import ast
import contextlib
import importlib
import json
import os
import re
import shlex
import sys
import tomllib
import types
from pathlib import Path

import pytest

import jaxllm
from jaxllm import __main__ as cli
from jaxllm.config import InputError, build, load
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.format import KINDS
from jaxllm.data.splits import examples
from jaxllm.engine.config import SamplingConfig
from jaxllm.models.parts_config import LoRAConfig
from jaxllm.optim_config import OptimConfig
from jaxllm.run import Config
from jaxllm.runtime.config import CheckpointConfig
from tests.conftest import ROOT
from tests.pages import (
    anchors,
    commands,
    fences,
    headings,
    inline_commands,
    pages,
    read,
    without_fences,
)

PAGES = pages()
TRANSLATED = [name for name in PAGES if name.endswith(".zh.md")]


# Links and anchors


def broken_links(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences(read(name))):
        if re.match(r"[a-z]+://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"{name}: the link {target} leads to no file"
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"{name}: {path or name} has no heading for #{anchor}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name):
    assert not [*broken_links(name)]


# Names of files

CODE = (".py", ".yaml", ".yml", ".sh", ".sbatch", ".toml", ".svg", ".npz")


def is_repository_path(token, page):
    """Whether a word in backticks looks like a file or folder of the repository, and not of a run directory."""
    if not re.fullmatch(r"[\w.*/-]+", token) or token.startswith(("runs/", "-", "/", ".")):
        return False
    first = token.split("/")[0]
    if re.fullmatch(r"[A-Z_]+(\.yaml)?", first):  # JOB.yaml: a name to be filled in
        return False
    known = (ROOT / first).is_dir() or (page.parent / first).is_dir()
    return token.endswith(CODE) or ("/" in token and known)


def missing_files(name):
    page = ROOT / name
    for token in re.findall(r"`([^`\n]+)`", without_fences(read(name))):
        if is_repository_path(token, page):
            given = token.rstrip("/")
            if not any([*ROOT.glob(given)] or [*page.parent.glob(given)]):
                yield f"{name}: `{token}` is not in the repository"


@pytest.mark.parametrize("name", PAGES)
def test_files_named_in_backticks_exist(name):
    assert not [*missing_files(name)]


def test_pages_name_no_machine():
    for name in PAGES:
        found = re.search(r"(?<![\w.])/(?:home|root|work|tmp|Users)/\S+", read(name))
        assert not found, f"{name}: {found and found[0]}"


# Names of config fields, functions and classes

# Sections that are named without the stage they belong to.
SECTIONS = {
    "checkpoint": CheckpointConfig,
    "data": DataConfig,
    "lora": LoRAConfig,
    "optim": OptimConfig,
    "sampling": SamplingConfig,
}
FILES = ("csv", "html", "json", "jsonl", "log", "md", "model", "pid", "png", "py", "yaml")


def owner_of(first):
    """What a dotted name in backticks begins with: a section of the config, a module, or None."""
    if first == "jaxllm":
        return jaxllm
    if first in SECTIONS or hasattr(Config(), first):
        return SECTIONS[first]() if first in SECTIONS else getattr(Config(), first)
    is_module = (ROOT / "jaxllm" / f"{first}.py").exists()
    return importlib.import_module(f"jaxllm.{first}") if is_module else None


def import_submodule(module, name):
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(f"{module.__name__}.{name}")


def missing_names(name):
    for token in re.findall(r"`([A-Za-z_]+(?:\.\w+)+)`", without_fences(read(name))):
        first, *rest = token.split(".")
        found = owner_of(first)
        if found is None or rest[-1] in FILES:
            continue
        for part in rest:
            if isinstance(found, types.ModuleType):
                import_submodule(found, part)  # a package has it as an attribute only then
            if not hasattr(found, part):
                yield f"{name}: `{token}` does not exist"
                break
            found = getattr(found, part)


@pytest.mark.parametrize("name", PAGES)
def test_fields_and_functions_named_in_backticks_exist(name):
    assert not [*missing_names(name)]


# Commands


@pytest.fixture
def refused(monkeypatch):
    """A function from a command's words to the reason why the program refuses them, or "". Nothing is run."""
    monkeypatch.chdir(ROOT)
    # `plan` sets variables of its process, which would outlive this test.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    # The functions that do the work, each called once the arguments are parsed and found good.
    done = lambda *_, **__: []
    for leaf in (
        "run.run_stages",
        "run.set_cpu_devices",
        "chat.answer_once",
        "chat.converse",
        "pretrained.convert.import_model",
        "pretrained.convert.export_model",
        "evaluation.tasks.command",
        "plan.planning.command",
        "report.status.command",
        "scaling.command.command",
        "serve.command.command",
    ):
        module, name = leaf.rsplit(".", 1)
        monkeypatch.setattr(importlib.import_module(f"jaxllm.{module}"), name, done)
    # The harness itself is an extra that need not be installed.
    harness = types.SimpleNamespace(harness=done)
    monkeypatch.setitem(sys.modules, "jaxllm.evaluation.harness", harness)
    return lambda words: "".join(_complaints(words))


# Placeholders that a reader fills in, and the values that the checks use instead.
FILLED_IN = {
    "CONFIG": "configs/tiny.yaml",
    "OTHER": "configs/quickstart.yaml",
    "COMMAND": "run",
    "STAGE": "pretrain",
    "N": "2",
}


def _complaints(words):
    words = [FILLED_IN.get(word, word) for word in words]
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "jaxllm":
        yield from _refused_by_jaxllm(rest)
    elif program == "bash":
        yield from _refused_by_script(*rest)
    elif program == "sbatch":
        job = next(i for i, word in enumerate(rest) if word.startswith("launch/"))
        yield from _missing(rest[job])
        yield from _refused_by_jaxllm(["run", *rest[job + 1 :]])
    elif program == "pip":
        yield from _unknown_extras(rest)
    elif rest[0] == "-m":
        yield from _refused_module(rest[1:])
    elif program == "PYTHON" or rest[0].endswith(".py"):
        yield from _refused_by_file(*rest)


def _refused_by_jaxllm(words):
    try:
        cli.main(words)
    except SystemExit as stop:
        if stop.code:
            yield f"jaxllm {shlex.join(words)}: exit code {stop.code}"


def _missing(*paths):
    for path in paths:
        if not (ROOT / path).exists():
            yield f"{path}: no such file"


def _refused_by_script(script, *words):
    if missing := [*_missing(script)]:
        yield from missing
    elif script == "launch/quickstart.sh":
        yield from _refused_by_jaxllm(["run", "configs/quickstart.yaml", *words])
    elif script == "launch/local.sh":
        yield from _refused_by_jaxllm(["run", *words[1:]])
    elif script in ("launch/restart.sh", "launch/daemon.sh"):
        begin = 2 if words[0] == "start" else 1
        if len(words) > begin:
            yield from _complaints(words[begin:])
    else:
        usage = re.search(rf"usage: bash {script} ([\w|]+) JOB", read(script))
        if usage and words[0] not in usage[1].split("|"):
            yield f"{script}: {words[0]} is not one of {usage[1]}"


def _unknown_extras(words):
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    for word in words[1:]:
        package = re.fullmatch(r"(?:jaxllm|\.)(?:\[([\w,-]+)\])?", word)
        for extra in (package[1] or "").split(",") if package else ():
            if extra and extra not in extras:
                yield f"pip install {word}: no extra {extra}"
        if not package and word != "-e":
            yield f"pip install {word}: is not this package"


def _refused_module(words):
    module, *rest = words
    if module == "jaxllm":
        yield from _refused_by_jaxllm(rest)
    elif module.startswith("tests."):
        yield from _refused_by_file(f"{module.replace('.', '/')}.py", *rest)
    elif module == "pytest":
        yield from _missing(*(w.split("::")[0] for w in rest if w.startswith("tests/")))
    else:
        yield f"python -m {module}: is not known here"


def _refused_by_file(script, *words):
    """A script's own options are those that its text names."""
    if missing := [*_missing(script)]:
        yield from missing
        return
    text = read(script)
    for word in words:
        if option := re.match(r"--([\w-]+)", word):
            names = (f"--{option[1]}", option[1].replace("-", "_"))
            if not any(name in text for name in names):
                yield f"{script}: has no option --{option[1]}"
        elif word.startswith("configs/"):
            yield from _missing(word)


@pytest.mark.parametrize("name", PAGES)
def test_commands_are_accepted(name, refused):
    text = read(name)
    reasons = [refused(words) for words in (*commands(text), *inline_commands(text))]
    assert not [*filter(None, reasons)]


def test_commands_named_in_configs_and_scripts_exist(capsys):
    cli.main(["--help"])
    known = {*re.findall(r"^  jaxllm (\w+)", capsys.readouterr().out, re.MULTILINE)}
    assert {"run", "pretrain", "plan"} <= known
    for page in (*(ROOT / "configs").glob("*.yaml"), *(ROOT / "launch").glob("*.*")):
        pattern = r"(?:^|[`# ]|python -m )jaxllm +([a-z_]+)(?= +[A-Z-]| +configs/| +runs/)"
        for command in re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE):
            assert command in known, f"{page.name} names `jaxllm {command}`"


# Config files, records, Python


@pytest.mark.parametrize("name", PAGES)
def test_configs_are_valid(name, tmp_path):
    shipped = ROOT / "configs"
    for number, (language, lines) in enumerate(fences(read(name))):
        text = "\n".join(lines)
        if language == "yaml" and "topology:" not in text:  # a job of launch/ is not a config
            file = tmp_path / f"{number}.yaml"
            file.write_text(text.replace("extends: ", f"extends: {shipped}/"), encoding="utf-8")
            load(Config, file)


@pytest.mark.parametrize("name", PAGES)
def test_records_are_read(name, tmp_path):
    """The blocks marked ```jsonl KIND hold records of that kind."""
    for number, (language, lines) in enumerate(fences(read(name))):
        kind = language.removeprefix("jsonl").strip()
        if not language.startswith("jsonl"):
            continue
        for line in filter(None, lines):
            json.loads(line)
        if kind in KINDS:
            file = tmp_path / f"{number}.jsonl"
            file.write_text("\n".join(lines), encoding="utf-8")
            data = DataConfig(sources=(Source(path=str(file)),), held_out_fraction=0.0)
            assert len([*examples(data, kind, "train")]) == len([*filter(None, lines)])


@pytest.mark.parametrize("name", PAGES)
def test_python_uses_names_that_exist(name):
    from jaxllm.api import LoadedModel

    for language, lines in fences(read(name)):
        for node in ast.walk(ast.parse("\n".join(lines))) if language == "python" else ():
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = {"jaxllm": jaxllm, "model": LoadedModel}.get(node.value.id)
                assert owner is None or hasattr(owner, node.attr), f"{name}: {ast.unparse(node)}"


# The Chinese pages


@pytest.mark.parametrize("name", TRANSLATED)
def test_the_chinese_page_has_the_headings_and_commands_of_the_english_one(name):
    chinese, english = read(name), read(name.replace(".zh.md", ".md"))
    levels = lambda text: [level for level, _ in headings(text)]
    assert levels(chinese) == levels(english)
    assert [*commands(chinese)] == [*commands(english)]


def test_a_page_links_to_its_translation():
    for name in TRANSLATED:
        english = name.replace(".zh.md", ".md")
        assert f"]({Path(name).name})" in read(english)
        assert f"]({Path(english).name})" in read(name)


# The checks themselves


def test_what_is_broken_is_found(tmp_path, monkeypatch, refused):
    (tmp_path / "PAGE.md").write_text(
        "# One\n[a](NONE.md) [b](#two) [c](#one)\n`jaxllm/none.py` `jaxllm/train.py` `runs/x/none.py`\n"
        "`ppo.kl_coef` `ppo.kl_coeff` `losses.gae` `optim.none` `tokenizer.json` `jaxllm.load`\n"
    )
    page = os.path.relpath(tmp_path / "PAGE.md", ROOT)
    assert len([*broken_links(page)]) == 2
    assert len([*missing_files(page)]) == 1
    assert len([*missing_names(page)]) == 2
    for words, right in (
        ("jaxllm run configs/tiny.yaml --seed 1", True),
        ("jaxllm run configs/none.yaml", False),
        ("jaxllm run configs/tiny.yaml --sed 1", False),
        ("jaxllm nothing", False),
        ("jaxllm generate runs/x/sft --prompt x --top-k 3", True),
        ("jaxllm generate runs/x/sft --prompt x --top-kk 3", False),
        ("jaxllm plan CONFIG --topology v5p:4x4x4", True),
        ("jaxllm plan CONFIG --topology v5p:4x4x4 --sliced", False),
        ("bash launch/none.sh", False),
        ("bash launch/gke.sh sideways JOB.yaml", False),
        ("bash launch/local.sh 2 configs/tiny.yaml --cpu-device 1", False),
        ("pip install -e '.[cuda]'", True),
        ("pip install 'jaxllm[none]'", False),
        ("python launch/sweep.py CONFIG --grit x", False),
        ("python -m pytest tests/none.py", False),
    ):
        assert bool(refused(shlex.split(words))) != right, words


def test_input_errors_are_not_hidden(refused):
    with pytest.raises(InputError):
        build(Config, {"pretrain": {"num_stepz": 1}})
