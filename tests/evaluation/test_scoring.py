"""Scores == the full forward pass row by row, whatever the batch, padding, cut and mesh; tasks; the harness."""

import dataclasses
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.__main__ import main
from jaxllm.config import InputError
from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.responses import complete
from jaxllm.evaluation import scoring, tasks
from jaxllm.evaluation.scoring import Row
from jaxllm.evaluation.task_files import read_tasks
from jaxllm.model_store import load_model
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import param_shardings
from jaxllm.tokenizers.trained import Tokenizer, train
from tests.conftest import jaxllm

SHAPE = {
    "num_layers": 2,
    "embed_dim": 32,
    "num_heads": 4,
    "mlp_dim": 48,
    "dtype": "float32",
    "init_std": 0.3,
}
LLAMA = ModelConfig(vocab_size=40, max_length=96, num_kv_heads=2, **SHAPE)
GPT = ModelConfig(
    vocab_size=40,
    max_length=72,
    norm="layernorm",
    position="learned",
    mlp="gelu",
    bias=True,
    **SHAPE,
)
MESHES = [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)]


def place(params, model, mesh):
    return jax.device_put(params, param_shardings(mesh, params, transformer.axes(model)))


def oracle(params, model, row):
    """(nats, greedy) of one row by itself, unpadded, its log-softmax in NumPy float64."""
    hidden = transformer.apply(params, model, jnp.array([row.ids[:-1]], jnp.int32))[0]
    logits = np.asarray(hidden @ transformer.head(params).T, np.float64)[-row.count :]
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logp -= logits.max(-1, keepdims=True)
    wanted = row.ids[-row.count :]
    return logp[np.arange(row.count), wanted].sum(), logits.argmax(-1).tolist() == wanted


def greedy_row(params, model, ids, count):
    for _ in range(count):
        hidden = transformer.apply(params, model, jnp.array([ids], jnp.int32))[0, -1]
        ids = [*ids, int(jnp.argmax(hidden @ transformer.head(params).T))]
    return Row(ids, count)


@pytest.mark.parametrize(
    "model", [LLAMA, pytest.param(GPT, marks=pytest.mark.slow)], ids=["llama", "gpt"]
)
def test_every_row_scores_as_if_it_were_alone(model):
    rng, params = np.random.default_rng(0), transformer.init(model, jax.random.key(0))
    lengths = [2, 33, 34, 65, model.max_length, model.max_length + 1, 5, 5, 5]
    rows = [Row(rng.integers(0, 40, n).tolist(), int(rng.integers(1, n))) for n in lengths]
    rows += [greedy_row(params, model, [7, 8, 9], 3), greedy_row(params, model, [3], 2)]
    want = [oracle(params, model, row) for row in rows]
    assert [greedy for _, greedy in want].count(True) >= 2
    for config in MESHES:
        mesh = make_mesh(config)
        compiled = scoring._row_sums._cache_size()
        found = scoring.score_rows(
            scoring.Model(place(params, model, mesh), model, None, mesh), rows, batch_size=4
        )
        np.testing.assert_allclose(
            [nats for nats, _ in found], [nats for nats, _ in want], rtol=1e-4, atol=1e-4
        )
        assert [greedy for _, greedy in found] == [greedy for _, greedy in want]
        assert scoring._row_sums._cache_size() - compiled == 3  # 32, 64 and the context's length
    with pytest.raises(ValueError, match=r"row: 1 scored of \d+ ids"):
        scoring.score_rows(
            scoring.Model(params, model, None, mesh), [Row([1] * (model.max_length + 2), 1)]
        )


def test_a_long_context_loses_its_oldest_tokens_but_the_first_and_a_long_answer_is_refused():
    assert scoring.fit([1, 5, 6], [7, 8], LLAMA, "x:1") == Row([1, 5, 6, 7, 8], 2)
    row = scoring.fit([1, *range(200, 400)], [7, 8], LLAMA, "x:1")
    assert len(row.ids) == 97 and row.ids[:2] == [1, 306] and row.ids[-3:] == [399, 7, 8]
    with pytest.raises(
        InputError, match="x:1: the answer takes 97 tokens and the context holds 96"
    ):
        scoring.fit([1], [7] * 97, LLAMA, "x:1")


