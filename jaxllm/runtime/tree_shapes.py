"""Trees of arrays by the names and shapes of their leaves: what a checkpoint holds beside what a config makes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxllm.config import InputError
from jaxllm.runtime import digest


def compare(saved: Any, wanted: Any, place: str) -> None:
    """Raise InputError listing what differs between a checkpoint's tree and the one this config makes."""
    have, want = shapes(saved), shapes(wanted)
    if have == want:
        return
    only_saved = [f"{k} {have[k]}" for k in have if k not in want]
    only_wanted = [f"{k} {want[k]}" for k in want if k not in have]
    differ = [
        f"{k} {have[k]} here, {want[k]} wanted" for k in have if k in want and have[k] != want[k]
    ]
    parts = [
        ("differ", differ),
        ("only in the checkpoint", only_saved),
        ("only in this config's model", only_wanted),
    ]
    text = "; ".join(
        f"{name}: {', '.join(v[:3])}{f' and {len(v) - 3} more' if len(v) > 3 else ''}"
        for name, v in parts
        if v
    )
    raise InputError(
        f"{place}: the checkpoint is of another model ({text}); use its own config or another directory"
    )


def _is_metadata(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def shapes(tree: Any) -> dict[str, str]:
    """Path -> "dtype[shape]" for each leaf, the same for a NamedTuple and for the dict Orbax makes of it."""
    leaves = jax.tree_util.tree_leaves_with_path(as_dicts(tree), is_leaf=_is_metadata)
    shown = lambda m: f"{np.dtype(m.dtype).name}{list(m.shape)}"
    return {digest.path_name(path): shown(leaf) for path, leaf in leaves}


def as_dicts(tree: Any) -> Any:
    """NamedTuples, tuples and lists as dicts, empty ones dropped, as they stand in a checkpoint."""
    if _is_metadata(tree):
        return tree
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    elif isinstance(tree, list | tuple):
        tree = {str(i): v for i, v in enumerate(tree)}
    if not isinstance(tree, Mapping):
        return {}
    children = {str(k): as_dicts(v) for k, v in tree.items()}
    return {k: v for k, v in children.items() if _is_metadata(v) or v}
