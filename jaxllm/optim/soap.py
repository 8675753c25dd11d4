"""SOAP (Vyas et al. 2024, algorithm 3): Adam in the eigenbasis of Shampoo's preconditioner.

For a matrix's gradient G [I, O] the means L of G G^T and R of G^T G have eigenvectors Q_L and Q_R. Adam's second moment is
that of Q_L^T G Q_R, and its move is rotated back.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.models.parameters import Axes
from jaxllm.optim.whole_matrices import Arrays, Names, as_matrix, on_whole_matrices


class SoapState(NamedTuple):
    """Trees like the matrices; where a side is too long to have a basis there is an `optax.MaskedNode`."""

    count: Any  # int32[]: updates so far, the first one included, which moves nothing
    mean: Any  # of the gradient, as it is
    square: Any  # second moment of the rotated gradient
    left: Any  # float32[*stack, I, I]: L
    right: Any  # float32[*stack, O, O]: R
    left_basis: Any  # its eigenvectors Q_L, the largest eigenvalue's first
    right_basis: Any  # Q_R


def left_axes(axes: Axes) -> Names:
    """The axes of `left` and `left_basis`: its rows are split as those of the matrix."""
    return (*axes.stack, axes.inputs[0], None)


def right_axes(axes: Axes) -> Names:
    """The axes of `right` and `right_basis`: its rows are split as the columns of the matrix."""
    return (*axes.stack, axes.outputs[0], None)


def scale_by_soap(
    b1: float, b2: float, eps: float, every: int, longest: int, axes: Any
) -> optax.GradientTransformation:
    """Adam of stacked matrices, each in its eigenbasis.

    The first update only finds the eigenbases, and moves nothing: in its own basis a gradient is diagonal, and Adam would
    blow up the rounding errors around it. This is what the authors' code does.

    Args:
      b1: decay of the gradient's running mean.
      b2: decay of the running means of its squares: Adam's, L and R.
      eps: added to the root of the second moment.
      every: updates between two steps of the power iteration that keeps up the eigenbases.
      longest: the longest side with an eigenbasis. A longer one is not rotated (the paper's one-sided SOAP).
      axes: a tree of `Axes` of matrices.
    """

    def init(params: Any) -> SoapState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        sides = lambda: [
            jax.tree.map(functools.partial(_zero_side, longest, left=left), axes, params)
            for left in (True, False)
        ]
        return SoapState(jnp.zeros((), jnp.int32), zeros(), zeros(), *sides(), *sides())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, SoapState]:
        del params
        first = state.count == 0
        mean = optax.tree.update_moment(updates, state.mean, b1, 1)
        # The first gradient goes into L and R only.
        mean = jax.tree.map(lambda x: jnp.where(first, 0.0, x), mean)
        steps = jnp.maximum(state.count, 1)
        unbiased = optax.tree.bias_correction(mean, b1, steps)
        old = (state.square, state.left, state.right, state.left_basis, state.right_basis)
        correction = 1.0 - b2 ** steps.astype(jnp.float32)
        stepped = jax.tree.map(
            lambda names, *arrays: _step(names, *arrays, b2=b2, eps=eps, correction=correction),
            axes,
            unbiased,
            updates,
            *old,
        )
        pick = lambda name: jax.tree.map(lambda _, found: found[name], axes, stepped)
        square = jax.tree.map(lambda x: jnp.where(first, 0.0, x), pick("square"))
        sides, bases = (pick("left"), pick("right")), (state.left_basis, state.right_basis)
        bases = _renewed(axes, sides, bases, state.count, every)
        return pick("mean"), SoapState(state.count + 1, mean, square, *sides, *bases)

    return optax.GradientTransformation(init, update)


def _zero_side(longest: int, axes: Axes, param: Any, *, left: bool) -> Any:
    """Zeros [*stack, n, n] of a side of n; absent if it is too long."""
    split = axes.num_stacked + axes.num_inputs
    own = param.shape[axes.num_stacked : split] if left else param.shape[split:]
    size = math.prod(own)
    if size > longest:
        return optax.MaskedNode()
    return jnp.zeros((*param.shape[: axes.num_stacked], size, size), jnp.float32)


def _step(
    axes: Axes,
    mean: jax.Array,
    grad: jax.Array,
    square: jax.Array,
    *sides: Any,
    b2: float,
    eps: float,
    correction: jax.Array,
) -> dict[str, Any]:
    """One step of a stack of matrices: "mean" as the move, and "square", "left" and "right" one update further.

    mean: of the gradient, unbiased. sides: left, right and their bases. correction: that of `square`'s bias.
    """
    # A side without a basis takes part in nothing.
    names = ("left", "right", "left_basis", "right_basis")
    arrays = {"mean": mean, "grad": grad, "square": square}
    places: dict[str, Names] = dict.fromkeys(arrays, axes)
    for name, side in zip(names, sides, strict=True):
        if not isinstance(side, optax.MaskedNode):
            arrays[name] = side
            places[name] = left_axes(axes) if name.startswith("left") else right_axes(axes)

    def one(own: Arrays) -> Arrays:
        g, m, v = (as_matrix(own[name], axes) for name in ("grad", "mean", "square"))
        v = b2 * v + (1.0 - b2) * jnp.square(_rotate(g, own))
        move = _rotate(m, own) / (jnp.sqrt(v / correction) + eps)
        results = {"mean": _rotate(move, own, back=True), "square": v}
        results = {name: x.reshape(own[name].shape) for name, x in results.items()}
        for name, product in (("left", g @ g.T), ("right", g.T @ g)):
            if name in own:
                results[name] = b2 * own[name] + (1.0 - b2) * product
        return results

    results = [name for name in ("mean", "square", "left", "right") if name in arrays]
    done = on_whole_matrices(one, arrays, places, axes.num_stacked, results)
    return {"left": optax.MaskedNode(), "right": optax.MaskedNode(), **done}


def _rotate(x: jax.Array, own: Arrays, *, back: bool = False) -> jax.Array:
    """Q_L^T x Q_R of x [I, O], or Q_L x Q_R^T; a side without a basis is left alone."""
    if "left_basis" in own:
        basis = own["left_basis"]
        x = (basis if back else basis.T) @ x
    if "right_basis" in own:
        basis = own["right_basis"]
        x = x @ (basis.T if back else basis)
    return x


def _renewed(axes: Any, sides: Any, bases: Any, count: jax.Array, every: int) -> Any:
    """The (left, right) bases after this update: new ones after the first, renewed ones after every `every` updates."""

    def renew(one: Callable[[Arrays], Arrays]) -> Any:
        return tuple(
            jax.tree.map(functools.partial(_renew_side, one, place), axes, side, basis)
            for place, side, basis in zip((left_axes, right_axes), sides, bases, strict=True)
        )

    which = jnp.where(count == 0, 1, jnp.where(count % every == 0, 2, 0))
    return jax.lax.switch(
        which, [lambda: bases, lambda: renew(_eigenbasis), lambda: renew(_power_iteration)]
    )


def _renew_side(
    one: Callable[[Arrays], Arrays],
    place: Callable[[Axes], Names],
    axes: Axes,
    side: Any,
    basis: Any,
) -> Any:
    if isinstance(side, optax.MaskedNode):
        return basis
    arrays = {"side": side, "basis": basis}
    where = dict.fromkeys(arrays, place(axes))
    return on_whole_matrices(one, arrays, where, axes.num_stacked, ["basis"])["basis"]


def _eigenbasis(own: Arrays) -> Arrays:
    # Ascending eigenvalues; the power iteration would turn their order around, column by column.
    return {"basis": jnp.linalg.eigh(own["side"])[1][:, ::-1]}


def _power_iteration(own: Arrays) -> Arrays:
    """One step of orthogonal iteration (algorithm 4): the factor Q of side @ basis."""
    return {"basis": jnp.linalg.qr(own["side"] @ own["basis"])[0]}
