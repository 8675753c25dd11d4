"""Records -> examples: documents, conversations, prompts, rankings, each on its side of the split.

Which side of the split a content is on depends on its hash alone. For a text that is the text before any template:
a review held out of pre-training is held out of every task made from it. Where a prompt is cut from a text, the
prompt has a side of its own, and what would put a held-out prompt into training is left out of both.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.config import InputError
from jaxllm.data.messages import (
    Messages,
    as_json,
    check_messages,
    known_parts,
    message_text,
    question,
)
from jaxllm.data.records import Record, spelled
from jaxllm.data.sources import DataConfig, Source, digest
from jaxllm.data.templates import fill
from jaxllm.tokenizers.trained import Tokenizer

KINDS = ("document", "chat", "prompt", "ranked")
_LARGEST = 3.4e38  # of a float32, which scores become


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
        ranking = (
            [self.responses, self.ranks, self.scores, self.annotator] if self.responses else []
        )
        tools = [self.tools] if self.tools else []
        return as_json([self.text, self.messages, *ranking, *tools])

    def digest(self) -> bytes:
        """16 bytes of the content's sha256."""
        return digest(self.content())

    def learnt(self) -> str:
        """The text whose tokens are targets."""
        return self.text or "".join(
            message_text(m) for m in self.messages if m["role"] == "assistant"
        )

    def whole(self) -> str:
        """All of its text."""
        return self.text or "\n".join(map(message_text, self.messages))

    def question(self) -> str:
        """What the model is asked: one message as it is, or all messages before the reply."""
        return question(self.messages)

    def encode(
        self, tokenizer: Tokenizer, *replies: str, reply: bool = False
    ) -> tuple[list[int], list[bool]]:
        """`encode_chat` of its messages, and of replies to them; what the template refuses is named by its place."""
        messages = [*self.messages, *({"role": "assistant", "content": text} for text in replies)]
        try:
            return tokenizer.encode_chat(
                messages, reply=reply, **({"tools": self.tools} if self.tools else {})
            )
        except InputError as error:
            raise InputError(f"{self.origin}: {error}") from None


def assign_splits(
    data: DataConfig, kind: str, index: int, records: Iterable[Record]
) -> Iterator[tuple[Example, str | None]]:
    """(example, its side of the split, None for neither) of every record of source number `index`."""
    for record in records:
        example, given = _make(kind, data.sources[index], record, index), record.fields.get("split")
        if given not in (None, "", "train", "held_out"):
            raise InputError(
                f"{record.origin}: split must be train or held_out, not {given!r:.40}; rename it"
            )
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
    fields, origin = record.fields, record.origin
    if kind == "document":
        text = fields.get("text")
        if not isinstance(text, str):
            raise InputError(
                f"{origin}: a document needs the field {source.text_field!r} with a string; set text_field"
            )
        return Example(text, [], [], [], index, origin)
    messages, tools = _messages(source, record, with_reply=kind == "chat"), fields.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f'{origin}: "tools" must be a list of objects')
    if tools and kind != "chat":
        raise InputError(f'{origin}: "tools" are for conversations only; a {kind} has none')
    if kind == "prompt":
        return Example("", messages, [], [], index, origin, answer=_answer(source, record))
    if kind == "chat":
        return Example("", messages, [], [], index, origin, tools=tools)
    responses = _responses(fields, origin)
    scores = _scores(fields, responses, origin)
    ranks = _checked_ranks(fields.get("ranks") or _ranks_of(scores), responses, origin)
    who = spelled(fields.get("annotator", ""), origin)
    return Example("", messages, responses, ranks, index, origin, tuple(scores), annotator=who)


def _answer(source: Source, record: Record) -> str:
    """The right answer of a prompt's record: its `answer`, else its reply, else nothing."""
    if "answer" in record.fields:
        return spelled(record.fields["answer"], record.origin)
    if source.prompt:
        return fill(source.response, record)
    messages = record.fields.get("messages") or [{}]
    if messages[-1].get("role") == "assistant":
        return message_text(messages[-1])
    return spelled(record.fields.get("response", ""), record.origin)


def _messages(source: Source, record: Record, with_reply: bool) -> Messages:
    """The conversation up to its last user message, or with the assistant's reply to it."""
    if source.prompt or "messages" not in record.fields:
        messages = _filled(source, record, with_reply) if source.prompt else _of_fields(record)
        check_messages(messages, record.origin)
        if not all(m["content"].strip() for m in messages if m["role"] == "user"):
            raise InputError(
                f"{record.origin}: the prompt is empty, so nothing is asked; remove the record"
            )
    else:
        messages = record.fields["messages"]
        check_messages(messages, record.origin)
    if not with_reply and messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    wanted = ("assistant",) if with_reply else ("user", "tool")
    if not messages or messages[-1]["role"] not in wanted:
        raise InputError(
            f'{record.origin}: the conversation must end with the {wanted[0]}; give "messages", or "prompt" and '
            '"response", or templates in the source'
        )
    return known_parts(messages)


def _filled(source: Source, record: Record, with_reply: bool) -> Messages:
    """The conversation of a source's templates; a system message of empty fields is left out."""
    system = fill(source.system, record)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": fill(source.prompt, record)})
    if with_reply and source.response:
        messages.append({"role": "assistant", "content": fill(source.response, record)})
    return messages


def _of_fields(record: Record) -> Messages:
    """The conversation of the fields "system", "prompt" and "response"."""
    if "response" in record.fields and "prompt" not in record.fields:
        raise InputError(f'{record.origin}: has a "response" without a "prompt"; give both')
    names = {"system": "system", "user": "prompt", "assistant": "response"}
    return [
        {"role": role, "content": record.fields[name]}
        for role, name in names.items()
        if name in record.fields
    ]


def _responses(fields: Mapping[str, Any], origin: str) -> list[str]:
    responses = fields.get("responses")
    if (
        not isinstance(responses, list)
        or len(responses) < 2
        or not all(isinstance(r, str) for r in responses)
    ):
        raise InputError(f'{origin}: a ranking needs "responses", a list of at least 2 strings')
    return responses


def _scores(fields: Mapping[str, Any], responses: Sequence[str], origin: str) -> list[float]:
    """The scores of the responses; none where the record has none."""
    scores = fields.get("scores")
    if scores is None:
        return []
    finite = lambda x: (
        isinstance(x, int | float) and not isinstance(x, bool) and -_LARGEST <= x <= _LARGEST
    )
    if (
        not isinstance(scores, list)
        or len(scores) != len(responses)
        or not all(map(finite, scores))
    ):
        raise InputError(
            f'{origin}: "scores" must be one finite number for each of {len(responses)} responses'
        )
    return scores


def _ranks_of(scores: Sequence[float]) -> list[int]:
    """1 + the number of better scores: equal scores are a tie."""
    return [1 + sum(other > score for other in scores) for score in scores]


def _checked_ranks(ranks: Any, responses: Sequence[str], origin: str) -> list[int]:
    good = isinstance(ranks, list) and all(
        type(rank) is int and 1 <= rank < 2**31 for rank in ranks
    )
    if not good or len(ranks) != len(responses):
        raise InputError(
            f'{origin}: a ranking needs "ranks", one integer from 1 (best) for each of {len(responses)} responses, '
            'or "scores", one number for each'
        )
    return ranks
