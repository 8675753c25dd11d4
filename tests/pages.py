"""Readers of Markdown pages for test_documents.py: headings, anchors, fenced blocks, commands."""

import re
import shlex
import subprocess

from tests.conftest import ROOT

# Lines that begin like this are commands; other lines of a block are output.
_BEGINS = r"(jaxllm |bash launch/|bash tests/|sbatch |pip install |python |JAX_\w+=|PYTHON )"
# The programs whose arguments are checked.
_PROGRAMS = r"(jaxllm|bash|sbatch|pip|python|PYTHON)$|JAX_"


def pages():
    """The Markdown pages of the repository, tracked or new; ignored files are left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = listed.stdout.split() if listed.returncode == 0 else []
    if not found:  # a copy of the repository without .git
        hidden = lambda path: any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        found = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.md") if not hidden(p)]
    return sorted(name for name in found if (ROOT / name).exists())


def read(name):
    """The text of a page, by its path from the root."""
    return (ROOT / name).read_text(encoding="utf-8")


def fences(text):
    """(language, lines) of every fenced block; all indented lines together are a block of language ""."""
    for found in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        yield found[1].strip(), found[2].split("\n")
    lines = without_fences(text).split("\n")
    yield "", [line[4:] for line in lines if line.startswith("    ")]


def without_fences(text):
    """The page without its fenced blocks, whose comments would look like headings."""
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", text, flags=re.MULTILINE)


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    found = []
    for _, title in headings(text):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
        anchor = kept.strip().replace(" ", "-")
        # The second heading of the same text gets -1, the third -2.
        again = sum(re.sub(r"-\d+$", "", other) == anchor for other in found)
        found.append(f"{anchor}-{again}" if again else anchor)
    return found


def headings(text):
    """(level, title) of every heading, in order."""
    marked = re.findall(r"^(#+) +(.+)$", without_fences(text), re.MULTILINE)
    return [(len(marks), title.strip()) for marks, title in marked]


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
    """The words of a command line as a shell splits them."""
    line = re.sub(r"\[(-[^\]]*)\]", r"\1", line)  # [--option]: one that may be left out
    return shlex.split(line, comments=True)


def split_pipes(words):
    """The commands of a line that pipes or && join, without redirections."""
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
