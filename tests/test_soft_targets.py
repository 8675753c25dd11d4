"""Soft targets and the divergence from them: against NumPy, sorted logits, the whole divergence, and JAX's own gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import output_layer
from jaxllm.divergences import Output, token_divergences
from jaxllm.losses import soft_targets
from jaxllm.output_layer import softmax_in_blocks
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.soft_targets import SoftStats, SoftTargets, soft_stats, top_tokens

B, T, V = 3, 7, 11
WIDTHS = (5, 8)  # of student and teacher
CAPS = [0.0, 2.0]
BLOCKS = [1 << 26, 400, 37]  # of all tokens, of several, of one


def models(seed=0, batch=B, vocab=V, scale=1.0):
    """(hidden, head) of student and teacher, float64."""
    rng = np.random.default_rng(seed)
    return [(scale * rng.normal(size=(batch, T, D)), rng.normal(size=(vocab, D))) for D in WIDTHS]


def arrays(dtype=jnp.float32, **more):
    return [(jnp.array(h, dtype), jnp.array(w, jnp.float32)) for h, w in models(**more)]


def targets_of(batch=B, vocab=V):
    return jnp.array(np.random.default_rng(3).integers(0, vocab, (batch, T)), jnp.int32)


def log_softmax(hidden, head, cap=0.0):
    """float64[B, T, V]."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    logits = cap * np.tanh(logits / cap) if cap else logits
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def sorted_targets(log_t, top_k):
    """The slow way to `top_tokens`, from float64[B, T, V]."""
    ids = np.argsort(-log_t, axis=-1, kind="stable")[..., :top_k]
    kept = np.take_along_axis(log_t, ids, -1)
    return SoftTargets(jnp.array(ids, jnp.int32), jnp.array(kept, jnp.float32))


def oracle(log_s, log_t, top_k):
    """float64[B, T], position by position as the definition is written."""
    found = np.zeros((B, T))
    for b, t in np.ndindex(B, T):
        ids = np.argsort(-log_t[b, t], kind="stable")
        kept, other = ids[:top_k], ids[top_k:]
        p, q = np.exp(log_t[b, t]), np.exp(log_s[b, t])
        found[b, t] = (p[kept] * np.log(p[kept] / q[kept])).sum()
        if len(other):
            found[b, t] += p[other].sum() * np.log(p[other].sum() / q[other].sum())
    return found


