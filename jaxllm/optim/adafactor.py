"""Adafactor (Shazeer and Stern 2018): the second moment of a matrix, kept as the means of its rows and columns."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.models.parameters import Axes

# Values of the paper (section 9): the exponent of the decay 1 - t^-0.8, the floor of a squared gradient, and the largest
# root mean square of an update.
_EXPONENT = 0.8
_FLOOR = 1e-30
_LARGEST_RMS = 1.0


class AdafactorState(NamedTuple):
    """Trees like the parameters; where a parameter has no such mean there is an `optax.MaskedNode`."""

    count: Any  # int32[]: updates so far
    row_mean: Any  # [*stack, *inputs], of matrices and tables
    column_mean: Any  # [*stack, *outputs], of the same
    full_mean: Any  # like the parameter, of norms and biases


def scale_by_adafactor(axes: Any) -> optax.GradientTransformation:
    """Gradients over the root of their factored second moment, clipped matrix by matrix (algorithms 4 and 5).

    Without momentum and without the relative step size: the learning rate is that of the schedule.

    As `optax.scale_by_factored_rms` and `optax.clip_by_block_rms`, which factor the two largest dimensions of an array:
    of stacked layers these may be the layers, or one head and not all of them. Here the names of the dimensions decide.

    axes: a tree of `Axes` like the parameters.
    """

    def init(params: Any) -> AdafactorState:
        means = jax.tree.map(_zeros, axes, params)
        return _state(jnp.zeros((), jnp.int32), axes, means)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdafactorState]:
        del params
        count = state.count + 1
        decay = 1.0 - count.astype(jnp.float32) ** -_EXPONENT
        updated = jax.tree.map(
            lambda names, grad, *means: _update(names, grad, means, decay),
            axes,
            updates,
            *state[1:],
        )
        moves = jax.tree.map(lambda _, pair: pair[0], axes, updated)
        means = jax.tree.map(lambda _, pair: pair[1], axes, updated)
        return moves, _state(count, axes, means)

    return optax.GradientTransformation(init, update)


def _update(
    axes: Axes, grad: jax.Array, means: tuple[Any, ...], decay: jax.Array
) -> tuple[jax.Array, tuple[Any, ...]]:
    """(move, new means) of one parameter."""
    square = jnp.square(grad) + _FLOOR
    follow = lambda mean, new: decay * mean + (1.0 - decay) * new
    rows, columns, full = means
    inputs, outputs = _matrix_dims(axes)
    if not inputs:
        full = follow(full, square)
        move = grad * jax.lax.rsqrt(full)
    else:
        rows = follow(rows, square.mean(outputs))
        columns = follow(columns, square.mean(inputs))
        # The estimate is rows x columns / mean of rows.
        share = rows / rows.mean(inputs, keepdims=True)
        move = (
            grad
            * jnp.expand_dims(jax.lax.rsqrt(share), outputs)
            * jnp.expand_dims(jax.lax.rsqrt(columns), inputs)
        )
    own = tuple(range(axes.num_stacked, grad.ndim))
    rms = jnp.sqrt(jnp.square(move).mean(own, keepdims=True))
    return move / jnp.maximum(1.0, rms / _LARGEST_RMS), (rows, columns, full)


def _matrix_dims(axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(dimensions of the rows, of the columns) of a matrix or a table; two empty ones for norms and biases."""
    first = axes.num_stacked
    own = len(axes) - first
    # A table of vectors is a matrix as well, whose rows are looked up instead of summed over.
    inputs = axes.num_inputs or int(axes.decays and own == 2)
    if not inputs:
        return (), ()
    return tuple(range(first, first + inputs)), tuple(range(first + inputs, len(axes)))


def row_axes(axes: Axes) -> tuple[str | None, ...]:
    """The axes of `row_mean`: the parameter's without its columns."""
    _, outputs = _matrix_dims(axes)
    return tuple(name for dim, name in enumerate(axes) if dim not in outputs)


def column_axes(axes: Axes) -> tuple[str | None, ...]:
    """The axes of `column_mean`: the parameter's without its rows."""
    inputs, _ = _matrix_dims(axes)
    return tuple(name for dim, name in enumerate(axes) if dim not in inputs)


def _zeros(axes: Axes, param: Any) -> tuple[Any, ...]:
    inputs, outputs = _matrix_dims(axes)
    absent = optax.MaskedNode()
    if not inputs:
        return absent, absent, jnp.zeros_like(param)
    without = lambda dims: tuple(n for dim, n in enumerate(param.shape) if dim not in dims)
    return (
        jnp.zeros(without(outputs), param.dtype),
        jnp.zeros(without(inputs), param.dtype),
        absent,
    )


def _state(count: jax.Array, axes: Any, means: Any) -> AdafactorState:
    """means: a tree like `axes` of (row, column, full)."""
    pick = lambda i: jax.tree.map(lambda _, triple: triple[i], axes, means)
    return AdafactorState(count, pick(0), pick(1), pick(2))
