"""Attention kernels of CPUs, TPUs (interpreted) and GPUs (XLA's operations for cuDNN's) and the reference: values and
gradients, packed rows, windows, meshes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import attention as attention_module
from jaxllm.models import attention_cpu, attention_gpu, attention_tpu
from jaxllm.models.attention import attention, reference_attention
from jaxllm.models.attention_mask import WholeRows, visible
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import undo_zigzag, zigzag_order

B, T, K, H = 2, 256, 2, 64
SEGMENTS = jnp.array([[1] * 100 + [2] * 120 + [0] * 36, [1] * 256], jnp.int32)


def reference(q, k, v, *, q_segment_ids, kv_segment_ids, window=None, scale=None, softcap=0.0):
    """`reference_attention` of whole rows in their order."""
    allowed = visible(jnp.arange(q.shape[1]), q_segment_ids, kv_segment_ids, window)
    return reference_attention(q, k, v, allowed, scale or q.shape[-1] ** -0.5, softcap)


def value_and_gradients(function, arrays):
    """Of a sum over the real tokens: padding may hold anything."""
    real = (SEGMENTS > 0).astype(jnp.float32)[:, :, None, None]
    loss = lambda *arrays: (jnp.square(function(*arrays)) * real).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_of_a_row_attend_to_as_many_keys(shards):
    with jax.set_mesh(make_mesh(MeshConfig(context=shards))):
        order = zigzag_order(T)
        assert zigzag_order(T + 1) is None
        np.testing.assert_array_equal(undo_zigzag(jnp.array(order)[None])[0], np.arange(T))
    work = (order + 1).reshape(shards, -1).sum(1)
    assert (work == work[0]).all() and sorted(order) == [*range(T)]


@pytest.mark.parametrize(
    ("window", "softcap"), [pytest.param(None, 0.0, marks=pytest.mark.life), (64, 20.0)]
)
def test_queries_may_come_in_a_balanced_order(window, softcap):
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jax.random.normal(key, (B, 2 * T, n, H)) for key, n in zip(keys, (2 * K, K, K), strict=True)
    ]
    segments = jnp.concatenate([SEGMENTS, SEGMENTS + 3], 1)
    how = {"window": window, "scale": 0.2, "softcap": softcap}
    weigh = lambda y: jnp.square(y).sum()
    plain = lambda q, k, v: weigh(
        reference(q, k, v, q_segment_ids=segments, kv_segment_ids=segments, **how)
    )
    want, wanted = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2)))(*arrays)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, context=2))):
        order = zigzag_order(2 * T)
        more = {
            "q_segment_ids": segments[:, order],
            "kv_segment_ids": segments,
            "q_order": order,
            **how,
        }
        kernel = lambda q, k, v: weigh(
            attention_tpu.tpu_attention(q[:, order], k, v, WholeRows(**more), interpret=True)
        )
        plain = lambda q, k, v: weigh(attention(q[:, order], k, v, **more))
        for ordered in (kernel, plain):
            got, grads = jax.jit(jax.value_and_grad(ordered, argnums=(0, 1, 2)))(*arrays)
            np.testing.assert_allclose(got, want, rtol=1e-5)
            for a, b in zip(grads, wanted, strict=True):
                np.testing.assert_allclose(np.asarray(a), b, atol=2e-4)


@pytest.mark.parametrize(("length", "fits"), [(256, False), (512, True)])
def test_tpu_kernels_take_rows_whose_chunks_are_whole_tiles(length, fits):
    """Two shards of a row have four chunks in the zigzag order."""
    q, k = (jax.ShapeDtypeStruct((4, length, n, H), jnp.bfloat16) for n in (2 * K, K))
    with jax.set_mesh(make_mesh(MeshConfig(data=4, context=2))):
        assert attention_tpu.supports(q, k, zigzag_order(length)) == fits
        assert attention_tpu.supports(q, k, None)


KERNELS = {
    "cpu": lambda *a, **how: attention_cpu.cpu_attention(*a, rows=WholeRows(**how), name="x"),
    "tpu": lambda *a, **how: attention_tpu.tpu_attention(*a, WholeRows(**how), interpret=True),
    "gpu": lambda *a, **how: attention_gpu.gpu_attention(
        *a, WholeRows(**how), implementation="xla"
    ),
}
CASES = [
    ("cpu", None, 0.0, 2),
    ("cpu", 64, 0.0, 1),
    ("cpu", 1000, 0.0, 3),
    ("tpu", None, 0.0, 2),
    ("tpu", 64, 20.0, 2),
    ("tpu", 1000, 0.0, 1),
    ("gpu", None, 0.0, 2),
    ("gpu", 64, 0.0, 1),
]


@pytest.mark.parametrize(
    "mesh", [None, MeshConfig(data=2, tensor=2, context=2)], ids=["one", "data-tensor-context"]
)
@pytest.mark.parametrize(("kernel", "window", "softcap", "groups"), CASES)
def test_the_kernel_is_the_reference(kernel, window, softcap, groups, mesh):
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (K * groups, K, K)
    arrays = [jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, heads, strict=True)]
    how = {
        "q_segment_ids": SEGMENTS,
        "kv_segment_ids": SEGMENTS,
        "window": window,
        "scale": 0.2,
        "softcap": softcap,
    }
    want, wanted = value_and_gradients(lambda *a: reference(*a, **how), arrays)
    with jax.set_mesh(make_mesh(mesh)) if mesh else contextlib.nullcontext():
        got, grads = value_and_gradients(lambda *a: KERNELS[kernel](*a, **how), arrays)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, atol=1e-4)


def test_values_may_be_narrower_than_keys():
    q, k, v = (
        jax.random.normal(key, (B, T, K, H)) for key in jax.random.split(jax.random.key(0), 3)
    )
    how = {"q_segment_ids": SEGMENTS, "kv_segment_ids": SEGMENTS, "window": None, "scale": 0.2}
    got = attention_gpu.gpu_attention(q, k, v[..., :40], WholeRows(**how), implementation="xla")
    np.testing.assert_allclose(got, reference(q, k, v[..., :40], **how), atol=1e-5)


@pytest.mark.parametrize("length", [1, 127, 129, 300, 1100])
def test_blocks_of_queries_on_a_cpu_cover_a_row_of_any_length(length):
    """1,100 positions are eight blocks, the last of them shorter."""
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (
        jax.random.normal(key, (1, length, n, 8)) for key, n in zip(keys, (4, 2, 2), strict=True)
    )
    segments = (1 + jnp.arange(length) // 90)[None].astype(jnp.int32)
    how = {"q_segment_ids": segments, "kv_segment_ids": segments}
    got = KERNELS["cpu"](q, k, v, window=None, scale=8**-0.5, **how)
    np.testing.assert_allclose(got, reference(q, k, v, **how), atol=1e-5)


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    monkeypatch.setattr(attention_module, "platform", lambda: "gpu")
    asked = attention_gpu._refusal
    asked.cache_clear()
    yield
    asked.cache_clear()


HALF = [jax.ShapeDtypeStruct((4, T, n, H), jnp.bfloat16) for n in (2 * K, K, K)]
PACKED = {name: jnp.concatenate([SEGMENTS] * 2) for name in ("q_segment_ids", "kv_segment_ids")}


def rows_of(softcap=0.0, window=None):
    """Of packed documents, as `attention` describes them to a kernel."""
    return WholeRows(**PACKED, window=window, scale=0.2, softcap=softcap, q_order=None)


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_where_cudnn_refuses_the_reason_is_printed_once_and_xla_takes_over(monkeypatch, capsys):
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.cuda_versions", None
    )  # CUDA may be installed
    arrays = [jnp.full(x.shape, 0.5, x.dtype) for x in HALF]
    run = lambda *a: jax.jit(lambda *a: attention(*a, **PACKED))(*a)
    with monkeypatch.context() as on_a_cpu:
        on_a_cpu.setattr(attention_module, "platform", lambda: "none of them")
        want = run(*arrays)
    with jax.set_mesh(make_mesh(MeshConfig(data=4, tensor=2))):
        for _ in range(2):
            np.testing.assert_array_equal(np.asarray(run(*arrays)), want)
    printed = capsys.readouterr().err
    assert (
        printed.count("\n") == 1
        and "cuDNN does not support (1, 256, 2, 64): cuDNN is not detected" in printed
    )


@pytest.mark.usefixtures("as_if_on_a_gpu")
@pytest.mark.parametrize(
    ("error", "refuses"),
    [
        (NotImplementedError("The head dim must be <= 256"), True),
        (RuntimeError("INTERNAL: No cuDNN execution plan supports the graph"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("QK must have same head dim"), False),
    ],
    ids=str,
)
def test_only_a_refusal_of_cudnn_falls_back(monkeypatch, error, refuses):
    def fail(*shapes):
        raise error

    monkeypatch.setattr(attention_gpu, "_compile", fail)
    if refuses:
        assert not attention_gpu.supports(*HALF, rows_of())
    else:
        with pytest.raises(type(error)):
            attention_gpu.supports(*HALF, rows_of())


@pytest.mark.parametrize(
    "mesh", [None, MeshConfig(data=4, tensor=2), MeshConfig(data=2, tensor=2, context=2)]
)
def test_a_gpu_program_calls_cudnn_forward_and_backward(monkeypatch, as_if_on_a_gpu, mesh):
    """Lowered, not compiled: that takes the GPU."""
    monkeypatch.setattr(attention_gpu, "_refusal", lambda *shapes: None)
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91300
    )
    loss = lambda *a: jnp.square(attention(*a, window=64, **PACKED).astype(jnp.float32)).sum()
    with jax.set_mesh(make_mesh(mesh)) if mesh else contextlib.nullcontext():
        lowered = jax.jit(jax.grad(loss)).trace(*HALF).lower(lowering_platforms=("cuda",)).as_text()
    for call in ("__cudnn$fmhaScaleBiasSoftmax(", "__cudnn$fmhaScaleBiasSoftmaxBackward("):
        assert lowered.count("custom_call @" + call) == 1, call
    assert ('"mask_type": "CAUSAL"' in lowered.replace("\\22", '"')) == (
        mesh is None or mesh.context == 1
    )


@pytest.mark.parametrize(
    "change",
    [
        {"softcap": 20.0},
        {"q": (4, T, 3, H)},
        {"q": (3, T, 4, H)},
        {"q": (4, T + 1, 4, H)},
        {"dtype": "float32"},
    ],
)
def test_what_cudnn_is_not_asked_for(monkeypatch, change):
    monkeypatch.setattr(attention_gpu, "_refusal", lambda *shapes: None)
    dtype = change.get("dtype", jnp.bfloat16)
    q, k = (
        jax.ShapeDtypeStruct(change.get("q", HALF[0].shape), dtype),
        jax.ShapeDtypeStruct(HALF[1].shape, dtype),
    )
    with jax.set_mesh(make_mesh(MeshConfig(data=4, tensor=2))):
        assert attention_gpu.supports(*HALF, rows_of())
        assert not attention_gpu.supports(q, k, k, rows_of(change.get("softcap", 0.0)))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize(("window", "width"), [(None, H), (64, H), (None, 40)])
def test_cudnn_is_the_reference(window, width):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, HALF, strict=True))
    v, how = v[..., :width], {"window": window, "scale": 0.2, **PACKED}
    assert attention_gpu.supports(q, k, v, rows_of(window=window))
    real = (PACKED["q_segment_ids"] > 0)[:, :, None, None]
    weigh = lambda y: (jnp.square(y.astype(jnp.float32)) * real).sum()
    run = lambda *a: jax.jit(
        jax.value_and_grad(lambda *a: weigh(attention(*a, **how)), argnums=(0, 1, 2))
    )(*a)
    want, wanted = run(*(x.astype(jnp.float32) for x in (q, k, v)))  # 32-bit numbers: XLA's
    got, grads = run(q, k, v)
    np.testing.assert_allclose(got, want, rtol=1e-2)
    for a, b in zip(grads, wanted, strict=True):
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.02 * jnp.linalg.norm(b)
