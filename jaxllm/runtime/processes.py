"""This process among the others of a job: joining, waiting for each other, signals, and a watchdog for a stuck loop."""

import faulthandler
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.config import Ending, InputError
from jaxllm.runtime.config import ProcessConfig


class Stopped(Ending):
    """A signal stopped the process, and no work is lost."""

    code = 0


def join(config: ProcessConfig) -> None:
    """Join the job; JAX_NUM_PROCESSES and JAX_PROCESS_ID are read here, a cluster's own variables by JAX.

    Raises:
        InputError: the address of process 0 is not known.
    """
    address = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    num_processes = os.environ.get("JAX_NUM_PROCESSES")
    process_id = os.environ.get("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(
            address or None,
            int(num_processes) if num_processes else None,
            int(process_id) if process_id else None,
            # By default JAX would listen on every network interface.
            coordinator_bind_address=address if address and process_id == "0" else None,
            initialization_timeout=config.join_seconds,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            # A process that has failed does not wait longer than this for the others to shut down.
            shutdown_timeout_seconds=config.heartbeat_seconds,
        )
    except ValueError as error:
        raise InputError(
            f"distributed: cannot join the job ({error}); set process.coordinator, and "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID in each process's environment"
        ) from None


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; all processes must call it together."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def gather_json(value: Any) -> list[Any]:
    """The JSON values of all processes, by their index; all must call it together."""
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(content.size))
    # A power of two, since every other width is compiled anew.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: content.size] = content
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def on_all[T](run: Callable[[], T]) -> T:
    """The result of `run`, which all processes call together; where it fails on one, all of them end.

    Raises:
        Ending: as `run` did here; where it failed elsewhere, with that text.
    """
    results: list[T] = []
    error = None
    try:
        results.append(run())
    except Ending as caught:
        error = caught
    for text in gather_json(str(error or "")):
        if text:
            raise error or Ending(text)
    return results[0]


def barrier(name: str) -> None:
    """Wait until all processes have called this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _end_soon(code: int, seconds: float = 10.0) -> None:
    """Exit after `seconds` even if a library swallows the exception that should end the process.

    Only outside a training loop, where a process may be killed at any time.
    """
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True  # it does not keep a process alive that ends by itself
    timer.start()


class Signals:
    """Handles SIGTERM and SIGINT: a training loop ends after its step (`stop_after`); other code ends at once.

    In a job of several processes, JAX's own service handles SIGTERM and makes all of them stop at the same step.

    Attributes:
        received: name of the first signal, "" before it.
        since: `time.monotonic()` at that signal.
    """

    def __init__(self, watchdog_seconds: int = 0):
        self.watchdog_seconds = watchdog_seconds
        self.received = ""
        self.since = 0.0
        self._in_loop = False
        self._calls = itertools.count(1)
        self._last_reset = 0.0  # of the watchdog, time.monotonic()

    def install(self) -> None:
        """Handle signals from now on."""
        signal.signal(signal.SIGINT, self._handle)
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        name = signal.Signals(number).name
        repeated = bool(self.received)
        self.received = name
        self.since = self.since or time.monotonic()
        # A handler runs between any two bytecodes: inside a loop it only notes the signal.
        if self._in_loop and not repeated:
            print(f"jaxllm: {name}: stopping after this step", file=sys.stderr, flush=True)
            if jax.process_count() > 1:
                # JAX's service takes this SIGTERM and tells the other processes.
                os.kill(os.getpid(), signal.SIGTERM)
        elif number == signal.SIGINT and repeated:
            os._exit(130)  # the second Ctrl-C does not wait for anything
        elif number == signal.SIGINT:
            _end_soon(130)
            raise KeyboardInterrupt
        elif not self._in_loop:
            _end_soon(0)
            raise Stopped(f"stopped by {name}; run the same command again to resume")

    def __enter__(self) -> "Signals":
        """Begin a loop, which must call `stop_after` at every step."""
        self._in_loop = True
        # A library may have swallowed the exception of a signal that came before the loop.
        if self.received and jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return self

    def __exit__(self, *error: object) -> None:
        self._in_loop = False
        faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Restart the watchdog: the loop has made progress."""
        now = time.monotonic()
        # Each reset starts a thread: reset at most once a second, or ten times in a short period.
        if self.watchdog_seconds and now - self._last_reset > min(1.0, self.watchdog_seconds / 10):
            self._last_reset = now
            faulthandler.dump_traceback_later(self.watchdog_seconds, exit=True, file=2)

    def stop_after(self) -> bool:
        """Whether to stop after this step. All processes must ask at every step; they get the same answer."""
        self.alive()
        if jax.process_count() == 1:
            return bool(self.received)
        # JAX's service compares the numbers of the steps, and picks one that no process has passed.
        if not multihost_utils.reached_preemption_sync_point(next(self._calls)):
            return False
        # The signal may have gone to another process.
        self.received = self.received or "SIGTERM"
        self.since = self.since or time.monotonic()
        return True

    def stopped(self, what: str) -> Stopped:
        """The exception that ends the process with status 0; it says how long stopping took."""
        seconds = time.monotonic() - self.since
        return Stopped(
            f"{self.received}: {what}, {seconds:.1f} s after the signal; "
            "run the same command again to resume"
        )
