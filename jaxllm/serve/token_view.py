"""POST /api/tokens: a text as a model sees it: its tokens, how probable each was, and what else was likely."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxllm.engine.request import Draw
from jaxllm.serve.endpoint import Endpoint, in_thread
from jaxllm.serve.protocol import parse
from jaxllm.tokenizers.trained import RULE_OF_THUMB, Tokenizer, compression
from jaxllm.web.errors import ApiError

_MOST_ALTERNATIVES = 20


class TokensRequest(pydantic.BaseModel):
    """What the page sends."""

    model_config = pydantic.ConfigDict(extra="forbid")
    model: str
    text: str
    alternatives: Annotated[int, Field(strict=True, ge=0, le=_MOST_ALTERNATIVES)] = 5


async def view(endpoint: Endpoint, request: Request) -> Response:
    """Answers a request with

    tokens          [{id, bytes, text, logprob, alternatives: [{id, bytes, text, logprob}]}], the likeliest first
    logprob         of the whole text, in nats
    compression     `tokenizers.compression` of the text
    others          {name of another tokenizer: {count, compression}}, for the same text
    rule_of_thumb   tokens that publishers count for 750 English words or 500 Chinese characters
    """
    body = parse(TokensRequest, await request.body())
    served = endpoint.model(body.model)
    tokenizer = served.tokenizer
    ids = await in_thread(tokenizer.encode, body.text)
    limit = served.config.max_length
    if not 0 < len(ids) <= limit:
        raise ApiError(
            400, f"text: has {len(ids)} tokens, and the context holds 1 to {limit}", "text"
        )
    row = [tokenizer.start_id, *ids]
    draws = await endpoint.driver.call(lambda: served.engine.score(row, body.alternatives))
    return JSONResponse(
        {
            "tokens": [_token(tokenizer, draw) for draw in draws],
            "logprob": math.fsum(draw.logprob for draw in draws),
            "compression": await in_thread(compression, tokenizer, [body.text]),
            "others": await in_thread(_others, endpoint.tokenizers, body.text),
            "rule_of_thumb": RULE_OF_THUMB,
        }
    )


def _others(tokenizers: Mapping[str, Tokenizer], text: str) -> dict[str, Any]:
    return {
        name: {"count": len(each.encode(text)), "compression": compression(each, [text])}
        for name, each in tokenizers.items()
    }


def _token(tokenizer: Tokenizer, draw: Draw) -> dict[str, Any]:
    others = [{**_text(tokenizer, each.id), "logprob": each.logprob} for each in draw.alternatives]
    return {**_text(tokenizer, draw.id), "logprob": draw.logprob, "alternatives": others}


def _text(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    """A token: its number, its bytes in hexadecimal, and its text if they are whole characters."""
    data = tokenizer.token_bytes(token)
    return {"id": token, "bytes": data.hex(), "text": _whole(data)}


def _whole(data: bytes) -> str | None:
    try:
        return data.decode() or None
    except UnicodeDecodeError:
        return None
