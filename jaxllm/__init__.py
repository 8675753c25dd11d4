"""jaxllm: the whole life of a language model in JAX, from tokenizer to PPO. As a library: `jaxllm.api`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.api import LoadedModel, load, read_config, read_metrics, run_stages

__version__ = "0.1.0"
__all__ = ["LoadedModel", "__version__", "load", "read_config", "read_metrics", "run_stages"]


def __getattr__(name: str) -> Any:
    """The names of `jaxllm.api`, imported when one is used: JAX takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    from jaxllm.runtime.hardware import choose_platform

    choose_platform()
    from jaxllm import api

    return getattr(api, name)
