"""Conversations: what their messages say, and what they ask. `schema` checks the messages."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

# One spelling of JSON values, including the dates of a table. json.dumps would make an encoder for each call.
as_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message, followed by the functions it calls; it may have only one of the two."""
    calls = message.get("tool_calls")
    return (message.get("content") or "") + (as_json(calls) if calls else "")


def question(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the model is asked: a single message's text, or all messages before the reply as JSON."""
    asked = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    return message_text(asked[0]) if len(asked) == 1 else as_json(asked)


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt that an annotator gets: the text of the last message, which may be a tool's result."""
    return message_text(messages[-1])
