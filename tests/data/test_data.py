"""Sources, formats and the split: nothing twice, nothing on both sides, and every mistake one line with its place."""

import json
import sys

import pytest

from jaxllm.config import InputError, build
from jaxllm.data.config import DataConfig, Phase, Source
from jaxllm.data.format import is_held_out
from jaxllm.data.sources import read_records
from jaxllm.data.splits import examples, shuffled
from jaxllm.data.store import load_texts


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def data(*sources, **fields):
    fields.setdefault("held_out_fraction", 0.3)
    return DataConfig(tuple(sources), **fields)


def texts(source):
    return [r.fields["text"] for r in read_records(source)]


def test_units_of_plain_text(tmp_path):
    path = write(tmp_path / "a.txt", "one\n two \n\nthree\r\n\n\n四")
    assert texts(Source(path)) == ["one", " two ", "three", "四"]
    assert texts(Source(path, record="paragraph")) == ["one\n two ", "three", "四"]
    assert texts(Source(path, record="file")) == ["one\n two \n\nthree\r\n\n\n四"]
    assert [r.origin for r in read_records(Source(path, record="paragraph"))] == [
        f"{path}:{n}" for n in (1, 4, 7)
    ]


def test_globs_jsonl_json_and_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    write(tmp_path / "b.jsonl", '{"body": "b"}\n\n{"body": "c"}\n')
    write(tmp_path / "a.jsonl", '{"body": "a"}\n')
    write(tmp_path / "d.json", '[{"body": "d"}]')
    pyarrow.parquet.write_table(pyarrow.table({"body": ["e", "f"]}), tmp_path / "e.parquet")
    assert texts(Source(str(tmp_path / "*.jsonl"), text_field="body")) == ["a", "b", "c"]
    assert texts(Source(str(tmp_path / "d.json"), text_field="body")) == ["d"]
    assert texts(Source(str(tmp_path / "e.parquet"), text_field="body")) == ["e", "f"]


def test_package_data_is_read_without_importing_the_package(tmp_path, monkeypatch):
    (tmp_path / "loud").mkdir()
    write(tmp_path / "loud" / "__init__.py", "raise RuntimeError('imported')")
    write(tmp_path / "loud" / "x.txt", "hello")
    monkeypatch.syspath_prepend(tmp_path)
    assert texts(Source("pkg://loud/x.txt")) == ["hello"]
    with pytest.raises(InputError, match="leaves the package"):
        texts(Source("pkg://loud/../x.txt"))


def test_replace_match_lengths_and_sample(tmp_path):
    path = write(tmp_path / "a.txt", "迈向/v  充满/v\nab\nabcdef\nxyz12")
    assert texts(Source(path, replace=((r"/\w+(\s+|$)", ""),)))[0] == "迈向充满"
    assert texts(Source(path, min_chars=3, max_chars=5)) == ["xyz12"]
    records = list(read_records(Source(path, match=r"(?P<word>[a-z]+)(?P<number>\d+)")))
    assert [(r.fields["word"], r.fields["number"]) for r in records] == [("xyz", "12")]
    sample = texts(Source(path, max_records=2))
    assert len(sample) == 2 and sample == texts(Source(path, max_records=2))


def test_duplicates_and_excluded_texts_are_dropped(tmp_path):
    a = write(tmp_path / "a.txt", "p\nq\np\nr")
    b = write(tmp_path / "b.txt", "r\ns")
    config = data(Source(a, exclude=(b,)), Source(b, exclude=(a,)), held_out_fraction=0.0)
    assert [e.text for e in examples(config, "document", "train")] == ["p", "q", "s"]


def review_file(tmp_path, n=400):
    return write(
        tmp_path / "reviews.txt", "\n".join(f"review {i % 7} number {i} is fine" for i in range(n))
    )


TASKS = {"prompt": "{text}", "response": "good"}


def test_a_text_is_on_the_same_side_in_every_task(tmp_path):
    path = review_file(tmp_path)
    plain, task = data(Source(path)), data(Source(path, **TASKS))
    for split in ("train", "held_out"):
        documents = {e.text for e in examples(plain, "document", split)}
        assert documents == {e.messages[0]["content"] for e in examples(task, "chat", split)}
        assert 50 < len(documents) < 350


