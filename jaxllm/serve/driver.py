"""One thread that steps all engines, and hands what they draw to whoever asked.

event loop                               thread of the engines
Drawing(...)      -- a command -->       submits its requests
async for         <-- an event --        steps all engines that have requests
leaving it        -- a command -->       cancels what has not ended
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import jax

from jaxllm.config import InputError
from jaxllm.engine.engine import Engine
from jaxllm.engine.request import Event, Request


class EngineStopped(Exception):
    """The engines have failed, or the server stops: no response comes any more."""


class Busy(Exception):
    """As many responses as may wait are waiting."""


class Driver:
    """Engines are used in its thread alone; other threads send it what to do."""

    def __init__(self, engines: Sequence[Engine], max_waiting: int):
        """max_waiting: responses that may wait for a slot."""
        self._engines = list(engines)
        self._most_open = max_waiting + sum(engine.num_slots for engine in engines)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # (engine, ticket) -> who wants its events.
        self._listeners: dict[tuple[int, int], Callable[[Event], None]] = {}
        self._waiting: set[Callable[[], None]] = set()
        self._lock = threading.Lock()
        self._stopped = False
        self.num_open = 0
        """Responses that were asked for and have not ended."""
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether responses still come."""
        return not self._stopped

    def reserve(self, count: int) -> None:
        """Counts further responses. Raises Busy if there would be too many."""
        with self._lock:
            if self.num_open + count > self._most_open:
                raise Busy
            self.num_open += count

    def release(self, count: int) -> None:
        """Responses that were reserved have ended."""
        with self._lock:
            self.num_open -= count

    def draw(self, number: int, requests: Sequence[Request], seconds: float) -> "Drawing":
        """What an engine will draw for these requests, within so many seconds."""
        return Drawing(self, number, requests, seconds)

    async def call[T](self, function: Callable[[], T]) -> T:
        """Runs a function in the thread of the engines.

        Raises:
          EngineStopped: nothing runs there any more.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if future.done():  # whoever asked has gone
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def run() -> None:
            try:
                result = function()
            except InputError as error:  # an answer for whoever asked; others end the thread
                _tell(loop, settle, None, error)
            else:
                _tell(loop, settle, result, None)

        self.send(run, lambda: _tell(loop, settle, None, EngineStopped()))
        return await future

    def send(self, command: Callable[[], None], refuse: Callable[[], None]) -> None:
        """Has a command run in the thread; `refuse` is called instead if the thread ends before."""

        def run() -> None:
            with self._lock:
                self._waiting.discard(refuse)
            command()

        with self._lock:
            if not self._stopped:
                self._waiting.add(refuse)
                self._commands.put(run)
                return
        refuse()

    def stop(self) -> None:
        """Ends the thread; what is in progress gets no more."""
        self._commands.put(None)
        self._thread.join()

    def at_end(self, refuse: Callable[[], None]) -> None:
        """Has a function called when the thread ends."""
        with self._lock:
            self._waiting.add(refuse)

    def not_at_end(self, refuse: Callable[[], None]) -> None:
        """Forgets what `at_end` was given."""
        with self._lock:
            self._waiting.discard(refuse)

    # --- In the thread.

    def submit(
        self, number: int, requests: Sequence[Request], tells: Sequence[Callable[[Event], None]]
    ) -> list[tuple[int, int]]:
        """Submits requests to an engine, all or none; returns their keys, for `cancel`."""
        keys: list[tuple[int, int]] = []
        try:
            for request in requests:
                keys.append((number, self._engines[number].submit(request)))
        except InputError:
            self.cancel(keys)
            raise
        self._listeners |= dict(zip(keys, tells, strict=True))
        return keys

    def cancel(self, keys: Sequence[tuple[int, int]]) -> None:
        """Ends requests; does nothing for those that have ended."""
        for number, ticket in keys:
            self._engines[number].cancel(ticket)
            self._listeners.pop((number, ticket), None)

    def _run(self) -> None:
        try:
            while self._obey():
                for number, engine in enumerate(self._engines):
                    if engine.num_unfinished:
                        self._step(number, engine)
        finally:
            with self._lock:
                self._stopped = True
                refused, self._waiting = self._waiting, set()
            for refuse in refused:
                refuse()

    def _obey(self) -> bool:
        """Does what it was told; waits for something if there is nothing to step. False: stop."""
        idle = not any(engine.num_unfinished for engine in self._engines)
        while True:
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            idle = False

    def _step(self, number: int, engine: Engine) -> None:
        with jax.set_mesh(engine.mesh):
            events = engine.step()
        for event in events:
            key = (number, event.ticket)
            if key in self._listeners:
                self._listeners[key](event)
                if event.end:
                    del self._listeners[key]


class Drawing:
    """What an engine draws for some requests; `async with` it, then iterate over it. Leaving cancels what is open."""

    def __init__(self, driver: Driver, number: int, requests: Sequence[Request], seconds: float):
        self._driver = driver
        self._number = number
        self._requests = requests
        self._deadline = time.monotonic() + seconds
        self._open = set(range(len(requests)))
        self._keys: list[tuple[int, int]] = []
        self._events: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()

    async def __aenter__(self) -> "Drawing":
        """Submits the requests. Raises Busy if there are too many."""
        self._driver.reserve(len(self._requests))
        self._loop = asyncio.get_running_loop()
        self._refuse = lambda: self._tell(EngineStopped())
        self._driver.send(self._submit, self._refuse)
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._driver.release(len(self._requests))
        # In the thread, after the requests were submitted.
        self._driver.send(self._leave, lambda: None)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Yields (number of the request, event) until all requests have ended.

        Raises:
          EngineStopped: no more comes.
          TimeoutError: it takes too long.
          InputError: the engine refuses a request.
        """
        while self._open:
            left = self._deadline - time.monotonic()
            event = await asyncio.wait_for(self._events.get(), left)
            if isinstance(event, Exception):
                raise event
            if event[0] not in self._open:  # it was drawn before `end` was heard of
                continue
            if event[1].end:
                self._open.remove(event[0])
            yield event

    def end(self, i: int) -> None:
        """Ends one of the requests: it needs no more tokens."""
        self._open.discard(i)
        self._driver.send(lambda: self._driver.cancel(self._keys[i : i + 1]), lambda: None)

    # --- In the thread.

    def _submit(self) -> None:
        tells = [self._teller(i) for i in range(len(self._requests))]
        try:
            self._keys += self._driver.submit(self._number, self._requests, tells)
        except InputError as error:
            self._tell(error)
            return
        self._driver.at_end(self._refuse)

    def _leave(self) -> None:
        self._driver.cancel(self._keys)
        self._driver.not_at_end(self._refuse)

    def _teller(self, i: int) -> Callable[[Event], None]:
        return lambda event: self._tell((i, event))

    def _tell(self, event: Any) -> None:
        _tell(self._loop, self._events.put_nowait, event)


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    # The loop is closed when the server has stopped: nobody listens.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)
