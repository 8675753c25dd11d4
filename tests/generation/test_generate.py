"""Cached decoding == the trainer's forward pass, whatever the padding, batch and mesh; sampling follows its rules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import InputError
from jaxllm.generation import generate as g
from jaxllm.generation import rollouts
from jaxllm.generation.config import SamplingConfig
from jaxllm.generation.sampling import inverse_transform, keep_likely
from jaxllm.generation.streaming import stream
from jaxllm.models import decode, transformer
from jaxllm.models.config import ModelConfig, MoEConfig
from jaxllm.models.parts_config import MLAConfig
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import activation, param_shardings

LLAMA = ModelConfig(
    vocab_size=40, max_length=96, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48, dtype="float32",
    init_std=0.3,
)  # fmt: skip
GPT = ModelConfig(
    vocab_size=40, max_length=96, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, norm="layernorm", init_std=0.3,
    position="learned", mlp="gelu", bias=True, tie_embeddings=False, dtype="float32",
)  # fmt: skip
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [5, 6, 7], [1, 2], [3, 3, 3, 3], [20]]
STOP, PAD = (2,), 0


def roll(model, params, prompts, sampling, seed=0, num_samples=1, length=8, index=None):
    tokens, mask = rollouts.left_pad(prompts, length, PAD)
    run = g.jitted(model, sampling, STOP, PAD, num_samples)
    index = np.arange(len(prompts), dtype=np.int32) if index is None else np.array(index, np.int32)
    return run(params, jnp.array(tokens), jnp.array(mask), jax.random.key(seed), index)


@pytest.fixture(
    scope="module", params=[LLAMA, pytest.param(GPT, marks=pytest.mark.life)], ids=["llama", "gpt"]
)
def model_and_params(request):
    return request.param, transformer.init(request.param, jax.random.key(0))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_logprobs_equal_the_trainers(model_and_params, temperature):
    model, params = model_and_params
    rollout = roll(model, params, PROMPTS, SamplingConfig(12, temperature), num_samples=2)
    stats = rollouts.response_logprobs(params, rollout, config=model, temperature=temperature)
    mask = np.asarray(rollout.mask)
    assert mask.sum() > 40
    np.testing.assert_allclose(
        np.asarray(rollout.logprobs)[mask], np.asarray(stats.logprob)[mask], atol=1e-4
    )


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, fsdp=2, tensor=2),
        pytest.param(MeshConfig(), marks=pytest.mark.life),
        pytest.param(MeshConfig(data=1, fsdp=8), marks=pytest.mark.life),
    ],
)
def test_a_growing_cache_on_any_mesh_gives_the_trainers_logprobs(model_and_params, mesh):
    model, params = model_and_params
    length = 80
    sampling = SamplingConfig(length, 0.8)
    mesh = make_mesh(mesh)
    assert len(g._cache_ends(length)) == 3
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(mesh, params, transformer.axes(model)))
        rows = [
            jax.device_put(x, activation(mesh, "batch", None))
            for x in rollouts.left_pad(PROMPTS, 9, PAD)
        ]
        run = g.jitted(model, sampling, (), PAD, 1)
        rollout = jax.device_get(
            run(placed, *rows, jax.random.key(0), np.arange(8, dtype=np.int32))
        )
    stats = jax.jit(functools.partial(rollouts.response_logprobs, config=model, temperature=0.8))(
        params, rollout
    )
    assert rollout.mask.all()
    np.testing.assert_allclose(rollout.logprobs, stats.logprob, atol=1e-4)


def test_padding_and_batch_do_not_change_a_row(model_and_params):
    model, params = model_and_params
    sampling = SamplingConfig(10, 1.0)
    together = roll(model, params, PROMPTS, sampling, length=8)
    for i, prompt in enumerate(PROMPTS[:4]):
        alone = roll(model, params, [prompt], sampling, length=len(prompt), index=[i])
        np.testing.assert_array_equal(alone.tokens[0, len(prompt) :], together.tokens[i, 8:])
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], atol=1e-5)


def test_mask_ends_with_the_stop_token_and_padding_follows(model_and_params):
    model, params = model_and_params
    rollout = jax.device_get(roll(model, params, PROMPTS, SamplingConfig(20), num_samples=4))
    responses = rollout.tokens[:, 8:]
    assert rollout.finished.any() and not rollout.finished.all()
    for tokens, mask, finished in zip(responses, rollout.mask, rollout.finished, strict=True):
        n = int(mask.sum())
        assert mask[:n].all() and not mask[n:].any()
        assert (tokens[:n] == STOP[0]).sum() == finished and (tokens[n:] == PAD).all()
        assert not finished or tokens[n - 1] == STOP[0]
    for row, completion in zip(responses, rollouts.completions(rollout, STOP), strict=True):
        assert (
            STOP[0] not in completion.ids and row[: len(completion.ids)].tolist() == completion.ids
        )


def test_samples_of_a_prompt_differ_and_the_same_seed_repeats_them(model_and_params):
    model, params = model_and_params
    first, again, other = (
        roll(model, params, PROMPTS, SamplingConfig(10), seed=s, num_samples=4) for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any()
    rows = np.asarray(first.tokens)[:4, 8:]
    assert len({tuple(r) for r in rows}) > 1


def test_greedy_is_the_argmax_of_the_full_forward(model_and_params):
    model, params = model_and_params
    rollout = jax.device_get(roll(model, params, PROMPTS, SamplingConfig(6, 0.0)))
    ids = PROMPTS[2]
    for want in rollouts.completions(rollout, STOP)[2].ids:
        hidden = transformer.apply(params, model, jnp.array([ids], jnp.int32))[0, -1]
        assert int(jnp.argmax(hidden @ transformer.head(params).T)) == want
        ids = [*ids, want]


def test_sharded_rollout_equals_single_device(model_and_params):
    model, params = model_and_params
    alone = roll(model, params, PROMPTS, SamplingConfig(10))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(mesh, params, transformer.axes(model)))
        tokens, mask = rollouts.left_pad(PROMPTS, 8, PAD)
        rows = [jax.device_put(x, activation(mesh, "batch", None)) for x in (tokens, mask)]
        run = g.jitted(model, SamplingConfig(10), STOP, PAD, 1)
        sharded = run(placed, *rows, jax.random.key(0), np.arange(8, dtype=np.int32))
    np.testing.assert_array_equal(alone.tokens, sharded.tokens)
    np.testing.assert_allclose(alone.logprobs, sharded.logprobs, atol=1e-4)


WINDOWED = dataclasses.replace(LLAMA, num_layers=4, window=4, global_every=2, local_rope_theta=1e3)
LATENT = dataclasses.replace(
    LLAMA, num_layers=3, num_kv_heads=4, mla=MLAConfig(kv_rank=16, rope_dim=8, nope_dim=8, value_dim=8),
    moe=MoEConfig(num_experts=4, per_token=2, mlp_dim=16, first_dense=1),
)  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [LLAMA, *(pytest.param(m, marks=pytest.mark.life) for m in (GPT, WINDOWED, LATENT))],
    ids=["llama", "gpt", "windowed", "latent"],
)
def test_layers_in_a_loop_decode_what_single_ones_do(model, monkeypatch):
    params = transformer.init(model, jax.random.key(0))

    def sample():
        tokens, mask = (jnp.array(x) for x in rollouts.left_pad(PROMPTS, 8, PAD))
        settings = {
            "sampling": SamplingConfig(10),
            "stop_ids": STOP,
            "pad_id": PAD,
            "num_samples": 2,
        }
        return jax.jit(functools.partial(g.generate, config=model, **settings))(
            params, tokens=tokens, mask=mask, key=jax.random.key(0)
        )

    single = sample()
    assert len(decode.decoded_groups(model)) == model.num_layers
    monkeypatch.setattr(decode, "platform", lambda: "tpu")
    assert len(decode.decoded_groups(model)) == len(transformer.stacks(model)) < model.num_layers
    looped = sample()
    np.testing.assert_array_equal(single.tokens, looped.tokens)
    np.testing.assert_allclose(single.logprobs, looped.logprobs, atol=1e-5)


def test_a_stream_samples_what_a_batch_samples(model_and_params):
    model, params = model_and_params
    sampling = SamplingConfig(10, 0.8)
    batch = rollouts.completions(
        jax.device_get(roll(model, params, PROMPTS[:1], sampling, seed=3)), STOP
    )[0]
    small = decode.unstack(params, model)
    streamed = list(
        stream(small, model, PROMPTS[0], sampling=sampling, stop_ids=STOP, pad_id=PAD, seed=3)
    )
    assert streamed == batch.ids


def test_roll_out_serves_any_number_of_prompts_in_order():
    params = transformer.init(LLAMA, jax.random.key(0))
    mesh = make_mesh(MeshConfig())
    settings = {
        "sampling": SamplingConfig(5),
        "stop_ids": STOP,
        "pad_id": PAD,
        "mesh": mesh,
        "seed": 0,
    }
    prompts = [PROMPTS[i % 8] for i in range(19)]
    with jax.set_mesh(mesh):
        whole = list(g.complete(params, LLAMA, prompts, batch_size=32, num_samples=2, **settings))
        parts = list(g.complete(params, LLAMA, prompts, batch_size=8, num_samples=2, **settings))
    assert len(whole) == 19 and all(len(c) == 2 for c in whole)
    assert whole == parts


def test_top_k_and_top_p_keep_the_right_tokens():
    p = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
    kept = lambda k, q: jnp.isfinite(keep_likely(p, k, q))[0].tolist()
    assert kept(2, 1.0) == [True, True, False, False]
    assert kept(0, 0.6) == [True, True, False, False]
    assert kept(0, 0.76) == [True, True, True, False]
    assert kept(0, 1e-6) == [True, False, False, False]
    assert kept(3, 0.5) == [True, False, False, False]
    assert kept(0, 1.0) == [True] * 4


def test_the_sampler_samples_from_the_softmax():
    """Frequencies of the first token over many samples agree with the model's own probabilities."""
    model, n = LLAMA, 4000
    params = transformer.init(model, jax.random.key(0))
    rollout = roll(model, params, [[5, 6, 7]], SamplingConfig(1, 1.3), num_samples=n, length=3)
    hidden = transformer.apply(params, model, jnp.array([[5, 6, 7]], jnp.int32))[0, -1]
    p = np.asarray(jax.nn.softmax(hidden @ transformer.head(params).T / 1.3))
    counts = np.bincount(np.asarray(rollout.tokens)[:, -1], minlength=40)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 39 + 5 * np.sqrt(2 * 39)


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