def test_prompts_and_replies_never_cross_the_split(tmp_path):
    """Prompts cut from texts, 7 texts to a prompt: held-out prompts are unknown to SFT, held-out replies too."""
    cut = Source(
        review_file(tmp_path),
        match=r"(?P<start>review \d number \d)(?P<rest>.*)",
        prompt="{start}",
        response="{rest}",
    )
    config = data(cut, held_out_fraction=0.5)
    prompts = {
        s: {e.question() for e in examples(config, "prompt", s)} for s in ("train", "held_out")
    }
    chats = {s: list(examples(config, "chat", s)) for s in ("train", "held_out")}
    assert prompts["train"] and prompts["held_out"] and not prompts["train"] & prompts["held_out"]
    assert not {e.question() for e in chats["train"]} & prompts["held_out"]
    assert not {e.content() for e in chats["train"]} & {e.content() for e in chats["held_out"]}
    raw = {
        e.text for e in examples(data(Source(cut.path), held_out_fraction=0.5), "document", "train")
    }
    for e in chats["held_out"]:
        assert e.messages[0]["content"] + e.messages[1]["content"] not in raw


def test_the_split_is_a_function_of_the_content_and_the_salt(tmp_path):
    config = data(Source(review_file(tmp_path)))
    shares = [sum(is_held_out(f"{i}", config.held_out_fraction) for i in range(4000)) / 4000]
    assert abs(shares[0] - 0.3) < 0.03
    salted = data(*config.sources, split_salt="x")
    assert [e.text for e in examples(config, "document", "train")] != [
        e.text for e in examples(salted, "document", "train")
    ]


def test_conversations_rankings_and_given_splits(tmp_path):
    lines = [
        {"prompt": "hi", "response": "ho", "system": "be"},
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "split": "held_out",
        },
    ]
    path = write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, lines)))
    config = data(Source(path), held_out_fraction=0.0)
    (train,), (held,) = (list(examples(config, "chat", s)) for s in ("train", "held_out"))
    assert [m["role"] for m in train.messages] == ["system", "user", "assistant"]
    assert held.messages[1]["content"] == "b"
    assert [
        e.messages[-1]["role"] for s in ("train", "held_out") for e in examples(config, "prompt", s)
    ] == ["user"] * 2
    ranking = {"prompt": "q", "responses": ["x", "y", "z"], "ranks": [1, 2, 2]}
    path = write(tmp_path / "r.jsonl", json.dumps(ranking))
    (ranked,) = examples(data(Source(path), held_out_fraction=0.0), "ranked", "train")
    assert (ranked.responses, ranked.ranks) == (["x", "y", "z"], [1, 2, 2])


def test_labels_of_several_responses_and_of_a_single_reply(tmp_path):
    spoken = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"}]
    lines = [
        {"prompt": "p", "responses": ["x", "y", "z"], "labels": [False, True, False]},
        {"prompt": "p", "response": "yes", "label": True},
        {"messages": spoken, "label": False},
    ]
    path = write(tmp_path / "r.jsonl", "\n".join(map(json.dumps, lines)))
    several, yes, no = examples(data(Source(path), held_out_fraction=0.0), "ranked", "train")
    assert (several.ranks, several.labels) == ([2, 1, 2], (False, True, False))
    assert (yes.responses, yes.ranks, yes.labels) == (["yes"], [1], (True,))
    assert (no.responses, no.messages, no.labels) == (["no"], spoken[:1], (False,))
    # Opposite labels of one response are two examples.
    assert yes.content() != yes._replace(labels=(False,)).content()
    path = write(tmp_path / "t.jsonl", json.dumps(lines[1]))
    template = Source(path, prompt="{prompt}?", response="{response}!")
    (filled,) = examples(data(template, held_out_fraction=0.0), "ranked", "train")
    assert (filled.messages[0]["content"], filled.responses) == ("p?", ["yes!"])


def test_shuffled_is_fixed_and_mixes(tmp_path):
    found = list(examples(data(Source(review_file(tmp_path))), "document", "train"))
    assert shuffled(found) == shuffled(reversed(found)) != found


def test_texts_of_documents_and_conversations(tmp_path):
    path = write(tmp_path / "a.txt", "good day\nbad day")
    config = data(
        Source(path), Source(path, prompt="{text}?", response="yes"), held_out_fraction=0.0
    )
    assert list(load_texts(config, "train")) == [
        "good day",
        "bad day",
        "good day?\nyes",
        "bad day?\nyes",
    ]


