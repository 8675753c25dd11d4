"""POST /v1/chat/completions: answers conversations in the model's own chat template, and reads its calls of tools."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxllm.engine.request import Draw
from jaxllm.serve.endpoint import (
    Endpoint,
    Json,
    envelope,
    in_thread,
    stream,
    usage,
    whole,
)
from jaxllm.serve.generation import Piece, check_length
from jaxllm.serve.logprobs import chat_logprobs
from jaxllm.serve.protocol import ChatRequest, parse
from jaxllm.serve.served import Served
from jaxllm.serve.tool_calls import ToolCallReader, for_template
from jaxllm.web.errors import ApiError

# What a template reads of a message.
_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


async def chat(endpoint: Endpoint, request: Request) -> Response:
    """Answers a request."""
    body = parse(ChatRequest, await request.body())
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", "top_logprobs")
    served = endpoint.model(body.model)
    ids = await in_thread(_encode, body, served)
    wanted = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    longest = check_length(served, len(ids), wanted, served.config.max_length)
    if not longest:
        raise ApiError(400, "max_tokens: must be at least 1", "max_tokens")
    endpoint.metrics.prompt(served.name, len(ids))
    task = _Chat(endpoint, served, body, ids, longest)
    return await (stream(task.parts()) if body.stream else whole(request, task.answer()))


def _encode(body: ChatRequest, served: Served) -> list[int]:
    """The conversation with the assistant's turn open, as tokens.

    Raises:
      ApiError: a message is of another form.
      InputError: the model's template refuses the conversation.
    """
    messages = [_message(message, i) for i, message in enumerate(body.messages)]
    tools = {} if not body.tools or body.tool_choice == "none" else {"tools": body.tools}
    ids, _ = served.tokenizer.encode_chat(messages, reply=True, **tools)
    return ids


def _message(message: Mapping[str, Any], i: int) -> Json:
    """A message as templates read it: its content is text."""
    found = {name: message[name] for name in _FIELDS if message.get(name) is not None}
    if found.get("role") == "developer":  # OpenAI's newer name
        found["role"] = "system"
    content = found.get("content")
    if isinstance(content, list):
        found["content"] = "".join(_part(part, i) for part in content)
    if isinstance(found.get("tool_calls"), list):
        found["tool_calls"] = for_template(found["tool_calls"])
        found.setdefault("content", "")
    return found


def _part(part: Any, i: int) -> str:
    if (
        not isinstance(part, dict)
        or part.get("type") != "text"
        or not isinstance(part.get("text"), str)
    ):
        raise ApiError(
            400, f"messages: message {i + 1}: only parts of type text are supported", "messages"
        )
    return part["text"]


class _Chat:
    """The answer to one request."""

    def __init__(
        self, endpoint: Endpoint, served: Served, body: ChatRequest, ids: list[int], longest: int
    ):
        self._endpoint = endpoint
        self._served = served
        self._body = body
        self._ids = ids
        self._longest = longest
        # Without tools in the request nothing is read as a call.
        self._tools = [ToolCallReader() if body.tools else None for _ in range(body.n)]
        self._num_generated = 0

    async def answer(self) -> Json:
        """The whole response."""
        count = self._body.n
        texts, finishes = [""] * count, ["length"] * count
        calls: list[list[Json]] = [[] for _ in range(count)]
        draws: list[list[Draw]] = [[] for _ in range(count)]
        async for piece, text, new_calls in self._pieces():
            i = piece.number
            texts[i] += text
            calls[i] += new_calls
            draws[i] += piece.draws
            finishes[i] = self._finish(piece, new_calls) or finishes[i]
        choices = [
            {
                "index": i,
                "message": _answer_message(texts[i], calls[i]),
                "logprobs": self._logprobs(draws[i]),
                "finish_reason": finishes[i],
            }
            for i in range(count)
        ]
        head = envelope("chat.completion", "chatcmpl", self._served.name)
        return {**head, "choices": choices, "usage": self._usage()}

    async def parts(self) -> AsyncIterator[Json]:
        """The parts of a stream."""
        head = envelope("chat.completion.chunk", "chatcmpl", self._served.name)
        has_begun: set[int] = set()
        async for piece, text, calls in self._pieces():
            delta: Json = {}
            if piece.number not in has_begun:
                has_begun.add(piece.number)
                delta = {"role": "assistant", "content": ""}
            if text:
                delta["content"] = text
            if calls:
                delta["tool_calls"] = calls
            finish = self._finish(piece, calls)
            logprobs = self._logprobs(piece.draws) if piece.draws else None
            if delta or finish or logprobs:
                choice = {"index": piece.number, "delta": delta, "logprobs": logprobs}
                yield {**head, "choices": [{**choice, "finish_reason": finish}]}
        if self._body.counts_tokens:
            yield {**head, "choices": [], "usage": self._usage()}

    async def _pieces(self) -> AsyncIterator[tuple[Piece, str, list[Json]]]:
        """(piece, its text that is none of a call, the calls that end the response)."""
        count = self._body.top_logprobs or 0
        pieces = self._endpoint.pieces(self._served, self._body, [self._ids], self._longest, count)
        async for piece in pieces:
            self._num_generated += piece.num_tokens
            reader = self._tools[piece.number]
            if reader is None:
                yield piece, piece.text, []
                continue
            text, calls = reader.add(piece.text), []
            if piece.finish:
                rest, calls = reader.finish()
                text += rest
            yield piece, text, calls

    def _finish(self, piece: Piece, calls: Sequence[Json]) -> str | None:
        return "tool_calls" if calls else piece.finish

    def _logprobs(self, draws: Sequence[Draw]) -> Json | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._served.tokenizer, draws, self._body.top_logprobs or 0)

    def _usage(self) -> Json:
        return usage(len(self._ids), self._num_generated)


def _answer_message(text: str, calls: Sequence[Json]) -> Json:
    message: Json = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message["content"] = text or None
        message["tool_calls"] = [
            {name: value for name, value in call.items() if name != "index"} for call in calls
        ]
    return message
