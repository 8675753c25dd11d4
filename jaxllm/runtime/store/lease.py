"""One run at a time in a run directory of a store: a lease, which its holder renews for as long as it lives.

    lease/7.json        created by the run that holds lease number 7, which only one run can do
    lease/7.beat.json   written anew by that run every few seconds; its last words are that the lease is free

Whoever wants to work takes the next number, once the highest one is free or its beat has stood still for as long as a
lease lasts. The waiting host measures that with its own clock, so that no clocks have to agree. A run that sees a higher
number than its own has lost its lease, and stops before it writes.

Only the creation of an object has to be atomic, which every store offers.
"""

import json
import math
import os
import re
import socket
import threading
import time
import uuid
from typing import Any

from jaxllm.config import Ending, InputError
from jaxllm.runtime.console import console
from jaxllm.runtime.store.objects import Store
from jaxllm.runtime.store.retry import Unavailable

FOLDER = "lease"
_NUMBER = re.compile(rf"{FOLDER}/(\d+)\.json")


class InUse(InputError):
    """Another run works in the run directory."""

    # Not that of bad input, after which a scheduler would not start the job again.
    code = 1


class LeaseLost(Ending):
    """Another run works in the run directory now."""


class Lease:
    """The right to write below a store's URL, from `take` to `give_back`.

    Args:
        store: the run directory.
        seconds: how long a lease lasts that is not renewed.
        scratch: a name of this machine's folder for the run, which the caller has locked. A lease that was held from
            there belongs to a process that is dead, so that nobody has to wait for it.
    """

    def __init__(self, store: Store, seconds: float, scratch: str = ""):
        self.store = store
        self.seconds = seconds
        self.number = 0
        self._holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "id": uuid.uuid4().hex,
            "scratch": scratch,
            "seconds": seconds,
        }
        self._renewed = 0.0  # time.monotonic() of the last renewal that was certain
        self._lost = ""  # why the lease is lost
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Wait for the lease if its holder may be dead, take it, and begin to renew it.

        Raises:
            InUse: another run is alive.
        """
        while not self.number:
            newest = max(_numbers(self.store), default=0)
            if newest:
                self._wait_for_end(newest)
            # Of several runs that come this far, one creates the object; the others look again.
            if self.store.create(f"{FOLDER}/{newest + 1}.json", self._content()):
                self.number = newest + 1
        self._beat()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()
        self.store.delete(_names_below(self.store, self.number))

    def follow(self, number: int) -> None:
        """Work under a lease that another host of the same job has taken, and renews."""
        self.number = number
        # How well that host is, is not known here: `check` looks every time.
        self._renewed = -math.inf

    def check(self) -> None:
        """Raises LeaseLost if this run must not write any more."""
        # After a pause of the whole machine nobody has noticed yet that time has passed.
        if not self._lost and time.monotonic() - self._renewed > self.seconds / 2:
            self._look()
        if self._lost:
            raise LeaseLost(
                f"{self.store}: {self._lost}; nothing more is written there. Run the same command again to go on "
                "once that run has ended"
            )

    def give_back(self) -> None:
        """Free the lease for others at once."""
        self._ended.set()
        if self._thread is None:  # it is another host's
            return
        self._thread.join()
        if self.number and not self._lost:
            self.store.write(_beat_name(self.number), self._content(free=True))

    def _wait_for_end(self, number: int) -> None:
        """Return once the holder of a lease has ended or its lease has run out.

        Raises:
            InUse: it renews its lease.
        """
        first = last = _read_beat(self.store, number)
        deadline = time.monotonic() + self.seconds
        said = False
        while not _is_free(last, self._holder["scratch"]):
            if last != first:
                where = f"{last.get('host', '?')}, process {last.get('pid', '?')}"
                raise InUse(
                    f"{self.store}: another run works in it ({where}); wait for it, stop it, or choose another --run-dir"
                )
            if time.monotonic() > deadline:
                return
            if not said:
                console.print(
                    f"{self.store}: waiting up to {self.seconds:.0f} s for a run on {last.get('host', '?')} that may have "
                    "ended without a word",
                    soft_wrap=True,
                )
                said = True
            time.sleep(min(1.0, self.seconds / 10))
            last = _read_beat(self.store, number)

    def _renew(self) -> None:
        """In a thread: say that this run is alive, until it ends or has lost its lease."""
        while not self._ended.wait(self.seconds / 5) and not self._lost:
            try:
                self._look()
                if not self._lost:
                    self._beat()
            except Unavailable as error:
                # Without an answer nobody knows; `check` asks again before anything is written.
                console.print(f"warning: the lease could not be renewed ({error})", soft_wrap=True)

    def _look(self) -> None:
        newest = max(_numbers(self.store), default=0)
        if newest > self.number:
            self._lost = f"another run has taken over (lease {newest}; this one had {self.number})"

    def _beat(self) -> None:
        began = time.monotonic()
        self.store.write(_beat_name(self.number), self._content())
        self._renewed = began

    def _content(self, free: bool = False) -> bytes:
        return json.dumps({**self._holder, "time": time.time(), "free": free}).encode()


def newest_beat(url: str) -> dict[str, Any] | None:
    """What the newest holder of a run directory's lease has said last; None: nobody has held it."""
    store = Store(url)
    newest = max(_numbers(store), default=0)
    return _read_beat(store, newest) if newest else None


def _numbers(store: Store) -> list[int]:
    return [int(found[1]) for name in store.list(FOLDER) if (found := _NUMBER.fullmatch(name))]


def _names_below(store: Store, number: int) -> list[str]:
    below = []
    for name in store.list(FOLDER):
        if (found := re.match(rf"{FOLDER}/(\d+)\.", name)) and int(found[1]) < number:
            below.append(name)
    return below


def _beat_name(number: int) -> str:
    return f"{FOLDER}/{number}.beat.json"


def _read_beat(store: Store, number: int) -> dict[str, Any]:
    # A run may have been killed between the two objects.
    content = store.read(_beat_name(number)) or store.read(f"{FOLDER}/{number}.json")
    return json.loads(content) if content else {"free": True}


def _is_free(beat: dict[str, Any], scratch: str) -> bool:
    same_folder = bool(scratch) and beat.get("scratch") == scratch
    return bool(beat.get("free")) or same_folder
