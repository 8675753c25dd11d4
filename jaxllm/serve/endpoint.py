"""What requests to /v1 have in common: the model, the events of a stream, and what can go wrong."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from jaxllm.config import InputError
from jaxllm.engine.config import SamplingConfig
from jaxllm.serve.driver import Busy, Driver, EngineStopped
from jaxllm.serve.generation import Piece, Wanted, generate
from jaxllm.serve.metrics import Metrics
from jaxllm.serve.protocol import Sampling
from jaxllm.serve.served import Served
from jaxllm.tokenizers.trained import Tokenizer
from jaxllm.web.errors import ApiError

Json = dict[str, Any]


class Endpoint:
    """The models, and the thread that runs them."""

    def __init__(
        self,
        served: Sequence[Served],
        driver: Driver,
        metrics: Metrics,
        seconds: float,
        tokenizers: Mapping[str, Tokenizer] | None = None,
    ):
        """seconds: longest time for a response. tokenizers: others than those of the models, to compare with."""
        self.served = {each.name: each for each in served}
        self.driver = driver
        self.metrics = metrics
        self.seconds = seconds
        self.tokenizers = dict(tokenizers or {})

    def model(self, name: str) -> Served:
        """The model of this name. Raises ApiError if there is none."""
        if name not in self.served:
            known = ", ".join(self.served) or "none"
            raise ApiError(404, f"model: {name!r:.80} is not served; known: {known}", "model")
        return self.served[name]

    async def pieces(
        self,
        served: Served,
        request: Sampling,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        num_alternatives: int,
    ) -> AsyncIterator[Piece]:
        """The pieces of the responses to a request, which the metrics count."""
        wanted = Wanted(
            prompts,
            request.n,
            sampling_of(request, max_new_tokens),
            request.stops,
            request.seed,
            num_alternatives,
            self.seconds,
        )
        begin = time.monotonic()
        is_first = True
        async for piece in generate(self.driver, served, wanted):
            if is_first:
                self.metrics.first_token(served.name, time.monotonic() - begin)
                is_first = False
            self.metrics.generated(served.name, piece.num_tokens)
            yield piece


def sampling_of(request: Sampling, max_new_tokens: int) -> SamplingConfig:
    """The rules of a request."""
    return SamplingConfig(
        max_new_tokens=max_new_tokens,
        temperature=request.temperature,
        top_k=max(request.top_k, 0),  # -1: all
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
    )


def envelope(kind: str, prefix: str, model: str) -> Json:
    """The fields that every part of a response has."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage(num_prompt: int, num_generated: int) -> Json:
    """Counts of tokens."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }


def fault(error: Exception) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, Busy):
        return ApiError(429, "too many responses are waiting; try again in a moment")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the response took too long (--timeout); ask for fewer tokens")
    if isinstance(error, EngineStopped):
        return ApiError(503, "the server is stopping, or its engine has failed; see its log")
    raise error


async def in_thread[T](function: Callable[..., T], *args: Any) -> T:
    """A function that takes time, without keeping other requests waiting."""
    return await run_in_threadpool(function, *args)


async def whole(request: Request, answer: Awaitable[Json]) -> Response:
    """The response to a request that does not stream. If the client goes, the work ends."""
    working = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(working.result())
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream(parts: AsyncIterator[Json]) -> Response:
    """A response as server-sent events. What goes wrong before the first part is an error as usual."""
    first = await anext(parts, None)
    return StreamingResponse(_events(first, parts), media_type="text/event-stream")


async def _events(first: Json | None, parts: AsyncIterator[Json]) -> AsyncIterator[str]:
    try:
        if first is not None:
            yield _event(first)
        async for part in parts:
            yield _event(part)
        yield "data: [DONE]\n\n"
    except (ApiError, InputError, TimeoutError, EngineStopped) as error:
        # The status is sent already.
        yield _event(fault(error).body())
    finally:
        # Ends what is drawn, now and not when the iterator is collected.
        await parts.aclose()  # pyright: ignore[reportAttributeAccessIssue] - of an async generator


def _event(part: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(part, ensure_ascii=False)}\n\n"
