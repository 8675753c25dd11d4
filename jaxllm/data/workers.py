"""Builds the units that are missing, in worker processes where there is much text.

A worker is this module run as a program, with a pipe to the process that started it. It is not a process of
`multiprocessing`, which imports the main script again: a user's script without a `__main__` guard would run twice.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxllm.config import InputError
from jaxllm.data.cache import build_once, get_or_build, open_valid
from jaxllm.data.tokenization import write_unit
from jaxllm.data.units import Unit
from jaxllm.runtime.hardware import num_cores
from jaxllm.tokenizers.published import restore
from jaxllm.tokenizers.trained import Tokenizer

# Bytes of text below which starting workers takes longer than the work.
IN_PROCESS = 1 << 24


def prepare(
    units: Sequence[Unit],
    tokenizer: Tokenizer | None,
    share: tuple[int, int],
    exchange: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Returns the metadata of each unit, after building those that are missing.

    Args:
        share: (index of this process, number of processes) that prepare the same cache.
        exchange: brings what each process has built to all of them, where none sees the folder of another.
    """
    # Two sources with the same file and settings have one folder.
    metas: dict[Path, Any] = {unit.folder: open_valid(unit.folder) for unit in units}
    index, count = share
    distinct = [*{unit.folder: unit for unit in units}.values()]
    if exchange:
        # Nobody sees what another process builds: each has its part of the units, and then they exchange them.
        wanted = distinct[index::count]
    else:
        # Each process begins at a different unit; a unit that another one is building is skipped.
        first = index * len(distinct) // count
        wanted = [*distinct[first:], *distinct[:first]]
    missing = [unit for unit in wanted if metas[unit.folder] is None]
    total = sum(unit.size for unit in missing)
    num_workers = 0 if total < IN_PROCESS else min(len(missing), num_cores())
    columns = (TextColumn("data:"), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    is_quiet = total < IN_PROCESS or index > 0
    bar = Progress(*columns, console=Console(stderr=True), disable=is_quiet)
    task = bar.add_task("", total=total)
    with bar, _workers(num_workers) as connections:
        while missing:
            built_elsewhere = []
            for unit, result in _build(missing, tokenizer, connections):
                if isinstance(result, Exception):
                    raise result
                if result:
                    bar.advance(task, unit.size)
                else:
                    built_elsewhere.append(unit)
            # Nothing is left that this process could build.
            if len(built_elsewhere) == len(missing):
                time.sleep(0.1)
            missing = built_elsewhere
    if exchange:
        exchange()
    for unit in units:
        if metas[unit.folder] is None:
            metas[unit.folder] = get_or_build(unit.folder, _writer(unit, tokenizer, num_cores))
    return [metas[unit.folder] for unit in units]


def _build(
    units: Sequence[Unit], tokenizer: Tokenizer | None, connections: Sequence[Connection]
) -> Iterator[tuple[Unit, bool | Exception]]:
    """Yields each unit as it becomes ready, with the result of `build_once` or the error that it raised."""
    waiting: deque[Unit] = deque()
    for unit in units:
        # A user's function runs in this process only: it may use what the user's script has set up.
        is_function = unit.data.sources[unit.source].path.startswith("py://")
        if connections and not is_function:
            waiting.append(unit)
        else:
            yield unit, build_once(unit.folder, _writer(unit, tokenizer, num_cores))
    idle = list(connections)
    busy: dict[Connection, Unit] = {}
    try:
        while waiting or busy:
            # One unit at a time for each worker: whoever is ready first gets the next one.
            while waiting and idle:
                connection = idle.pop()
                busy[connection] = waiting.popleft()
                connection.send((busy[connection], tokenizer and tokenizer.model))
            # The last units would leave cores without work.
            num_threads = num_cores() // len(busy)
            if not waiting and num_threads > 1:
                for connection in busy:
                    connection.send(num_threads)
            ready: list[Any] = wait(list(busy))
            for connection in ready:
                yield busy.pop(connection), connection.recv()
                idle.append(connection)
    except (EOFError, OSError):
        raise InputError(
            "data: a process that tokenizes has ended: its error is above, or it was killed (out "
            "of memory?); run again to resume"
        ) from None


def _writer(
    unit: Unit, tokenizer: Tokenizer | None, num_threads: Callable[[], int]
) -> Callable[[Path], dict[str, Any]]:
    return functools.partial(write_unit, unit=unit, tokenizer=tokenizer, num_threads=num_threads)


@contextlib.contextmanager
def _workers(count: int) -> Iterator[list[Connection]]:
    """Connections to worker processes, which end with the context."""
    processes = []
    connections = []
    # The same search path, without the current directory that `-m` would put before it (-P).
    search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    env = {**os.environ, "PYTHONPATH": search_path}
    try:
        for _ in range(count):
            connection, other_end = Pipe()
            connections.append(connection)
            fd = other_end.fileno()
            command = [sys.executable, "-P", "-m", __name__, str(fd)]
            # Its standard input stays open for as long as this process lives: see `_end_with_parent`.
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[fd], env=env)
            processes.append(worker)
            # With this copy open, the end of the worker would not be the end of the pipe.
            other_end.close()
        yield connections
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        for connection in connections:
            connection.close()


class _Threads:
    """How many threads a worker may use, which the process that started it says at any time."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self.count = 1

    def __call__(self) -> int:
        # While a unit is made, nothing else comes.
        while self._connection.poll():
            self.count = self._connection.recv()
        return self.count


def _work(connection: Connection) -> None:
    """The program of a worker. Receives (unit, tokenizer's model) and sends back the result of `build_once`.

    Between two units, or during one, it may receive the number of threads it may use.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Each message has the model; it is loaded once.
    load = functools.lru_cache(maxsize=1)(restore)
    threads = _Threads(connection)
    while True:
        message = connection.recv()
        if isinstance(message, int):  # said too late: the unit was ready
            continue
        unit, model = message
        threads.count = 1
        try:
            result = build_once(unit.folder, _writer(unit, model and load(model), threads))
        except (InputError, OSError) as error:
            result = error
        connection.send(result)


def _end_with_parent() -> None:
    """Ends a worker in the middle of its work when the process that started it was killed."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1])))
