"""What a request draws depends on the request alone: not on what else is there, on memory, or on the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import InputError
from jaxllm.engine import programs
from jaxllm.engine.config import EngineConfig, SamplingConfig
from jaxllm.engine.engine import Engine
from jaxllm.engine.geometry import unstacking
from jaxllm.engine.request import Request
from jaxllm.engine.sampling import row_keys
from jaxllm.engine.scheduler import Row
from jaxllm.models import decode, transformer
from jaxllm.models.config import ModelConfig, MoEConfig
from jaxllm.models.parts_config import MLAConfig
from jaxllm.output_layer import token_logprobs
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.runtime.products import has_bfloat16
from jaxllm.sharding import param_shardings
from tests.engine import static

LLAMA = ModelConfig(
    vocab_size=40, max_length=96, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48, dtype="float32",
    init_std=0.3,
)  # fmt: skip
GPT = ModelConfig(
    vocab_size=40, max_length=96, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, norm="layernorm", init_std=0.3,
    position="learned", mlp="gelu", bias=True, tie_embeddings=False, dtype="float32",
)  # fmt: skip
WINDOWED = dataclasses.replace(
    LLAMA, num_layers=4, window=6, global_every=2, local_rope_theta=1e3, attention_softcap=4.0, logit_softcap=9.0
)  # fmt: skip
LATENT = dataclasses.replace(
    LLAMA, num_layers=3, num_kv_heads=4, mla=MLAConfig(kv_rank=16, rope_dim=8, nope_dim=8, value_dim=8),
    moe=MoEConfig(num_experts=4, per_token=2, mlp_dim=16, first_dense=1),
)  # fmt: skip
MODELS = {"llama": LLAMA, "gpt": GPT, "windowed": WINDOWED, "latent": LATENT}
STOP, PAD = (2,), 0
# Blocks and chunks so small that every prompt has several, and fewer slots than requests.
TIGHT = EngineConfig(slots=6, block=4, prefill_blocks=3, steps=5)


def prompts_of(seed, count, longest=30):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 40, n).tolist() for n in rng.integers(1, longest, count)]


def requests_of(prompts, sampling, num_samples=1, seed=0, **more):
    """One request for each sample, with the random keys that a static batch gives its rows."""
    keys = row_keys(jax.random.key(seed), np.arange(len(prompts), dtype=np.int32), num_samples)
    words = iter(np.asarray(jax.random.key_data(keys)).tolist())
    return [
        Request(prompt, sampling, tuple(next(words)), STOP, **more)
        for prompt in prompts
        for _ in range(num_samples)
    ]


def expected(model, params, prompts, sampling, num_samples=1):
    """(ids, log-probabilities) of each row, from the slow reference."""
    rollout = jax.device_get(
        static.roll_out(
            params, model, prompts, sampling, stop_ids=STOP, pad_id=PAD, num_samples=num_samples
        )
    )
    responses = rollout.tokens[:, -rollout.mask.shape[1] :]
    return [
        (row[mask].tolist(), logprobs[mask].tolist())
        for row, mask, logprobs in zip(responses, rollout.mask, rollout.logprobs, strict=True)
    ]


def engine_of(params, model, settings=TIGHT, mesh=None, longest=64):
    mesh = mesh or make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return Engine(params, model, mesh, longest=longest, settings=settings)


def texts(engine, requests):
    """(ids, log-probabilities) of each response."""
    with jax.set_mesh(engine.mesh):
        found = dict(engine.run(requests))
    return [as_pair(found[i].draws) for i in range(len(requests))]


def as_pair(draws):
    return [draw.id for draw in draws], [draw.logprob for draw in draws]


def check(found, correct):
    assert [ids for ids, _ in found] == [ids for ids, _ in correct]
    for (_, logprobs), (_, wanted) in zip(found, correct, strict=True):
        np.testing.assert_allclose(logprobs, wanted, atol=1e-4)


@pytest.fixture(scope="module")
def llama():
    return transformer.init(LLAMA, jax.random.key(0))


@pytest.mark.parametrize("any_rules", [False, True])
def test_prompts_of_many_blocks_are_those_of_the_reference(llama, any_rules):
    # Tables have room for 16 blocks, or for 46: a prompt takes up to 43.
    settings = dataclasses.replace(TIGHT, block=2, slots=4, prefill_blocks=24)
    prompts = [*prompts_of(5, 3), *([7 + i % 30 for i in range(n)] for n in (86, 33, 32, 31))]
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    engine = Engine(llama, LLAMA, mesh, longest=92, settings=settings, any_rules=any_rules)
    sampling = SamplingConfig(6)
    found = texts(engine, requests_of(prompts, sampling, num_samples=2))
    check(found, expected(LLAMA, llama, prompts, sampling, num_samples=2))


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.life) for n in list(MODELS)[1:])]
)
def test_every_row_is_that_of_the_reference(name):
    model = MODELS[name]
    params = transformer.init(model, jax.random.key(0))
    prompts = prompts_of(0, 9)
    engine = engine_of(params, model)
    found = texts(engine, requests_of(prompts, SamplingConfig(24), num_samples=3))
    check(found, expected(model, params, prompts, SamplingConfig(24), num_samples=3))
    assert engine.num_used_blocks == 0


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama", MeshConfig(data=2, fsdp=2, tensor=2)),
        pytest.param("latent", MeshConfig(data=2, expert=2, tensor=2), marks=pytest.mark.life),
        pytest.param("windowed", MeshConfig(data=1, fsdp=8), marks=pytest.mark.life),
        pytest.param("gpt", MeshConfig(data=2, context=2, tensor=2), marks=pytest.mark.life),
    ],
)
def test_every_row_is_the_same_on_any_mesh(name, mesh):
    model, mesh = MODELS[name], make_mesh(mesh)
    params = transformer.init(model, jax.random.key(0))
    prompts = prompts_of(1, 9)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(mesh, params, transformer.axes(model)))
    engine = engine_of(placed, model, mesh=mesh)
    found = texts(engine, requests_of(prompts, SamplingConfig(16), num_samples=3))
    check(found, expected(model, params, prompts, SamplingConfig(16), num_samples=3))
    assert engine.num_used_blocks == 0


@pytest.mark.parametrize("name", ["windowed", pytest.param("latent", marks=pytest.mark.life)])
def test_layers_in_a_loop_draw_what_single_ones_draw(name, monkeypatch):
    # As on a TPU, where the cache of several layers is one array.
    model = MODELS[name]
    params = transformer.init(model, jax.random.key(0))
    requests = requests_of(prompts_of(2, 5), SamplingConfig(12), num_samples=2)
    single = texts(engine_of(params, model), requests)
    monkeypatch.setattr(decode, "platform", lambda: "tpu")
    jax.clear_caches()
    unstacking.cache_clear()
    assert len(decode.decoded_groups(model)) < model.num_layers
    check(texts(engine_of(params, model), requests), single)
    unstacking.cache_clear()


@pytest.mark.parametrize("seed", range(3))
def test_company_order_and_cancellations_change_nothing(llama, seed):
    rng = np.random.default_rng(seed)
    prompts = prompts_of(seed, 16)
    # Some begin alike, and share blocks.
    prompts[3] = [*prompts[5], 7]
    prompts[4] = prompts[5]
    requests = requests_of(prompts, SamplingConfig(20))
    alone = [texts(engine_of(llama, LLAMA), [request])[0] for request in requests[:6]]
    engine = engine_of(llama, LLAMA, dataclasses.replace(TIGHT, cache_gib=40 * 1024 / 2**30))
    waiting = rng.permutation(len(requests)).tolist()
    tickets: dict[int, int] = {}
    draws: dict[int, list] = {}
    cancelled = set()
    with jax.set_mesh(engine.mesh):
        while waiting or engine.num_unfinished:
            for _ in range(rng.integers(0, 4)):
                if waiting:
                    number = waiting.pop()
                    tickets[engine.submit(requests[number])] = number
                    draws[number] = []
            if rng.random() < 0.5 and tickets:
                ticket = rng.choice([*tickets])
                if tickets[ticket] > 5:  # those that are compared stay
                    engine.cancel(int(ticket))
                    cancelled.add(tickets[ticket])
            for event in engine.step(int(rng.integers(1, 6))):
                assert tickets[event.ticket] not in cancelled
                draws[tickets[event.ticket]] += event.draws
    assert cancelled
    assert engine.num_used_blocks == 0
    check([as_pair(draws[number]) for number in range(6)], alone)


def test_every_row_has_rules_of_its_own(llama):
    rules = [
        SamplingConfig(16),
        SamplingConfig(16, temperature=0.0),
        SamplingConfig(9, temperature=0.5, top_k=3),
        SamplingConfig(16, top_p=0.6),
        SamplingConfig(16, temperature=1.7, min_p=0.2),
        SamplingConfig(12, top_k=5, top_p=0.5, min_p=0.1),
    ]
    prompts = prompts_of(3, len(rules))
    plain = requests_of(prompts, SamplingConfig(16))
    mixed = [
        dataclasses.replace(request, sampling=rule)
        for request, rule in zip(plain, rules, strict=True)
    ]
    wanted = [expected(LLAMA, llama, prompts, rule)[i] for i, rule in enumerate(rules)]
    check(texts(engine_of(llama, LLAMA), mixed), wanted)


def test_alternatives_are_the_likeliest_tokens(llama):
    [request] = requests_of([[5, 6, 7]], SamplingConfig(6, temperature=0.0), num_alternatives=4)
    engine = engine_of(llama, LLAMA)
    with jax.set_mesh(engine.mesh):
        [(_, response)] = engine.run([request])
    ids = [draw.id for draw in response.draws]
    row = jnp.array([[5, 6, 7, *ids]])
    hidden = transformer.apply(llama, LLAMA, row)[0, 2:-1]
    logprobs = jax.nn.log_softmax(hidden @ transformer.head(llama).T)
    for draw, wanted in zip(response.draws, np.asarray(logprobs), strict=True):
        assert [a.id for a in draw.alternatives] == np.argsort(-wanted)[:4].tolist()
        found = [a.logprob for a in draw.alternatives]
        np.testing.assert_allclose(found, np.sort(wanted)[::-1][:4], atol=1e-4)
        assert draw.alternatives[0].id == draw.id


def test_a_kept_prompt_is_not_prefilled_again(llama):
    engine = engine_of(llama, LLAMA)
    system = list(range(3, 30))
    requests = requests_of([[*system, 31, 32], [*system, 33]], SamplingConfig(8))
    chunks = []
    plan = engine._scheduler.plan_prefill

    def planned():
        plans = plan()
        chunks.append(sum(len(each.chunks) for each in plans))
        return plans

    engine._scheduler.plan_prefill = planned
    first = texts(engine, requests[:1])
    assert sum(chunks) == 8  # 29 tokens in blocks of 4
    chunks.clear()
    second = texts(engine, requests[1:])
    assert sum(chunks) == 1
    check(first + second, expected(LLAMA, llama, [r.prompt for r in requests], SamplingConfig(8)))
    # New weights make what is cached worthless.
    other = transformer.init(LLAMA, jax.random.key(1))
    engine.set_params(other)
    again = texts(engine, requests[1:])
    alone = texts(engine_of(other, LLAMA), requests[1:])
    check(again, alone)
    assert again != second


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], SamplingConfig(4), "prompt: has no tokens"),
        ([3] * 60, SamplingConfig(5), "do not fit the context of 64"),
    ],
)
def test_a_request_that_cannot_be_served_is_one_line(llama, prompt, sampling, message):
    engine = engine_of(llama, LLAMA)
    with pytest.raises(InputError, match=message):
        engine.submit(Request(prompt, sampling, (0, 0), STOP))
    assert not engine.num_unfinished


def test_memory_that_holds_no_row_is_one_line(llama):
    with pytest.raises(InputError, match="cache_gib: 1e-06 does not hold one response"):
        engine_of(llama, LLAMA, dataclasses.replace(TIGHT, cache_gib=1e-6))


def penalized(logits, prompt, drawn, sampling):
    """The slow reference of penalties, token by token."""
    logits = logits.copy()
    for token in {*prompt, *drawn}:
        factor = sampling.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in drawn:
        logits[token] -= sampling.frequency_penalty
    for token in {*drawn}:
        logits[token] -= sampling.presence_penalty
    return logits


def test_penalties_are_those_of_the_reference_and_leave_other_rows_alone(llama):
    rules = [
        SamplingConfig(12, temperature=0.0, repetition_penalty=1.4),
        SamplingConfig(12, temperature=0.0, presence_penalty=0.9, frequency_penalty=0.4),
        SamplingConfig(12, temperature=0.0, frequency_penalty=-1.5),
        SamplingConfig(12, temperature=0.0),
    ]
    prompts = prompts_of(5, 4)
    requests = [Request(prompt, rule, (0, 1)) for prompt, rule in zip(prompts, rules, strict=True)]
    logits_of = jax.jit(
        lambda ids, mask: transformer.apply(llama, LLAMA, ids, mask) @ transformer.head(llama).T
    )
    for (ids, logprobs), request in zip(
        texts(engine_of(llama, LLAMA), requests), requests, strict=True
    ):
        drawn = []
        for token, logprob in zip(ids, logprobs, strict=True):
            row = np.zeros((1, 48), np.int32)
            so_far = [*request.prompt, *drawn]
            row[0, : len(so_far)] = so_far
            logits = np.asarray(logits_of(row, (np.arange(48) < len(so_far))[None].astype(int)))
            logits = logits[0, len(so_far) - 1].astype(np.float64)
            choice = penalized(logits, request.prompt, drawn, request.sampling)
            assert token == choice.argmax()
            # The model's own probability, whatever was penalized.
            assert abs(logprob - (logits[token] - np.logaddexp.reduce(logits))) < 1e-4
            drawn.append(token)
        assert len(drawn) == 12


@pytest.mark.parametrize("any_rules", [True, False])
def test_programs_are_compiled_for_kinds_of_rules(llama, any_rules):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    engine = Engine(llama, LLAMA, mesh, longest=64, settings=TIGHT, any_rules=any_rules)
    compiled = set()
    # Temperatures that are no binary fractions: the bound of top-k must be the number that it was found as.
    for top_k, temperature in [(3, 0.6), (4, 0.7), (5, 0.8)]:
        sampling = SamplingConfig(6, top_k=top_k, temperature=temperature)
        prompts = prompts_of(6, 3)
        requests = requests_of(prompts, sampling)
        check(texts(engine, requests), expected(LLAMA, llama, prompts, sampling))
        rows = [Row(0, request, []) for request in requests]
        compiled.add(engine._compiled_for([rows]))
    assert len(compiled) == (1 if any_rules else 3)


def test_an_engine_for_any_rules_compiles_nothing_once_it_is_prepared(llama):
    """Loads from one row to all slots, prompts of all lengths, all kinds of rules."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    # Tables have room for 16 blocks, or for 32.
    settings = dataclasses.replace(TIGHT, slots=16, block=2)
    engine = Engine(llama, LLAMA, mesh, longest=64, settings=settings, any_rules=True)
    engine.prepare()
    kinds = [
        SamplingConfig(6),
        SamplingConfig(9, temperature=0.0),
        SamplingConfig(12, top_k=3, top_p=0.9),
        SamplingConfig(5, frequency_penalty=0.5, repetition_penalty=1.2),
    ]
    compiled = num_compiled(engine)
    for count in (1, 2, 16, 40, 3, 1):
        requests = []
        for i, prompt in enumerate(prompts_of(seed=count, count=count, longest=50)):
            [request] = requests_of([prompt], kinds[i % 4], num_alternatives=i % 3)
            requests.append(request)
        drawn = texts(engine, requests)
        assert len(drawn) == count
    assert num_compiled(engine) == compiled


