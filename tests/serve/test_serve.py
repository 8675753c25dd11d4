"""Real clients of the endpoint: every response is that of the engine for this request alone, and nothing leaks."""

import asyncio
import json
import math
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qs

import httpx
import jax
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.responses import complete
from jaxllm.models import transformer
from jaxllm.web.guard import Rules
from jaxllm.web.server import bind, public_address, with_key
from tests.serve import small_server


@pytest.fixture(scope="module")
def server():
    with small_server.running() as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def expected(server, prompt_ids, number=0, num_samples=1, seed=0, **sampling):
    """What `jaxllm generate` would print."""
    served, params = server.served[number], server.params[number]
    with jax.set_mesh(served.engine.mesh):
        [completions] = complete(
            params,
            served.config,
            [prompt_ids],
            sampling=SamplingConfig(**sampling),
            stop_ids=served.tokenizer.stop_ids,
            mesh=served.engine.mesh,
            seed=seed,
            num_samples=num_samples,
        )
    return [served.tokenizer.decode(completion.ids) for completion in completions]


def is_idle(server):
    """Whether no response is open; waits a little, since clients are told before everything is put away."""
    for _ in range(200):
        engines = [served.engine for served in server.served]
        used = sum(engine.num_unfinished + engine.num_used_blocks for engine in engines)
        if not used and not server.endpoint.driver.num_open:
            return True
        time.sleep(0.02)
    return False


# --- Completions.


def test_a_completion_is_that_of_the_command_line(server, client):
    prompt = server.served[0].tokenizer.prompt("the soup")
    wanted = expected(server, prompt, num_samples=3, seed=5, max_new_tokens=12, temperature=0.8)
    found = client.completions.create(
        model="small", prompt="the soup", n=3, seed=5, max_tokens=12, temperature=0.8
    )
    assert [choice.text for choice in found.choices] == wanted
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert found.usage.prompt_tokens == len(prompt)
    assert 0 < found.usage.completion_tokens <= 36


def test_a_stream_is_the_whole_in_parts(client):
    asked = dict(model="other", prompt=["the", "一二"], n=2, seed=1, max_tokens=20, logprobs=2)
    whole = client.completions.create(**asked)
    texts, logprobs, finishes = [""] * 4, [[] for _ in range(4)], [None] * 4
    for part in client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        for choice in part.choices:
            texts[choice.index] += choice.text
            logprobs[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert part.usage == whole.usage
    assert texts == [choice.text for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert logprobs == [choice.logprobs.token_logprobs for choice in whole.choices]


def test_echo_gives_the_probabilities_of_the_forward_pass(server, client):
    served, params = server.served[0], server.params[0]
    text = "the soup is 好喝"
    ids = served.tokenizer.prompt(text)
    row = np.array([ids], np.int32)
    hidden = transformer.apply(params, served.config, row, np.ones_like(row))[0]
    table = np.asarray(jax.nn.log_softmax(hidden @ transformer.head(params).T))[:-1]
    wanted = table[np.arange(len(ids) - 1), ids[1:]]
    by_text = client.completions.create(
        model="small", prompt=text, max_tokens=0, echo=True, logprobs=1
    )
    logprobs = by_text.choices[0].logprobs
    assert by_text.choices[0].text == text
    np.testing.assert_allclose(logprobs.token_logprobs, wanted, atol=1e-4)
    for token, likeliest, offset in zip(
        logprobs.tokens, logprobs.top_logprobs, logprobs.text_offset, strict=True
    ):
        if not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token
        assert token in likeliest and len(likeliest) <= 2
    # Token ids come back as they are: nothing is before the first.
    by_ids = client.completions.create(
        model="small", prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    logprobs = by_ids.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    np.testing.assert_allclose(logprobs.token_logprobs[1 : len(ids)], wanted, atol=1e-4)
    assert len(logprobs.tokens) in (len(ids), len(ids) + 1)


def test_a_stop_text_ends_a_response_before_it(server, client):
    asked = dict(model="small", prompt="the", seed=3, max_tokens=40, temperature=1.5)
    [whole] = client.completions.create(**asked).choices
    middle = len(whole.text) // 2
    for stop in (whole.text[middle : middle + 3], [whole.text[-2:], whole.text[middle]]):
        [cut] = client.completions.create(**asked, stop=stop).choices
        stops = [stop] if isinstance(stop, str) else stop
        assert cut.text == whole.text[: min(whole.text.index(each) for each in stops)]
        assert cut.finish_reason == "stop"
        streamed = client.completions.create(**asked, stop=stop, stream=True)
        assert "".join(part.choices[0].text for part in streamed) == cut.text
    assert is_idle(server)


# --- Chats.


def test_a_chat_is_answered_in_the_model_s_template(server, client):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi 你好"}]
    ids, _ = server.served[1].tokenizer.encode_chat(messages, reply=True)
    wanted = expected(server, ids, 1, seed=9, max_new_tokens=16)
    # Parts, and OpenAI's newer name of the system.
    messages[0] = {
        "role": "developer",
        "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}],
    }
    asked = dict(model="other", messages=messages, seed=9, max_completion_tokens=16)
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert [found.choices[0].message.content] == wanted
    for entry in found.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob <= entry.top_logprobs[0].logprob + 1e-6
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == wanted[0]
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason in ("stop", "length")


def test_without_a_limit_an_answer_may_fill_the_context(server, client):
    found = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "hi"}], temperature=2.0, seed=1
    )
    assert found.usage.total_tokens <= small_server.LENGTH


