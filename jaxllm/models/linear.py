"""The linear map and the gated activation of the MLP, with gradients written by hand."""

import functools

import jax
import jax.numpy as jnp

from jaxllm.runtime.products import contract


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, matrix: jax.Array, num_inputs: int = 1) -> jax.Array:
    """x [..., I] times a float32 matrix [I, *O] -> [..., *O], in x's dtype.

    num_inputs: how many leading dimensions of the matrix make up I, as of [heads, head_dim, D].

    With y = x W the gradients are dx = dy W^T and dW = x^T dy. `jax.grad` would derive dW = (dy^T x)^T, and XLA's kernels
    for CPUs are slow at both transpositions.
    """
    return contract(x, _weights(x, matrix, num_inputs), ((x.ndim - 1,), (0,)))


def _weights(x: jax.Array, matrix: jax.Array, num_inputs: int) -> jax.Array:
    """The matrix as [I, *O] in x's dtype."""
    # Converted first: XLA gathers a sharded matrix where it is reshaped, and float32 is twice as much.
    return matrix.astype(x.dtype).reshape(-1, *matrix.shape[num_inputs:])


def _forward(
    x: jax.Array, matrix: jax.Array, num_inputs: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The matrix is kept in float32, as it is: to convert it again is cheaper than to keep a copy.
    return linear(x, matrix, num_inputs), (x, matrix)


def _backward(
    num_inputs: int, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, matrix = residuals
    weights = _weights(x, matrix, num_inputs)
    rows = tuple(range(x.ndim - 1))  # the dimensions of x that are not multiplied
    outputs = tuple(range(x.ndim - 1, dy.ndim))
    dx = contract(dy, weights, (outputs, tuple(range(1, weights.ndim))))
    dw = contract(x, dy, (rows, rows), float32_if_free=True)
    return dx, dw.reshape(matrix.shape).astype(matrix.dtype)


linear.defvjp(_forward, _backward)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up (Shazeer 2020, eq. 6), of arrays of one shape and dtype; computed in float32.

    Only the two arguments are kept for the backward pass.
    """
    wide = gate.astype(jnp.float32)
    return (jax.nn.silu(wide) * up.astype(jnp.float32)).astype(gate.dtype)


def _swiglu_forward(
    gate: jax.Array, up: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(
    residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """With s = sigmoid(g): the derivative of silu(g) = g s is s (1 + g (1 - s))."""
    gate, up = residuals
    g = gate.astype(jnp.float32)
    d = dy.astype(jnp.float32)
    s = jax.nn.sigmoid(g)
    d_gate = d * up.astype(jnp.float32) * s * (1.0 + g * (1.0 - s))
    d_up = d * g * s
    return d_gate.astype(gate.dtype), d_up.astype(up.dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
