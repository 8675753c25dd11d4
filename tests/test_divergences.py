"""Divergences over the vocabulary and their hand-written gradient, against NumPy and the gradient that JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import output_layer
from jaxllm.divergences import DIVERGENCES, Output, token_divergences
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh

B, T, V = 3, 7, 11
WIDTHS = (5, 8)  # of student and teacher
CAPS = [(0.0, 0.0), (2.0, 3.0)]
BETA = 0.3


def models(seed=0, batch=B):
    """(hidden, head) of student and teacher, float64."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(batch, T, D)), rng.normal(size=(V, D))) for D in WIDTHS]


def outputs(caps=(0.0, 0.0), dtype=jnp.float32, **more):
    made = zip(models(**more), caps, strict=True)
    return [Output(jnp.array(h, dtype), jnp.array(w, jnp.float32), cap) for (h, w), cap in made]


def oracle(kind, caps, temperature):
    """float64[B, T], as the definitions are written."""
    softmaxes = []
    for (hidden, head), cap in zip(models(), caps, strict=True):
        logits = hidden @ head.T
        logits = (cap * np.tanh(logits / cap) if cap else logits) / temperature
        softmaxes.append(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    s, t = softmaxes
    kl = lambda p, q: (p * np.log(p / q)).sum(-1)
    if kind == "jsd":
        m = BETA * t + (1 - BETA) * s
        return BETA * kl(t, m) + (1 - BETA) * kl(s, m)
    return kl(s, t) if kind == "reverse_kl" else kl(t, s)


@pytest.mark.parametrize("block_elements", [1 << 26, 400, 37])
@pytest.mark.parametrize("caps", CAPS)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_divergence_is_the_one_that_is_defined_whatever_the_blocks(kind, caps, block_elements):
    found = token_divergences(
        *outputs(caps), kind=kind, temperature=0.7, beta=BETA, block_elements=block_elements
    )
    np.testing.assert_allclose(found, oracle(kind, caps, 0.7), rtol=2e-5, atol=1e-6)


def derived(kind, student, teacher, temperature):
    """The same of whole arrays, whose gradient JAX derives."""
    softmaxes = []
    for each in (student, teacher):
        logits = jnp.einsum("btd,vd->btv", each.hidden, each.head)
        softmaxes.append(jax.nn.log_softmax(output_layer.softcap(logits, each.cap) / temperature))
    log_s, log_t = softmaxes
    s, t = jnp.exp(log_s), jnp.exp(log_t)
    log_m = jnp.log(BETA * t + (1 - BETA) * s)
    terms = {
        "reverse_kl": s * (log_s - log_t),
        "forward_kl": t * (log_t - log_s),
        "jsd": BETA * t * (log_t - log_m) + (1 - BETA) * s * (log_s - log_m),
    }
    return terms[kind].sum(-1)


@pytest.mark.parametrize("block_elements", [1 << 26, 60])
@pytest.mark.parametrize("caps", CAPS)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_gradient_is_the_derived_one_and_the_teacher_has_none(kind, caps, block_elements):
    student, teacher = outputs(caps)
    weights = jnp.array(np.random.default_rng(1).normal(size=(B, T)), jnp.float32)

    def ours(arrays):
        s, t = (Output(*pair, cap) for pair, cap in zip(arrays, caps, strict=True))
        values = token_divergences(
            s, t, kind=kind, temperature=1.3, beta=BETA, block_elements=block_elements
        )
        return (weights * values).sum()

    arrays = (student[:2], teacher[:2])
    got, of_teacher = jax.grad(ours)(arrays)
    want = jax.grad(
        lambda pair: (weights * derived(kind, Output(*pair, caps[0]), teacher, 1.3)).sum()
    )(student[:2])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=3e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teacher))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_equal_distributions_diverge_by_nothing_and_have_no_gradient(kind):
    student, _ = outputs()
    loss = lambda hidden: token_divergences(student._replace(hidden=hidden), student, kind=kind)
    np.testing.assert_allclose(loss(student.hidden), 0.0, atol=1e-6)
    gradient = jax.grad(lambda hidden: loss(hidden).sum())(student.hidden)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_jsd_becomes_the_kls_at_its_ends():
    """Divided by beta, or by 1 - beta (Agarwal et al. 2024, section 2)."""
    # Flat ones: with steep ones the limit is far.
    student, teacher = (made._replace(hidden=0.3 * made.hidden) for made in outputs())
    beta = 1e-3

    def of(kind, beta=0.5):
        return token_divergences(student, teacher, kind=kind, beta=beta)

    np.testing.assert_allclose(of("jsd", beta) / beta, of("forward_kl"), rtol=0.03)
    np.testing.assert_allclose(of("jsd", 1 - beta) / beta, of("reverse_kl"), rtol=0.03)


def test_far_apart_distributions_stay_finite():
    """Tokens that are impossible to one of them: nothing overflows, and 0 log 0 is 0."""
    student, teacher = outputs()
    far = (
        student._replace(hidden=300 * student.hidden),
        teacher._replace(hidden=-300 * teacher.hidden),
    )
    for kind in DIVERGENCES:
        loss = lambda hidden, kind=kind: token_divergences(
            far[0]._replace(hidden=hidden), far[1], kind=kind, block_elements=60
        ).sum()
        value, gradient = jax.value_and_grad(loss)(far[0].hidden)
        assert np.isfinite(value) and np.isfinite(gradient).all() and value > 0


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_in_bfloat16_the_gradient_is_near_that_of_float32(kind):
    loss = lambda hidden, made: token_divergences(
        made[0]._replace(hidden=hidden), made[1], kind=kind, beta=BETA
    ).sum()
    exact, narrow = outputs(), outputs(dtype=jnp.bfloat16)
    want, got = (jax.grad(loss)(made[0].hidden, made) for made in (exact, narrow))
    assert got.dtype == jnp.bfloat16
    distance = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
    assert distance < 0.02


def test_no_array_of_all_logits_ever_lives():
    rows, length, width, vocab = 2, 4096, 32, 128_256
    shape = jax.ShapeDtypeStruct
    arrays = [
        (shape((rows, length, D), jnp.float32), shape((vocab, D), jnp.float32))
        for D in (width, 2 * width)
    ]

    def loss(student, teacher):
        return token_divergences(Output(*student), Output(*teacher), kind="jsd").sum()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * length * vocab * 4 / 3


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_on_a_mesh_it_is_the_same(kind):
    student, teacher = outputs(batch=8)

    def loss(hidden, head):
        made = Output(hidden, head), teacher
        return token_divergences(*made, kind=kind, beta=BETA, block_elements=300).sum()

    want = jax.value_and_grad(loss, (0, 1))(*student[:2])
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(*student[:2])
    for a, b in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=3e-6)