@pytest.mark.parametrize("block_elements", BLOCKS)
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("top_k", [1, 4, V])
def test_the_kept_tokens_are_those_of_sorted_logits_whatever_the_blocks(cap, top_k, block_elements):
    _, (hidden, head) = arrays()
    found = top_tokens(hidden, head, top_k, cap=cap, block_elements=block_elements)
    want = sorted_targets(log_softmax(*models()[1], cap), top_k)
    np.testing.assert_array_equal(found.ids, want.ids)
    np.testing.assert_allclose(found.logprobs, want.logprobs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_elements", BLOCKS)
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("top_k", [1, 4, V - 1, V])
def test_the_divergence_is_the_one_that_is_defined_whatever_the_blocks(cap, top_k, block_elements):
    log_s, log_t = (log_softmax(*model, c) for model, c in zip(models(), (cap, 0.0), strict=True))
    (hidden, head), _ = arrays()
    found = soft_stats(
        hidden,
        head,
        targets_of(),
        sorted_targets(log_t, top_k),
        cap=cap,
        block_elements=block_elements,
    )
    np.testing.assert_allclose(found.divergence, oracle(log_s, log_t, top_k), rtol=3e-5, atol=1e-6)
    stats = output_layer.token_logprobs(hidden, head, targets_of(), cap=cap)
    np.testing.assert_allclose(found.logprob, stats.logprob, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.logsumexp, stats.logsumexp, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cap", CAPS)
def test_with_all_tokens_it_is_the_whole_divergence_and_with_fewer_it_is_less(cap):
    (hidden, head), teacher = arrays()
    whole = token_divergences(Output(hidden, head, cap), Output(*teacher), kind="forward_kl")
    before = np.zeros((B, T))
    for top_k in (1, 3, 7, V - 1, V):
        kept = top_tokens(*teacher, top_k)
        found = soft_stats(hidden, head, targets_of(), kept, cap=cap).divergence
        # Every token that is kept splits an outcome in two.
        assert (found >= before - 1e-5).all() and (found <= whole + 1e-5).all()
        before = found
    np.testing.assert_allclose(before, whole, rtol=2e-5, atol=1e-6)


def derived(hidden, head, targets, kept, cap):
    """`soft_stats` of whole arrays, whose gradient JAX derives."""
    logits = output_layer.softcap(jnp.einsum("btd,vd->btv", hidden, head), cap)
    log_s = jax.nn.log_softmax(logits)
    is_kept = (kept.ids[..., None] == jnp.arange(head.shape[0])[None, None, None]).any(2)
    others = jax.nn.logsumexp(jnp.where(is_kept, -1e30, log_s), -1)
    t = jnp.exp(kept.logprobs)
    r = 1.0 - t.sum(-1)
    at_kept = jnp.take_along_axis(log_s, kept.ids, -1)
    divergence = (t * (kept.logprobs - at_kept)).sum(-1)
    divergence = divergence + (r * (jnp.log(r) - others) if kept.ids.shape[-1] < len(head) else 0.0)
    at_target = jnp.take_along_axis(log_s, targets[..., None], -1)[..., 0]
    return SoftStats(at_target, jax.nn.logsumexp(logits, -1), divergence)


@pytest.mark.parametrize("block_elements", [1 << 26, 60])
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("top_k", [1, 4, V])
def test_the_gradient_is_the_derived_one(top_k, cap, block_elements):
    student, teacher = arrays()
    kept = top_tokens(*teacher, top_k)
    rng = np.random.default_rng(1)
    # Of all three statistics at once, each position with weights of its own.
    weights = [jnp.array(rng.normal(size=(B, T)), jnp.float32) for _ in SoftStats._fields]

    def loss(pair, stats):
        return sum((w * x).sum() for w, x in zip(weights, stats(*pair), strict=True))

    ours = lambda *pair: soft_stats(
        *pair, targets_of(), kept, cap=cap, block_elements=block_elements
    )
    theirs = lambda *pair: derived(*pair, targets_of(), kept, cap)
    got, want = (jax.grad(functools.partial(loss, stats=each))(student) for each in (ours, theirs))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=5e-6)


@pytest.mark.parametrize("top_k", [1, 4, V])
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_the_teacher_itself_diverges_by_nothing_and_has_no_gradient(scale, top_k):
    """From flat distributions to sure ones, whose kept tokens have all the mass there is in float32."""
    (hidden, head), _ = arrays(scale=scale)
    kept = top_tokens(hidden, head, top_k)
    loss = lambda x: soft_stats(x, head, targets_of(), kept).divergence
    gradient = jax.grad(lambda x: loss(x).sum())(hidden)
    np.testing.assert_allclose(loss(hidden), 0.0, atol=3e-5)
    np.testing.assert_allclose(gradient, 0.0, atol=3e-5)


@pytest.mark.parametrize("rounding", [-2e-6, 0.0, 2e-6])
@pytest.mark.parametrize("top_k", [4, V])
def test_a_remainder_of_nothing_but_rounding_is_none(top_k, rounding):
    """All mass is kept, a little less or more in float32: the divergence is that of the kept tokens alone."""
    (hidden, head), _ = arrays()
    log_t = log_softmax(*models()[1])
    ids = np.argsort(-log_t, axis=-1)[..., :top_k]
    p = np.take_along_axis(np.exp(log_t), ids, -1)
    p *= (1 - rounding) / p.sum(-1, keepdims=True)
    kept = SoftTargets(jnp.array(ids, jnp.int32), jnp.array(np.log(p), jnp.float32))
    loss = lambda x: soft_stats(x, head, targets_of(), kept).divergence
    q = np.take_along_axis(np.exp(log_softmax(*models()[0])), ids, -1)
    np.testing.assert_allclose(loss(hidden), (p * np.log(p / q)).sum(-1), rtol=3e-5, atol=1e-5)
    assert np.isfinite(jax.grad(lambda x: loss(x).sum())(hidden)).all()


def test_a_remainder_that_one_of_them_has_not_stays_finite():
    """Sure teacher and flat student, and the other way round; and distributions that are far apart."""
    for scales in ((100.0, 0.01), (0.01, 100.0), (300.0, -300.0)):
        (hidden, head), (states, matrix) = arrays()
        kept = top_tokens(scales[1] * states, matrix, 2)
        loss = lambda x, head=head, kept=kept: soft_stats(
            x, head, targets_of(), kept, block_elements=60
        ).divergence.sum()
        value, gradient = jax.value_and_grad(loss)(scales[0] * hidden)
        assert np.isfinite(value) and np.isfinite(gradient).all() and value > 0


def test_positions_without_a_teacher_are_finite():
    """Rows of padding have zeros for soft targets: K times token 0 with probability 1."""
    (hidden, head), _ = arrays()
    none = SoftTargets(jnp.zeros((B, T, 4), jnp.int32), jnp.zeros((B, T, 4)))
    mask = jnp.zeros((B, T), bool)
    loss = lambda x: soft_targets(soft_stats(x, head, targets_of(), none), mask, 1.0)[0]
    value, gradient = jax.value_and_grad(loss)(hidden)
    assert value == 0 and not np.any(gradient)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_loss_shares_between_the_teacher_and_the_targets(share):
    student, teacher = arrays()
    mask = np.random.default_rng(5).random((B, T)) < 0.5
    stats = soft_stats(*student, targets_of(), top_tokens(*teacher, 4))
    total, weight, metrics = soft_targets(stats, jnp.array(mask), share, z_loss_coef=0.1)
    log_s, log_t = (log_softmax(*model) for model in models())
    divergence = (mask * oracle(log_s, log_t, 4)).sum()
    nats = -(mask * np.take_along_axis(log_s, np.array(targets_of())[..., None], -1)[..., 0]).sum()
    hidden, head = models()[0]
    z = 0.1 * (mask * np.square(np.log(np.exp(hidden @ head.T).sum(-1)))).sum()
    np.testing.assert_allclose(total, share * divergence + (1 - share) * nats + z, rtol=1e-5)
    assert float(weight) == mask.sum()
    np.testing.assert_allclose(metrics["divergence"], (divergence, mask.sum()), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (nats, mask.sum()), rtol=1e-5)


def test_in_bfloat16_the_gradient_is_near_that_of_float32():
    def gradient(made):
        (hidden, head), teacher = made
        kept = top_tokens(*teacher, 4)
        return jax.grad(lambda x: soft_stats(x, head, targets_of(), kept).divergence.sum())(hidden)

    want, got = (gradient(arrays(dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    distance = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
    assert distance < 0.02


def test_no_array_of_all_logits_or_of_all_kept_rows_ever_lives():
    rows, length, width, vocab, top_k = 2, 4096, 128, 128_256, 32
    shape = jax.ShapeDtypeStruct
    hidden = shape((rows, length, width), jnp.float32)
    head = shape((vocab, width), jnp.float32)
    targets = shape((rows, length), jnp.int32)
    kept = SoftTargets(
        shape((rows, length, top_k), jnp.int32), shape((rows, length, top_k), jnp.float32)
    )
    whole = rows * length * vocab * 4

    def loss(hidden, head, targets, kept):
        return soft_stats(hidden, head, targets, kept).divergence.sum()

    step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, head, targets, kept).compile()
    keep = jax.jit(top_tokens, static_argnums=2).lower(hidden, head, top_k).compile()
    for compiled in (step, keep):
        assert compiled.memory_analysis().temp_size_in_bytes < whole / 3


def test_on_a_mesh_it_is_the_same_and_no_device_gathers_logits():
    rows, vocab, top_k, limit = 16, 640, 5, 1 << 14
    student, teacher = arrays(batch=rows, vocab=vocab)
    targets = targets_of(rows, vocab)

    def loss(hidden, head):
        kept = top_tokens(*teacher, top_k, block_elements=limit)
        found = soft_stats(hidden, head, targets, kept, block_elements=limit)
        return (found.divergence + 0.5 * found.logprob).sum(), kept

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    want = jax.jit(run)(*student)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        compiled = jax.jit(run).lower(*student).compile()
        found = compiled(*student)
    np.testing.assert_array_equal(found[0][1].ids, want[0][1].ids)
    for a, b in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=5e-6)
    # What has three dimensions is of positions: the candidates of a block on each device, and not its logits.
    logits = vocab // softmax_in_blocks(2 * rows * T, vocab, 1.0, 0.0, limit).count
    gathered = re.findall(r"= \w+\[\d+,\d+,(\d+)\]\S* all-gather\(", compiled.as_text())
    assert max(map(int, gathered)) == 2 * top_k < logits / 2