def test_texts_are_those_of_the_examples(tmp_path):
    """Duplicates across files, given splits, a function among the sources, a curriculum: from the cache or not."""
    lines = [
        json.dumps({"text": f"t{i % 50}", **({"split": "held_out"} if i == 77 else {})})
        for i in range(120)
    ]
    own = [json.dumps({"text": f"own {i}"}) for i in range(9)]
    one, two = (
        write(tmp_path / f"{n}.jsonl", "\n".join([*lines[n:], *own[: n // 4]])) for n in (0, 40)
    )
    sums = Source("py://jaxllm.demo.corpora:careless_additions", max_records=30)
    config = data(Source(one), Source(two), sums, curriculum=(Phase(3, (1.0, 0.0, 2.0)),))
    for split in ("train", "held_out"):
        expected = [e.text for e in examples(config, "document", split)]
        assert (
            list(load_texts(config, split))
            == list(load_texts(config, split, tmp_path / "cache"))
            == expected
        )


BAD_LINES = {
    '{"messages": 3}': 'messages: must be a valid list, not 3',
    '{"prompt": "a", "response": ""}': "last reply is empty",
    '{"prompt": "a"}': "must end with the assistant",
    '{"messages": [{"role": "robot", "content": "x"}]}': "needs a role",
    '{"prompt": "a", ': "not valid JSON",
    "[1]": "must be a JSON object",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_malformed_line_is_refused_with_its_number(tmp_path, line):
    good = '{"prompt": "a", "response": "b"}\n'
    path = write(tmp_path / "c.jsonl", good * 2 + line + "\n" + good)
    with pytest.raises(InputError, match=r"c.jsonl:3: ") as error:
        list(examples(data(Source(path)), "chat", "train"))
    assert BAD_LINES[line] in str(error.value) and "\n" not in str(error.value)


BAD_RANKINGS = [
    {"responses": ["x"], "ranks": [1]},
    {"responses": ["x", "y"], "ranks": [1]},
    {"responses": ["x", "y"], "ranks": [0, 1]},
    {"responses": ["x", "y"], "ranks": [1.5, 2]},
    {"responses": ["x", "y"], "ranks": [True, 2]},
    {"ranks": [1, 2]},
]


@pytest.mark.parametrize("fields", BAD_RANKINGS, ids=str)
def test_a_malformed_ranking_is_refused_with_its_number(tmp_path, fields):
    path = write(tmp_path / "r.jsonl", json.dumps({"prompt": "q", **fields}))
    with pytest.raises(InputError, match=r"r.jsonl:1: .*; a ranking needs"):
        list(examples(data(Source(path)), "ranked", "train"))


def test_nothing_there_is_one_clear_line(tmp_path):
    empty = write(tmp_path / "empty.txt", "\n\n")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"fine\ncaf\xe9\n")
    cases = {
        "not a single document example": data(Source(empty)),
        "no such file": data(Source(str(tmp_path / "nowhere.txt"))),
        "no such file; give": data(Source(str(tmp_path / "*.nope"))),
        "package nosuchpackage is not installed": data(Source("pkg://nosuchpackage/x.txt")),
        "latin.txt:2: not UTF-8": data(Source(str(latin))),
        "is empty": data(),
        "needs a path": data(Source()),
        "no function 'nope'": data(Source("py://json:nope")),
        "nosuchmodule": data(Source("py://nosuchmodule:f")),
    }
    for message, config in cases.items():
        with pytest.raises(InputError) as error:
            list(examples(config, "document", "train"))
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_function_can_be_a_source(tmp_path, monkeypatch):
    write(
        tmp_path / "my_records.py",
        "def rows():\n    yield {'text': 'a'}\n    yield {'text': 'b'}\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert texts(Source("py://my_records:rows")) == ["a", "b"]
    sys.modules.pop("my_records")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"match": "("}, "match: "),
        ({"replace": (("[", ""),)}, "replace: "),
        ({"weight": -1.0}, "weight: "),
        ({"response": "x"}, "prompt: "),
        ({"match": "(?P<a>.)", "prompt": "{b}"}, "not a group"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        build(Source, {"path": "x", **fields})


def test_texts_need_only_one_kind_of_source_to_have_some_held_out(tmp_path):
    few = write(tmp_path / "c.jsonl", '{"prompt": "a", "response": "b", "split": "train"}')
    config = data(Source(review_file(tmp_path)), Source(few))
    assert len(list(load_texts(config, "held_out"))) > 10
    with pytest.raises(InputError, match="not a single text example in the held_out split"):
        list(load_texts(data(Source(few)), "held_out"))
