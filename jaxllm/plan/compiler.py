"""Which compiler answers: memory and speed of a program differ from one version to the next."""

import fnmatch
import importlib.metadata
import re


def name(platform: str) -> str:
    """The compiler for "tpu" or "gpu" with its version, for the report."""
    if platform == "tpu":
        return f"libtpu {libtpu()[0]}"
    plugin = f"jax-cuda13-plugin {importlib.metadata.version('jax-cuda13-plugin')}"
    try:
        return f"{plugin}, cuDNN {importlib.metadata.version('nvidia-cudnn-cu13')}"
    except importlib.metadata.PackageNotFoundError:
        return plugin


def libtpu() -> tuple[str, str]:
    """(the installed version, the version that this jax asks for, as a pattern; "" if it asks for none)."""
    installed = importlib.metadata.version("libtpu")
    # "libtpu==0.0.50.*; extra == 'tpu'": what `pip install 'jax[tpu]'` brings to a pod.
    for requirement in importlib.metadata.requires("jax") or []:
        if found := re.match(r"libtpu\s*==\s*([\w.*]+)", requirement):
            return installed, found[1]
    return installed, ""


def note(installed: str, pinned: str) -> str:
    """A line for whoever compiles with another compiler than a pod would; "" if it is the same."""
    if not pinned or fnmatch.fnmatchcase(installed, pinned):
        return ""
    return (
        f"note: compiled by libtpu {installed}; a pod with this jax installs {pinned}, whose memory and speed may "
        f"differ: pip install 'libtpu=={pinned}'"
    )
