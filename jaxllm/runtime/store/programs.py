"""Compiled programs in a store, for the machines of a job that come and go.

Whoever compiles uploads, in a thread of its own: of a job of several processes that is process 0, since JAX lets no other
keep programs. A store that fails is said once, and not asked again by this process.
"""

import atexit
import functools
import queue
import threading
import time

from jaxllm.config import Ending
from jaxllm.runtime.console import console
from jaxllm.runtime.hardware import cpu_kind
from jaxllm.runtime.store.objects import Store

# Seconds that a process waits at its end for programs that are on their way.
_PATIENCE = 20.0


class RemotePrograms:
    """The programs in a store.

    Args:
        url: gs://BUCKET/PATH or s3://BUCKET/PATH.

    Raises:
        InputError: the URL has another form, or the store's client is not installed.
    """

    def __init__(self, url: str):
        # JAX's keys do not tell CPUs apart, which differ in the instructions that they know.
        self._store = Store(f"{url.rstrip('/')}/programs/{cpu_kind()}")
        self._works = True
        self._waiting: queue.Queue[tuple[str, bytes]] = queue.Queue()

    @functools.cached_property
    def _names(self) -> set[str]:
        # Listed once, so that a program that is not there costs no request.
        return {*self._store.list()}

    def get(self, name: str) -> bytes | None:
        """The entry of this name, None if there is none."""
        try:
            found = self._works and name in self._names
            return self._store.read(name) if found else None
        except Ending as error:
            self._fail(error)
            return None

    def put(self, name: str, content: bytes) -> None:
        """Upload an entry, in place of an older one, without waiting for it."""
        if self._works:
            self._waiting.put((name, content))
            _ = self._thread

    @functools.cached_property
    def _thread(self) -> threading.Thread:
        thread = threading.Thread(target=self._upload_all, daemon=True, name="programs")
        thread.start()
        atexit.register(self.flush)
        return thread

    def flush(self, seconds: float = _PATIENCE) -> None:
        """Wait for what is on its way, for so many seconds at most."""
        # Not `join`, which has no limit; and at its end a process can start no thread to wait in.
        deadline = time.monotonic() + seconds
        while self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.02)

    def _upload_all(self) -> None:
        """In a thread."""
        while True:
            name, content = self._waiting.get()
            try:
                if self._works:
                    self._store.write(name, content)
            except Ending as error:
                self._fail(error)
            finally:
                self._waiting.task_done()

    def _fail(self, error: Ending) -> None:
        if self._works:
            console.print(
                f"note: compiled programs are not kept in {self._store}: {error}", soft_wrap=True
            )
        self._works = False