def num_compiled(engine):
    """Programs of engines like this one that have been compiled so far."""
    settings = engine._compiled_for([])
    functions = (programs.prefill, programs.decode_steps)
    runs = [programs.compiled(function, settings, engine.mesh) for function in functions]
    return sum(run._cache_size() for run in (*runs, programs.copy, programs.resize))


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU decodes in float32: it has no bfloat16")
@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.life) for n in list(MODELS)[1:])]
)
def test_bfloat16_takes_half_the_memory_and_is_as_near_to_float32_as_the_trainer(name):
    """Log-probabilities of what is drawn, against float32: off by 0.03 in the mean, as those of whole rows in bfloat16."""
    exact = MODELS[name]
    model = dataclasses.replace(exact, dtype="bfloat16")
    params = transformer.init(model, jax.random.key(0))
    prompts = prompts_of(3, 8)
    engine = engine_of(params, model)
    assert decode.block_bytes(model, 4) * 2 == decode.block_bytes(exact, 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(engine._cache)} == {jnp.dtype("bfloat16")}
    of_engine, of_rows = [], []
    for prompt, (ids, logprobs) in zip(
        prompts, texts(engine, requests_of(prompts, SamplingConfig(20))), strict=True
    ):
        wanted = whole_row_logprobs(params, exact, prompt, ids)
        of_engine += np.abs(np.array(logprobs) - wanted).tolist()
        of_rows += np.abs(whole_row_logprobs(params, model, prompt, ids) - wanted).tolist()
    assert 1e-4 < np.mean(of_engine) < 0.03 and np.max(of_engine) < 0.3
    assert np.mean(of_engine) < 1.3 * np.mean(of_rows)


def whole_row_logprobs(params, model, prompt, ids):
    """Log-probabilities float[n] of a response, from one pass over its whole row."""
    row = jnp.array([[*prompt, *ids]])
    hidden = transformer.apply(params, model, row, jnp.ones_like(row))
    head = transformer.head(params)
    stats = token_logprobs(hidden[:, :-1], head, row[:, 1:], cap=model.logit_softcap)
    return np.asarray(stats.logprob)[0, len(prompt) - 1 :]
