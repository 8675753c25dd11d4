"""What it cost to have the compiled programs of this process: their number, and seconds.

JAX reports each tracing, lowering and compilation (`jax.monitoring`). A program found in the cache on disk
(`compile_cache`) is one that was read; it is traced and lowered all the same, since its key is a hash of what comes out.
"""

import dataclasses
import threading
from typing import Any

import jax

_HIT = "/jax/compilation_cache/cache_hits"
# Compiling, or reading from the cache.
_READY = "/jax/core/compile/backend_compile_duration"
_BEFORE = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The programs of some time."""

    compiled: int = 0
    """Programs that were compiled."""
    read: int = 0
    """Programs that were read from the cache on disk."""
    seconds: float = 0.0
    """Spent on tracing, lowering, compiling and reading."""


class Programs:
    """Counts programs from its creation on. Several threads may compile at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cost = Cost()
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    def take(self) -> Cost:
        """The cost since the last call."""
        with self._lock:
            cost = self._cost
            self._cost = Cost()
        return cost

    def close(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_listener(self._on_event)
        jax.monitoring.unregister_event_duration_listener(self._on_duration)

    def _on_event(self, event: str, **kwargs: Any) -> None:
        # Inside the span of _READY, which then counts it as compiled.
        if event == _HIT:
            self._add(compiled=-1, read=1)

    def _on_duration(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _READY:
            self._add(compiled=1, seconds=duration_secs)
        elif event in _BEFORE:
            self._add(seconds=duration_secs)

    def _add(self, compiled: int = 0, read: int = 0, seconds: float = 0.0) -> None:
        with self._lock:
            self._cost = Cost(
                self._cost.compiled + compiled,
                self._cost.read + read,
                self._cost.seconds + seconds,
            )
