"""Checkpoints: Orbax behind a few functions. Asynchronous, atomic, last N and best kept.

Restoring always goes through the abstract state with the target shardings, so another mesh or device count is
no special case. A tree that does not match is an error that lists both sides; nothing is overlaid on fresh weights.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from jaxllm.config import InputError


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    save_every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Checkpoints with the best held-out metric kept besides."""

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise ValueError("save_every: must be at least 1")
        if self.keep_last < 1 or self.keep_best < 0:
            raise ValueError("keep_last: keep at least the newest checkpoint, and keep_best of 0 or more")


def open_manager(
    directory: epath.PathLike, config: CheckpointConfig | None = None, metric: str = "", lower_is_better: bool = True
) -> ocp.CheckpointManager:
    """The manager of a stage's checkpoints/ folder; without a config it only reads."""
    path = epath.Path(directory)
    path = path if "://" in str(path) else path.resolve()  # Orbax takes absolute paths only
    handler = ocp.PyTreeCheckpointHandler()
    if config is None:
        options = ocp.CheckpointManagerOptions(read_only=True)
        return ocp.CheckpointManager(path, options=options, item_handlers=handler)
    rules: list[Any] = [policies.LatestN(config.keep_last)]
    if metric and config.keep_best:
        # BestN keeps the highest value, and a step saved without the metric counts as the worst.
        sign = -1.0 if lower_is_better else 1.0
        value: Callable[[Any], float] = lambda m: sign * m[metric] if m and metric in m else -np.inf
        rules.append(policies.BestN(get_metric_fn=value, n=config.keep_best))
    _clean(path)
    options = ocp.CheckpointManagerOptions(preservation_policy=policies.AnyPreservationPolicy(rules))
    return ocp.CheckpointManager(path, options=options, item_handlers=handler)


def save(manager: ocp.CheckpointManager, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
    """Start saving; the state is copied off the device before this returns, the rest is in the background."""
    manager.save(step, args=ocp.args.PyTreeSave(state), metrics=dict(metrics or {}))


def restore_or_init(manager: ocp.CheckpointManager, abstract: Any, init: Callable[[], Any]) -> Any:
    """The newest complete checkpoint of this run, else init()."""
    manager.reload()  # re-read the folder: the cached list may name a step whose commit failed
    step = manager.latest_step()
    return init() if step is None else restore(manager, step, abstract)


def load_params(stage_dir: epath.PathLike, abstract: Any, path: Sequence[str] = ("params",)) -> Any:
    """Only the subtree at `path` of the newest checkpoint of a stage directory, sharded like `abstract`."""
    directory = epath.Path(stage_dir) / "checkpoints"
    if not directory.exists():
        raise InputError(f"{stage_dir}: has no checkpoints; give the directory of a stage that trains a model")
    manager = open_manager(directory)
    try:
        if (step := manager.latest_step()) is None:
            raise InputError(f"{directory}: holds no complete checkpoint; run the stage again")
        return restore(manager, step, abstract, path)
    finally:
        manager.close()


def restore(manager: ocp.CheckpointManager, step: int, abstract: Any, path: Sequence[str] = ()) -> Any:
    """The state saved at `step`, or its subtree at `path`, placed by the shardings of `abstract`.

    abstract: a tree of jax.ShapeDtypeStruct. Raises InputError where the checkpoint holds another tree, other
    shapes or types, or cannot be read.
    """
    place = f"{manager.directory}/{step}"
    try:
        if (saved := manager.item_metadata(step)) is None:
            raise FileNotFoundError("its metadata is missing")
        part = functools.reduce(lambda tree, key: tree.get(key, {}), path, _as_dicts(saved.tree))
        compare(part, abstract, place)
        item = functools.reduce(lambda tree, key: {key: tree}, reversed(path), abstract)
        to_args = lambda a: ocp.ArrayRestoreArgs(sharding=a.sharding, global_shape=a.shape, dtype=a.dtype)
        args = ocp.args.PyTreeRestore(item, restore_args=jax.tree.map(to_args, item), partial_restore=bool(path))
        return functools.reduce(lambda tree, key: tree[key], path, manager.restore(step, args=args))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{place}: this checkpoint is damaged or half-written ({type(error).__name__}: {reason}); "
            "remove that folder to go on from the one before"
        ) from None


def compare(saved: Any, wanted: Any, place: str) -> None:
    """Raise InputError listing what differs between a checkpoint's tree and the one this config makes."""
    have, want = _shapes(saved), _shapes(wanted)
    if have == want:
        return
    only_saved = [f"{k} {have[k]}" for k in have if k not in want]
    only_wanted = [f"{k} {want[k]}" for k in want if k not in have]
    differ = [f"{k} {have[k]} here, {want[k]} wanted" for k in have if k in want and have[k] != want[k]]
    parts = [("differ", differ), ("only in the checkpoint", only_saved), ("only in this config's model", only_wanted)]
    text = "; ".join(
        f"{name}: {', '.join(v[:3])}{f' and {len(v) - 3} more' if len(v) > 3 else ''}" for name, v in parts if v
    )
    raise InputError(f"{place}: the checkpoint is of another model ({text}); use its own config or another directory")


def _clean(path: epath.Path) -> None:
    """Remove what a killed save left behind; committed steps have another name."""
    if path.exists():
        for entry in path.iterdir():
            if ".orbax-checkpoint-tmp" in entry.name:
                shutil.rmtree(entry)
    path.mkdir(parents=True, exist_ok=True)


def _is_metadata(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _shapes(tree: Any) -> dict[str, str]:
    """Path -> "dtype[shape]" for each leaf, the same for a NamedTuple and for the dict Orbax makes of it."""
    leaves = jax.tree_util.tree_leaves_with_path(_as_dicts(tree), is_leaf=_is_metadata)
    shown = lambda m: f"{np.dtype(m.dtype).name}{list(m.shape)}"
    return {".".join(str(k.key) for k in path): shown(leaf) for path, leaf in leaves}


def _as_dicts(tree: Any) -> Any:
    """NamedTuples, tuples and lists as dicts, empty ones dropped, as they stand in a checkpoint."""
    if _is_metadata(tree):
        return tree
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    elif isinstance(tree, list | tuple):
        tree = {str(i): v for i, v in enumerate(tree)}
    if not isinstance(tree, Mapping):
        return {}
    children = {str(k): _as_dicts(v) for k, v in tree.items()}
    return {k: v for k, v in children.items() if _is_metadata(v) or v}
