"""The TPU's attention kernels, interpreted, and the reference: values and gradients, packed rows, windows, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import flash
from jaxllm.models.attention import attention
from jaxllm.sharding import MeshConfig, make_mesh

B, T, K, H = 2, 256, 2, 64
SEGMENTS = jnp.array([[1] * 100 + [2] * 120 + [0] * 36, [1] * 256], jnp.int32)


def value_and_gradients(function, arrays):
    """Of a sum over the real tokens: padding may hold anything."""
    real = (SEGMENTS > 0).astype(jnp.float32)[:, :, None, None]
    loss = lambda *arrays: (jnp.square(function(*arrays)) * real).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, tensor=2, context=2)], ids=["one", "data-tensor-context"])
@pytest.mark.parametrize(("window", "softcap", "groups"), [(None, 0.0, 2), (64, 20.0, 2), (1000, 0.0, 1)])
def test_the_kernel_is_the_reference(window, softcap, groups, mesh):
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (K * groups, K, K)
    arrays = [jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, heads, strict=True)]
    how = {"q_segment_ids": SEGMENTS, "kv_segment_ids": SEGMENTS, "window": window, "scale": 0.2, "softcap": softcap}
    want, wanted = value_and_gradients(lambda *a: attention(*a, **how), arrays)
    kernel = lambda *a: flash.tpu_attention(*a, interpret=True, **how)
    if mesh is None:
        got, grads = value_and_gradients(kernel, arrays)
    else:
        with jax.set_mesh(make_mesh(mesh)):
            got, grads = value_and_gradients(kernel, arrays)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, atol=1e-4)
