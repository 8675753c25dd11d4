"""Records -> examples: documents, conversations, prompts, rankings; without duplicates, split by content.

Which side of the split a content is on depends on its hash alone. For a text that is the text before any template:
a review held out of pre-training is held out of every task made from it. Where a prompt is cut from a text, the
prompt has a side of its own, and what would put a held-out prompt into training is left out of both.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.config import InputError
from jaxllm.data.sources import DataConfig, Record, Source, read_records
from jaxllm.tokenizer import Tokenizer

KINDS = ("document", "chat", "prompt", "ranked")
Messages = list[dict[str, Any]]
# What a message may have besides its role; which of them a model is shown is its chat template's matter.
_IN_MESSAGES = ("content", "reasoning_content", "tool_calls", "tool_call_id", "name")
_spelled = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder each time


class Example(NamedTuple):
    """One example. document: text; chat: messages; prompt: messages, answer; ranked: messages, responses, ranks."""

    text: str
    messages: Messages
    responses: list[str]
    ranks: list[int]  # 1 = best, equal = tie
    source: int  # index into DataConfig.sources
    origin: str  # "path:line"
    scores: tuple[float, ...] = ()  # of the responses, where the record has them
    answer: str = ""  # what a verifiable reward compares with
    annotator: str = ""  # who ranked
    tools: Sequence[Any] = ()  # of a chat: descriptions of the functions that may be called

    def content(self) -> str:
        """What makes two examples the same one."""
        ranking = [self.responses, self.ranks, self.scores, self.annotator] if self.responses else []
        tools = [self.tools] if self.tools else []
        return _spelled([self.text, self.messages, *ranking, *tools])

    def digest(self) -> bytes:
        """16 bytes of the content's sha256."""
        return _hash(self.content())

    def learnt(self) -> str:
        """The text whose tokens are targets."""
        return self.text or "".join(said(m) for m in self.messages if m["role"] == "assistant")

    def whole(self) -> str:
        """All of its text."""
        return self.text or "\n".join(map(said, self.messages))

    def question(self) -> str:
        """What the model is asked: one user message as it is, or all messages before the reply."""
        asked = self.messages[:-1] if self.messages and self.messages[-1]["role"] == "assistant" else self.messages
        return asked[0]["content"] if len(asked) == 1 else json.dumps(asked, ensure_ascii=False)

    def encode(self, tokenizer: Tokenizer, *replies: str, reply: bool = False) -> tuple[list[int], list[bool]]:
        """`encode_chat` of its messages, and of replies to them; what the template refuses is named by its place."""
        messages = [*self.messages, *({"role": "assistant", "content": text} for text in replies)]
        try:
            return tokenizer.encode_chat(messages, reply=reply, **({"tools": self.tools} if self.tools else {}))
        except InputError as error:
            raise InputError(f"{self.origin}: {error}") from None


def said(message: Mapping[str, Any]) -> str:
    """The text of a message, the functions it calls included."""
    calls = message.get("tool_calls")
    return (message.get("content") or "") + (_spelled(calls) if calls else "")


def examples(data: DataConfig, kind: str, split: str) -> Iterator[Example]:
    """The examples of one split ("train" or "held_out"), exact duplicates removed.

    Raises InputError: no sources, a malformed record with its place, or a split without a single example.
    """
    if not data.sources:
        raise InputError(f"data.sources: none given, and {kind} examples are needed; name at least one source")
    yield from not_empty(_stream(data, kind, split), data, kind, split)


def _stream(data: DataConfig, kind: str, split: str) -> Iterator[Example]:
    # Two texts on different sides may give the same conversation: it stays held out. So does a ranked prompt.
    every = lambda: (pair for i, s in enumerate(data.sources) for pair in sided(data, kind, i, read_records(s)))
    held_out = {_leak(e, kind) for e, side in every() if side == "held_out"} if split == "train" else set()
    seen: set[bytes] = set()
    for example, side in every():
        if side == split and _leak(example, kind) not in held_out and (key := example.digest()) not in seen:
            seen.add(key)
            yield example


def not_empty[T](stream: Iterator[T], data: DataConfig, kind: str, split: str) -> Iterator[T]:
    empty = True
    for item in stream:
        empty = False
        yield item
    if empty:
        raise nothing_there(data, kind, split)


def nothing_there(data: DataConfig, kind: str, split: str) -> InputError:
    where = ", ".join(source.path for source in data.sources)
    more, text = "raise data.held_out_fraction or give more text", "give text that is not empty"
    mend = more if split == "held_out" else text
    return InputError(f"{where}: not a single {kind} example in the {split} split; {mend}")


def shuffled(stream: Iterable[Example]) -> list[Example]:
    """Examples in the order of their contents' hashes: a fixed shuffle, so that the first n are a sample of all."""
    return sorted(stream, key=Example.digest)


def _leak(example: Example, kind: str) -> bytes:
    """What must not be in both splits: of a ranking its prompt, whatever the responses; else the whole content."""
    return _hash(example.question() if kind == "ranked" else example.content())


def sided(data: DataConfig, kind: str, index: int, records: Iterable[Record]) -> Iterator[tuple[Example, str | None]]:
    """(example, its side of the split, None for neither) of every record of source number `index`."""
    for record in records:
        example, given = _make(kind, data.sources[index], record, index), record.fields.get("split")
        if given not in (None, "", "train", "held_out"):
            raise InputError(f"{record.origin}: split must be train or held_out, not {given!r:.40}; rename it")
        yield example, given or _side(example, record, kind, data)


