"""What clients may send, in OpenAI's protocol, and what of it is refused.

A field that would change the response and that nothing here heeds is refused: a client learns of it before it trusts the
response.
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jaxllm.config.ranges import PositiveFloat, Proportion
from jaxllm.web.errors import ApiError

MOST_CHOICES = 128
"""Responses to one prompt."""
MOST_ALTERNATIVES = 20
"""Alternatives of a token."""
_MOST_STOPS = 16
_MOST_PROMPTS = 256

Count = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenIds = Annotated[list[Count], Field(min_length=1)]


class StreamOptions(pydantic.BaseModel):
    """Of a response that streams."""

    model_config = pydantic.ConfigDict(extra="forbid")
    include_usage: bool = False
    """Send the counts of tokens at the end."""
    include_obfuscation: bool = False
    """Accepted; nothing is obfuscated."""


class Sampling(pydantic.BaseModel):
    """What both kinds of requests have in common."""

    model_config = pydantic.ConfigDict(extra="forbid")

    model: str
    n: Annotated[int, Field(strict=True, ge=1, le=MOST_CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: Annotated[int, Field(strict=True)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Not OpenAI's, but of other servers of open models.
    top_k: Annotated[int, Field(strict=True, ge=-1, le=2**31 - 1)] = 0
    min_p: Proportion = 0.0
    repetition_penalty: PositiveFloat = 1.0
    # Without influence on a response.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def stops(self) -> list[str]:
        """The stop texts."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def counts_tokens(self) -> bool:
        """Whether the counts of tokens end the stream."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=_MOST_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=_MOST_PROMPTS)]
    )
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MOST_ALTERNATIVES)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(strict=True, ge=1)] | None = None
    suffix: Literal[""] | None = None
    logit_bias: dict[str, Literal[0]] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, of which there may be one."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType] - one prompt of token ids
        return self.prompt  # pyright: ignore[reportReturnType]


class ResponseFormat(pydantic.BaseModel):
    """How the response is written: as text."""

    type: Literal["text"] = "text"


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MOST_ALTERNATIVES)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logit_bias: dict[str, Literal[0]] | None = None


def parse[T: pydantic.BaseModel](kind: type[T], body: bytes) -> T:
    """The request in a body.

    Raises:
      ApiError: it is not JSON, or a field is missing, unknown or out of range.
    """
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _fault(error) from None


def _fault(error: pydantic.ValidationError) -> ApiError:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # Of a union the names of its types follow, which no client knows.
    place = [str(part) for part in first["loc"]]
    field = place[0] if place else ""
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body must be JSON: {first['msg']}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field}: is not supported; leave it out", ".".join(place))
    if not field:
        return ApiError(400, "the body must be a JSON object")
    return ApiError(400, f"{field}: {first['msg']}", field)
