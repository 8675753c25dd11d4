"""Data: sources -> examples -> tokens -> rows -> batches. Each step is a pure function of the one before."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.data.contamination import *  # noqa: F403
    from jaxllm.data.format import *  # noqa: F403
    from jaxllm.data.loader import *  # noqa: F403
    from jaxllm.data.sources import *  # noqa: F403
    from jaxllm.data.splits import *  # noqa: F403
    from jaxllm.data.store import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """A public name, looked up when it is used: the processes that tokenize import this package, and need no JAX."""
    for module in (
        ("sources", "format", "splits", "store", "loader", "contamination")
        if name[0] != "_" and name not in _MODULES
        else ()
    ):
        if hasattr(found := importlib.import_module(f"jaxllm.data.{module}"), name):
            return getattr(found, name)
    raise AttributeError(f"module 'jaxllm.data' has no attribute {name!r}")


_MODULES = ("cache", "contamination", "file_formats", "files", "format", "loader")
_MODULES += ("packing", "readers", "records", "sources", "splits", "store", "templates")