# --- Models and errors.


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["small", "other"]
    assert client.models.retrieve("other").created == 1_000_000
    with pytest.raises(openai.NotFoundError, match="known: small, other"):
        client.models.retrieve("large")


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("completions", {"prompt": "a"}, 400, "model"),
        ("completions", {"model": "large", "prompt": "a"}, 404, "'large' is not served"),
        ("completions", {"model": "small", "prompt": "a", "n": 0}, 400, "n: "),
        ("completions", {"model": "small", "prompt": "a", "max_tokens": 2000}, 400, "exceed the context of 128"),
        ("completions", {"model": "small", "prompt": [1, 330]}, 400, "no token 330"),
        ("completions", {"model": "small", "prompt": [1, -1]}, 400, "prompt"),
        ("completions", {"model": "small", "prompt": []}, 400, "prompt"),
        ("completions", {"model": "small", "prompt": "a", "best_of": 3}, 400, "best_of"),
        ("completions", {"model": "small", "prompt": "a", "logit_bias": {"3": 5}}, 400, "logit_bias"),
        ("completions", {"model": "small", "prompt": "a", "beam": 5}, 400, "beam: is not supported"),
        ("completions", {"model": "small", "prompt": "a", "temperature": math.inf}, 400, "temperature"),
        ("completions", {"model": "small", "prompt": "a", "temperature": -1}, 400, "temperature"),
        ("completions", {"model": "small", "prompt": "a", "stop": ""}, 400, "stop"),
        ("chat/completions", {"model": "small", "messages": []}, 400, "messages"),
        ("chat/completions", {"model": "small", "messages": [{"role": "cat", "content": "a"}]}, 400, "role"),
        ("chat/completions", {"model": "small", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "parts of type text"),
        ("chat/completions", {"model": "small", "messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, 400, "needs logprobs"),
        ("chat/completions", {"model": "small", "messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}}, 400, "response_format"),
        ("chat/completions", {"model": "small", "messages": [{"role": "user", "content": "\ud800"}]}, 400, ""),
        ("chat/completions", {"model": "small", "messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, 400, "tools"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_line(server, path, body, status, says):
    found = httpx.post(f"{server.address}/v1/{path}", content=json.dumps(body).encode())
    error = found.json()["error"]
    assert found.status_code == status and says in error["message"] and "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert is_idle(server)


def test_other_paths_and_methods_are_errors_in_the_same_form(server):
    for method, path, status in [
        ("GET", "/v2", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
    ]:
        found = httpx.request(method, server.address + path)
        assert found.status_code == status and path in found.json()["error"]["message"]
    for path in (
        "/static/../../errors.py",
        "/static/%2e%2e/%2e%2e/errors.py",
        "/static//etc/passwd",
    ):
        assert httpx.get(server.address + path).status_code == 404


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [
    "model",
    "prompt",
    "messages",
    "n",
    "max_tokens",
    "temperature",
    "top_p",
    "stop",
    "seed",
    "stream",
    "logprobs",
    "echo",
    "top_logprobs",
    "tools",
    "stream_options",
    "min_p",
    "top_k",
    "presence_penalty",
    "repetition_penalty",
    "user",
]


@given(
    st.sampled_from(["completions", "chat/completions"]),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_body_is_answered_or_refused(server, path, fields):
    body = {
        "model": "small",
        "prompt": "a",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 2,
        **fields,
    }
    body.pop("messages" if path == "completions" else "prompt")
    found = httpx.post(f"{server.address}/v1/{path}", content=json.dumps(body).encode(), timeout=60)
    assert found.status_code in (200, 400, 404), found.text


@given(st.binary(max_size=40))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_are_refused(server, raw):
    found = httpx.post(f"{server.address}/v1/completions", content=raw)
    assert found.status_code == 400 and found.json()["error"]["message"]


# --- Many clients.


def test_fifty_clients_at_once_each_get_their_own_response(server):
    tokenizer = server.served[0].tokenizer
    texts = [
        f"{TEXT}{i}"
        for i, TEXT in enumerate(["the soup", "好", "one two three four five six", "w"] * 13)
    ][:50]

    def ask(i):
        body = {"model": "small", "prompt": texts[i], "seed": i, "max_tokens": 4 + i % 17}
        answer = httpx.post(f"{server.address}/v1/completions", json=body, timeout=600)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(ask, range(50)))
    for i in range(0, 50, 7):
        assert [found[i]] == expected(
            server, tokenizer.prompt(texts[i]), seed=i, max_new_tokens=4 + i % 17
        )
    assert is_idle(server)


def test_a_client_that_goes_away_ends_its_response(server):
    body = {
        "model": "small",
        "prompt": "the",
        "max_tokens": 100,
        "n": 6,
        "temperature": 2.0,
        "stop": None,
    }
    for stream in (True, False):
        raw = json.dumps({**body, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
        with socket.create_connection(
            ("127.0.0.1", int(server.address.rpartition(":")[2]))
        ) as client:
            client.sendall(head.encode() + raw)
            while not server.endpoint.driver.num_open:
                time.sleep(0.001)
        begin = server.endpoint.metrics.text({})
        assert is_idle(server), begin


def test_a_slow_reader_keeps_nobody_waiting(server):
    body = {
        "model": "small",
        "prompt": "the",
        "max_tokens": 100,
        "n": 4,
        "stream": True,
        "logprobs": 20,
    }
    with httpx.stream("POST", f"{server.address}/v1/completions", json=body, timeout=60) as slow:
        lines = slow.iter_lines()
        next(lines)
        quick = httpx.post(
            f"{server.address}/v1/completions", json={"model": "small", "prompt": "a"}, timeout=60
        )
        assert quick.status_code == 200
        assert sum(line == "data: [DONE]" for line in lines) == 1
    assert is_idle(server)


def test_more_than_may_wait_are_refused_at_once(server):
    with small_server.running(max_waiting=2, slots=2) as crowded:
        # Two models with two slots each.
        body = {"model": "small", "prompt": "a", "n": 7}
        found = httpx.post(f"{crowded.address}/v1/completions", json=body, timeout=60)
        assert found.status_code == 429 and found.headers["Retry-After"] == "1"
        assert (
            httpx.post(
                f"{crowded.address}/v1/completions", json={**body, "n": 6}, timeout=60
            ).status_code
            == 200
        )
        assert is_idle(crowded)


def test_a_response_that_takes_too_long_is_an_error():
    with small_server.running(seconds=0.0) as hasty:
        body = {"model": "small", "prompt": "a", "max_tokens": 100}
        found = httpx.post(f"{hasty.address}/v1/completions", json=body, timeout=60)
        assert found.status_code == 504 and "--timeout" in found.json()["error"]["message"]
        assert is_idle(hasty)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_engine_is_told_and_not_waited_for(monkeypatch):
    with small_server.running() as broken:

        def fail():
            raise RuntimeError("out of memory")

        monkeypatch.setattr(broken.served[0].engine, "step", fail)
        body = {"model": "small", "prompt": "a"}
        for _ in range(2):
            found = httpx.post(f"{broken.address}/v1/completions", json=body, timeout=60)
            assert found.status_code == 503
        assert httpx.get(f"{broken.address}/health").status_code == 503


def test_health_and_metrics(server, client):
    client.completions.create(model="small", prompt="a", max_tokens=3)
    assert httpx.get(f"{server.address}/health").json() == {"status": "ok"}
    lines = httpx.get(f"{server.address}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['jaxllm_generated_tokens_total{model="small"}']) >= 3
    assert int(values['jaxllm_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert (
        values['jaxllm_first_token_seconds_bucket{model="small",le="+Inf"}']
        == values['jaxllm_first_token_seconds_count{model="small"}']
    )


def test_a_tokenizer_is_served_to_those_who_have_none(server):
    tokenizer = server.served[0].tokenizer
    post = lambda path, **body: httpx.post(f"{server.address}/{path}", json=body).json()
    info = httpx.get(f"{server.address}/tokenizer_info").json()
    text = "the soup 汤 <|end|>"
    assert post("tokenize", prompt=text)["tokens"] == tokenizer.prompt(text)
    ids = post("tokenize", prompt=text, add_special_tokens=False, model="other")["tokens"]
    assert ids == tokenizer.encode(text) and post("detokenize", tokens=ids) == {"prompt": text}
    assert post("tokenize", prompt=info["bos_token"])["tokens"] == [tokenizer.bos_id]
    messages = [{"role": "user", "content": "hi"}]
    assert (
        post("tokenize", messages=messages)["tokens"]
        == tokenizer.encode_chat(messages, reply=True)[0]
    )
    assert "either prompt or messages" in post("tokenize")["error"]["message"]


# --- Who may ask.


def test_the_key_is_needed_for_data_and_not_for_pages():
    with small_server.running(Rules("0.0.0.0", api_key="secret")) as locked:
        get = lambda path, **headers: httpx.get(locked.address + path, headers=headers).status_code
        for path in ("/v1/models", "/api/models", "/metrics", "/api/runs", "/tokenizer_info"):
            assert (
                get(path)
                == get(path, Authorization="Bearer wrong")
                == get(path, Authorization="secret")
                == 401
            )
            assert get(path, Authorization="Bearer secret") == 200
        assert get("/chat") == get("/health") == 200


@pytest.mark.parametrize("key", ["secret", "a+b/c==", "50%#&x y", "钥匙"])
def test_a_link_has_the_key_as_it_is_read_from_it(key):
    """Pages read it with URLSearchParams, to which "+" is a space; base64 has it."""
    page, _, fragment = with_key("/rank", key).partition("#")
    assert page == "/rank" and parse_qs(fragment) == {"key": [key]}
    assert with_key("/", "") == "/"


def test_others_are_told_the_name_of_the_machine():
    for host, name in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", socket.gethostname())):
        with bind(host, 0) as bound:
            assert public_address(bound) == f"http://{name}:{bound.getsockname()[1]}"


def test_pages_of_others_and_wrong_names_are_refused(server):
    post = lambda **headers: httpx.post(
        f"{server.address}/v1/completions",
        json={"model": "small", "prompt": "a"},
        headers=headers,
        timeout=60,
    )
    assert post(Origin="http://evil.example").status_code == 403
    assert post(Origin="null").status_code == 403
    assert post(Host="evil.example").status_code == 403
    assert post(Origin=server.address).status_code == 200
    found = httpx.get(f"{server.address}/chat")
    assert "default-src 'self'" in found.headers["Content-Security-Policy"]
    assert found.headers["X-Content-Type-Options"] == "nosniff"


def test_a_body_is_bounded_whatever_its_header_says(server):
    async def too_large():
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", int(server.address.rpartition(":")[2])
        )
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(40):
            writer.write(b"10000\r\n" + b"a" * 65536 + b"\r\n")
        writer.write(b"0\r\n\r\n")
        head = await reader.readline()
        writer.close()
        return head

    assert b" 413 " in asyncio.run(too_large())
    declared = httpx.post(f"{server.address}/v1/completions", content=b"a" * 2**21)
    assert declared.status_code == 413


def test_ratings_become_rankings(tmp_path):
    from jaxllm.ranking.records import read_rankings

    path = tmp_path / "ratings/rankings.jsonl"
    rating = {
        "messages": [{"role": "user", "content": "hi"}],
        "responses": ["a", "b", "c"],
        "ranks": [2, 1, 2],
        "annotator": "李",
    }
    with small_server.running(ratings=path) as server:
        post = lambda body: httpx.post(f"{server.address}/api/ratings", json=body)
        for _ in range(2):  # as if the first response had been lost
            assert post(rating).json() == {"path": str(path)}
        for wrong in (
            {"ranks": [1, 3, 2, 1]},
            {"ranks": [0, 1, 2]},
            {"annotator": "\n"},
            {"responses": ["a"]},
            {"more": 1},
        ):
            assert post({**rating, **wrong}).status_code == 400
    [line] = read_rankings(path)
    assert line["ranks"] == [2, 1, 2] and line["annotator"] == "李" and line["simulated"] is False
