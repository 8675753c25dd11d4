"""Responses to lists of prompts: in order, resumable, and distributed as the model says; and one response as it comes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import InputError
from jaxllm.engine import responses as r
from jaxllm.engine import rollouts
from jaxllm.engine.config import EngineConfig, SamplingConfig
from jaxllm.models import transformer
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from tests.engine import static
from tests.engine.test_engine import GPT, LLAMA, PAD, STOP

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [5, 6, 7], [1, 2], [3, 3, 3, 3], [20]]
SMALL = EngineConfig(slots=4, block=4, steps=3)
FIVE = SamplingConfig(5)


@pytest.fixture(
    scope="module", params=[LLAMA, pytest.param(GPT, marks=pytest.mark.life)], ids=["llama", "gpt"]
)
def model_and_params(request):
    return request.param, transformer.init(request.param, jax.random.key(0))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


def roll(model, params, sampling, mesh, seed=0, prompts=PROMPTS, **more):
    """All rows of all batches."""
    settings = {"sampling": sampling, "stop_ids": STOP, "pad_id": PAD, "mesh": mesh, "seed": seed}
    with jax.set_mesh(mesh):
        batches = list(r.roll_out(params, model, prompts, **settings, **more))
    arrays = [[np.asarray(x)[:count] for x in rollout] for rollout, count in batches]
    return rollouts.Rollout(*map(np.concatenate, zip(*arrays, strict=True)))


def completions(params, mesh, prompts, sampling=FIVE, **more):
    settings = {"sampling": sampling, "stop_ids": STOP, "mesh": mesh, "seed": 0, "engine": SMALL}
    with jax.set_mesh(mesh):
        return list(r.complete(params, LLAMA, prompts, **settings, **more))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_logprobs_equal_the_trainers(model_and_params, mesh, temperature):
    model, params = model_and_params
    rollout = roll(model, params, SamplingConfig(12, temperature), mesh)
    stats = rollouts.response_logprobs(params, rollout, config=model, temperature=temperature)
    assert rollout.mask.sum() > 40
    np.testing.assert_allclose(
        rollout.logprobs[rollout.mask], np.asarray(stats.logprob)[rollout.mask], atol=1e-4
    )


def test_rows_are_those_of_the_reference(model_and_params, mesh):
    model, params = model_and_params
    rollout = roll(model, params, SamplingConfig(20), mesh, batch_size=3, engine=SMALL)
    expected = static.roll_out(
        params, model, PROMPTS, SamplingConfig(20), stop_ids=STOP, pad_id=PAD, length=16
    )
    assert rollout.finished.any() and not rollout.finished.all()
    for field in ("tokens", "prompt_mask", "mask", "finished"):
        np.testing.assert_array_equal(getattr(rollout, field), getattr(expected, field))
    np.testing.assert_allclose(rollout.logprobs, expected.logprobs, atol=1e-4)


def test_mask_ends_with_the_stop_token_and_padding_follows(model_and_params, mesh):
    model, params = model_and_params
    rollout = roll(model, params, SamplingConfig(20), mesh, prompts=PROMPTS * 4)
    responses = rollout.tokens[:, 16:]
    for tokens, mask, finished in zip(responses, rollout.mask, rollout.finished, strict=True):
        n = int(mask.sum())
        assert mask[:n].all() and not mask[n:].any()
        assert (tokens[:n] == STOP[0]).sum() == finished and (tokens[n:] == PAD).all()
        assert not finished or tokens[n - 1] == STOP[0]
    for row, completion in zip(responses, rollouts.completions(rollout, STOP), strict=True):
        assert STOP[0] not in completion.ids
        assert row[: len(completion.ids)].tolist() == completion.ids


def test_samples_of_a_prompt_differ_and_the_same_seed_repeats_them(model_and_params, mesh):
    model, params = model_and_params
    first, again, other = (roll(model, params, SamplingConfig(10), mesh, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any()


def test_greedy_is_the_argmax_of_the_full_forward(model_and_params, mesh):
    model, params = model_and_params
    rollout = roll(model, params, SamplingConfig(6, 0.0), mesh)
    ids = PROMPTS[2]
    for want in rollouts.completions(rollout, STOP)[2].ids:
        hidden = transformer.apply(params, model, jnp.array([ids], jnp.int32))[0, -1]
        assert int(jnp.argmax(hidden @ transformer.head(params).T)) == want
        ids = [*ids, want]


def test_a_tiny_temperature_is_greedy(model_and_params, mesh):
    model, params = model_and_params
    greedy = roll(model, params, SamplingConfig(8, 0.0), mesh)
    for temperature in (1e-6, 1e-10, 1e-40, 5e-324):
        tiny = roll(model, params, SamplingConfig(8, temperature), mesh)
        np.testing.assert_array_equal(tiny.tokens, greedy.tokens)
        np.testing.assert_array_equal(tiny.logprobs, greedy.logprobs)


def test_any_number_of_prompts_is_answered_in_order(mesh):
    params = transformer.init(LLAMA, jax.random.key(0))
    prompts = [PROMPTS[i % 8] for i in range(19)]
    whole = completions(params, mesh, prompts, num_samples=2)
    parts = completions(params, mesh, prompts, num_samples=2, batch_size=8)
    assert len(whole) == 19 and all(len(c) == 2 for c in whole)
    assert any(first != second for first, second in whole)
    assert whole == parts


def test_the_longest_prompt_may_be_in_a_later_batch(mesh):
    params = transformer.init(LLAMA, jax.random.key(0))
    prompts = [[8], [14, 15], [20], list(range(3, 3 + LLAMA.max_length - FIVE.max_new_tokens))]
    parts = completions(params, mesh, prompts, batch_size=2)
    assert parts == completions(params, mesh, prompts)
    assert completions(params, mesh, prompts, batch_size=2, start=2) == parts[2:]


def test_resuming_in_the_middle_gives_the_same_completions(mesh):
    params = transformer.init(LLAMA, jax.random.key(0))
    prompts = [PROMPTS[i % 8] for i in range(19)]
    whole = completions(params, mesh, prompts, batch_size=8)
    assert completions(params, mesh, prompts, batch_size=8, start=16) == whole[16:]


def test_a_stream_samples_what_a_batch_samples(model_and_params, mesh):
    model, params = model_and_params
    sampling = SamplingConfig(10, 0.8)
    alone = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    batch = rollouts.completions(roll(model, params, sampling, mesh, seed=3), STOP)
    with jax.set_mesh(alone):
        engine = r.stream_engine(params, model, alone)
        for _ in range(2):  # the second time the prompt is known
            ids = r.stream(engine, PROMPTS[0], sampling=sampling, stop_ids=STOP, seed=3)
            assert list(ids) == batch[0].ids
        # Whoever stops listening frees the slot.
        next(iter(r.stream(engine, PROMPTS[2], sampling=sampling, stop_ids=STOP, seed=4)))
        assert not engine.num_unfinished


def test_the_sampler_samples_from_the_softmax(mesh):
    """Frequencies of the first token over many samples agree with the model's own probabilities."""
    n = 4000
    params = transformer.init(LLAMA, jax.random.key(0))
    sampling, engine = SamplingConfig(1, 1.3), EngineConfig(slots=1000)
    settings = {"sampling": sampling, "stop_ids": (), "mesh": mesh, "seed": 0, "engine": engine}
    with jax.set_mesh(mesh):
        [drawn] = r.complete(params, LLAMA, [[5, 6, 7]], num_samples=n, **settings)
    hidden = transformer.apply(params, LLAMA, jnp.array([[5, 6, 7]], jnp.int32))[0, -1]
    p = np.asarray(jax.nn.softmax(hidden @ transformer.head(params).T / 1.3))
    counts = np.bincount([completion.ids[0] for completion in drawn], minlength=40)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 39 + 5 * np.sqrt(2 * 39)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[3] * 90], r"prompt: 90 tokens and max_new_tokens 10 do not fit the context of 96"),
        ([[3], []], "prompt: has no tokens"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_one_clear_line(mesh, prompts, message):
    params = transformer.init(LLAMA, jax.random.key(0))
    with pytest.raises(InputError, match=message):
        completions(params, mesh, prompts, SamplingConfig(10))
