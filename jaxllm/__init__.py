"""jaxllm: the whole life of a language model in JAX, from tokenizer to PPO. As a library: `jaxllm.api`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.api import LoadedModel, load, read_config, read_metrics, run_stages

__version__ = "0.1.0"
__all__ = ["LoadedModel", "__version__", "load", "read_config", "read_metrics", "run_stages"]


def __getattr__(name: str) -> Any:
    """Imports the names of `jaxllm.api` when one is first used: importing JAX takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    from jaxllm.runtime.hardware import choose_platform

    choose_platform()  # before JAX is imported
    from jaxllm import api

    return getattr(api, name)
