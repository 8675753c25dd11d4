"""The application: its routes, and how errors become responses."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from jaxllm.config import InputError
from jaxllm.serve import chats, completions, token_view, tokenization, watch
from jaxllm.serve.driver import Busy, EngineStopped
from jaxllm.serve.endpoint import Endpoint, fault
from jaxllm.serve.ratings import Ratings
from jaxllm.serve.served import describe
from jaxllm.web import pages
from jaxllm.web.errors import ApiError, show_error
from jaxllm.web.guard import Guard, Rules

Handler = Callable[[Endpoint, Request], Awaitable[Response]]


def make_app(
    endpoint: Endpoint, rules: Rules, runs: Mapping[str, Path], ratings: Ratings | None = None
) -> Guard:
    """The application behind its guard.

    Args:
      endpoint: the models.
      rules: who may ask.
      runs: {name: run directory}, to be watched.
      ratings: where ratings are kept; None: nowhere.
    """

    def route(path: str, handler: Handler, method: str = "GET") -> Route:
        async def answer(request: Request) -> Response:
            response = await _answered(endpoint, handler, request)
            endpoint.metrics.request(path, response.status_code)
            return response

        return Route(path, answer, methods=[method])

    routes = [
        route("/health", _health),
        route("/metrics", _metrics),
        route("/v1/models", _list_models),
        route("/v1/models/{name:path}", _one_model),
        route("/v1/completions", completions.complete, "POST"),
        route("/v1/chat/completions", chats.chat, "POST"),
        route("/tokenize", tokenization.tokenize, "POST"),
        route("/detokenize", tokenization.detokenize, "POST"),
        route("/tokenizer_info", tokenization.info),
        route("/api/models", _describe_models),
        route("/api/tokens", token_view.view, "POST"),
        *(ratings.routes() if ratings else []),
        *watch.routes(runs),
        *pages.routes(
            *(["chat", "tokens"] if endpoint.served else []), *(["watch"] if runs else [])
        ),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        endpoint.driver.stop()

    handlers: Any = {ApiError: show_error, 404: _not_found, 405: _not_found}
    return Guard(Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan), rules)


async def _answered(endpoint: Endpoint, handler: Handler, request: Request) -> Response:
    try:
        return await handler(endpoint, request)
    except ClientDisconnect:  # before all of its request was here
        return Response(status_code=499)
    except (ApiError, InputError, Busy, TimeoutError, EngineStopped) as error:
        return fault(error).response()


async def _not_found(request: Request, error: Any) -> Response:
    what = "no such path" if error.status_code == 404 else "another method is needed"
    return ApiError(
        error.status_code, f"{request.method} {request.url.path!r:.80}: {what}"
    ).response()


async def _health(endpoint: Endpoint, _: Request) -> Response:
    if endpoint.driver.is_alive:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "the engine has failed; see the server's log"}, 503)


async def _metrics(endpoint: Endpoint, _: Request) -> Response:
    engines = {name: served.engine for name, served in endpoint.served.items()}
    gauges = {
        "jaxllm_unfinished_responses": {n: float(e.num_unfinished) for n, e in engines.items()},
        "jaxllm_cache_blocks_used": {n: float(e.num_used_blocks) for n, e in engines.items()},
    }
    return PlainTextResponse(endpoint.metrics.text(gauges))


def _as_model(endpoint: Endpoint, name: str) -> dict[str, Any]:
    served = endpoint.model(name)
    return {"id": name, "object": "model", "created": served.created, "owned_by": "jaxllm"}


async def _list_models(endpoint: Endpoint, _: Request) -> Response:
    models = [_as_model(endpoint, name) for name in endpoint.served]
    return JSONResponse({"object": "list", "data": models})


async def _one_model(endpoint: Endpoint, request: Request) -> Response:
    return JSONResponse(_as_model(endpoint, request.path_params["name"]))


async def _describe_models(endpoint: Endpoint, _: Request) -> Response:
    return JSONResponse({"models": [describe(served) for served in endpoint.served.values()]})
