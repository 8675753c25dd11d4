"""Muon (Jordan et al. 2024): momentum, made orthogonal matrix by matrix by a Newton-Schulz iteration."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.models.parameters import Axes
from jaxllm.optim.whole_matrices import Arrays, as_matrix, on_whole_matrices

# Of the quintic iteration: they raise small singular values fastest, and end between about 0.7 and 1.2 instead of at 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class MuonState(NamedTuple):
    """Of the matrices."""

    count: Any  # int32[]: updates so far
    momentum: Any  # a tree like the parameters


def scale_by_muon(
    momentum: float, scaling: Literal["rms", "width"], axes: Any
) -> optax.GradientTransformation:
    """Orthogonalized Nesterov momentum of stacked matrices.

    As `optax.contrib.scale_by_muon`, but dimensions have their roles by name, and each device works on its own share of
    the matrices instead of on all of them (`whole_matrices`).

    Args:
      momentum: decay of the gradient's running mean.
      scaling: see `_scale`.
      axes: a tree of `Axes` of matrices.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        del params
        count = state.count + 1
        mean = optax.tree.update_moment(updates, state.momentum, momentum, 1)
        # Nesterov's step ahead, each part without its bias towards 0 (Dozat 2016).
        ahead = jax.tree.map(
            lambda m, g: momentum * m + (1.0 - momentum) * g,
            optax.tree.bias_correction(mean, momentum, count + 1),
            optax.tree.bias_correction(updates, momentum, count),
        )
        moves = jax.tree.map(lambda x, names: _orthogonalize(x, names, scaling), ahead, axes)
        return moves, MuonState(count, mean)

    return optax.GradientTransformation(init, update)


def _orthogonalize(x: jax.Array, axes: Axes, scaling: str) -> jax.Array:
    """Every matrix of x [*stack, *inputs, *outputs], as the nearest orthogonal matrix (nearly) times its scale."""

    def one(arrays: Arrays) -> Arrays:
        matrix = as_matrix(arrays["x"], axes)
        rows, columns = matrix.shape
        nearest = newton_schulz(matrix) * _scale(rows, columns, scaling, axes)
        return {"x": nearest.reshape(arrays["x"].shape)}

    return on_whole_matrices(one, {"x": x}, {"x": axes}, axes.num_stacked, ["x"])["x"]


def newton_schulz(x: jax.Array) -> jax.Array:
    """U S V^T [I, O] -> about U V^T, by f(X) = a X + b (X X^T) X + c (X X^T)^2 X, applied five times."""
    a, b, c = _COEFFICIENTS
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T  # f(X^T) = f(X)^T, and X X^T is smaller this way
    # The iteration converges for singular values up to 1, and none is larger than the Frobenius norm.
    x = x / (jnp.linalg.norm(x) + 1e-8)
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.T if tall else x


def _scale(rows: float, columns: float, scaling: str, axes: Axes) -> float:
    """The factor of an orthogonal matrix that maps `rows` inputs to `columns` outputs.

    "rms": 0.2 sqrt(max(rows, columns)), so that its elements have a root mean square of 0.2, about as large as an update
    of AdamW: the same learning rate and weight decay do for both (Liu et al. 2025, section 2.2).
    "width": sqrt(max(1, columns / rows)) (Jordan et al. 2024).

    With `model.scaling` it is that of the base's matrix, and from there the norm grows as sqrt(columns / rows) (Yang, Simon and
    Bernstein 2023, "A spectral condition for feature learning").
    """
    rows, columns = rows / axes.scale.inputs, columns / axes.scale.outputs
    growth = (axes.scale.outputs / axes.scale.inputs) ** 0.5
    if scaling == "rms":
        return growth * 0.2 * max(rows, columns) ** 0.5
    return growth * max(1.0, columns / rows) ** 0.5
