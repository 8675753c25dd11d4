"""Functions that a config names as "module:function": the only code that a config can run."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any

from pydantic import AfterValidator

from jaxllm.config.renames import print_once, say_renamed
from jaxllm.errors import InputError

# Modules of this package that have moved, and their new names: old configs keep working.
_MOVED = {
    "jaxllm.annotators": "jaxllm.demo.annotators",
    "jaxllm.corpora": "jaxllm.demo.corpora",
    "jaxllm.rewards": "jaxllm.rl.rewards",
}
_PYTHON_SOURCE = "py://"  # prefix of a data source that is a function


def current_name(spec: str) -> str:
    """Replaces the name of a module that has moved by its new name.

    Args:
        spec: "module:function" or "py://module:function"; any other text is returned unchanged.
    """
    scheme = _PYTHON_SOURCE if spec.startswith(_PYTHON_SOURCE) else ""
    module, colon, function = spec.removeprefix(scheme).partition(":")
    # Without a colon it is a file, an annotator's name or the like: not a function.
    if not colon or module not in _MOVED:
        return spec
    renamed = f"{scheme}{_MOVED[module]}:{function}"
    say_renamed(spec, renamed)
    return renamed


FunctionName = Annotated[str, AfterValidator(current_name)]
"""Type of config fields that name a function."""


def resolve_function(spec: str, field: str) -> Callable[..., Any]:
    """Imports the function that a config names, and prints once that it runs.

    Args:
        spec: "module:function".
        field: dotted name of the config field, for errors.

    Raises:
        InputError: if the module or the function does not exist.
    """
    module_name, _, name = spec.partition(":")
    if not (module_name and name):
        raise InputError(
            f"{field} {spec!r}: write it as module:function, "
            "as in jaxllm.demo.annotators:keyword_sentiment"
        )
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:  # the latter two: a relative name
        raise InputError(
            f"{field} {spec!r}: {error}; install that package "
            "(demos: pip install 'jaxllm[demo]') or add its directory to PYTHONPATH"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(_functions_of(module)) or "none"
        raise InputError(
            f"{field} {spec!r}: {module_name} has no function {name!r}; it has: {known}"
        )
    # Announced, because it is foreign code that a config file can make run.
    print_once(f"{field}: running {spec}")
    return function


def _functions_of(module: ModuleType) -> list[str]:
    """Returns the names of what a module defines and can be called, without what it imports."""
    names = []
    for name, value in vars(module).items():
        if callable(value) and getattr(value, "__module__", "") == module.__name__:
            names.append(name)
    return names
