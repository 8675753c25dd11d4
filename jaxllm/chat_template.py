"""A published model's chat template: Jinja in a sandbox, rendered as `transformers` does, and who speaks where."""

import datetime
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from jaxllm.config import InputError

# No text can spell it, and no template, normaliser or JSON encoder changes it.
SECRET = f"q{secrets.token_hex(12)}"
_OPEN, _CLOSE = f"{SECRET}open", f"{SECRET}close"

_REASONING = ("reasoning_content", "thinking", "reasoning")
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)

Span = tuple[int, int]


class ChatTemplate:
    """Jinja sources by name ("default", "tool_use"), and the special tokens that they may use, as {"bos_token": ...}.

    Raises InputError where a source is not Jinja.
    """

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str], origin: str):
        self.tokens, self.origin = tokens, origin
        try:
            self._compiled = {name: _ENVIRONMENT.from_string(source) for name, source in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{origin}: the chat template is not valid Jinja ({error}); repair it") from None

    def render(self, messages: Sequence[Any], *, reply: bool = False, **inputs: Any) -> tuple[str, list[Span]]:
        """(text of a conversation, where its {% generation %} blocks are); reply opens the assistant's next turn.

        inputs are tools, documents and what else the template reads. Raises InputError where it refuses them.
        """
        if not messages or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
            raise InputError('messages: must be a list of objects with a "role"; give at least one')
        use = "tool_use" if inputs.get("tools") is not None and "tool_use" in self._compiled else "default"
        given = {"tools": None, "documents": None, **self.tokens, **inputs, "add_generation_prompt": reply}
        try:
            marked = self._compiled[use].render(messages=[_message(m) for m in messages], **given)
        except _REFUSALS as error:
            reason = " ".join(f"{error}".split())[:200]
            raise InputError(f"{self.origin}: the chat template refuses the conversation ({reason})") from None
        return _unmarked(marked)

    def assistant_spans(
        self, text: str, ends: Sequence[Span], messages: Sequence[Mapping[str, Any]], **inputs: Any
    ) -> list[Span]:
        """Where the assistant speaks in text = render(messages, ...): from behind the header of each of its turns
        through the first of `ends`, the places of the end-of-turn tokens that the template wrote.

        Raises InputError where that cannot be told.
        """
        spans, last = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._start(text, number, messages, **inputs)
            end = next((end for begin, end in ends if begin >= start), -1)
            said = message.get("content")
            checked = isinstance(said, str) and not message.get("tool_calls")  # beside calls it may be left out
            said = str(said).split("</think>")[-1].strip() if checked else ""
            if start < last or end < 0 or said not in text[start:end]:
                raise self._unclear(number)
            spans.append((start, end))
            last = end
        return spans

    def _start(self, text: str, number: int, messages: Sequence[Mapping[str, Any]], **inputs: Any) -> int:
        """Where message `number` begins: behind what the model is shown when it has to write that message.

        A template that shows the past in another way later (thoughts dropped, tools moved to the last question) gives
        no such beginning; there it is where the text changes with the message.
        """
        if number:
            try:
                shown, _ = self.render(messages[:number], **{**inputs, "reply": True})
            except InputError:  # the template takes whole conversations only
                shown = SECRET
            if text.startswith(shown):
                return len(shown)
        mark = next(letter for letter in "zq" if not str(messages[number].get("content")).startswith(letter)) + SECRET
        probe = [*messages[:number], {**messages[number], "content": mark}, *messages[number + 1 :]]
        changed, _ = self.render(probe, **inputs)
        if changed.count(mark) != 1:
            raise self._unclear(number)
        same = (a == b for a, b in zip(text, changed, strict=False))
        return next((i for i, equal in enumerate(same) if not equal), len(text))

    def _unclear(self, number: int) -> InputError:
        return InputError(
            f"{self.origin}: the chat template does not tell where message {number + 1} (the assistant's) begins and "
            "ends, so there is no mask for it; put {% generation %} ... {% endgeneration %} around its text"
        )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without the fields that are None; thoughts also under the names that templates read."""
    fields = {name: value for name, value in message.items() if value is not None}
    if (thought := next((fields[name] for name in _REASONING if name in fields), None)) is not None:
        fields = {"thinking": thought, **fields, "reasoning_content": thought}
    return fields


def _unmarked(marked: str) -> tuple[str, list[Span]]:
    text, spans, opened = "", [], []
    for piece in re.split(f"({_OPEN}|{_CLOSE})", marked):
        if piece == _OPEN:
            opened.append(len(text))
        elif piece == _CLOSE:
            spans.append((opened.pop(), len(text)))
        else:
            text += piece
    return text, spans


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: what is between is the assistant's; marked, and the marks removed."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    # Jinja's own filter would escape HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
)
_ENVIRONMENT.filters["tojson"] = _tojson
_ENVIRONMENT.globals |= {
    "raise_exception": _refuse,
    "strftime_now": lambda form: datetime.datetime.now().strftime(form),
}
