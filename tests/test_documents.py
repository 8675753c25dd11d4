"""Every page is true: links, anchors, file names, commands, config files and records in it are those of the code.

Commands are parsed by the programs that they call, in this process; nothing is run. A Chinese page has the headings and
the commands of the English one.
"""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import jaxllm
from jaxllm import __main__ as cli
from jaxllm.config import InputError, build, load
from jaxllm.data.format import KINDS
from jaxllm.data.sources import DataConfig, Source
from jaxllm.data.splits import examples
from jaxllm.generate import SamplingConfig
from jaxllm.models.lora import LoRAConfig
from jaxllm.optim import OptimConfig
from jaxllm.run import Config
from jaxllm.runtime.checkpoint import CheckpointConfig
from tests.conftest import ROOT


def pages():
    """The Markdown pages of the repository: those that git tracks, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = listed.stdout.split() if listed.returncode == 0 else []
    if not found:  # a copy without .git
        hidden = lambda path: any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        found = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.md") if not hidden(p)]
    return sorted(name for name in found if (ROOT / name).exists())


PAGES = pages()
TRANSLATED = [name for name in PAGES if name.endswith(".zh.md")]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def fences(text):
    """(what stands behind ```, the lines) of every fenced block; an indented block has "" behind it."""
    for found in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        yield found[1].strip(), found[2].split("\n")
    lines = without_fences(text).split("\n")
    yield "", [line[4:] for line in lines if line.startswith("    ")]


def without_fences(text):
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", text, flags=re.MULTILINE)


# Links and anchors


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    found = []
    for _, title in headings(text):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
        anchor = kept.strip().replace(" ", "-")
        again = sum(re.sub(r"-\d+$", "", other) == anchor for other in found)
        found.append(f"{anchor}-{again}" if again else anchor)
    return found


def headings(text):
    """(level, title) of every heading, in order."""
    marked = re.findall(r"^(#+) +(.+)$", without_fences(text), re.MULTILINE)
    return [(len(marks), title.strip()) for marks, title in marked]


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


def missing_names(name):
    for token in re.findall(r"`([A-Za-z_]+(?:\.\w+)+)`", without_fences(read(name))):
        first, *rest = token.split(".")
        found = owner_of(first)
        if found is None or rest[-1] in FILES:
            continue
        for part in rest:
            if isinstance(found, types.ModuleType) and not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            if not hasattr(found, part):
                yield f"{name}: `{token}` does not exist"
                break
            found = getattr(found, part)


@pytest.mark.parametrize("name", PAGES)
def test_fields_and_functions_named_in_backticks_exist(name):
    assert not [*missing_names(name)]


# Commands


_BEGINS = r"(jaxllm |bash launch/|bash tests/|sbatch |pip install |python |JAX_\w+=|PYTHON )"


def commands(text):
    """The words of every command in the fenced blocks of a page; comments and prompts are left out."""
    for language, lines in fences(text):
        if language not in ("bash", "text", ""):
            continue
        joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
        for line in joined.split("\n"):
            line = line.removeprefix("$ ").removeprefix(".venv/bin/")
            if re.match(_BEGINS, line):
                yield from split_pipes(words_of(line))


def inline_commands(text):
    """The words of every command in backticks that has arguments; `jaxllm plan` is only a name."""
    for found in re.findall(r"`([^`\n]+)`", without_fences(text)):
        words = words_of(found) if re.match(_BEGINS, found) else []
        if len(words) > 2 or any(word.startswith("--") for word in words):
            yield from split_pipes(words)


def words_of(line):
    line = re.sub(r"\[(-[^\]]*)\]", r"\1", line)  # [--option]: one that may be left out
    return shlex.split(line, comments=True)


_PROGRAMS = r"(jaxllm|bash|sbatch|pip|python|PYTHON)$|JAX_"


def split_pipes(words):
    """The commands of a line, without what they write to."""
    command = []
    for word in [*words, "&&"]:
        if word in ("&&", "|", ";"):
            if ">" in command:
                command = command[: command.index(">")]
            if len(command) > 1 and re.match(_PROGRAMS, command[0]):
                yield command
            command = []
        else:
            command.append(word)


@pytest.fixture
def refused(monkeypatch):
    """A function of a command's words: why the program refuses them, "" where it does not. Nothing is run."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "environ", os.environ.copy())
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
    ):
        module, name = leaf.rsplit(".", 1)
        monkeypatch.setattr(importlib.import_module(f"jaxllm.{module}"), name, done)
    harness = types.SimpleNamespace(harness=done)
    monkeypatch.setitem(sys.modules, "jaxllm.evaluation.harness", harness)
    return lambda words: "".join(_complaints(words))


# What the pages call the things that a reader fills in, and what stands for them here.
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
        package = re.fullmatch(r"(?:jaxllm|\.)(?:\[([\w,]+)\])?", word)
        for extra in (package[1] or "").split(",") if package else ():
            if extra and extra not in extras:
                yield f"pip install {word}: no extra {extra}"
        if not package and word != "-e":
            yield f"pip install {word}: is not this package"


def _refused_module(words):
    module, *rest = words
    if module == "jaxllm":
        yield from _refused_by_jaxllm(rest)
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
    page = f"../{tmp_path.name}/PAGE.md"
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "ROOT", tmp_path)
        assert len([*broken_links(page)]) == 2
        (tmp_path / "jaxllm").mkdir()
        (tmp_path / "jaxllm" / "train.py").touch()
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
