"""The logical axes of an optimizer's state, by which it is sharded."""

from typing import Any

import jax

from jaxllm.optim import adafactor, soap

# States that have a leaf for each parameter, but of another shape: field -> its axes, of those of the parameter.
_OTHER_SHAPES = {
    "row_mean": adafactor.row_axes,
    "column_mean": adafactor.column_axes,
    "left": soap.left_axes,
    "right": soap.right_axes,
    "left_basis": soap.left_axes,
    "right_basis": soap.right_axes,
}


def state_axes(state: Any, axes: Any) -> Any:
    """A tree like an optimizer's (abstract) state: for each leaf the axes of its dimensions.

    A leaf belongs to the parameter whose path its own path ends with, and has that parameter's axes. Counts have none.

    axes: a tree of `Axes`, nested dicts like the parameters.
    """
    leaves = jax.tree_util.tree_leaves_with_path(axes)
    by_path = {tuple(key.key for key in path): names for path, names in leaves}

    def axes_of(path: Any, leaf: Any) -> tuple[str | None, ...]:
        # State is made of named tuples and parameters of dicts: (0, ".mu", "layers", "mlp", "up").
        field, own = "", []
        for key in path:
            if isinstance(key, jax.tree_util.DictKey):
                own.append(key.key)
            else:
                field, own = getattr(key, "name", ""), []
        if tuple(own) not in by_path:
            return (None,) * leaf.ndim
        names = by_path[tuple(own)]
        return _OTHER_SHAPES.get(field, tuple)(names)

    return jax.tree_util.tree_map_with_path(axes_of, state)