def test_prompt_longer_than_the_context_is_one_clear_line():
    with pytest.raises(
        InputError, match=r"prompt: 90 tokens and max_new_tokens 10 do not fit the context of 96"
    ):
        g.check_lengths(LLAMA, 90, SamplingConfig(10))


def test_resuming_in_the_middle_gives_the_same_completions():
    params = transformer.init(LLAMA, jax.random.key(0))
    mesh = make_mesh(MeshConfig())
    settings = {
        "sampling": SamplingConfig(5),
        "stop_ids": STOP,
        "pad_id": PAD,
        "mesh": mesh,
        "seed": 0,
    }
    prompts = [PROMPTS[i % 8] for i in range(19)]
    with jax.set_mesh(mesh):
        whole = list(g.complete(params, LLAMA, prompts, batch_size=8, **settings))
        rest = list(g.complete(params, LLAMA, prompts, batch_size=8, start=16, **settings))
    assert rest == whole[16:]


def test_a_tiny_temperature_is_greedy(model_and_params):
    model, params = model_and_params
    greedy = roll(model, params, PROMPTS, SamplingConfig(8, 0.0))
    for temperature in (1e-6, 1e-10, 1e-40, 5e-324):
        tiny = roll(model, params, PROMPTS, SamplingConfig(8, temperature))
        np.testing.assert_array_equal(tiny.tokens, greedy.tokens)
        np.testing.assert_array_equal(tiny.logprobs, greedy.logprobs)


@pytest.mark.parametrize("top_p", [1e-30, 1e-46, 5e-324])
def test_the_smallest_nucleus_holds_the_most_likely_token(top_p):
    logprobs = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (4, 40)))
    kept = np.isfinite(np.asarray(keep_likely(logprobs, 0, top_p)))
    np.testing.assert_array_equal(
        kept, np.asarray(logprobs) == np.asarray(logprobs).max(-1, keepdims=True)
    )
