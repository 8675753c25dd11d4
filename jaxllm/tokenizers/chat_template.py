"""A published model's chat template: Jinja in a sandbox, rendered as `transformers` does, and who speaks where."""

import functools
import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

from jaxllm.config import InputError

# No text can spell it, and no template, normaliser or JSON encoder changes it.
SECRET = f"q{secrets.token_hex(12)}"
_OPEN, _CLOSE = f"{SECRET}open", f"{SECRET}close"

_REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)

Span = tuple[int, int]


class ChatTemplate:
    """A Jinja source, and the special tokens that it may use, as {"bos_token": ...}; InputError where it is not Jinja."""

    def __init__(self, source: str, tokens: Mapping[str, str], origin: str):
        self.tokens, self.origin = tokens, origin
        try:
            self._compiled = _ENVIRONMENT.from_string(source)
        except _REFUSALS as error:
            reason, mend = (
                " ".join(f"{error}".split())[:200],
                "repair it, or give one as chat_template.jinja",
            )
            raise InputError(
                f"{origin}: the chat template is not valid Jinja ({reason}); {mend}"
            ) from None

    def render(
        self, messages: Sequence[Any], *, reply: bool = False, **inputs: Any
    ) -> tuple[str, list[Span]]:
        """(text of a conversation, where its {% generation %} blocks are); reply opens the assistant's next turn.

        inputs are tools, documents and what else the template reads. Raises InputError where it refuses them.
        """
        if not messages or not all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages
        ):
            raise InputError('messages: must be a list of objects with a "role"; give at least one')
        given = {
            "tools": None,
            "documents": None,
            **self.tokens,
            **inputs,
            "add_generation_prompt": reply,
        }
        filled = [
            {name: value for name, value in message.items() if value is not None}
            for message in messages
        ]
        try:
            marked = self._compiled.render(messages=filled, **given)
        except _REFUSALS as error:
            reason = " ".join(f"{error}".split())[:200]
            raise InputError(
                f"{self.origin}: the chat template refuses the conversation ({reason})"
            ) from None
        text, spans, opened = "", [], []
        for piece in re.split(f"({_OPEN}|{_CLOSE})", marked):
            if piece == _OPEN:
                opened.append(len(text))
            elif piece == _CLOSE:
                spans.append((opened.pop(), len(text)))
            else:
                text += piece
        return text, spans

    def assistant_spans(
        self, text: str, ends: Sequence[Span], messages: Sequence[Mapping[str, Any]], **inputs: Any
    ) -> list[Span]:
        """Where the assistant speaks in text = render(messages, ...): from behind the header of each of its turns
        through the first of `ends`, the places of the end-of-turn tokens. Raises InputError where that cannot be told.
        """
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._start(text, number, messages, **inputs)
            end = next((end for begin, end in ends if begin >= start), -1)
            said = (
                None if message.get("tool_calls") else message.get("content")
            )  # beside calls it may be left out
            said = said.split("</think>")[-1].strip() if isinstance(said, str) else ""
            if start < (spans[-1][1] if spans else 0) or end < 0 or said not in text[start:end]:
                raise InputError(
                    f"{self.origin}: the chat template does not tell where message {number + 1} (the assistant's) "
                    "begins and ends, so there is no mask; put {% generation %} ... {% endgeneration %} around its text"
                )
            spans.append((start, end))
        return spans

    def _start(
        self, text: str, number: int, messages: Sequence[Mapping[str, Any]], **inputs: Any
    ) -> int:
        """Where message `number` begins: behind what the model is shown when it has to write that message.

        A template that shows the past in another way later (thoughts dropped, tools moved to the last question) gives
        no such beginning; there it is where the text changes with the message. -1 where that cannot be told.
        """
        try:
            shown, _ = self.render(messages[:number], **{**inputs, "reply": True})
        except InputError:  # no messages, or the template takes whole conversations only
            shown = SECRET
        if text.startswith(shown):
            return len(shown)
        mark = (
            next(
                letter
                for letter in "zq"
                if not str(messages[number].get("content")).startswith(letter)
            )
            + SECRET
        )
        probe = [*messages[:number], {**messages[number], "content": mark}, *messages[number + 1 :]]
        changed, _ = self.render(probe, **inputs)
        same = next(
            (i for i, (a, b) in enumerate(zip(text, changed, strict=False)) if a != b), len(text)
        )
        return same if changed.count(mark) == 1 else -1


class _Generation(ext.Extension):
    """{% generation %} ... {% endgeneration %}: what is between is the assistant's; marked, and the marks removed."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


_OPTIONS = {
    "trim_blocks": True,
    "lstrip_blocks": True,
    "extensions": [_Generation, ext.loopcontrols],
}
_ENVIRONMENT = sandbox.ImmutableSandboxedEnvironment(**_OPTIONS)
_ENVIRONMENT.filters["tojson"] = functools.partial(
    json.dumps, ensure_ascii=False
)  # Jinja's own escapes HTML
_ENVIRONMENT.globals |= {"raise_exception": _refuse, "strftime_now": time.strftime}
