"""Which tokens the rules keep, and how one of them is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.row_sampling import _keep_likely, row_rules
from jaxllm.engine.sampling import inverse_transform, keep_likely


def test_top_k_top_p_and_min_p_keep_the_right_tokens():
    p = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
    kept = lambda *rules: jnp.isfinite(keep_likely(p, *rules))[0].tolist()
    assert kept(2, 1.0) == [True, True, False, False]
    assert kept(0, 0.6) == [True, True, False, False]
    assert kept(0, 0.76) == [True, True, True, False]
    assert kept(0, 1e-6) == [True, False, False, False]
    assert kept(3, 0.5) == [True, False, False, False]
    assert kept(0, 1.0) == [True] * 4
    assert kept(0, 1.0, 0.25) == [True, True, True, False]
    assert kept(0, 1.0, 1.0) == [True, False, False, False]


def test_rules_of_rows_are_those_of_a_batch():
    rng = np.random.default_rng(0)
    logprobs = jax.nn.log_softmax(jnp.array(rng.normal(size=(200, 30)) * 2, jnp.float32))
    configs = [
        SamplingConfig(
            1,
            top_k=int(rng.choice([0, 1, 5, 29, 40])),
            top_p=float(rng.choice([1e-40, 0.3, 0.9, 1.0])),
            min_p=float(rng.choice([0.0, 0.1, 1.0])),
        )
        for _ in range(200)
    ]
    found = _keep_likely(logprobs, row_rules(configs, 30))
    for i, config in enumerate(configs):
        alone = keep_likely(logprobs[i : i + 1], config.top_k, config.top_p, config.min_p)
        np.testing.assert_array_equal(np.isfinite(found[i]), np.isfinite(alone[0]), str(config))


def test_the_inverse_transform_gives_each_index_its_share_and_never_one_without_weight():
    rng = np.random.default_rng(0)
    weights = rng.random(300) ** 4 * (rng.random(300) < 0.5)
    n = 60_000
    uniform = (np.arange(n) + 0.5) / n  # evenly spread: the counts are the shares, up to rounding
    rows = jnp.broadcast_to(jnp.array(weights, jnp.float32)[None], (n, 300))
    counts = np.bincount(
        np.asarray(jax.jit(inverse_transform)(rows, jnp.array(uniform, jnp.float32))),
        minlength=300,
    )
    np.testing.assert_allclose(counts / n, weights / weights.sum(), atol=2 / n + 1e-5)
    assert not counts[weights == 0].any()
    ends = jnp.array([0.0, np.nextafter(1, 0)], jnp.float32)
    lone = jnp.zeros((2, 5)).at[:, 3].set(1e-30)
    assert inverse_transform(lone, ends).tolist() == [3, 3]


@pytest.mark.parametrize("top_p", [1e-30, 1e-46, 5e-324])
def test_the_smallest_nucleus_holds_the_most_likely_token(top_p):
    logprobs = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (4, 40)))
    kept = np.isfinite(np.asarray(keep_likely(logprobs, 0, top_p)))
    np.testing.assert_array_equal(
        kept, np.asarray(logprobs) == np.asarray(logprobs).max(-1, keepdims=True)
    )
