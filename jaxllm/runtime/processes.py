"""This process among others: joining a job, being told to stop, and noticing that nothing moves any more."""

import dataclasses
import faulthandler
import itertools
import os
import signal
import sys
import threading
import time
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.config import Ending, InputError
from jaxllm.config.ranges import PositiveSeconds, Seconds


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """The processes of a job, and when one of them gives up."""

    coordinator: str = ""
    """host:port of process 0, which listens on this address only; empty: JAX_COORDINATOR_ADDRESS, or as the cluster says."""
    join_seconds: PositiveSeconds = 300
    """How long to wait for all processes of the job when it begins."""
    heartbeat_seconds: PositiveSeconds = 60
    """A process that is not heard of for so long is lost: the others end, with an error."""
    watchdog_seconds: Seconds = 1800
    """A training loop without a step for so long dumps every thread's stack and exits with status 1; 0: never."""


class Stopped(Ending):
    """The process was told to stop, and nothing is lost."""

    code = 0


def join(config: ProcessConfig) -> None:
    """Join the job. JAX_NUM_PROCESSES and JAX_PROCESS_ID are read here; a cluster's own variables by JAX.

    Raises InputError where no address is known.
    """
    address = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    count, number = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        jax.distributed.initialize(
            address or None,
            int(count) if count else None,
            int(number) if number else None,
            coordinator_bind_address=address if address and number == "0" else None,
            initialization_timeout=config.join_seconds,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=config.heartbeat_seconds,  # one that has failed does not wait for the others
        )
    except ValueError as error:
        raise InputError(
            f"distributed: cannot join the job ({error}); set process.coordinator, and JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID in each process's environment"
        ) from None


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; all processes must call it together."""
    return (
        flag
        if jax.process_count() == 1
        else bool(multihost_utils.process_allgather(np.array(flag)).any())
    )


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _end_soon(code: int, seconds: float = 10.0) -> None:
    """Outside a loop everything is safe to kill: do so, where a library swallows the exception that ends the process."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


class Signals:
    """SIGTERM and SIGINT. Outside a loop they end the process at once; inside, after the step (`stop_after`).

    In a job of several processes JAX's own service takes SIGTERM, and all of them stop at the same step.
    """

    def __init__(self, watchdog_seconds: int = 0):
        self.watchdog_seconds, self.received, self.since = watchdog_seconds, "", 0.0
        self._in_loop, self._calls, self._beat = False, itertools.count(1), 0.0

    def install(self) -> None:
        signal.signal(signal.SIGINT, self._handle)
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        name = signal.Signals(number).name
        again, self.received, self.since = bool(self.received), name, self.since or time.monotonic()
        if self._in_loop and not again:
            print(f"jaxllm: {name}: stopping after this step", file=sys.stderr, flush=True)
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)  # for JAX's service, which tells the others
        elif number == signal.SIGINT and again:
            os._exit(130)  # twice Ctrl-C: now
        elif number == signal.SIGINT:
            _end_soon(130)
            raise KeyboardInterrupt
        elif not self._in_loop:
            _end_soon(0)
            raise Stopped(f"stopped by {name}; run the same command again to go on")

    def __enter__(self) -> "Signals":
        """A loop begins: it asks `stop_after` at every step."""
        self._in_loop = True
        if self.received and jax.process_count() > 1:  # before the loop, and swallowed by a library
            os.kill(os.getpid(), signal.SIGTERM)
        return self

    def __exit__(self, *error: object) -> None:
        self._in_loop = False
        faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Something has moved: the watchdog starts counting anew."""
        now = time.monotonic()
        if self.watchdog_seconds and now - self._beat > min(1.0, self.watchdog_seconds / 10):
            self._beat = now
            faulthandler.dump_traceback_later(self.watchdog_seconds, exit=True, file=2)

    def stop_after(self) -> bool:
        """Whether to stop after this step: the same answer on every process, all of which must ask at every step."""
        self.alive()
        if jax.process_count() == 1:
            return bool(self.received)
        if not multihost_utils.reached_preemption_sync_point(next(self._calls)):
            return False
        self.received, self.since = self.received or "SIGTERM", self.since or time.monotonic()
        return True

    def stopped(self, what: str) -> Stopped:
        """The exception that ends the process with status 0, saying how long the stop took."""
        seconds = time.monotonic() - self.since
        return Stopped(
            f"{self.received}: {what}, {seconds:.1f} s after the signal; run the same command again to go on"
        )
