"""Compares the names and shapes of a checkpoint's leaves with those of the model that a config describes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxllm.config import InputError
from jaxllm.runtime import digest


def compare(saved: Any, wanted: Any, where: str) -> None:
    """Raise InputError, which lists both sides, if two trees differ in the path, dtype or shape of a leaf.

    Args:
        saved: the tree in a checkpoint, or its metadata.
        wanted: the tree that the config's model has.
        where: the checkpoint's folder, for the error.
    """
    have = shapes(saved)
    want = shapes(wanted)
    if have == want:
        return
    # Three lists, which tell a wrong size from a wrong architecture.
    different = []
    only_saved = []
    for name, shape in have.items():
        if name not in want:
            only_saved.append(f"{name} {shape}")
        elif shape != want[name]:
            different.append(f"{name} {shape} here, {want[name]} wanted")
    only_wanted = [f"{name} {shape}" for name, shape in want.items() if name not in have]
    lists = [
        _first_three("differ", different),
        _first_three("only in the checkpoint", only_saved),
        _first_three("only in this config's model", only_wanted),
    ]
    raise InputError(
        f"{where}: the checkpoint is of another model ({'; '.join(filter(None, lists))}); "
        "use its own config or another directory"
    )


def _first_three(title: str, items: list[str]) -> str:
    if not items:
        return ""
    rest = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return f"{title}: {', '.join(items[:3])}{rest}"


def shapes(tree: Any) -> dict[str, str]:
    """{path: "dtype[shape]"} of each leaf, the same for a NamedTuple and for the dict Orbax makes of it."""
    leaves = jax.tree_util.tree_leaves_with_path(as_dicts(tree), is_leaf=_is_array_like)
    return {digest.path_name(path): _describe(leaf) for path, leaf in leaves}


def _describe(leaf: Any) -> str:
    # np.dtype: a dtype may also be given as a scalar type, such as jnp.bfloat16.
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _is_array_like(leaf: Any) -> bool:
    """Whether it is an array, a ShapeDtypeStruct or Orbax's metadata of an array."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def as_dicts(tree: Any) -> Any:
    """NamedTuples, tuples and lists as nested dicts without empty ones, as a checkpoint holds them.

    State(params={"w": x}, opt=(Adam(mu=y), Empty())) -> {"params": {"w": x}, "opt": {"0": {"mu": y}}}
    """
    if _is_array_like(tree):
        return tree
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    elif isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    # Anything else is a leaf without a shape, such as None: a checkpoint does not hold it.
    if not isinstance(tree, Mapping):
        return {}
    children = {}
    for key, value in tree.items():
        # Optax's states have many empty tuples, which Orbax drops.
        child = as_dicts(value)
        if _is_array_like(child) or child:
            children[str(key)] = child
    return children
