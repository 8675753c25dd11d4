"""A proxy in front of a store that fails as networks and stores do."""

import collections
import contextlib
import http.client
import random
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# What it does to a request, with the same chance for each.
KINDS = ("503", "429", "reset before", "reset after", "cut body", "slow")


class Weather:
    """How often requests fail, how long each takes, and what has happened so far.

    Attributes:
        chance: of a request to fail.
        kinds: the ways in which it may.
        latency: seconds that every request waits before anything else.
        happened: failures by kind.
        requests: all of them by method.
    """

    def __init__(self, seed: int):
        self.chance = 0.0
        self.latency = 0.0
        self.requests: collections.Counter[str] = collections.Counter()
        self.kinds: tuple[str, ...] = KINDS
        self.happened: dict[str, int] = dict.fromkeys(KINDS, 0)
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def next(self) -> str:
        """What happens to a request; "": nothing."""
        with self._lock:
            if self._random.random() >= self.chance:
                return ""
            kind = self._random.choice(self.kinds)
            self.happened[kind] += 1
            return kind


def _handler(target: str, weather: Weather) -> type[BaseHTTPRequestHandler]:
    host = urlsplit(target).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def _reset(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if (
                len(body) < length
            ):  # of a client that was killed: no store would take a part for the whole
                raise ConnectionError("the request was cut")
            return body

        def _serve(self) -> None:
            body = self._body()
            weather.requests[self.command] += 1
            time.sleep(weather.latency)
            fault = weather.next()
            if fault == "reset before":
                return self._reset()
            if fault in ("503", "429"):
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
            if fault == "slow":
                time.sleep(0.5)
            server = http.client.HTTPConnection(host, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
            headers["Content-Length"] = str(len(body))
            server.request(self.command, self.path, body, headers)
            answer = server.getresponse()
            content = answer.read()
            server.close()
            if fault == "reset after":  # the store has done it, and nobody hears of it
                return self._reset()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            if fault == "cut body" and content:
                self.wfile.write(content[: len(content) // 2])
                return self._reset()
            self.wfile.write(content)
            return None

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _serve

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a killed client


@contextlib.contextmanager
def proxy(target: str, weather: Weather, port: int = 0) -> Iterator[str]:
    """The address of a server that passes requests on to `target`."""
    server = _Server(("127.0.0.1", port), _handler(target, weather))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
