"""A published model's chat template: Jinja in a sandbox, rendered as `transformers` does, and who speaks where."""

import functools
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

from jaxllm.config import InputError
from jaxllm.tokenizers.marks import SECRET

# Around the text of a {% generation %} block, until `render` removes them.
_OPEN = f"{SECRET}open"
_CLOSE = f"{SECRET}close"

# What a template or a message of a wrong type can raise.
_REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)

# (start, end) characters of a text
Span = tuple[int, int]


class ChatTemplate:
    """A model's chat template, compiled."""

    def __init__(self, source: str, tokens: Mapping[str, str], origin: str):
        """Compile the source.

        Args:
            tokens: the special tokens that it may use, {"bos_token": ...}.
            origin: names the tokenizer in errors.

        Raises:
            InputError: the source is not Jinja.
        """
        self.tokens = tokens
        self.origin = origin
        try:
            self._compiled = _ENVIRONMENT.from_string(source)
        except _REFUSALS as error:
            raise InputError(
                f"{origin}: the chat template is not valid Jinja ({_one_line(error)}); repair it, or "
                "give one as chat_template.jinja"
            ) from None

    def render(
        self, messages: Sequence[Any], *, reply: bool = False, **inputs: Any
    ) -> tuple[str, list[Span]]:
        """(text of a conversation, where its {% generation %} blocks are).

        Args:
            reply: open the assistant's next turn.
            inputs: tools, documents and what else the template reads.

        Raises:
            InputError: not messages, or the template refuses them.
        """
        if not messages or not all(map(_is_message, messages)):
            raise InputError('messages: must be a list of objects with a "role"; give at least one')
        # A template may ask for any of these; a missing variable would be undefined, and not none.
        given = {"tools": None, "documents": None, **self.tokens, **inputs}
        given["add_generation_prompt"] = reply
        # Null counts as missing: templates ask whether a field is defined.
        given["messages"] = [_without_nulls(message) for message in messages]
        try:
            marked = self._compiled.render(**given)
        except _REFUSALS as error:
            raise InputError(
                f"{self.origin}: the chat template refuses the conversation ({_one_line(error)})"
            ) from None
        return _take_blocks(marked)

    def assistant_spans(
        self,
        text: str,
        ends: Sequence[Span],
        messages: Sequence[Mapping[str, Any]],
        reply: bool,
        **inputs: Any,
    ) -> list[Span]:
        """Where the assistant speaks, for a template without {% generation %} blocks.

        Each span begins after the header of a turn and ends with the first end of turn after it:

            text     <|user|>hi<|end|><|assistant|>ok<|end|><|user|>bye<|end|><|assistant|>...
            spans                                  [-------)                               [---

        Args:
            text: `render(messages, reply=reply, **inputs)`.
            ends: spans of the tokens that end a turn.

        Raises:
            InputError: the template does not show where a message begins and ends.
        """
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # Message by message, so a conversation of n turns is rendered about n times.
            start = self._start(text, number, messages, reply, **inputs)
            end = next((end for begin, end in ends if begin >= start), -1)
            previous_end = spans[-1][1] if spans else 0
            if start < previous_end or end < 0 or _certain_text(message) not in text[start:end]:
                raise InputError(
                    f"{self.origin}: the chat template does not tell where message {number + 1} (the "
                    "assistant's) begins and ends, so there is no mask; put {% generation %} ... "
                    "{% endgeneration %} around its text"
                )
            spans.append((start, end))
        return spans

    def _start(
        self,
        text: str,
        number: int,
        messages: Sequence[Mapping[str, Any]],
        reply: bool,
        **inputs: Any,
    ) -> int:
        """Where message `number` begins, -1 if that cannot be determined.

        That is after what the model is shown when it has to write the message. Some templates show the
        past differently later (without thoughts, or with tools at the last question); for these it is
        where the text changes with the content of the message:

            text             <|user|>hi<|end|><|assistant|>ok<|end|>
            shown            <|user|>hi<|end|><|assistant|>
            other content    <|user|>hi<|end|><|assistant|>zq07...<|end|>
            start                                          ^
        """
        try:
            shown, _ = self.render(messages[:number], reply=True, **inputs)
        except InputError:
            shown = SECRET  # no messages, or the template accepts only whole conversations
        if text.startswith(shown):
            return len(shown)
        # The first letter has to differ from the content's: the texts would agree in it.
        first = "q" if str(messages[number].get("content")).startswith("z") else "z"
        other = first + SECRET
        changed_messages = [*messages]
        changed_messages[number] = {**messages[number], "content": other}
        changed, _ = self.render(changed_messages, reply=reply, **inputs)
        if changed.count(other) != 1:
            return -1
        for position, (before, after) in enumerate(zip(text, changed, strict=False)):
            if before != after:
                return position
        return len(text)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str)


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None}


def _one_line(error: Exception) -> str:
    # A template's own message may have line ends.
    return " ".join(f"{error}".split())[:200]


def _take_blocks(marked: str) -> tuple[str, list[Span]]:
    """(the text without the marks of blocks, the spans of the blocks)."""
    # Blocks may be nested, and the inner one closes first:
    #   marked    <|assistant|>(ok<|end|>)    ( and ) for the marks
    #   text      <|assistant|>ok<|end|>      spans [(13, 22)]
    text = ""
    spans: list[Span] = []
    opened: list[int] = []
    for piece in re.split(f"({_OPEN}|{_CLOSE})", marked):
        if piece == _OPEN:
            opened.append(len(text))
        elif piece == _CLOSE:
            spans.append((opened.pop(), len(text)))
        else:
            text += piece
    return text, spans


def _certain_text(message: Mapping[str, Any]) -> str:
    """What a template shows of an assistant's message in any case.

    Thoughts may be dropped, and so may the text next to tool calls.
    """
    content = message.get("content")
    if message.get("tool_calls") or not isinstance(content, str):
        return ""
    return content.split("</think>")[-1].strip()


class _Generation(ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks the text between as the assistant's."""

    # Jinja would refuse the unknown tag; `transformers` knows it.
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


# Sandboxed: a downloaded template must not reach Python's objects.
_ENVIRONMENT = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
)
# Jinja's own tojson escapes HTML.
_ENVIRONMENT.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
_ENVIRONMENT.globals["raise_exception"] = _refuse
_ENVIRONMENT.globals["strftime_now"] = time.strftime
