"""POST /api/ratings: a comparison on the chat page as a ranking, in the file that a reward model is trained on.

    RUN_DIR/ratings/rankings.jsonl      one line for each, as `jaxllm rank` writes them

`jaxllm rank CONFIG --rank.annotator file:RUN_DIR/ratings/rankings.jsonl` takes them over.
"""

import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxllm.config import InputError
from jaxllm.ranking.answer_files import append_line
from jaxllm.ranking.answers import clean_name
from jaxllm.ranking.records import now, ranks_fault, split_of
from jaxllm.runtime.store.working import make_durable
from jaxllm.serve.endpoint import in_thread
from jaxllm.serve.protocol import parse
from jaxllm.web.errors import ApiError


class Message(pydantic.BaseModel):
    """A turn of the conversation."""

    model_config = pydantic.ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class Rating(pydantic.BaseModel):
    """What the page sends."""

    model_config = pydantic.ConfigDict(extra="forbid")
    messages: Annotated[list[Message], Field(min_length=1)]
    responses: Annotated[list[str], Field(min_length=2, max_length=26)]
    ranks: list[Annotated[int, Field(strict=True)]]
    annotator: str


class Ratings:
    """The file, which grows by a line for each rating."""

    def __init__(self, path: Path, held_out: float = 0.1):
        """held_out: share of the prompts that are kept for evaluation."""
        self._path = path
        self._held_out = held_out
        self._lock = threading.Lock()
        self._newest: Rating | None = None

    def routes(self) -> list[Route]:
        """The routes below /api."""
        return [Route("/api/ratings", self._post, methods=["POST"])]

    async def _post(self, request: Request) -> Response:
        rating = parse(Rating, await request.body())
        fault = ranks_fault(rating.ranks, len(rating.responses))
        if fault:
            raise ApiError(400, f"ranks: {fault}"[:300], "ranks")
        try:
            line = self._line(rating)
        except InputError as error:
            raise ApiError(400, str(error), "annotator") from None
        await in_thread(self._append, rating, line)
        return JSONResponse({"path": str(self._path)})

    def _line(self, rating: Rating) -> dict[str, Any]:
        messages = [message.model_dump() for message in rating.messages]
        return {
            "messages": messages,
            "responses": rating.responses,
            "ranks": rating.ranks,
            "annotator": clean_name(rating.annotator),
            "simulated": False,
            "time": now(),
            "split": split_of(messages, self._held_out),
        }

    def _append(self, rating: Rating, line: dict[str, Any]) -> None:
        with self._lock:
            if rating == self._newest:  # sent again, after its response was lost
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            append_line(self._path, line)
            make_durable(self._path)
            self._newest = rating
