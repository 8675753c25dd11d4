"""The probabilities of a given text are those of training's forward pass, whatever the model, the length and the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import output_layer
from jaxllm.config import InputError
from jaxllm.models import transformer
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import param_shardings
from tests.engine.test_engine import GPT, LATENT, LLAMA, WINDOWED, engine_of


def reference(model, params, ids):
    """Log-probabilities float32[T, V] after each id."""
    row = jnp.array([ids], jnp.int32)
    hidden = transformer.apply(params, model, row, jnp.ones_like(row))[0]
    logits = output_layer.softcap(hidden @ transformer.head(params).T, model.logit_softcap)
    return np.asarray(jax.nn.log_softmax(logits))


@pytest.mark.parametrize(
    "model", [LLAMA, GPT, WINDOWED, LATENT], ids=["llama", "gpt", "windowed", "latent"]
)
def test_scores_are_those_of_training(model):
    params = transformer.init(model, jax.random.key(0))
    engine = engine_of(params, model)
    for length in (2, 5, 6, 40):
        ids = np.random.default_rng(length).integers(0, 40, length).tolist()
        logprobs = reference(model, params, ids[:-1])
        found = engine.score(ids, num_alternatives=3)
        assert [draw.id for draw in found] == ids[1:]
        for draw, row in zip(found, logprobs, strict=True):
            assert abs(draw.logprob - row[draw.id]) < 1e-4
            best = np.sort(row)[::-1][:3]
            np.testing.assert_allclose([a.logprob for a in draw.alternatives], best, atol=1e-4)
            np.testing.assert_allclose(row[[a.id for a in draw.alternatives]], best, atol=1e-4)


def test_scores_are_the_same_on_a_mesh():
    params = transformer.init(LLAMA, jax.random.key(0))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(mesh, params, transformer.axes(LLAMA)))
    ids = np.random.default_rng(0).integers(0, 40, 20).tolist()
    one, many = engine_of(params, LLAMA).score(ids), engine_of(placed, LLAMA, mesh=mesh).score(ids)
    np.testing.assert_allclose([d.logprob for d in many], [d.logprob for d in one], atol=1e-4)


def test_the_whole_context_can_be_scored_and_no_more():
    engine = engine_of(transformer.init(LLAMA, jax.random.key(0)), LLAMA)
    assert len(engine.score([3] * 97)) == 96
    assert engine.score([3]) == []
    for ids in ([], [3] * 98):
        with pytest.raises(InputError, match="context holds 1 to 96"):
            engine.score(ids)
