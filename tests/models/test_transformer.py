"""Attention == a plain loop, packed == unpacked, remat and unrolling change nothing, published parameter counts."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import InputError, build
from jaxllm.models import scalar, transformer
from jaxllm.models.attention import attention
from jaxllm.models.config import ModelConfig, preset
from jaxllm.models.parts_config import RopeScaling
from jaxllm.models.rope import frequencies, rope

LLAMA = ModelConfig(
    vocab_size=40, max_length=32, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48, dtype="float32",
    init_std=0.2,
)  # fmt: skip
GPT = dataclasses.replace(
    LLAMA,
    norm="layernorm",
    position="learned",
    mlp="gelu",
    bias=True,
    tie_embeddings=False,
    num_kv_heads=4,
)
BOTH = pytest.mark.parametrize(
    "model", [LLAMA, pytest.param(GPT, marks=pytest.mark.life)], ids=["llama", "gpt"]
)


def attention_oracle(q, k, v, segments):
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        scores = np.array([q[b, t, n] @ k[b, s, n // group] for s in seen]) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        values = np.stack([v[b, s, n // group] for s in seen])
        out[b, t, n] = weights @ values / weights.sum()
    return out


def test_attention_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 8, 4, 8))
    k, v = (rng.normal(size=(2, 8, 2, 8)) for _ in range(2))
    segments = np.array([[1, 1, 2, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1]])
    arrays = [jnp.array(x, jnp.float32) for x in (q, k, v)]
    ids = jnp.array(segments)
    found = attention(*arrays, q_segment_ids=ids, kv_segment_ids=ids)
    np.testing.assert_allclose(found, attention_oracle(q, k, v, segments), atol=1e-5)


def test_rope_keeps_lengths_and_depends_on_distance_alone():
    x, y = (jax.random.normal(jax.random.key(i), (1, 1, 1, 16)) for i in range(2))
    at = lambda z, p: rope(z, jnp.array([[p]], jnp.int32), frequencies(16, 10_000.0, RopeScaling()))
    np.testing.assert_allclose(jnp.linalg.norm(at(x, 7)), jnp.linalg.norm(x), rtol=1e-5)
    np.testing.assert_allclose(
        (at(x, 9) * at(y, 4)).sum(), (at(x, 25) * at(y, 20)).sum(), rtol=1e-4
    )
    assert abs(float((at(x, 9) * at(y, 4)).sum() - (at(x, 9) * at(y, 5)).sum())) > 1e-3


@BOTH
def test_packed_rows_equal_single_documents_forward_and_gradient(model):
    params = transformer.init(model, jax.random.key(0))
    documents = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
    row = jnp.array([[*itertools.chain(*documents), 0, 0]], jnp.int32)
    segments = jnp.array([[1] * 4 + [2] * 3 + [3] * 5 + [0] * 2], jnp.int32)
    positions = jnp.array([[*range(4), *range(3), *range(5), 0, 0]], jnp.int32)

    def packed(p):
        return transformer.apply(p, model, row, segments, positions)[0, :12]

    def single(p):
        return jnp.concatenate(
            [transformer.apply(p, model, jnp.array([d], jnp.int32))[0] for d in documents]
        )

    np.testing.assert_allclose(jax.jit(packed)(params), jax.jit(single)(params), atol=2e-5)
    weight = jax.random.normal(jax.random.key(1), (12, 32))
    grads = [
        jax.jit(jax.grad(lambda p, f=f: (f(p) * weight).sum()))(params) for f in (packed, single)
    ]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max() + 1))


@BOTH
def test_the_future_and_other_segments_do_not_leak(model):
    params = transformer.init(model, jax.random.key(0))
    row = jnp.array([[5, 6, 7, 8, 9, 10]], jnp.int32)
    segments, positions = (
        jnp.array([[1, 1, 1, 2, 2, 2]], jnp.int32),
        jnp.array([[0, 1, 2, 0, 1, 2]], jnp.int32),
    )
    before = transformer.apply(params, model, row, segments, positions)
    other_first = transformer.apply(params, model, row.at[0, 1].set(30), segments, positions)
    np.testing.assert_array_equal(before[0, 3:], other_first[0, 3:])
    np.testing.assert_array_equal(before[0, 0], other_first[0, 0])
    assert (before[0, 1:3] != other_first[0, 1:3]).any()


REMATS = [{"remat": name} for name in ("dots", "offload_dots", "attention", "full", "offload")]


@pytest.mark.parametrize(
    "change",
    [
        {"remat": "full"},
        *(pytest.param(c, marks=pytest.mark.life) for c in REMATS if c != {"remat": "full"}),
        {"scan_unroll": 2},
    ],
    ids=str,
)
def test_remat_and_unrolling_change_nothing(change):
    params = transformer.init(LLAMA, jax.random.key(0))
    tokens = jnp.array([[5, 6, 7, 8]], jnp.int32)
    loss = lambda p, model: jnp.square(transformer.apply(p, model, tokens)).sum()
    one, two = (jax.grad(loss)(params, m) for m in (LLAMA, dataclasses.replace(LLAMA, **change)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@BOTH
def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(model):
    params = transformer.init(model, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    low = transformer.apply(
        params, dataclasses.replace(model, dtype="bfloat16"), jnp.array([[5, 6, 7]], jnp.int32)
    )
    high = transformer.apply(params, model, jnp.array([[5, 6, 7]], jnp.int32))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), high, atol=0.15)


@pytest.mark.parametrize("name", ["gpt2", "llama3-8b", "qwen3-0.6b"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_the_tables(name, tied):
    model = preset(name, tie_embeddings=tied)
    tree = transformer.abstract(model)
    tables = [
        leaf.size for part in ("embed", "head") for leaf in jax.tree.leaves(tree.get(part, {}))
    ]
    assert model.embedding_parameters == sum(tables)


def test_flops_agree_with_six_per_matrix_parameter():
    model = preset("llama3-8b")
    matrices = transformer.num_params(model) - model.vocab_size * model.embed_dim
    assert abs(transformer.flops_per_token(model, 1) / (6 * matrices) - 1) < 0.001


def test_last_value_reads_the_last_real_token():
    values = jnp.arange(10.0).reshape(2, 5)
    segments = jnp.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]], jnp.int32)
    np.testing.assert_array_equal(scalar.last_value(values, segments), [4.0, 6.0])


def test_the_scalar_head_starts_small_and_copies_the_trunk():
    trunk = transformer.init(LLAMA, jax.random.key(0))
    params = scalar.init(trunk, LLAMA, jax.random.key(1))
    assert float(params["head"]["bias"]) == 0
    np.testing.assert_allclose(params["head"]["kernel"].std(), 1 / np.sqrt(33), rtol=0.4)
    jax.tree.map(np.testing.assert_array_equal, params["trunk"], trunk)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "num_heads: 3 does not divide"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads: 3 does not divide"),
        ({"embed_dim": 12, "num_heads": 4}, "head_dim: rotary"),
        ({"num_layers": 0}, "num_layers: must be"),
    ],
)
def test_a_shape_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        build(ModelConfig, fields)
