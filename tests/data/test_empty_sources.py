"""A source of a mixture that gives nothing is refused with its reasons, or named: nothing is left out in silence."""

import json

import pytest

from jaxllm.config import InputError
from jaxllm.data import splits
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.loader import load_prompts, load_ranked, load_rows
from jaxllm.data.store import load_texts
from jaxllm.tokenizers.trained import train

LOADERS = ("document", "chat", "prompt", "ranked", "text")


@pytest.fixture(scope="module")
def tokenizer():
    settings = {"vocab_size": 300, "model_type": "bpe", "character_coverage": 1.0, "num_threads": 1}
    return train(iter([f"line number {i} of some text" for i in range(200)]), **settings)


@pytest.fixture(autouse=True)
def _all_lines_are_new():
    splits._report.cache_clear()


def record(i, **more):
    ranking = {"responses": ["a", "b"], "ranks": [1, 2]}
    return {
        "text": f"text {i}",
        "prompt": f"prompt {i}",
        "response": "yes",
        **ranking,
        "split": "train",
        **more,
    }


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def load(kind, tokenizer, cache, *sources, split="train", length=64, **fields):
    """The examples of one kind by the road that stages take."""
    fields.setdefault("held_out_fraction", 0.0)
    data = DataConfig(sources, **fields)
    if kind == "text":
        return list(load_texts(data, split, cache))
    if kind == "prompt":
        return load_prompts(data, split, tokenizer, length)
    if kind == "ranked":
        return load_ranked(data, split, tokenizer, length)
    return load_rows(data, kind, split, tokenizer, length, cache)


@pytest.fixture
def good(tmp_path):
    held_out = [record(100 + i, split="held_out") for i in range(3)]
    return Source(write(tmp_path / "good.jsonl", *map(record, range(9)), *held_out), weight=1.0)


FILTERS = {
    "5 shorter than min_chars 20": {"min_chars": 20},
    "5 longer than max_chars 3": {"max_chars": 3},
    "5 without a match": {"match": "nothing like it"},
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("reason", FILTERS)
def test_a_source_that_is_filtered_away_is_refused_with_the_reason(
    tmp_path, tokenizer, good, kind, reason
):
    bad = Source(
        write(tmp_path / "bad.jsonl", *(record(20 + i) for i in range(5))),
        weight=1.0,
        **FILTERS[reason],
    )
    with pytest.raises(InputError) as error:
        load(kind, tokenizer, tmp_path / "cache", good, bad)
    wanted = f"{bad.path}: not a single {kind} example in the train split (records: {reason}); fix the source"
    assert str(error.value).startswith(wanted) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", LOADERS)
def test_other_reasons_are_counted(tmp_path, tokenizer, good, kind):
    records = [record(i) for i in range(3)] + [
        record(50, text=""),
        record(8, text="text 8"),
        record(60),
    ]
    other = write(tmp_path / "other.jsonl", record(60))
    bad = Source(write(tmp_path / "bad.jsonl", *records), weight=1.0, exclude=(other,))
    with pytest.raises(InputError) as error:
        load(kind, tokenizer, tmp_path / "cache", good, bad)
    assert (
        "(records: 1 shorter than min_chars 1, 1 in a file of `exclude`, 4 in another source too)"
        in str(error.value)
    )
    empty = Source(write(tmp_path / "empty.jsonl"), weight=1.0)
    with pytest.raises(InputError, match=r"empty.jsonl: not a single .* \(it has no records\)"):
        load(kind, tokenizer, tmp_path / "cache", good, empty)


def test_all_held_out_by_chance_is_refused_and_by_their_own_word_is_named(
    tmp_path, tokenizer, good, capsys
):
    by_chance = [record(i, split=None) for i in range(20, 22)]
    bad = Source(write(tmp_path / "bad.jsonl", *by_chance), weight=1.0)
    with pytest.raises(InputError, match="2 held out by the hash of their content"):
        load("prompt", tokenizer, tmp_path / "cache", good, bad, held_out_fraction=0.9999999)
    validation = [record(30, split="held_out"), record(31, split="held_out"), record(32, text="")]
    marked = Source(write(tmp_path / "marked.jsonl", *validation), weight=1.0)
    for kind in LOADERS:
        splits._report.cache_clear()
        assert load(kind, tokenizer, tmp_path / "cache", good, marked)
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f"data: {marked.path}: not a single {kind} example in the train split"]


@pytest.mark.parametrize("kind", LOADERS)
def test_without_held_out_examples_a_source_is_named_once(tmp_path, tokenizer, good, kind, capsys):
    few = Source(write(tmp_path / "few.jsonl", record(40)), weight=1.0)
    for _ in range(2):
        assert load(kind, tokenizer, tmp_path / "cache", good, few, split="held_out")
    named = f"data: {few.path}: not a single {kind} example in the held_out split"
    assert capsys.readouterr().err.splitlines() == [named]
    assert load(kind, tokenizer, tmp_path / "cache", good, few)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["chat", "prompt", "ranked"])
def test_a_source_of_too_long_examples_is_refused_or_named(tmp_path, tokenizer, good, kind, capsys):
    long = [
        record(i, prompt="word " * 90 + str(i), split=s)
        for i, s in ((50, "train"), (51, "held_out"))
    ]
    source = Source(write(tmp_path / "long.jsonl", *long), weight=1.0)
    wanted = "every %s example of the %s split is longer than 64 tokens"
    with pytest.raises(InputError, match=r"long.jsonl: " + wanted % (kind, "train")):
        load(kind, tokenizer, tmp_path / "cache", good, source, too_long="drop")
    assert load(
        kind, tokenizer, tmp_path / "cache", good, source, too_long="drop", split="held_out"
    )
    assert wanted % (kind, "held_out") in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["document", "chat", "prompt", "ranked"])
def test_the_only_source_says_why_it_is_empty_too(tmp_path, tokenizer, good, kind):
    source = Source(good.path, match="nothing like it")
    with pytest.raises(
        InputError, match=r"not a single .* in the train split \(records: 12 without a match\)"
    ):
        load(kind, tokenizer, tmp_path / "cache", source)
