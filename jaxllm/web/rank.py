"""People rank responses in a browser: the requests of the page, and the server that waits for their answers.

    GET  /api/rank?annotator=NAME                                             the next sample of this person
    POST /api/rank       {"annotator", "index", "ranks" or "skip", "note"}    records an answer, then as GET
    POST /api/rank/undo  {"annotator", "index"}                               takes back the newest answer, then as GET

Requests may be sent again after a lost connection: the same answer is recorded once.
"""

import collections
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxllm.config import Ending, InputError
from jaxllm.data.messages import message_text
from jaxllm.ranking.answers import Answers, Refused, clean_name
from jaxllm.ranking.orders import shown_order, unshuffle
from jaxllm.ranking.records import ranks_fault
from jaxllm.ranking.terminal import cut
from jaxllm.runtime.console import console
from jaxllm.web import pages
from jaxllm.web.errors import ApiError, show_error
from jaxllm.web.guard import Guard, Rules
from jaxllm.web.server import address_of, bind, check_key, public_address, serve, with_key

_LONGEST_NOTE = 4000
# Answers of which a person's pace is the median.
_PACE_ANSWERS = 50
# Seconds between two lines of progress.
_LINE_SECONDS = 5.0
# Seconds after the last answer in which it can still be taken back, and pages that wait learn of the end.
_LINGER_SECONDS = 4.0