def test_windows_score_each_token_once_and_are_the_harness_ones():
    assert scoring.windows(range(6), 9, 4) == [Row([9, 0, 1, 2, 3], 4), Row([1, 2, 3, 4, 5], 2)]
    ten = [
        Row([99, 0, 1, 2, 3], 4),
        Row([3, 4, 5, 6, 7], 4),
        Row([5, 6, 7, 8, 9], 2),
    ]  # the harness's own example
    assert scoring.windows(range(10), 99, 4) == ten
    for n in range(1, 30):
        rows = scoring.windows(range(n), 99, 4)
        assert [i for row in rows for i in row.ids[-row.count :]] == [*range(n)]
        assert all(row.count < len(row.ids) <= 5 for row in rows)


def test_windows_where_the_text_fits_are_one_forward_pass():
    params, ids = (
        transformer.init(LLAMA, jax.random.key(1)),
        np.random.default_rng(1).integers(3, 40, 96).tolist(),
    )
    model, rows = (
        scoring.Model(params, LLAMA, None, make_mesh(MeshConfig())),
        scoring.windows(ids, 1, 96),
    )
    ((nats, _),) = scoring.score_rows(model, rows)
    assert rows == [Row([1, *ids], 96)]
    assert nats == pytest.approx(oracle(params, LLAMA, rows[0])[0], rel=1e-5)


@pytest.fixture(scope="module")
def tokenizer():
    text = "the sky is blue. grass is green and the sea is deep. one two three 1 2 3 4 5 6 7 8 9 0. 天空是蓝色的。"
    settings = {"model_type": "bpe", "character_coverage": 1.0, "num_threads": 1}
    return train(iter([text] * 20), vocab_size=350, **settings)


@pytest.fixture(scope="module")
def named(tokenizer):
    """A random model with a tokenizer."""
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_length=64, num_kv_heads=2, **SHAPE)
    return scoring.Model(
        transformer.init(config, jax.random.key(2)),
        config,
        tokenizer,
        make_mesh(MeshConfig(data=1), jax.devices()[:1]),
    )


def test_text_is_split_as_it_is_encoded_whole(tokenizer):
    for context, text in (
        ("the sky is", " blue"),
        ("the sky is ", "blue"),
        ("", "blue"),
        ("the s", "ky"),
        ("天空", "是"),
    ):
        before, after = scoring.split(tokenizer.encode, context, text)
        assert before + after == tokenizer.encode(context + text) and after
        assert tokenizer.decode(before) == context.rstrip() or context == "the s"
    assert scoring.split(tokenizer.encode, "a ", "b") == scoring.split(tokenizer.encode, "a", " b")


def write(path, *lines):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return str(path)


def score_file(model, path, chat=False, **settings):
    """The metrics of one task file on one model."""
    config, scores = tasks.ScoringConfig(chat="always" if chat else "never", **settings), {}
    tasks.add_scores(scores, "stage", model, read_tasks([path], config.shots), config, 0)
    return {name.split()[1]: values["stage"] for name, values in scores.items()}


CHOICES = [
    {"question": "the sky is", "choices": ["green", "blue", "deep sea and one"], "answer": 1},
    {"messages": [{"role": "user", "content": "grass is"}], "choices": ["green", "1"], "answer": 0},
    {"question": "the sea is", "choices": ["deep", "blue and three"], "answer": 0},
    {"question": "one two", "choices": ["three", "1 2 3"], "answer": 1},
]


