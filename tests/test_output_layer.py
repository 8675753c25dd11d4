"""Log-probabilities and their hand-written gradient against NumPy and the gradient that JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import output_layer, sharding
from jaxllm.runtime import products

B, T, D, V = 3, 7, 5, 11
NAMES = output_layer.TokenStats._fields[:3]  # `top` has no gradient


@pytest.mark.parametrize("block_elements", [1 << 26, 400, 37])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_equal_log_softmax_whatever_the_chunk(block_elements, temperature):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    targets = rng.integers(0, V, size=(B, T))
    logits = hidden @ head.T / temperature
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    h, w, t = (
        jnp.array(hidden, jnp.float32),
        jnp.array(head, jnp.float32),
        jnp.array(targets, jnp.int32),
    )
    stats = output_layer.token_logprobs(
        h, w, t, temperature=temperature, block_elements=block_elements
    )
    want = np.take_along_axis(logp, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(stats.logprob, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats.entropy, -(np.exp(logp) * logp).sum(-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        stats.logsumexp, np.log(np.exp(logits).sum(-1)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(stats.top, logp.max(-1), rtol=1e-5, atol=1e-6)


def test_chunked_gradient_equals_whole():
    rng = np.random.default_rng(1)
    h = jnp.array(rng.normal(size=(2, 9, 4)), jnp.float32)
    w = jnp.array(rng.normal(size=(13, 4)), jnp.float32)
    t = jnp.array(rng.integers(0, 13, size=(2, 9)), jnp.int32)
    grads = [
        jax.grad(
            lambda h, w, n=n: output_layer.token_logprobs(h, w, t, block_elements=n).logprob.sum(),
            (0, 1),
        )(h, w)
        for n in (1 << 26, 60)
    ]
    for whole, chunked in zip(*grads, strict=True):
        np.testing.assert_allclose(whole, chunked, rtol=1e-5, atol=1e-6)


def plain(hidden, head, targets, temperature, cap):
    """The same statistics as JAX's own operations, whose gradient is derived."""
    logits = jnp.einsum("btd,vd->btv", hidden, head.astype(hidden.dtype)).astype(jnp.float32)
    logits = output_layer.softcap(logits, cap) / temperature
    log_p = jax.nn.log_softmax(logits)
    logprob = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return logprob, jax.nn.logsumexp(logits, -1), -(jnp.exp(log_p) * log_p).sum(-1)


@pytest.fixture(params=["one CPU device", "several devices"])
def place(request, monkeypatch):
    """Looking targets up, and a pass over all logits instead."""
    monkeypatch.setattr(output_layer, "on_one_cpu", lambda: request.param == "one CPU device")


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("block_elements", [1 << 26, 60])
@pytest.mark.parametrize("wanted", [NAMES[:1], NAMES[:2], NAMES], ids=["", "z-loss", "entropy"])
@pytest.mark.parametrize(("temperature", "cap"), [(1.0, 0.0), (0.7, 0.0), (1.3, 2.0)])
def test_the_gradient_is_the_derived_one(wanted, temperature, cap, block_elements):
    rng = np.random.default_rng(2)
    hidden = jnp.array(rng.normal(size=(B, T, D)), jnp.float32)
    head = jnp.array(rng.normal(size=(V, D)), jnp.float32)
    targets = jnp.array(rng.integers(0, V, size=(B, T)), jnp.int32)
    weights = [jnp.array(rng.normal(size=(B, T)), jnp.float32) for _ in wanted]

    def ours(hidden, head):
        stats = output_layer.token_logprobs(
            hidden, head, targets, temperature=temperature, cap=cap, block_elements=block_elements
        )
        return sum((w * getattr(stats, n)).sum() for w, n in zip(weights, wanted, strict=True))

    def derived(hidden, head):
        stats = plain(hidden, head, targets, temperature, cap)
        return sum((w * s).sum() for w, s in zip(weights, stats, strict=False))

    got = jax.grad(ours, (0, 1))(hidden, head)
    want = jax.grad(derived, (0, 1))(hidden, head)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("place")
def test_in_bfloat16_the_gradient_is_as_near_to_float32_as_the_derived_one():
    rng = np.random.default_rng(3)
    hidden = jnp.array(rng.normal(size=(8, 32, 64)), jnp.float32)
    head = jnp.array(0.3 * rng.normal(size=(200, 64)), jnp.float32)
    targets = jnp.array(rng.integers(0, 200, size=(8, 32)), jnp.int32)
    ours = lambda h, w: output_layer.token_logprobs(h, w, targets).logprob.sum()
    derived = lambda h, w: plain(h, w, targets, 1.0, 0.0)[0].sum()
    exact = jax.grad(derived, (0, 1))(hidden, head)
    narrow = hidden.astype(jnp.bfloat16)
    got, want = (jax.grad(f, (0, 1))(narrow, head) for f in (ours, derived))
    for a, b, c in zip(got, want, exact, strict=True):
        distance = lambda x, c=c: np.linalg.norm(np.asarray(x, np.float32) - c) / np.linalg.norm(c)
        assert distance(a) < 1.1 * distance(b) < 0.02


def test_on_one_cpu_device_no_operation_but_the_products_goes_over_all_logits_of_the_gradient():
    """The exponentials enter both products as they are: nothing of their shape is computed in the backward pass."""
    hidden = jax.ShapeDtypeStruct((2, 16, 8), jnp.float32)
    head = jax.ShapeDtypeStruct((50, 8), jnp.float32)
    targets = jnp.zeros((2, 16), jnp.int32)
    loss = lambda h, w: output_layer.token_logprobs(h, w, targets).logprob.sum()
    assert sharding.on_one_cpu()
    _, backward = jax.vjp(loss, *(jnp.ones(x.shape) for x in (hidden, head)))
    text = str(jax.make_jaxpr(backward)(jnp.ones(())))
    assert text.count("dot_general") == 2
    assert "f32[2,16,50] = " not in text.replace(":f32[2,16,50] = broadcast", "")


def test_a_large_product_is_onednns_where_it_works():
    """Then the program has its call, and only then."""
    a = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
    b = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    run = jax.jit(lambda a, b: products.contract(a, b, ((1,), (0,))))
    assert ("__onednn" in run.lower(a, b).as_text()) == products.onednn_works()
