"""Hand-written gradients of the model's parts are those that JAX derives from the plain definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import norm
from jaxllm.models.linear import linear, swiglu
from jaxllm.models.parts_config import RopeScaling
from jaxllm.models.rope import frequencies, rope

B, T, D = 2, 5, 6


def sample(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + sum(shape)), shape)


def same_gradients(ours, derived, *arrays):
    """Of a weighted sum of the results, by all arrays; and the results themselves."""
    want = derived(*arrays)
    weights = sample(*want.shape, seed=9)
    np.testing.assert_allclose(ours(*arrays), want, rtol=1e-5, atol=1e-6)
    numbers = tuple(range(len(arrays)))
    sums = [lambda *a, f=f: (weights * f(*a)).sum() for f in (ours, derived)]
    got, want = (jax.grad(f, numbers)(*arrays) for f in sums)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(D, 4), (D, 2, 3)], ids=["matrix", "heads"])
def test_linear(shape):
    derived = lambda x, w: jnp.tensordot(x, w, 1)
    same_gradients(linear, derived, sample(B, T, D), sample(*shape))


def test_linear_of_heads():
    ours = lambda x, w: linear(x.reshape(B, T, 6), w, 2)
    derived = lambda x, w: jnp.einsum("btnh,nhd->btd", x, w)
    same_gradients(ours, derived, sample(B, T, 2, 3), sample(2, 3, 4))


def test_linear_under_vmap_and_checkpoint():
    x, w = sample(3, B, T, D), sample(3, D, 4)
    ours = lambda x, w: jax.vmap(jax.checkpoint(linear))(x, w)
    same_gradients(ours, lambda x, w: jnp.einsum("nbtd,ndf->nbtf", x, w), x, w)


def test_swiglu():
    same_gradients(
        swiglu, lambda g, u: jax.nn.silu(g) * u, sample(B, T, D), sample(B, T, D, seed=1)
    )


def derived_norm(x, scale, bias, eps):
    dims = tuple(range(-scale.ndim, 0))
    if bias is not None:
        x = x - x.mean(dims, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(dims, keepdims=True) + eps)
    lead = (1,) * (x.ndim - scale.ndim)
    y = x * scale.reshape(lead + scale.shape)
    return y if bias is None else y + bias.reshape(lead + bias.shape)


@pytest.mark.parametrize("axes", [(D,), (2, 3)], ids=["width", "all heads"])
@pytest.mark.parametrize("centered", [False, True], ids=["rmsnorm", "layernorm"])
def test_norms(axes, centered):
    arrays = [sample(B, T, *axes), sample(*axes, seed=1)]
    arrays += [sample(*axes, seed=2)] if centered else []
    ours = lambda x, s, b=None: norm._normalize(x, s, b, 1e-3)
    same_gradients(ours, lambda x, s, b=None: derived_norm(x, s, b, 1e-3), *arrays)


def test_rope():
    positions = jnp.array([[0, 1, 2, 0, 1], [4, 5, 6, 7, 300]], jnp.int32)
    frequency = frequencies(8, 10_000.0, RopeScaling())
    angle = np.asarray(positions)[:, :, None, None] * frequency

    def derived(x):
        a, b = x[..., :4], x[..., 4:]
        cos, sin = 1.5 * jnp.cos(angle), 1.5 * jnp.sin(angle)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    ours = lambda x: rope(x, positions, frequency, 1.5)
    same_gradients(ours, derived, sample(2, 5, 3, 8))


def test_parameters_have_float32_gradients_beside_bfloat16_activations():
    x = sample(B, T, D).astype(jnp.bfloat16)
    gradient = jax.grad(lambda w: linear(x, w).astype(jnp.float32).sum())(sample(D, 4))
    assert gradient.dtype == jnp.float32
    gradient = jax.grad(lambda s: norm._normalize(x, s, None, 1e-5).astype(jnp.float32).sum())(
        jnp.ones(D)
    )
    assert gradient.dtype == jnp.float32
