"""Task files: the questions that models are asked. One object a line (or row of a table), whose fields tell its kind.

multiple choice  {"question": text or "messages": [...], "choices": [texts], "answer": index of the right one, from 0}
perplexity       {"text": text}
generation       {"prompt": text or "messages": [...], "answer": text or number}
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import fsspec
from etils import epath

from jaxllm.config import InputError
from jaxllm.data.config import Source
from jaxllm.data.format import Example, make_example
from jaxllm.data.records import Record, spelled
from jaxllm.data.sources import files, read_records


class Task(NamedTuple):
    """A task file."""

    name: str
    """The file's name without folder and ending; the path if two files have the same name."""
    path: str
    sha256: str
    """Of the file's content."""
    kind: str
    """"multiple choice", "perplexity" or "generation"."""
    items: list[Example]
    """At least one. Those of multiple choice have the choices as responses, the right one of rank 1."""


def read_tasks(paths: Sequence[str], shots: int) -> list[Task]:
    """Read task files, here or on an object store. A path given twice is read once.

    shots: lines at the head of each file that are not scored.

    Raises:
        InputError: a file is missing, malformed, mixes kinds or has too few lines.
    """
    tasks: list[Task] = []
    uses: Counter[str] = Counter()
    for path in dict.fromkeys(paths):
        task = _read_task(path, shots)
        tasks.append(task)
        uses[task.name] += 1
    # Scores are kept by name, so it must be unique.
    return [task._replace(name=task.path) if uses[task.name] > 1 else task for task in tasks]


def describe(tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """{name: path, sha256, kind and number of lines}, to be kept with the scores."""
    described = {}
    for task in tasks:
        described[task.name] = {
            "path": task.path,
            "sha256": task.sha256,
            "kind": task.kind,
            "lines": len(task.items),
        }
    return described


def _read_task(path: str, shots: int) -> Task:
    # An empty text is an error here, not a record to drop.
    items = [_item(record) for record in read_records(Source(path, min_chars=0))]
    if not items:
        raise InputError(f"{path}: is empty; give one JSON object a line")
    kind = _kind(items[0])
    for item in items:
        if _kind(item) != kind:
            message = f"{_kind(item)} after {kind}; one file holds one kind, split it"
            raise InputError(f"{item.origin}: {message}")
    # Texts have no question that shots could show an answer to.
    if kind != "perplexity" and len(items) <= shots:
        raise InputError(
            f"{path}: {shots} shots of {len(items)} lines leave none to score; lower shots or add lines"
        )
    return Task(epath.Path(path).name.split(".")[0], path, _sha256(path), kind, items)


def _sha256(path: str) -> str:
    """Of the files that a path or pattern names, one after the other."""
    # Of the bytes, not of the parsed lines: it can be compared with what sha256sum prints.
    sha256 = hashlib.sha256()
    for file in files(Source(path)):
        filesystem, location = fsspec.core.url_to_fs(file)
        sha256.update(filesystem.cat_file(location))
    return sha256.hexdigest()


def _kind(item: Example) -> str:
    # An item keeps no kind: only a text has `text`, and only multiple choice has responses.
    if item.text:
        return "perplexity"
    return "multiple choice" if item.responses else "generation"


def _item(record: Record) -> Example:
    """A line as an example; its fields tell its kind."""
    fields = record.fields
    origin = record.origin
    choices = fields.get("choices")
    asked = [name for name in ("messages", "prompt", "question") if name in fields]
    if not asked:
        text = fields.get("text")
        if choices is None and isinstance(text, str) and text:
            return Example(text, [], [], [], 0, origin)
        known = '"question", "choices" and "answer", or "prompt" and "answer", or "text"'
        raise InputError(f"{origin}: is not a task; give {known}")
    # Read as a prompt of the training data is, so that it is checked and asked like one.
    name = "messages" if asked[0] == "messages" else "prompt"
    item = make_example("prompt", Source(), Record({name: fields[asked[0]]}, origin))
    if choices is None:
        return item._replace(answer=_answer(fields, origin))
    return _with_choices(item, choices, fields.get("answer"))


def _answer(fields: Mapping[str, Any], origin: str) -> str:
    """The text of a generation's answer; a number is spelled as in JSON."""
    answer = fields.get("answer")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise InputError(
            f'{origin}: generation needs "answer", a text or a number; add it (or "choices")'
        )
    return spelled(answer, origin)


def _with_choices(item: Example, choices: Any, answer: Any) -> Example:
    """A question of multiple choice; answer: the right choice's index."""
    origin = item.origin
    are_texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not are_texts or len(choices) < 2:
        raise InputError(
            f'{origin}: "choices" must be a list of at least 2 texts, none empty; fix the list'
        )
    if answer is None:
        raise InputError(
            f'{origin}: multiple choice needs "answer", the right choice\'s index from 0; add it'
        )
    # Not isinstance: true is an int to Python.
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(
            f'{origin}: "answer" must be the right choice\'s index from 0, not {answer!r:.40}'
        )
    ranks = [2] * len(choices)
    ranks[answer] = 1
    return item._replace(answer=choices[answer], responses=choices, ranks=ranks)
