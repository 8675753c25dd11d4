"""POST /tokenize and /detokenize, GET /tokenizer_info: a model's tokenizer for programs that have none, as vLLM offers it.

A request that names no model means the first one.
"""

from typing import Annotated, Any

import pydantic
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxllm.serve.endpoint import Endpoint, in_thread
from jaxllm.serve.protocol import Count, parse
from jaxllm.serve.served import Served
from jaxllm.tokenizers.trained import Tokenizer
from jaxllm.web.errors import ApiError


class TokenizeRequest(pydantic.BaseModel):
    """POST /tokenize: of a text, or of a conversation in the model's template."""

    model_config = pydantic.ConfigDict(extra="forbid")
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    """Of a text: with the tokens that every text begins with."""
    add_generation_prompt: bool = True
    """Of a conversation: with the assistant's turn open."""


class DetokenizeRequest(pydantic.BaseModel):
    """POST /detokenize."""

    model_config = pydantic.ConfigDict(extra="forbid")
    model: str | None = None
    tokens: list[Count]


async def tokenize(endpoint: Endpoint, request: Request) -> Response:
    """Answers POST /tokenize with {tokens, count, max_model_len}."""
    body = parse(TokenizeRequest, await request.body())
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt: give either prompt or messages", "prompt")
    served = _model(endpoint, body.model)
    ids = await in_thread(_encode, served.tokenizer, body)
    length = served.config.max_length
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": length})


def _encode(tokenizer: Tokenizer, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        return tokenizer.encode_chat(body.messages, reply=body.add_generation_prompt)[0]
    text = body.prompt or ""
    # A client asks so which token a name stands for. Within a text a name is text.
    if text in tokenizer.controls:
        return [tokenizer.controls[text]]
    return [*(tokenizer.begin_ids if body.add_special_tokens else ()), *tokenizer.encode(text)]


async def detokenize(endpoint: Endpoint, request: Request) -> Response:
    """Answers POST /detokenize with {prompt}."""
    body = parse(DetokenizeRequest, await request.body())
    tokenizer = _model(endpoint, body.model).tokenizer
    return JSONResponse({"prompt": await in_thread(tokenizer.decode, body.tokens)})


async def info(endpoint: Endpoint, request: Request) -> Response:
    """Answers GET /tokenizer_info with the names of special tokens."""
    tokenizer = _model(endpoint, request.query_params.get("model")).tokenizer
    names = {token: name for name, token in tokenizer.controls.items()}
    return JSONResponse(
        {
            "vocab_size": tokenizer.vocab_size,
            "bos_token": names.get(tokenizer.start_id),
            "eos_token": names.get(tokenizer.eos_id),
            "pad_token": names.get(tokenizer.pad_id),
        }
    )


def _model(endpoint: Endpoint, name: str | None) -> Served:
    if name is None and endpoint.served:
        return next(iter(endpoint.served.values()))
    return endpoint.model(name or "")
