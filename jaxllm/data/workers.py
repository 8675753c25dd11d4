"""Builds the units that are missing, in worker processes where there is much text.

A worker is this module run as a program, with a pipe to the process that started it. It is not a pool of
`multiprocessing`, whose workers import the main script again: jaxllm's would load JAX in each of them, and a user's
script without a `__main__` guard would run a second time.
"""

import contextlib
import functools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
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
from jaxllm.tokenizers.published import restore
from jaxllm.tokenizers.trained import Tokenizer

# Bytes of text below which starting workers takes longer than the work.
IN_PROCESS = 1 << 24


def prepare(
    units: Sequence[Unit], tokenizer: Tokenizer | None, share: tuple[int, int]
) -> list[dict[str, Any]]:
    """Returns the metadata of each unit, after building those that are missing.

    share: (index of this process, number of processes) that prepare the same cache.
    """
    metas = {unit.folder: open_valid(unit.folder) for unit in units}
    # Each process begins at a different unit; a unit that another one is building is skipped.
    first = share[0] * len(units) // share[1]
    by_folder = {unit.folder: unit for unit in (*units[first:], *units[:first])}
    missing = [unit for unit in by_folder.values() if metas[unit.folder] is None]
    total = sum(unit.size for unit in missing)
    num_workers = 0 if total < IN_PROCESS else min(len(missing), _num_cores())
    columns = (TextColumn("data:"), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    is_quiet = total < IN_PROCESS or share[0] > 0
    bar = Progress(*columns, console=Console(stderr=True), disable=is_quiet)
    task = bar.add_task("", total=total)
    with bar, _workers(num_workers, tokenizer) as connections:
        while missing:
            built_elsewhere = []
            for unit, done in _build(missing, tokenizer, connections):
                if done:
                    bar.advance(task, unit.size)
                else:
                    built_elsewhere.append(unit)
            if len(built_elsewhere) == len(missing):
                time.sleep(0.1)
            missing = built_elsewhere
    return [metas[unit.folder] or get_or_build(*_recipe(unit, tokenizer)) for unit in units]


def _build(
    units: Sequence[Unit], tokenizer: Tokenizer | None, connections: Sequence[Connection]
) -> Iterator[tuple[Unit, bool]]:
    """Yields (unit, whether it is complete), as they become ready; False: another process is building it."""
    waiting: deque[Unit] = deque()
    for unit in units:
        # A user's function runs in this process only: it may use what the user's script has set up.
        is_function = unit.data.sources[unit.source].path.startswith("py://")
        if connections and not is_function:
            waiting.append(unit)
        else:
            yield unit, build_once(*_recipe(unit, tokenizer))
    idle = list(connections)
    busy: dict[Connection, Unit] = {}
    while waiting or busy:
        while waiting and idle:
            connection = idle.pop()
            busy[connection] = waiting.popleft()
            _send(connection, busy[connection])
        for connection in wait(list(busy)):
            yield busy.pop(connection), _result(connection)
            idle.append(connection)


def _recipe(unit: Unit, tokenizer: Tokenizer | None) -> tuple[Any, Any]:
    """The arguments of `build_once` and `get_or_build`."""
    return unit.folder, functools.partial(write_unit, unit=unit, tokenizer=tokenizer)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _workers(count: int, tokenizer: Tokenizer | None) -> Iterator[list[Connection]]:
    """Connections to worker processes, which end with the context."""
    processes = []
    connections = []
    # The same search path, without the current directory that `-m` would put before it (-P).
    search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    env = {**os.environ, "PYTHONPATH": search_path}
    try:
        for _ in range(count):
            ours, other_end = Pipe()
            fd = other_end.fileno()
            command = [sys.executable, "-P", "-m", __name__, str(fd)]
            processes.append(subprocess.Popen(command, pass_fds=[fd], env=env))
            connections.append(ours)
            # Closed here, so that the end of the worker is the end of the pipe.
            other_end.close()
        for connection in connections:
            _send(connection, tokenizer and tokenizer.model)
        yield connections
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for connection in connections:
            connection.close()


def _send(connection: Connection, value: Any) -> None:
    try:
        connection.send(value)
    except OSError:
        raise _worker_ended() from None


def _result(connection: Connection) -> bool:
    try:
        result = connection.recv()
    except (EOFError, OSError):
        raise _worker_ended() from None
    if isinstance(result, Exception):
        raise result
    return result


def _worker_ended() -> InputError:
    return InputError(
        "data: a process that tokenizes has ended: its error is above, or it was killed (out of "
        "memory?); run again to resume"
    )


def _work(connection: Connection) -> None:
    """The program of a worker: receives the tokenizer's model, then units; sends back `build_once` of each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    model = connection.recv()
    tokenizer = restore(model) if model else None
    units: queue.SimpleQueue[Unit] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, units), daemon=True).start()
    while True:
        try:
            result = build_once(*_recipe(units.get(), tokenizer))
        except (InputError, OSError) as error:
            result = error
        connection.send(result)


def _receive(connection: Connection, units: queue.SimpleQueue) -> None:
    """Receives units, and ends the process in the middle of its work when the one that started it has ended."""
    try:
        while True:
            units.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1])))
