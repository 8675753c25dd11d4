"""A profile of a few training steps, by JAX's profiler: what ran on the devices and the host, and for how long."""

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from jaxllm.runtime.console import console


class Profiler:
    """Records the steps from the first to the last one, of process 0, into a folder.

    Args:
        folder: where the profile goes.
        steps: (first, last), counted from 1; () records nothing.
        begun: steps that are done already.
    """

    def __init__(self, folder: epath.Path, steps: Sequence[int], begun: int):
        self._folder = folder
        # What a resumed run has passed is not recorded again.
        wanted = bool(steps) and steps[0] > begun and jax.process_index() == 0
        self._first, self._last = steps if wanted else (0, 0)
        self._records = False
        self._start_before(begun + 1)

    def after(self, step: int, state: Any) -> None:
        """Called after every step, with the state that it has made."""
        if self._records and step >= self._last:
            jax.block_until_ready(state)  # the steps may still run on the devices
            self._stop()
            console.print(
                f"profile of steps {self._first} to {self._last}: {self._folder}; open it: pip install xprof, then "
                f"xprof --logdir {self._folder}",
                soft_wrap=True,
            )
        self._start_before(step + 1)

    def close(self) -> None:
        """End a recording that the run's end has cut."""
        if self._records:
            self._stop()

    def _start_before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._records = True

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._records = False
