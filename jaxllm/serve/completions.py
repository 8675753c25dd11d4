"""POST /v1/completions: continues texts, and with `echo` says how probable they are."""

from collections.abc import AsyncIterator, Sequence

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
from jaxllm.serve.generation import check_length
from jaxllm.serve.logprobs import CompletionLogprobs, join
from jaxllm.serve.protocol import MOST_ALTERNATIVES, CompletionRequest, parse
from jaxllm.serve.served import Served
from jaxllm.web.errors import ApiError

# OpenAI's.
_DEFAULT_TOKENS = 16


async def complete(endpoint: Endpoint, request: Request) -> Response:
    """Answers a request."""
    body = parse(CompletionRequest, await request.body())
    if body.best_of not in (None, body.n):
        raise ApiError(400, f"best_of: only n, which is {body.n}, is supported", "best_of")
    served = endpoint.model(body.model)
    prompts = [await in_thread(_ids_of, prompt, served) for prompt in body.prompts]
    longest = check_length(served, max(map(len, prompts)), body.max_tokens, _DEFAULT_TOKENS)
    endpoint.metrics.prompt(served.name, sum(map(len, prompts)))
    task = _Completion(endpoint, served, body, prompts, longest)
    return await (stream(task.parts()) if body.stream else whole(request, task.answer()))


def _ids_of(prompt: str | list[int], served: Served) -> list[int]:
    """The tokens of a prompt. Raises ApiError if it has some that do not exist."""
    tokenizer = served.tokenizer
    if isinstance(prompt, str):
        return tokenizer.prompt(prompt)
    # A model's vocabulary may be padded.
    largest = max(prompt)
    if largest >= served.config.vocab_size:
        raise ApiError(
            400,
            f"prompt: there is no token {largest}; they are 0 to {served.config.vocab_size - 1}",
            "prompt",
        )
    return prompt


class _Completion:
    """The answer to one request."""

    def __init__(
        self,
        endpoint: Endpoint,
        served: Served,
        body: CompletionRequest,
        prompts: Sequence[Sequence[int]],
        longest: int,
    ):
        self._endpoint = endpoint
        self._served = served
        self._body = body
        self._prompts = prompts
        self._longest = longest
        self._envelope = envelope("text_completion", "cmpl", served.name)
        self._logprobs = [
            CompletionLogprobs(served.tokenizer, body.logprobs or 0)
            for _ in range(len(prompts) * body.n)
        ]
        self._num_generated = 0

    async def answer(self) -> Json:
        """The whole response."""
        count = len(self._logprobs)
        texts, finishes = [""] * count, ["length"] * count
        logprobs: list[list[Json]] = [[] for _ in range(count)]
        async for choice in self._choices():
            i = choice["index"]
            texts[i] += choice["text"]
            finishes[i] = choice["finish_reason"] or finishes[i]
            if choice["logprobs"]:
                logprobs[i].append(choice["logprobs"])
        choices = [
            {
                "index": i,
                "text": texts[i],
                "logprobs": join(logprobs[i]) if logprobs[i] else None,
                "finish_reason": finishes[i],
            }
            for i in range(count)
        ]
        return {**self._envelope, "choices": choices, "usage": self._usage()}

    async def parts(self) -> AsyncIterator[Json]:
        """The parts of a stream."""
        async for choice in self._choices():
            yield {**self._envelope, "choices": [choice]}
        if self._body.counts_tokens:
            yield {**self._envelope, "choices": [], "usage": self._usage()}

    def _usage(self) -> Json:
        return usage(sum(map(len, self._prompts)), self._num_generated)

    async def _choices(self) -> AsyncIterator[Json]:
        """What is known of each response, part by part."""
        if self._body.echo:
            for number, prompt in enumerate(self._prompts):
                for choice in await self._echo(number, prompt):
                    yield choice
        if not self._longest:
            for i in range(len(self._logprobs)):
                yield self._choice(i, "", [], "length")
            return
        count = self._body.logprobs or 0
        pieces = self._endpoint.pieces(
            self._served, self._body, self._prompts, self._longest, count
        )
        async for piece in pieces:
            self._num_generated += piece.num_tokens
            if piece.text or piece.draws or piece.finish:
                yield self._choice(piece.number, piece.text, piece.draws, piece.finish)

    def _choice(self, i: int, text: str, draws: Sequence[Draw], finish: str | None) -> Json:
        wants = self._body.logprobs is not None
        logprobs = self._logprobs[i].add(draws) if wants and draws else None
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": finish}

    async def _echo(self, number: int, prompt: Sequence[int]) -> list[Json]:
        """A prompt as the beginning of each of its responses, with its probabilities if they are asked for."""
        tokenizer = self._served.tokenizer
        text = tokenizer.decode(prompt)
        draws: list[Draw] = []
        if self._body.logprobs is not None:
            engine = self._served.engine
            # None or all, so that few programs are compiled.
            most = min(MOST_ALTERNATIVES, self._served.config.vocab_size)
            count = most if self._body.logprobs else 0
            draws = await self._endpoint.driver.call(lambda: engine.score(prompt, count))
        # A prompt that came as text has begun with a token that the client has not sent.
        added = len(tokenizer.begin_ids) if isinstance(self._body.prompts[number], str) else 0
        choices = []
        for i in range(number * self._body.n, (number + 1) * self._body.n):
            choice = self._choice(i, text, draws[max(added - 1, 0) :], None)
            if not added and self._body.logprobs is not None:
                first = CompletionLogprobs(tokenizer, 0).add_first(prompt[0])
                choice["logprobs"] = join([first, *([choice["logprobs"]] if draws else [])])
            choices.append(choice)
        return choices
