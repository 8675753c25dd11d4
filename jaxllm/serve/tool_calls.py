"""Calls of tools in a response, in the formats of the families that are imported.

    Qwen, Hermes   <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>, text before it, several one after another
    Llama 3        {"name": "add", "parameters": {"a": 1}}, nothing else; several with ; between them
    Mistral        [{"name": "add", "arguments": {"a": 1}}], after a token that has no text

What is none of these is text.
"""

import json
import secrets
from collections.abc import Sequence
from typing import Any

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"
_PYTHON = "<|python_tag|>"


class ToolCallReader:
    """Text of a response as it comes: text that may be a call is held back until the end."""

    def __init__(self) -> None:
        self._held = ""
        self._may_begin = True  # nothing but space has come yet

    def add(self, text: str) -> str:
        """The text that is certainly none of a call."""
        self._held += text
        if self._may_begin:
            begin = self._held.lstrip()
            if not begin or begin[0] in "{[" or _PYTHON.startswith(begin[: len(_PYTHON)]):
                return ""
            self._may_begin = False
        position = self._held.find(_OPEN)
        if position < 0:
            position = len(self._held) - _overlap(self._held)
        certain, self._held = self._held[:position], self._held[position:]
        return certain

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """(the text that is left, the calls) at the end of the response."""
        calls = parse(self._held)
        return ("", calls) if calls else (self._held, [])


def _overlap(text: str) -> int:
    """How many characters at the end may be the beginning of a call."""
    return next((n for n in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:n])), 0)


def parse(text: str) -> list[dict[str, Any]]:
    """The calls that a text consists of, as OpenAI's protocol has them; none if it is anything else."""
    found = _hermes(text) if _OPEN in text else _json_objects(text)
    if not found or not all(map(_is_call, found)):
        return []
    return [_as_sent(call, index) for index, call in enumerate(found)]


def _hermes(text: str) -> list[Any] | None:
    calls = []
    for part in text.split(_OPEN)[1:]:
        inside, _, after = part.partition(_CLOSE)
        if after.strip():
            return None
        calls.append(_json(inside))
    return calls


def _json_objects(text: str) -> list[Any] | None:
    text = text.strip().removeprefix(_PYTHON).strip()
    whole = _json(text)
    if isinstance(whole, list):
        return whole
    if whole is not None:
        return [whole]
    return [_json(part) for part in text.split(";")]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_call(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return False
    return isinstance(_arguments(value), dict)


def _arguments(call: dict[str, Any]) -> Any:
    return call.get("arguments", call.get("parameters"))


def _as_sent(call: dict[str, Any], index: int) -> dict[str, Any]:
    arguments = json.dumps(_arguments(call), ensure_ascii=False)
    return {
        "index": index,
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }


def for_template(calls: Sequence[Any]) -> list[Any]:
    """Calls of an earlier message as templates want them: their arguments are objects, and no text."""
    return [_with_object(call) for call in calls]


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments = _json(function["arguments"])
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
