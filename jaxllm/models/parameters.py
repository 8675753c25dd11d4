"""Parameters of the model's modules, and what other code must know about each of them.

A parameter states these facts where it is made: the logical axes of its dimensions (`sharding.PARAM_RULES` maps them to
the mesh), whether weight decay applies (`optim`), which of its dimensions make a matrix (`lora`, `optim`), and how it follows
the model's size (`scaling`, `optim`).
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.config import ModelConfig
from jaxllm.models.scaling import LIKE_BASE, Place, Scale, of_matrix, of_vector


class Axes(tuple[str | None, ...]):
    """Logical axes of a parameter, one name per dimension, with more facts about it.

    The sharding rules read it as the tuple that it is. JAX treats it as one leaf of a tree, so that a tree of `Axes` has
    the structure of the parameters.
    """

    decays: bool
    """Whether weight decay applies: yes for matrices and embeddings, no for norms and biases."""
    num_inputs: int
    """How many dimensions a product sums over, after the stacked ones: those of a linear map's matrix. 0: the parameter
    is no matrix but a table, a norm or a bias."""
    num_stacked: int
    """How many leading dimensions count equal parameters: layers, experts."""
    scale: Scale
    """How its start and its updates follow the model's size."""

    def __new__(
        cls,
        names: Iterable[str | None],
        *,
        decays: bool,
        num_inputs: int = 0,
        num_stacked: int = 0,
        scale: Scale = LIKE_BASE,
    ) -> "Axes":
        # A tuple is immutable: its elements are set here, not in __init__.
        axes = super().__new__(cls, names)
        axes.decays = decays
        axes.num_inputs = num_inputs
        axes.num_stacked = num_stacked
        axes.scale = scale
        return axes

    @property
    def stack(self) -> tuple[str | None, ...]:
        """The names of the stacked dimensions."""
        return self[: self.num_stacked]

    @property
    def inputs(self) -> tuple[str | None, ...]:
        """The names of the dimensions that a product sums over: a matrix's rows."""
        return self[self.num_stacked : self.num_stacked + self.num_inputs]

    @property
    def outputs(self) -> tuple[str | None, ...]:
        """The names of the other dimensions: a matrix's columns."""
        return self[self.num_stacked + self.num_inputs :]

    def stacked(self, name: str) -> "Axes":
        """The axes of many such parameters, stacked along a new first dimension."""
        return Axes(
            (name, *self),
            decays=self.decays,
            num_inputs=self.num_inputs,
            num_stacked=self.num_stacked + 1,
            scale=self.scale,
        )


def matrix(
    rngs: nnx.Rngs,
    config: ModelConfig,
    inputs: Mapping[str, int],
    outputs: Mapping[str, int],
    stack: Mapping[str, int] | None = None,
    place: Place = "inside",
) -> nnx.Param:
    """The float32 matrix of a linear map, or a stack of them, sampled from a normal distribution; weight decay applies.

    matrix(rngs, config, {"embed": 8}, {"heads": 2, "head_dim": 4}) maps [..., 8] to [..., 2, 4] and has shape [8, 2, 4].
    With stack={"experts": 3} there are three of them, in one array of shape [3, 8, 2, 4].

    place: "last" if the products are added to the residual stream.
    """
    stack = stack or {}
    sizes = {**stack, **inputs, **outputs}
    scale = of_matrix(config, inputs, outputs, _before_norm(config, place))
    axes = Axes(sizes, decays=True, num_inputs=len(inputs), num_stacked=len(stack), scale=scale)
    std = config.residual_init_std if place == "last" else config.init_std
    return _sample(rngs, std, sizes, axes)


def table(rngs: nnx.Rngs, config: ModelConfig, scale: Scale, **axes: int) -> nnx.Param:
    """A float32 table of vectors, sampled from a normal distribution; weight decay applies.

    Keyword order gives the dimensions: table(..., vocab=100, embed=8) has shape [100, 8].
    """
    return _sample(rngs, config.init_std, axes, Axes(axes, decays=True, scale=scale))


def constant(value: float, scale: Scale, **axes: int) -> nnx.Param:
    """A float32 parameter that starts at `value`, without weight decay: the scale of a norm, or a bias."""
    # One value for all elements, so no key is used: adding a bias changes no other parameter.
    array = jnp.full(tuple(axes.values()), value * scale.init, jnp.float32)
    return nnx.Param(array, axes=Axes(axes, decays=False, scale=scale))


def bias(config: ModelConfig, axes: Mapping[str, int], place: Place = "inside") -> nnx.Param:
    """The bias of a matrix in a residual branch, float32 zeros; place: that of the matrix."""
    return constant(0.0, of_vector(config, axes, _before_norm(config, place)), **axes)


def _before_norm(config: ModelConfig, place: Place) -> Place:
    """The place of a projection, which is not the last one where a norm stands between it and the stream."""
    return place if config.norm_place == "before" else "inside"


def expand_like(value: jax.Array, x: jax.Array) -> jax.Array:
    """A parameter over the last dimensions of x, in x's dtype and with leading dimensions of size 1."""
    # Explicit, since the tests forbid NumPy's implicit rank promotion.
    leading = (1,) * (x.ndim - value.ndim)
    return value.astype(x.dtype).reshape(leading + value.shape)


def _sample(rngs: nnx.Rngs, std: float, sizes: Mapping[str, int], axes: Axes) -> nnx.Param:
    # Always float32: the optimizer's small updates would be lost in bfloat16.
    array = (
        std * axes.scale.init * jax.random.normal(rngs.params(), tuple(sizes.values()), jnp.float32)
    )
    return nnx.Param(array, axes=axes)
