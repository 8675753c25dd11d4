"""Errors as HTTP responses, in the form that OpenAI's clients read."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """Ends a request with a status and one line that says what is wrong and what to do."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        """The field that is wrong."""

    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = _KINDS.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": None}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The response that says so."""
        # A client that waits a little finds the queue shorter.
        headers = {"Retry-After": "1"} if self.status == 429 else None
        return JSONResponse(self.body(), self.status, headers)


async def show_error(_: Request, error: Exception) -> Response:
    """Starlette's handler of an `ApiError` that a route has raised."""
    assert isinstance(error, ApiError)
    return error.response()
