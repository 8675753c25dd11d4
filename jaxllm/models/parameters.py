"""Parameters of the model's modules, and what other code must know about each of them.

A parameter states these facts where it is made: the logical axes of its dimensions (`sharding.PARAM_RULES` maps them to
the mesh), whether weight decay applies (`optim`), and how many dimensions a product sums over (`lora`).
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx


class Axes(tuple[str | None, ...]):
    """Logical axes of a parameter, one name per dimension, with two more facts about it.

    The sharding rules read it as the tuple that it is. JAX treats it as one leaf of a tree, so that a tree of `Axes` has
    the structure of the parameters.
    """

    decays: bool
    """Whether weight decay applies: yes for matrices and embeddings, no for norms and biases."""
    num_inputs: int
    """How many leading dimensions a product sums over, where a low-rank adapter is possible; otherwise 0."""

    def __new__(cls, names: Iterable[str | None], *, decays: bool, num_inputs: int = 0) -> "Axes":
        # A tuple is immutable: its elements are set here, not in __init__.
        axes = super().__new__(cls, names)
        axes.decays = decays
        axes.num_inputs = num_inputs
        return axes

    def stacked(self, name: str) -> "Axes":
        """The axes of many such parameters, stacked along a new first dimension."""
        return Axes((name, *self), decays=self.decays, num_inputs=self.num_inputs)


def matrix(
    rngs: nnx.Rngs, std: float, inputs: Mapping[str, int], outputs: Mapping[str, int]
) -> nnx.Param:
    """The float32 matrix of a linear map, sampled from N(0, std^2); see `normal`.

    matrix(rngs, 0.02, {"embed": 8}, {"heads": 2, "head_dim": 4}) maps [..., 8] to [..., 2, 4] and has shape [8, 2, 4].
    """
    return _sample(rngs, std, {**inputs, **outputs}, num_inputs=len(inputs))


def normal(rngs: nnx.Rngs, std: float, **axes: int) -> nnx.Param:
    """A float32 parameter sampled from N(0, std^2), to which weight decay applies.

    Keyword order gives the dimensions: normal(rngs, 0.02, vocab=100, embed=8) has shape [100, 8].
    """
    return _sample(rngs, std, axes, num_inputs=0)


def constant(value: float, **axes: int) -> nnx.Param:
    """A float32 parameter that starts at `value`, without weight decay: the scale of a norm, or a bias."""
    # One value for all elements, so no key is used: adding a bias changes no other parameter.
    array = jnp.full(tuple(axes.values()), value, jnp.float32)
    return nnx.Param(array, axes=Axes(axes, decays=False))


def expand_like(value: jax.Array, x: jax.Array) -> jax.Array:
    """A parameter over the last dimensions of x, in x's dtype and with leading dimensions of size 1."""
    # Explicit, since the tests forbid NumPy's implicit rank promotion.
    leading = (1,) * (x.ndim - value.ndim)
    return value.astype(x.dtype).reshape(leading + value.shape)


def _sample(rngs: nnx.Rngs, std: float, axes: Mapping[str, int], num_inputs: int) -> nnx.Param:
    # Always float32: the optimizer's small updates would be lost in bfloat16.
    array = std * jax.random.normal(rngs.params(), tuple(axes.values()), jnp.float32)
    return nnx.Param(array, axes=Axes(axes, decays=True, num_inputs=num_inputs))
