"""Records -> examples: documents, conversations, prompts, and rankings, each assigned to a split.

The split of a content depends on its hash alone. The content is the text before any template: a review that is held
out of pretraining is held out of every task made from it. Where a prompt is cut from a text, prompt and text each
have a split by their own hash, and an example whose text is in training and whose prompt is held out is in neither:

    text     prompt       document    conversation    prompt, ranking
    train    train        train       train           train
    train    held out     train       neither         held out
    held out train        held out    held out        train
    held out held out     held out    held out        held out

A record may also name its split itself, in the field "split".
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from json.encoder import encode_basestring
from typing import Any, NamedTuple

from jaxllm.config import InputError
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.messages import as_json, message_text, question
from jaxllm.data.records import Record, spelled
from jaxllm.data.schema import (
    Messages,
    Ranking,
    check_label,
    check_messages,
    check_ranking,
    check_tools,
)
from jaxllm.data.sources import digest
from jaxllm.data.templates import fill
from jaxllm.tokenizers.trained import Tokenizer

KINDS = ("document", "chat", "prompt", "ranked")


class Example(NamedTuple):
    """One example. document: text; chat: messages; prompt: messages, answer; ranked: messages, responses, ranks."""

    text: str
    messages: Messages
    responses: list[str]
    ranks: list[int]  # 1 = best, equal = tie
    source: int  # index into DataConfig.sources
    origin: str  # "path:line"
    scores: tuple[float, ...] = ()  # of the responses, if the record has them
    answer: str = ""  # what a verifiable reward compares with
    annotator: str = ""  # who ranked
    tools: Sequence[Any] = ()  # of a chat: descriptions of the functions that may be called
    labels: tuple[bool, ...] = ()  # whether each response is desirable, if the record says so

    def content(self) -> str:
        """A JSON text that is equal for duplicates: where an example comes from is not part of it."""
        # The hash of this text is stored in caches: neither order nor spelling may change.
        if not (self.messages or self.responses or self.tools):
            return document_content(self.text)
        fields: list[Any] = [self.text, self.messages]
        if self.responses:
            fields += [self.responses, self.ranks, self.scores, self.annotator]
        if self.labels:
            fields.append(self.labels)
        if self.tools:
            fields.append(self.tools)
        return as_json(fields)

    def digest(self) -> bytes:
        """16 bytes of the content's sha256."""
        return digest(self.content())

    def target_text(self) -> str:
        """The text whose tokens are targets."""
        if self.text:
            return self.text
        return "".join(message_text(m) for m in self.messages if m["role"] == "assistant")

    def full_text(self) -> str:
        """All of its text; messages are joined by newlines."""
        return self.text or "\n".join(map(message_text, self.messages))

    def question(self) -> str:
        """What the model is asked: a single message's text, or all messages before the reply as JSON."""
        return question(self.messages)

    def encode(
        self, tokenizer: Tokenizer, *replies: str, reply: bool = False
    ) -> tuple[list[int], list[bool]]:
        """`Tokenizer.encode_chat` of the messages, followed by assistant replies.

        Raises:
            InputError: the chat template refuses the messages; the error names their file and line.
        """
        messages = [*self.messages, *({"role": "assistant", "content": text} for text in replies)]
        # A template may distinguish no tools from an empty list.
        inputs = {"tools": self.tools} if self.tools else {}
        try:
            return tokenizer.encode_chat(messages, reply=reply, **inputs)
        except InputError as error:
            raise InputError(f"{self.origin}: {error}") from None


def document_content(text: str) -> str:
    """`Example.content` of a document."""
    # What as_json([text, []]) writes, in a third of the time.
    return f"[{encode_basestring(text)}, []]"


def assign_splits(
    data: DataConfig, kind: str, index: int, records: Iterable[Record]
) -> Iterator[tuple[Example, str | None]]:
    """Yields (example, its split, or None for neither) for every record of source number `index`."""
    for record in records:
        example = make_example(kind, data.sources[index], record, index)
        given = record.fields.get("split")
        # Empty cells of a table: the record does not say.
        if given not in (None, "", "train", "held_out"):
            raise InputError(
                f"{record.origin}: split must be train or held_out, not {given!r:.40}; rename it"
            )
        yield example, given or _split_of(example, record, kind, data)


def _split_of(example: Example, record: Record, kind: str, data: DataConfig) -> str | None:
    """The split by the table of the module docstring."""
    fraction = data.held_out_fraction
    salt = data.split_salt
    prompt_held_out = kind != "document" and is_held_out(example.question(), fraction, salt)
    if kind in ("prompt", "ranked"):
        return "held_out" if prompt_held_out else "train"
    text = record.fields.get("text")
    # A conversation that was not made from a text goes by its prompt alone.
    is_text = isinstance(text, str)
    text_held_out = is_held_out(text, fraction, salt) if is_text else prompt_held_out
    if text_held_out:
        return "held_out"
    return None if prompt_held_out else "train"


