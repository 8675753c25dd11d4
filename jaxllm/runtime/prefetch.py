"""Batches computed ahead in threads."""

import concurrent.futures
from collections.abc import Callable
from typing import Any


class Prefetch:
    """`batch_at`, computed ahead of the step that needs it.

    What it returns does not depend on the number of threads: a batch is a pure function of its number.
    """

    def __init__(self, batch_at: Callable[[int], Any], workers: int, num_steps: int):
        """workers: threads; 0 computes each batch when it is asked for."""
        self._batch_at = batch_at
        self._workers = workers
        self._num_steps = num_steps
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, "batches") if workers else None
        self._pending: dict[int, concurrent.futures.Future] = {}

    def __call__(self, number: int) -> Any:
        """The batch of a step. Raises what computing it raised."""
        if self._pool is None:
            return self._batch_at(number)
        # Two more than there are threads, so that none waits while the step takes its batch.
        for ahead in range(number, min(number + self._workers + 2, self._num_steps)):
            if ahead not in self._pending:
                self._pending[ahead] = self._pool.submit(self._batch_at, ahead)
        return self._pending.pop(number).result()

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