class Ranking:
    """What the page asks for."""

    failure: Ending | None = None
    """Why no more answers can be recorded: the server should end."""

    def __init__(
        self,
        answers: Answers,
        seed: int,
        guidelines: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
          answers: where they are kept.
          seed: of the order in which responses are shown.
          guidelines: for the people who rank.
          clock: seconds, of which a person's pace is made.
        """
        self._answers = answers
        self._seed = seed
        self._guidelines = guidelines
        self._clock = clock
        # By annotator: the sample on their screen, since when; and seconds of their newest answers.
        self._shown: dict[str, tuple[int, float]] = {}
        self._paces: dict[str, collections.deque[float]] = {}

    def routes(self) -> list[Route]:
        """The routes below /api."""
        return [
            Route("/api/rank", self._get),
            Route("/api/rank", self._post, methods=["POST"]),
            Route("/api/rank/undo", self._undo, methods=["POST"]),
        ]

    async def _get(self, request: Request) -> Response:
        annotator = _annotator(request.query_params)
        return await self._work(lambda: None, annotator)

    async def _post(self, request: Request) -> Response:
        body = await _body(request)
        annotator = _annotator(body)
        index = self._index(body)
        note = _note(body)
        if _wants_skip(body):
            return await self._work(lambda: self._skip(index, annotator, note), annotator)
        order = shown_order(self._seed, index, len(self._answers.samples[index]["responses"]))
        ranks = unshuffle(_ranks(body, len(order)), order)
        return await self._work(lambda: self._rank(index, ranks, annotator, note), annotator)

    async def _undo(self, request: Request) -> Response:
        body = await _body(request)
        annotator = _annotator(body)
        index = self._index(body)
        return await self._work(lambda: self._answers.undo(index, annotator), annotator)

    async def _work(self, change: Callable[[], None], annotator: str) -> Response:
        """Does a change in a thread, since it waits for the disk; answers with what to show then."""

        def work() -> dict[str, Any]:
            change()
            return self._state(annotator)

        try:
            return JSONResponse(await run_in_threadpool(work))
        except Refused as error:
            raise ApiError(409, str(error)) from None
        except Ending as error:
            # The run directory's store is lost: another process works there, or nothing can be brought there.
            self.failure = error
            raise ApiError(503, str(error)) from None
        except OSError as error:
            raise ApiError(
                500,
                f"{error.filename or 'the answer'}: {error.strerror}; fix that and send it again",
            ) from None

    def _rank(self, index: int, ranks: list[int], annotator: str, note: str) -> None:
        if self._answers.rank(index, ranks, annotator, note=note):
            self._note_pace(index, annotator)

    def _skip(self, index: int, annotator: str, note: str) -> None:
        if self._answers.skip(index, annotator, note):
            self._note_pace(index, annotator)

    def _note_pace(self, index: int, annotator: str) -> None:
        shown, since = self._shown.get(annotator, (None, 0.0))
        if shown == index:
            pace = self._paces.setdefault(annotator, collections.deque(maxlen=_PACE_ANSWERS))
            pace.append(self._clock() - since)

    def _index(self, body: Mapping[str, Any]) -> int:
        index = body.get("index")
        # Not isinstance(index, int), which holds for a bool as well.
        if type(index) is not int:
            raise ApiError(400, "index: must be the number of a prompt", "index")
        if not 0 <= index < len(self._answers.samples):
            last = len(self._answers.samples) - 1
            raise ApiError(404, f"index: there is no such prompt; they are 0 to {last}", "index")
        return index

    def _state(self, annotator: str) -> dict[str, Any]:
        """What the page shows to an annotator."""
        index = self._answers.next_for(annotator)
        newest = self._answers.newest(annotator)
        agreement = self._answers.agreement()
        pace = self._paces.get(annotator)
        return {
            **self._shown_sample(index, annotator),
            "answered": self._answers.count(annotator),
            "remaining": self._answers.remaining,
            "total": self._answers.needed,
            "can_undo": newest is not None,
            "newest": newest,
            "guidelines": self._guidelines,
            "seconds_per_answer": statistics.median(pace) if pace else None,
            "done": not self._answers.remaining,
            "agreement": agreement and {"share": agreement[0], "pairs": agreement[1]},
        }

    def _shown_sample(self, index: int | None, annotator: str) -> dict[str, Any]:
        if index is None:
            self._shown.pop(annotator, None)
            return {"index": None, "messages": [], "responses": []}
        if self._shown.get(annotator, (None,))[0] != index:
            self._shown[annotator] = (index, self._clock())
        sample = self._answers.samples[index]
        messages = [{"role": m["role"], "text": message_text(m)} for m in sample["messages"]]
        order = shown_order(self._seed, index, len(sample["responses"]))
        # Only the texts: nothing says where a response is from.
        responses = [sample["responses"][i] for i in order]
        return {"index": index, "messages": messages, "responses": responses}


async def _body(request: Request) -> dict[str, Any]:
    raw = await request.body()
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body: must be JSON") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body: must be a JSON object")
    return body


def _annotator(fields: Mapping[str, Any]) -> str:
    name = fields.get("annotator")
    if not isinstance(name, str):
        raise ApiError(400, "annotator: give your name", "annotator")
    try:
        return clean_name(name)
    except InputError as error:
        raise ApiError(400, str(error), "annotator") from None


def _note(body: Mapping[str, Any]) -> str:
    note = body.get("note", "")
    if not isinstance(note, str) or len(note) > _LONGEST_NOTE:
        raise ApiError(400, f"note: must be a text of at most {_LONGEST_NOTE} characters", "note")
    # A lone surrogate becomes "?", as in the file: a retry after a restart is the same answer.
    return note.strip().encode("utf-8", "replace").decode()


def _wants_skip(body: Mapping[str, Any]) -> bool:
    skip = body.get("skip", False)
    if not isinstance(skip, bool):
        raise ApiError(400, "skip: must be true or false", "skip")
    if skip and "ranks" in body:
        raise ApiError(400, "skip: give ranks or skip, not both", "skip")
    return skip


def _ranks(body: Mapping[str, Any], num_responses: int) -> list[int]:
    fault = ranks_fault(body.get("ranks"), num_responses)
    if fault:
        raise ApiError(400, f"ranks: {fault}"[:300], "ranks")
    return body["ranks"]


def make_app(ranking: Ranking, rules: Rules) -> Guard:
    """The page and its requests, as an ASGI application."""
    app = Starlette(
        routes=[*ranking.routes(), *pages.routes("rank")],
        exception_handlers={ApiError: show_error},
    )
    return Guard(app, rules)


class _Progress:
    """Prints how far people are, and tells when all is answered."""

    def __init__(self, answers: Answers, ranking: Ranking):
        self._answers = answers
        self._ranking = ranking
        self._printed = answers.remaining
        self._printed_at = time.monotonic()
        self._complete_since: float | None = None

    def is_done(self) -> bool:
        """Whether the server should end; called often."""
        now = time.monotonic()
        remaining = self._answers.remaining
        changed = remaining != self._printed
        if changed and (not remaining or now - self._printed_at > _LINE_SECONDS):
            self._print(remaining, now)
        if remaining:
            self._complete_since = None
        elif self._complete_since is None:
            self._complete_since = now
        since = self._complete_since
        lingered = since is not None and now - since > _LINGER_SECONDS
        return lingered or self._ranking.failure is not None

    def _print(self, remaining: int, now: float) -> None:
        self._printed, self._printed_at = remaining, now
        needed = self._answers.needed
        people = self._answers.num_annotators
        console.print(f"rank: {needed - remaining} of {needed} answers, annotators: {people}")


def rank_in_browser(
    answers: Answers,
    seed: int,
    *,
    guidelines: str = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str = "",
    open_browser: bool = False,
) -> None:
    """Serves the page until all samples have the answers that they need.

    Args:
      answers: where they are kept.
      seed: of the order in which responses are shown.
      guidelines: for the people who rank.
      host: the address to listen on.
      port: 0: a free one.
      api_key: what the page must send; empty: nothing.
      open_browser: open the page on this machine.

    Raises:
      InputError: the address cannot be had, or others could use it without a key.
      StageCut: a signal came before the end; the answers so far are on disk.
    """
    if not answers.remaining:
        return
    check_key(host, api_key)
    ranking = Ranking(answers, seed, guidelines)
    try:
        bound = bind(host, port)
    except InputError as error:
        raise InputError(str(error).replace("--", "--rank.", 1)) from None
    # Whoever follows the link at once waits until the server answers.
    bound.listen()
    page = with_key("/rank", api_key)
    console.print(
        f"rank: {answers.remaining} answers needed; people give them at {public_address(bound)}{page}\n"
        "rank: every answer is saved at once; Ctrl-C stops, and the same command resumes",
        soft_wrap=True,
    )
    try:
        serve(
            make_app(ranking, Rules(host, api_key)),
            bound,
            browse=f"{address_of(bound)}{page}" if open_browser else "",
            is_done=_Progress(answers, ranking).is_done,
        )
    except KeyboardInterrupt:
        raise cut(answers) from None
    if ranking.failure:
        raise ranking.failure
    if answers.remaining:
        raise cut(answers)