def is_held_out(content: str, fraction: float, salt: str = "") -> bool:
    """Whether a content is in the held-out split: sha256(salt + content), as a number in [0, 1), is below fraction."""
    hashed = hashlib.sha256((salt + content).encode("utf-8", "surrogatepass")).digest()
    # Python compares the integer with the float exactly, so machines agree on every content.
    return int.from_bytes(hashed[:8]) < fraction * 2**64


def make_example(kind: str, source: Source, record: Record, index: int = 0) -> Example:
    """The example of a record of source number `index`.

    Raises:
        InputError: the record does not hold an example of this kind.
    """
    fields = record.fields
    origin = record.origin
    if kind == "document":
        text = fields.get("text")
        if not isinstance(text, str):
            raise InputError(
                f"{origin}: a document needs the field {source.text_field!r} with a string; set text_field"
            )
        return Example(text, [], [], [], index, origin)
    messages = _messages(source, record, with_reply=kind == "chat")
    tools = check_tools(fields["tools"], origin) if "tools" in fields else []
    if tools and kind != "chat":
        raise InputError(
            f'{origin}: "tools" are for conversations only; remove them from this {kind} record'
        )
    example = Example("", messages, [], [], index, origin)
    if kind == "chat":
        return example._replace(tools=tools)
    if kind == "prompt":
        return example._replace(answer=_answer(source, record))
    ranking: Any = _ranking(source, record)
    return example._replace(
        responses=ranking["responses"],
        ranks=ranking["ranks"],
        scores=tuple(ranking["scores"]),
        labels=tuple(ranking["labels"]),
        annotator=spelled(fields.get("annotator", ""), origin),
    )


def _ranking(source: Source, record: Record) -> Ranking:
    """The ranking of a record: of its "responses", or of its reply, which has a "label"."""
    fields = record.fields
    if "responses" in fields or "label" not in fields:
        return check_ranking(fields, record.origin)
    label = check_label(fields["label"], record.origin)
    reply = _reply(source, record)
    if not reply:
        raise InputError(
            f'{record.origin}: has a "label" without a reply; give "response", or messages that end '
            "with the assistant's"
        )
    return check_ranking({"responses": [reply], "labels": [label]}, record.origin)


def _answer(source: Source, record: Record) -> str:
    """The right answer of a prompt: the record's `answer`, or else its reply, or else nothing."""
    if "answer" in record.fields:
        return spelled(record.fields["answer"], record.origin)
    return _reply(source, record)


def _reply(source: Source, record: Record) -> str:
    """The assistant's reply in a record, or nothing."""
    if source.prompt:
        return fill(source.response, record)
    messages = record.fields.get("messages")
    if messages and messages[-1].get("role") == "assistant":
        return message_text(messages[-1])
    return spelled(record.fields.get("response", ""), record.origin)


def _messages(source: Source, record: Record, with_reply: bool) -> Messages:
    """The conversation up to its last user message, or with the assistant's reply to it."""
    if source.prompt:
        messages = _from_templates(source, record, with_reply)
    elif "messages" in record.fields:
        messages = record.fields["messages"]
    else:
        messages = _from_fields(record)
    # Also what templates made: a reply of empty fields is found here.
    messages = check_messages(messages, record.origin)
    if source.prompt or "messages" not in record.fields:
        _require_prompt(messages, record.origin)
    # A prompt may come with its reply, which is the answer (see `_answer`), not part of what is asked.
    if not with_reply and messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    last_roles = ("assistant",) if with_reply else ("user", "tool")
    if not messages or messages[-1]["role"] not in last_roles:
        raise InputError(
            f'{record.origin}: the conversation must end with the {last_roles[0]}; give "messages", '
            'or "prompt" and "response", or templates in the source'
        )
    return messages


def _require_prompt(messages: Messages, origin: str) -> None:
    """Raises InputError if a user's message is blank: templates of empty fields, or an empty "prompt"."""
    for message in messages:
        if message["role"] == "user" and not message["content"].strip():
            raise InputError(
                f"{origin}: the prompt is empty, so nothing is asked; remove the record"
            )


def _from_templates(source: Source, record: Record, with_reply: bool) -> Messages:
    """The conversation of a source's templates; a system message without text is left out."""
    system = fill(source.system, record)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": fill(source.prompt, record)})
    if with_reply and source.response:
        messages.append({"role": "assistant", "content": fill(source.response, record)})
    return messages


def _from_fields(record: Record) -> Messages:
    """The conversation of the fields "system", "prompt" and "response"."""
    fields = record.fields
    if "response" in fields and "prompt" not in fields:
        raise InputError(f'{record.origin}: has a "response" without a "prompt"; give both')
    messages = []
    for role, name in (("system", "system"), ("user", "prompt"), ("assistant", "response")):
        if name in fields:
            messages.append({"role": role, "content": fields[name]})
    return messages
