"""Conversations in JSON: messages with a role, a text and the functions they call; what they say and ask."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.config import InputError

Messages = list[dict[str, Any]]
ROLES = ("system", "user", "assistant", "tool")
_TEXTS = ("content", "reasoning_content", "tool_call_id", "name")
# What a message may have besides its role; which of them a model is shown is its chat template's matter.
_PARTS = ("content", "reasoning_content", "tool_calls", "tool_call_id", "name")
# One spelling of JSON values, dates of a table included; json.dumps would make an encoder each time.
as_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message, the functions it calls included; it may have only one of the two."""
    calls = message.get("tool_calls")
    return (message.get("content") or "") + (as_json(calls) if calls else "")


def question(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the model is asked: one message as it is, or all messages before the reply, in JSON."""
    asked = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    return message_text(asked[0]) if len(asked) == 1 else as_json(asked)


def known_parts(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """The messages with what a template may show of them, in one order; what is absent is left out."""
    return [
        {name: m[name] for name in ("role", *_PARTS) if m.get(name) is not None} for m in messages
    ]


def check_messages(messages: Any, origin: str) -> None:
    """Raises InputError "origin: what is wrong" where these are no messages, or the last is an empty reply."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f'{origin}: "messages" must be a list of objects with role and content')
    for message in messages:
        _check_message(message, origin)
    if messages and messages[-1]["role"] == "assistant" and not message_text(messages[-1]):
        raise InputError(
            f"{origin}: the last reply is empty, so there is nothing to learn; remove the line"
        )


def _check_message(message: Mapping[str, Any], origin: str) -> None:
    calls, content, role = (message.get(name) for name in ("tool_calls", "content", "role"))
    if calls is not None and not (
        isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    ):
        raise InputError(f'{origin}: "tool_calls" must be a list of objects, not {calls!r:.60}')
    may_be_silent = role == "assistant" and bool(calls)
    if role not in ROLES or not (isinstance(content, str) or (content is None and may_be_silent)):
        needs = f"a role ({', '.join(ROLES)}) and content (a string)"
        raise InputError(f"{origin}: a message needs {needs}: {message!r:.80}")
    if wrong := next((name for name in _TEXTS if not isinstance(message.get(name, ""), str)), ""):
        raise InputError(
            f'{origin}: "{wrong}" of a message must be a string, not {message[wrong]!r:.60}'
        )


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """What an annotator gets as the prompt: what the last message says, which may be a tool's result."""
    return message_text(messages[-1])
