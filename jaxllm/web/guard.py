"""Middleware in front of every request: host names, origins, the API key, the size and the time of a body.

A page of somebody else in the user's browser can send requests to this machine. Two checks refuse them:

Host     a name that leads here by another's DNS server (DNS rebinding) is not one of ours
Origin   a request that changes something comes from one of our own pages, or from no page at all
"""

import asyncio
import dataclasses
import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from jaxllm.web.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Pages and their files hold no data.
_DATA = ("/v1/", "/api/", "/metrics", "/tokenize", "/detokenize")

# Everything a page loads comes from here, and nobody may put it into a frame.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Who may ask for what."""

    host: str
    """The address that the server listens on."""
    api_key: str = ""
    """What clients must send; empty: nothing."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names of this machine."""
    max_body: int = 2**20
    """Bytes of a request."""
    body_seconds: float = 30.0
    """Longest pause while a body is received."""

    def allows_host(self, header: str) -> bool:
        """Whether a Host header names this machine."""
        name = _without_port(header)
        if name in ("localhost", self.host.lower(), *map(str.lower, self.allowed_hosts)):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            # Where others may ask, they use the machine's name.
            return not is_local(self.host) and name == socket.gethostname().lower()
        return True  # no DNS server has been asked


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _without_port(header: str) -> str:
    """localhost:8000 -> localhost, [::1]:8000 -> ::1."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


class Guard:
    """Refuses what `rules` do not allow, before the application sees it."""

    def __init__(self, app: Any, rules: Rules):
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no page uses web sockets
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    # A response may have a policy of its own, such as that of a report.
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await error.response()(scope, receive, send_guarded)
            return
        await self._app(scope, self._bounded(receive), send_guarded)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._rules.allows_host(host):
            raise ApiError(
                403,
                f"Host {host!r:.80} is not a name of this server; add it with --allowed-hosts",
            )
        if scope["method"] not in ("GET", "HEAD"):
            self._check_origin(headers, host)
        if self._needs_key(scope["path"]):
            self._check_key(headers)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._rules.max_body:
            raise self._too_large()

    def _check_origin(self, headers: Headers, host: str) -> None:
        origin = headers.get("origin")
        # Programs send none; "null" is that of a page without one.
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, f"Origin {origin!r:.80}: pages of other sites may change nothing")

    def _needs_key(self, path: str) -> bool:
        """Pages ask for data with the key."""
        return bool(self._rules.api_key) and path.startswith(_DATA)

    def _check_key(self, headers: Headers) -> None:
        kind, _, key = headers.get("authorization", "").partition(" ")
        # Compared in constant time: how long it takes tells nothing of the key.
        same = hmac.compare_digest(key.strip().encode(), self._rules.api_key.encode())
        if kind.lower() != "bearer" or not same:
            raise ApiError(401, "Authorization: send 'Bearer KEY' with the API key of this server")

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than {self._rules.max_body} bytes; shorten it, or raise --max-body-kib",
        )

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` of a body that is neither too large, whatever its header says, nor too slow."""
        received = 0
        is_complete = False

        async def bounded() -> Message:
            nonlocal received, is_complete
            if is_complete:  # what follows is the end of the connection
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._rules.body_seconds)
            except TimeoutError:
                raise ApiError(408, "the request did not arrive in time; send it again") from None
            received += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if received > self._rules.max_body:
                raise self._too_large()
            return message

        return bounded