def _side(example: Example, record: Record, kind: str, data: DataConfig) -> str | None:
    """A prompt or ranking goes by its prompt; a document by its text; a conversation by its text, and to the
    training side only if its prompt is there as well."""
    prompt_held = kind != "document" and is_held_out(example.question(), data)
    if kind in ("prompt", "ranked"):
        return "held_out" if prompt_held else "train"
    text = record.fields.get("text")
    if is_held_out(text, data) if isinstance(text, str) else prompt_held:
        return "held_out"
    return None if prompt_held else "train"


def is_held_out(content: str, data: DataConfig) -> bool:
    """Whether a content belongs to the held-out split: sha256(salt + content), as a number in 0..1, is small."""
    digest = hashlib.sha256((data.split_salt + content).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) < data.held_out_fraction * 2**64


def _make(kind: str, source: Source, record: Record, index: int) -> Example:
    fields, origin, _ = record
    if kind == "document":
        text = fields.get("text")
        if not isinstance(text, str):
            raise InputError(
                f"{origin}: a document needs the field {source.text_field!r} with a string; set text_field"
            )
        return Example(text, [], [], [], index, origin)
    messages, tools = _messages(source, fields, origin, with_reply=kind == "chat"), fields.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f'{origin}: "tools" must be a list of objects')
    if tools and kind != "chat":
        raise InputError(f'{origin}: "tools" are for conversations only; a {kind} has none')
    if kind == "prompt":
        return Example("", messages, [], [], index, origin, answer=_answer(source, fields, origin))
    if kind == "chat":
        return Example("", messages, [], [], index, origin, tools=tools)
    responses, scores = _responses(fields, origin), fields.get("scores")
    ranks = fields.get("ranks") or (_ranks_of(scores, responses, origin) if scores is not None else None)
    who = str(fields.get("annotator", ""))
    checked = _checked_ranks(ranks, responses, origin)
    return Example("", messages, responses, checked, index, origin, tuple(scores or ()), annotator=who)


def _answer(source: Source, fields: Mapping[str, Any], origin: str) -> str:
    """The right answer of a prompt's record: its `answer`, else its reply, else nothing."""
    if "answer" in fields:
        return str(fields["answer"])
    if source.prompt:
        return fill(source.response, fields, origin)
    messages = fields.get("messages") or [{}]
    return messages[-1]["content"] if messages[-1].get("role") == "assistant" else str(fields.get("response", ""))


def _ranks_of(scores: Any, responses: Sequence[str], origin: str) -> list[int]:
    """1 + the number of better scores: equal scores are a tie."""
    number = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
    if not isinstance(scores, list) or len(scores) != len(responses) or not all(map(number, scores)):
        raise InputError(f'{origin}: "scores" must be one finite number for each of {len(responses)} responses')
    return [1 + sum(other > score for other in scores) for score in scores]


def _messages(source: Source, fields: Mapping[str, Any], origin: str, with_reply: bool) -> Messages:
    """The conversation up to its last user message, or with the assistant's reply to it."""
    if source.prompt:
        messages = [{"role": r, "content": fill(t, fields, origin)} for r, t in _templates(source, with_reply) if t]
    elif "messages" in fields:
        messages = fields["messages"]
    else:
        names = {"system": "system", "user": "prompt", "assistant": "response"}
        messages = [{"role": role, "content": fields[name]} for role, name in names.items() if name in fields]
    _check_messages(messages, origin)
    if not with_reply and messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    wanted = ("assistant",) if with_reply else ("user", "tool")
    if not messages or messages[-1]["role"] not in wanted:
        raise InputError(
            f'{origin}: the conversation must end with the {wanted[0]}; give "messages", or "prompt" and "response", '
            "or templates in the source"
        )
    return [{name: m[name] for name in ("role", *_IN_MESSAGES) if m.get(name) is not None} for m in messages]


def _templates(source: Source, with_reply: bool) -> list[tuple[str, str]]:
    reply = source.response if with_reply else ""
    return [("system", source.system), ("user", source.prompt), ("assistant", reply)]


def fill(template: str, fields: Mapping[str, Any], origin: str) -> str:
    """Replace {field} by its value; other braces stay. Raises InputError on a field that is not there."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in fields:
            raise InputError(f"{origin}: the template's {{{found[1]}}} is not a field; known: {', '.join(fields)}")
        return str(fields[found[1]])

    return re.sub(r"\{(\w+)\}", value, template)


def _check_messages(messages: Any, origin: str) -> None:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError(f'{origin}: "messages" must be a list of objects with role and content')
    for m in messages:
        calls, roles = m.get("tool_calls"), ("system", "user", "assistant", "tool")
        called = m.get("role") == "assistant" and isinstance(calls, list) and m.get("content") is None
        if m.get("role") not in roles or not (called or isinstance(m.get("content"), str)):
            raise InputError(f"{origin}: a message needs a role ({', '.join(roles)}) and content (a string): {m!r:.80}")
    if messages and messages[-1]["role"] == "assistant" and not said(messages[-1]):
        raise InputError(f"{origin}: the last reply is empty, so there is nothing to learn; remove the line")


def _responses(fields: Mapping[str, Any], origin: str) -> list[str]:
    responses = fields.get("responses")
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(r, str) for r in responses):
        raise InputError(f'{origin}: a ranking needs "responses", a list of at least 2 strings')
    return responses


def _checked_ranks(ranks: Any, responses: Sequence[str], origin: str) -> list[int]:
    good = isinstance(ranks, list) and all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in ranks)
    if not good or len(ranks) != len(responses):
        raise InputError(
            f'{origin}: a ranking needs "ranks", one integer from 1 (best) for each of {len(responses)} responses, '
            'or "scores", one number for each'
        )
    return ranks


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]
