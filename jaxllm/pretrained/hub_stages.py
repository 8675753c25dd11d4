"""Models on a hub as stage directories, for `init_from`.

Each is imported once for this user, into ~/.cache/jaxllm/models (`compile_cache.folder`).
"""

import contextlib
import functools
import re
import time
from collections.abc import Iterator
from pathlib import Path

from jaxllm.config import InputError
from jaxllm.pretrained.convert import make_stage
from jaxllm.runtime import compile_cache
from jaxllm.runtime.files import lock_file
from jaxllm.runtime.hubs import names


@functools.cache
def pinned(source: str) -> str:
    """The name of a model on a hub that always means the same files; the model is fetched for it.

    Raises:
        InputError: as `names.fetch`.
    """
    return source if names.is_pinned(source) else names.fetch(source).name


@functools.cache
def folder_of(source: str) -> Path:
    """The stage directory of a model on a hub, which is imported if it is not there.

    Raises:
        InputError: as `names.fetch` and `convert.make_stage`.
    """
    models = compile_cache.folder("models")
    if models is None:
        raise InputError(
            f"{source}: has to be kept on this machine; set JAXLLM_CACHE to a folder of your own"
        )
    name = pinned(source)
    target = models / re.sub(r"[^\w.@-]+", "--", name)
    with _waited_for(models / f".{target.name}.lock"):
        if not target.exists():
            make_stage(name, target)
    return target


@contextlib.contextmanager
def _waited_for(lock: Path) -> Iterator[None]:
    """Holds a lock, for which other processes of this machine are waited for."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock_file(lock, "held"))
                break
            except InputError:
                time.sleep(0.2)
        yield
