"""The TPU's attention kernels, interpreted, and the reference: values and gradients, packed rows, windows, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import flash
from jaxllm.models.attention import attention
from jaxllm.sharding import MeshConfig, balanced_order, in_order, make_mesh

B, T, K, H = 2, 256, 2, 64
SEGMENTS = jnp.array([[1] * 100 + [2] * 120 + [0] * 36, [1] * 256], jnp.int32)


def value_and_gradients(function, arrays):
    """Of a sum over the real tokens: padding may hold anything."""
    real = (SEGMENTS > 0).astype(jnp.float32)[:, :, None, None]
    loss = lambda *arrays: (jnp.square(function(*arrays)) * real).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_of_a_row_attend_to_as_many_keys(shards):
    with jax.set_mesh(make_mesh(MeshConfig(context=shards))):
        order = balanced_order(T)
        assert balanced_order(T + 1) is None
        np.testing.assert_array_equal(in_order(jnp.array(order)[None])[0], np.arange(T))
    work = (order + 1).reshape(shards, -1).sum(1)
    assert (work == work[0]).all() and sorted(order) == [*range(T)]


@pytest.mark.parametrize(("window", "softcap"), [(None, 0.0), (64, 20.0)])
def test_queries_may_come_in_a_balanced_order(window, softcap):
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (B, 2 * T, n, H)) for key, n in zip(keys, (2 * K, K, K), strict=True)]
    segments = jnp.concatenate([SEGMENTS, SEGMENTS + 3], 1)
    how = {"window": window, "scale": 0.2, "softcap": softcap}
    weigh = lambda y: jnp.square(y).sum()
    plain = lambda q, k, v: weigh(attention(q, k, v, q_segment_ids=segments, kv_segment_ids=segments, **how))
    want, wanted = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2)))(*arrays)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, context=2))):
        order = balanced_order(2 * T)
        more = {"q_segment_ids": segments[:, order], "kv_segment_ids": segments, "q_order": order, **how}
        kernel = lambda q, k, v: weigh(flash.tpu_attention(q[:, order], k, v, interpret=True, **more))
        reference = lambda q, k, v: weigh(attention(q[:, order], k, v, **more))
        for ordered in (kernel, reference):
            got, grads = jax.jit(jax.value_and_grad(ordered, argnums=(0, 1, 2)))(*arrays)
            np.testing.assert_allclose(got, want, rtol=1e-5)
            for a, b in zip(grads, wanted, strict=True):
                np.testing.assert_allclose(np.asarray(a), b, atol=2e-4)


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