@pytest.mark.parametrize(
    ("chat", "shots"),
    [
        (True, 1),
        *(pytest.param(*c, marks=pytest.mark.life) for c in ((False, 0), (False, 1), (True, 0))),
    ],
)
def test_multiple_choice_picks_what_the_oracle_picks(named, tmp_path, chat, shots):
    found = score_file(
        named, write(tmp_path / "c.jsonl", *CHOICES), chat, shots=shots, batch_size=2
    )
    right, by_byte, tk = [], [], named.tokenizer
    for line in CHOICES[shots:]:
        said = lambda x: x.get("question") or x["messages"][0]["content"]
        if chat:
            turns = [{"role": "user", "content": said(line)}]
            if shots:
                reply = {"role": "assistant", "content": "blue"}
                turns = [{"role": "user", "content": said(CHOICES[0])}, reply, *turns]
            context = tk.encode_chat(turns, reply=True)[0]
            rows = [Row(context + tk.encode(c), len(tk.encode(c))) for c in line["choices"]]
        else:
            text = ("the sky is blue\n\n" if shots else "") + said(line)
            whole = [tk.encode(f"{text} {c}") for c in line["choices"]]
            rows = [Row([tk.bos_id, *ids], len(ids) - len(tk.encode(text))) for ids in whole]
        nats = [oracle(named.params, named.config, row)[0] for row in rows]
        right.append(np.argmax(nats) == line["answer"])
        by_byte.append(
            np.argmax(np.array(nats) / [len(c) for c in line["choices"]]) == line["answer"]
        )
    assert found["acc"] == np.mean(right) and found["acc_norm"] == np.mean(by_byte)
    assert found["acc_error"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    assert (
        found["majority"] == ([0.5, 2 / 3][shots])
        and found["examples"] == 4 - shots
        and found["truncated"] == 0
    )


def test_the_scores_of_a_model_that_knows_one_token(named, tmp_path):
    """All logits point at one token: a choice of it is right, and nats are those of its softmax."""
    params = jax.tree.map(jnp.zeros_like, named.params)
    params["norm"] = jax.tree.map(jnp.ones_like, params["norm"])
    (blue,) = named.tokenizer.encode("b")
    params["embed"]["tokens"] = (
        jnp.zeros_like(params["embed"]["tokens"]).at[:, 0].set(0.01).at[blue, 0].set(1.0)
    )
    model = named._replace(params=params)
    lines = [{"question": "a", "choices": ["b", "c"], "answer": i} for i in (0, 0, 0, 1)]
    found = score_file(model, write(tmp_path / "c.jsonl", *lines), delimiter="")
    nats = score_file(model, write(tmp_path / "t.jsonl", {"text": "bbbb bb"}))
    assert found["acc"] == found["acc_norm"] == found["majority"] == 0.75
    ids = named.tokenizer.encode("bbbb bb")
    want = -oracle(params, named.config, Row([named.tokenizer.bos_id, *ids], len(ids)))[0]
    assert nats["nats_per_token"] == pytest.approx(want / len(ids), rel=1e-5)
    assert nats["bits_per_byte"] == pytest.approx(want / 7 / math.log(2), rel=1e-5)
    assert nats["word_perplexity"] == pytest.approx(math.exp(want / 2), rel=1e-4)


def test_generation_is_what_complete_gives(named, tmp_path):
    tk, sampling = named.tokenizer, SamplingConfig(12, 0.0)
    prompts = ["the sky is", "one two three 1 2 3", "the sea is deep. " * 60]  # the last one is cut
    ids = [
        scoring.shorten(tk.encode_chat([{"role": "user", "content": p}], reply=True)[0], 52)
        for p in prompts
    ]
    stops = {"stop_ids": (tk.end_id, tk.eos_id), "mesh": named.mesh, "seed": 0}
    with jax.set_mesh(named.mesh):
        drawn = [
            c[0] for c in complete(named.params, named.config, ids, sampling=sampling, **stops)
        ]
        texts = [tk.decode(c.ids) for c in drawn]
        answers = [texts[0], "no", f"The {texts[2]}!"]
        lines = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    found, stop = (
        score_file(named, write(tmp_path / "g.jsonl", *lines), chat=True, sampling=sampling),
        texts[0][1:3],
    )
    ((text, cut),) = scoring.generate_texts(named, ids[:1], sampling, [stop], seed=0)
    assert found["exact"] == pytest.approx(1 / 3) and found["normalised"] == pytest.approx(2 / 3)
    assert found["response_tokens"] == np.mean([len(c.ids) for c in drawn])
    assert found["finished"] == np.mean([c.finished for c in drawn])
    assert found["truncated"] == 1 and found["examples"] == 3
    assert text == texts[0][: texts[0].index(stop)] and cut.finished


def test_matches():
    assert (
        tasks.normalize("The  answer, is：ＡＢＣ!")
        == "answer isabc"
        == tasks.normalize("answer isabc")
    )


MALFORMED = {
    '{"text": ': "t.jsonl:2: not valid JSON",
    '{"txt": "a"}': 't.jsonl:2: is not a task; give "question", "choices" and "answer", or',
    '{"text": 3}': "t.jsonl:2: is not a task",
    '{"prompt": "a"}': 't.jsonl:2: generation needs "answer", a text or a number',
    '{"prompt": 3, "answer": "b"}': "t.jsonl:2: messages.0.",
    '{"messages": [{"role": "robot", "content": "a"}], "answer": 1}': "t.jsonl:2: messages.0.",
    '{"messages": [], "answer": 1}': "t.jsonl:2: the conversation must end with the user",
    '{"question": "a", "choices": ["b"], "answer": 0}': 't.jsonl:2: "choices" must be a list of at least 2 texts',
    '{"question": "a", "choices": ["b", ""], "answer": 0}': 't.jsonl:2: "choices" must be a list',
    '{"question": "a", "choices": ["b", "c"], "answer": 2}': 't.jsonl:2: "answer" must be the right choice\'s index',
    '{"question": "a", "choices": ["b", "c"], "answer": "b"}': 't.jsonl:2: "answer" must be the right choice\'s',
    '{"prompt": "a", "answer": "b"}': "t.jsonl:2: generation after perplexity; one file holds one kind",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_line_is_named(line, tmp_path):
    with pytest.raises(InputError) as error:
        read_tasks([write(tmp_path / "t.jsonl", {"text": "fine"}, line)], shots=0)
    assert MALFORMED[line] in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_command_ends_with_one_line(tmp_path, tiny_run, capsys):
    good, bad = (
        write(tmp_path / f"{n}.jsonl", line)
        for n, line in (("good", {"text": "a"}), ("bad", {"txt": "a"}))
    )
    sft = str(tiny_run / "sft")
    quiz = write(tmp_path / "quiz.jsonl", CHOICES[0])
    long = write(
        tmp_path / "long.jsonl", {"question": "a", "choices": ["b", "word " * 80], "answer": 0}
    )
    wrong = {
        (sft, "--task", bad): "bad.jsonl:1: is not a task",
        (sft, "--task", str(tmp_path / "none.jsonl")): "no such file",
        (str(tmp_path), "--task", good): "is not the directory of a trained stage",
        (sft, "--task", quiz, "--shots", "1"): "1 shots of 1 lines leave none to score",
        (sft, "--task", quiz, "--shots", "-1"): "shots: must be at least 0",
        (
            sft,
            "--task",
            good,
            "--json",
            str(tmp_path / "no" / "out.json"),
        ): "is not a file in an existing folder",
        (sft, "--task", long): "long.jsonl:1: the answer takes",
        ("--task", good): "at least one of each",
    }
    for args, line in wrong.items():
        with pytest.raises(SystemExit) as stop:
            main(["score", *args])
        out, err = capsys.readouterr()
        last = err.rstrip("\n").split("\n")[-1]
        assert stop.value.code == 2 and out == "" and "Traceback" not in err, err
        assert last.startswith("jaxllm: ") and line in last, err


def test_one_command_compares_stages_and_records_where_numbers_come_from(tmp_path, tiny_run):
    quiz, prose = (
        write(tmp_path / "quiz.jsonl", *CHOICES),
        write(tmp_path / "prose.jsonl", {"text": "in spring " * 90}),
    )
    stages = [str(tiny_run / name) for name in ("pretrain", "ppo")]
    process = jaxllm("score", *stages, "--task", quiz, prose, "--json", str(tmp_path / "out.json"))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "acc_norm" in out and "bits_per_byte" in out
    record = json.loads((tmp_path / "out.json").read_text())
    assert [record["stages"][s] for s in stages] == [
        {"step": 160, "chat": False},
        {"step": 12, "chat": True},
    ]
    assert len(record["tasks"]["quiz"]["sha256"]) == 64 and record["settings"]["shots"] == 0
    params, config = load_model(stages[0], make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    config = dataclasses.replace(config, dtype="float32")
    tk = Tokenizer.load(tiny_run / "pretrain" / "tokenizer")
    want = sum(
        oracle(params, config, row)[0]
        for row in scoring.windows(tk.encode("in spring " * 90), tk.bos_id, 64)
    )
    nats, tokens = (
        record["scores"][f"prose {name}"][stages[0]] for name in ("nats_per_token", "tokens")
    )
    assert nats * tokens == pytest.approx(-want, rel=2e-2)  # bfloat16


@pytest.fixture
def harness(monkeypatch, tiny_run):
    """jaxllm.evaluation.harness on the tiny SFT model: on the harness where it is installed, else on stand-ins for its types."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        parts = {"lm_eval": {}, "lm_eval.api": {}, "lm_eval.__main__": {"cli_evaluate": None}}
        parts["lm_eval.api.model"] = {"LM": type("LM", (), {"__init__": lambda self: None})}
        parts["lm_eval.api.registry"] = {"register_model": lambda name: lambda cls: cls}
        for name, content in parts.items():
            module = types.ModuleType(name)
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "jaxllm.evaluation.harness", raising=False)
    from jaxllm.evaluation.harness import StageLM

    return StageLM(str(tiny_run / "sft"), batch_size="4")


def requests(*args):
    return [types.SimpleNamespace(args=arg) for arg in args]


def test_the_harness_sees_the_same_numbers(harness, tmp_path):
    model, tk = harness._model, harness._model.tokenizer
    asked = [{"role": "user", "content": "The tea looks <|end|> beautiful."}]
    template = harness.apply_chat_template(asked)
    assert harness._encode(template) == tk.encode_chat(asked, reply=True)[0]
    begun = [*asked, {"role": "assistant", "content": "good"}]
    assert (
        harness._encode(harness.apply_chat_template(begun, False)) == tk.encode_chat(begun)[0][:-1]
    )
    choices = ["good 好", "bad 差"]
    line = {"messages": asked, "choices": choices, "answer": 0}
    (task,) = read_tasks([write(tmp_path / "c.jsonl", line)], shots=0)
    asking = tasks.Asking(model, [], task.items, tasks.ScoringConfig(), True, 0)
    rows = [
        scoring.fit(*tasks.question_ids(asking, task.items[0], c), model.config, "")
        for c in choices
    ]
    want, text = (
        scoring.score_rows(model, rows, batch_size=4),
        "The tea looks beautiful as always. " * 20,
    )
    perplexity = score_file(model, write(tmp_path / "t.jsonl", {"text": text}), batch_size=4)
    begun = "The tea looks"
    given = scoring.generate_texts(
        model, [harness._with_bos(harness._encode(begun))], SamplingConfig(8, 0.0), [], seed=0
    )
    found = harness.loglikelihood(requests(*((template, c) for c in choices)))
    np.testing.assert_allclose([nats for nats, _ in found], [nats for nats, _ in want], rtol=1e-6)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in want]
    said = given[0][0]
    assert len(said) > 3
    (rolling,) = harness.loglikelihood_rolling(requests((text,)))
    assert rolling == pytest.approx(-perplexity["nats_per_token"] * perplexity["tokens"], rel=1e-6)
    until, cut = (
        {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        {"until": said[1:3], "max_gen_toks": 8},
    )
    texts = harness.generate_until(requests((begun, until), (begun, cut), (begun, until)))
    assert texts == [said, said[:1], said]
    assert harness.tokenizer_name.startswith("jaxllm-")


def test_the_harness_itself_agrees_on_a_local_task(tmp_path, tiny_run):
    """Its own command, multiple choice and rolling log-likelihood, and `jaxllm score` on the same files."""
    pytest.importorskip("lm_eval")
    quiz, prose = (
        write(
            tmp_path / "quiz.jsonl",
            *({**c, "question": c.get("question", "grass is")} for c in CHOICES),
        ),
        write(
            tmp_path / "prose.jsonl",
            {"text": "in spring the sea " * 40},
            {"text": "The tea looks beautiful."},
        ),
    )
    common = "dataset_path: json\ntest_split: test\ndataset_kwargs: {data_files: {test: %s}}\n"
    (tmp_path / "quiz.yaml").write_text(
        "task: my_quiz\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
        + common
        % quiz
    )
    (tmp_path / "prose.yaml").write_text(
        "task: my_prose\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n" + common % prose
    )
    options = [
        "--tasks",
        "my_quiz,my_prose",
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "out.json"),
    ]
    process = jaxllm("lm_eval", str(tiny_run / "pretrain"), *options)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    theirs = json.loads(next(tmp_path.rglob("out*.json")).read_text())["results"]
    process = jaxllm(
        "score",
        str(tiny_run / "pretrain"),
        "--task",
        quiz,
        prose,
        "--json",
        str(tmp_path / "ours.json"),
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    ours = {
        name: next(iter(v.values()))
        for name, v in json.loads((tmp_path / "ours.json").read_text())["scores"].items()
    }
    for task, metric in (
        ("quiz", "acc"),
        ("quiz", "acc_norm"),
        ("prose", "word_perplexity"),
        ("prose", "bits_per_byte"),
    ):
        assert ours[f"{task} {metric}"] == pytest.approx(
            theirs[f"my_{task}"][f"{metric},none"], rel=1e-6
        )
