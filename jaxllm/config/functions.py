"""Functions that a config names as "module:function": the only code a config can run."""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator

from jaxllm.config import InputError

# Modules of this package that functions were named by before they moved; old configs keep working.
_MOVED = {
    "jaxllm.annotators": "jaxllm.demo.annotators",
    "jaxllm.corpora": "jaxllm.demo.corpora",
    "jaxllm.rewards": "jaxllm.rl.rewards",
}


def current_name(spec: str) -> str:
    """The name of a function today: a module of this package that has moved is found under its new name.

    spec: "module:function", also behind "py://"; any other text comes back as it is.
    """
    scheme, place = (
        ("py://", spec.removeprefix("py://")) if spec.startswith("py://") else ("", spec)
    )
    module, colon, function = place.partition(":")
    if not colon or module not in _MOVED:
        return spec
    renamed = f"{scheme}{_MOVED[module]}:{function}"
    _say_renamed(spec, renamed)
    return renamed


@functools.cache
def _say_renamed(old: str, new: str) -> None:
    print(f"{old} is now {new}; the old name keeps working", file=sys.stderr, flush=True)


FunctionName = Annotated[str, AfterValidator(current_name)]


def resolve_function(spec: str, field: str) -> Callable[..., Any]:
    """The function named by "module:function"; `field` is what named it.

    Raises InputError where there is no such module or function.
    """
    module_name, _, name = spec.partition(":")
    if not (module_name and name):
        raise InputError(
            f"{field} {spec!r}: write it as module:function, as in jaxllm.demo.annotators:keyword_sentiment"
        )
    try:
        module = importlib.import_module(module_name)
    except (
        ImportError,
        TypeError,
        ValueError,
    ) as error:  # a relative name is one of the latter two
        mend = "install that package (demos: pip install 'jaxllm[demo]') or add its directory to PYTHONPATH"
        raise InputError(f"{field} {spec!r}: {error}; {mend}") from None
    function = getattr(module, name, None)
    if not callable(function):
        known = [
            n
            for n, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", "") == module_name
        ]
        raise InputError(
            f"{field} {spec!r}: {module_name} has no function {name!r}; it has: {', '.join(known) or 'none'}"
        )
    _announce(spec, field)
    return function


@functools.cache
def _announce(spec: str, field: str) -> None:
    """Say once that a config makes code run: the only code it can."""
    print(f"{field}: running {spec}", file=sys.stderr, flush=True)
