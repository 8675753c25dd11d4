"""A server from its socket to its end."""

import asyncio
import errno
import socket
import webbrowser
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import uvicorn

from jaxllm.config import InputError
from jaxllm.web.guard import is_local

# Seconds that responses have to finish when the server is told to stop.
_GRACE = 10


def bind(host: str, port: int) -> socket.socket:
    """The socket to listen on; port 0: a free one.

    Raises:
      InputError: the address or the port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"--port: {port} is in use; give another one, or 0 for a free one"
            ) from None
        raise InputError(f"--host: cannot listen on {host} port {port}: {error.strerror}") from None
    except OverflowError:
        raise InputError(f"--port: must be 0 to 65535, not {port}") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """The address as a browser on this machine takes it: http://127.0.0.1:8000."""
    host, port = bound.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    return f"http://{'localhost' if host in ('0.0.0.0', '::') else name}:{port}"


def public_address(bound: socket.socket) -> str:
    """The address as other machines take it, where they can: http://HOSTNAME:8000."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        return f"http://{socket.gethostname()}:{port}"
    return address_of(bound)


def with_key(page: str, api_key: str) -> str:
    """A page's address with the key in its fragment, which browsers do not send; api_key "": there is none."""
    return f"{page}#key={quote(api_key, safe='')}" if api_key else page


def serve(
    app: Any,
    bound: socket.socket,
    *,
    browse: str = "",
    is_done: Callable[[], bool] = lambda: False,
) -> None:
    """Serves until a signal, or until `is_done`.

    Args:
      app: the application.
      bound: the socket to listen on; it is closed at the end.
      browse: an address to open in the user's browser, once the server answers; empty: none.
      is_done: asked twice a second.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
        h11_max_incomplete_event_size=2**16,
    )
    server = uvicorn.Server(config)
    # Reading a request is cheap, but each holds a file open.
    with bound:
        asyncio.run(_serve(server, bound, browse, is_done))


async def _serve(
    server: uvicorn.Server, bound: socket.socket, browse: str, is_done: Callable[[], bool]
) -> None:
    watching = asyncio.create_task(_watch(server, browse, is_done))
    await server.serve([bound])
    watching.cancel()


async def _watch(server: uvicorn.Server, browse: str, is_done: Callable[[], bool]) -> None:
    while not server.started:
        await asyncio.sleep(0.05)
    if browse:
        # It may wait for the browser's process.
        await asyncio.to_thread(webbrowser.open, browse)
    while not is_done():
        await asyncio.sleep(0.5)
    server.should_exit = True


def check_key(host: str, api_key: str) -> None:
    """Raises InputError if others could use the server without a key."""
    if not is_local(host) and not api_key:
        raise InputError(
            f"JAXLLM_API_KEY: needed to listen on {host}, which other machines reach; "
            "set this environment variable to a key of your choice"
        )
