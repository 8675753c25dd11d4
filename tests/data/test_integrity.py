"""What would go wrong without a sound: leaks, stale caches, wrong byte counts, answers cut away; and bad input."""

import datetime
import json
import os

import numpy as np
import pytest

from jaxllm.config import InputError
from jaxllm.data import packing
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.loader import load_ranked, load_rows
from jaxllm.data.sources import read_records
from jaxllm.data.splits import examples
from jaxllm.data.store import load_texts
from jaxllm.tokenizers.trained import train


@pytest.fixture(scope="module")
def tokenizer():
    corpus = [f"line number {i} of some text" for i in range(200)]
    return train(
        iter(corpus), vocab_size=320, model_type="bpe", character_coverage=1.0, num_threads=1
    )


def lines(path, *records):
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(path)


def config(*sources, **fields):
    fields.setdefault("held_out_fraction", 0.0)
    return DataConfig(tuple(sources), **fields)


def first_text(data, tokenizer, cache):
    ((rows, _),) = load_rows(data, "document", "train", tokenizer, 64, cache)
    return tokenizer.decode(rows.row(0)["tokens"])


def test_a_held_out_prompt_is_in_no_training_ranking(tmp_path):
    ranking = {"responses": ["a", "b"], "ranks": [1, 2]}
    path = lines(
        tmp_path / "r.jsonl",
        {**ranking, "prompt": "both", "split": "train"},
        {**ranking, "prompt": "both", "responses": ["c", "d"], "split": "held_out"},
        {**ranking, "prompt": "one", "split": "train"},
    )
    asked = {
        s: [e.question() for e in examples(config(Source(path)), "ranked", s)]
        for s in ("train", "held_out")
    }
    assert asked == {"train": ["one"], "held_out": ["both"]}


def test_an_unknown_split_is_refused_not_left_out(tmp_path):
    path = lines(tmp_path / "s.jsonl", {"text": "a"}, {"text": "b", "split": "validation"})
    with pytest.raises(
        InputError, match=r"s.jsonl:2: split must be train or held_out, not 'validation'"
    ):
        list(examples(config(Source(path)), "document", "train"))


def test_only_the_field_that_was_asked_for_is_read(tmp_path):
    path = lines(tmp_path / "f.jsonl", {"text": "wrong", "body": "right"}, {"text": "wrong"})
    with pytest.raises(InputError, match=r"f.jsonl:2: a document needs the field 'body'"):
        list(examples(config(Source(path, text_field="body")), "document", "train"))


def test_the_cache_goes_by_content_not_by_time(tmp_path, tokenizer):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("hello one")
    data, stat = config(Source(str(path))), path.stat()
    assert first_text(data, tokenizer, cache) == "hello one"
    os.utime(path, (1e9, 1e9))  # a copy of the same file
    first_text(data, tokenizer, cache)
    assert len(list(cache.glob("document-*"))) == 1
    path.write_text("hello two")  # as long, and as old
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert first_text(data, tokenizer, cache) == "hello two"


def test_the_cache_sees_what_a_function_yields_next_to_excluded_files(
    tmp_path, tokenizer, monkeypatch, capsys
):
    (tmp_path / "integrity_rows.py").write_text(
        "import os\ndef rows():\n    yield {'text': os.environ['ROW']}\ndef texts():\n    yield 'no dict'\n"
    )
    (tmp_path / "not.txt").write_text("nothing")
    monkeypatch.syspath_prepend(tmp_path)
    data = config(Source("py://integrity_rows:rows", exclude=(str(tmp_path / "not.txt"),)))
    for text in ("one two", "another text"):
        monkeypatch.setenv("ROW", text)
        assert first_text(data, tokenizer, tmp_path / "cache") == text
    assert capsys.readouterr().err.count("running integrity_rows:rows") == 1
    with pytest.raises(
        InputError, match=r"py://integrity_rows:texts:1: the function must yield dicts, not str"
    ):
        list(read_records(Source("py://integrity_rows:texts")))


def test_bytes_of_a_truncated_reply_are_those_of_its_targets(tmp_path, tokenizer):
    path = lines(
        tmp_path / "c.jsonl",
        {"prompt": "q", "response": "y" * 500},
        {"prompt": "p", "response": "yes 好"},
    )
    ((rows, _),) = load_rows(
        config(Source(path), too_long="truncate"),
        "chat",
        "train",
        tokenizer,
        24,
        tmp_path / "cache",
    )
    targets = [row["tokens"][row["loss_mask"]] for row in map(rows.row, range(rows.num_rows))]
    assert rows.num_tokens == sum(map(len, targets))
    assert (
        rows.num_bytes
        == sum(len(tokenizer.token_bytes(int(t))) for t in np.concatenate(targets))
        < 100
    )


def test_responses_cut_away_are_refused_or_dropped(tmp_path, tokenizer):
    long, short = (
        {"prompt": p, "responses": ["aa", "bb"], "ranks": [1, 2]} for p in ("q" * 200, "q")
    )
    source = Source(lines(tmp_path / "r.jsonl", short, long))
    with pytest.raises(InputError, match=r"r.jsonl:2: no token of a response is left in 32 tokens"):
        load_ranked(config(source, too_long="truncate"), "train", tokenizer, 32)
    assert len(load_ranked(config(source, too_long="drop"), "train", tokenizer, 32)) == 1


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_nothing_to_learn_from_is_refused(tmp_path, tokenizer, name):
    (tmp_path / name).write_text("\n\n")
    data = config(Source(str(tmp_path / name)))
    with pytest.raises(
        InputError, match=rf"{name}: not a single document example in the train split"
    ):
        load_rows(data, "document", "train", tokenizer, 32, tmp_path / "cache")
    with pytest.raises(InputError, match=rf"{name}: not a single text example in the train split"):
        list(load_texts(data, "train"))


def test_rows_without_room_for_a_target_are_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match="hold no target"):
        next(packing.concat_and_split([np.array([3])], 1))
    with pytest.raises(InputError, match="length: rows of 1 tokens hold no target"):
        load_rows(
            config(Source(str(tmp_path / "a.txt"))),
            "document",
            "train",
            tokenizer,
            1,
            tmp_path / "cache",
        )


def test_dates_of_parquet_do_not_stop_a_sample(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a", "b", "c"], "day": [datetime.date(2020, 1, 1)] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert len(list(read_records(Source(str(tmp_path / "d.parquet"), max_records=2)))) == 2


def test_more_bad_input_is_one_clear_line(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    body = lines(tmp_path / "b.jsonl", {"body": "x"})
    cases = {
        "b.jsonl:1: `exclude` compares texts": Source(str(tmp_path / "a.txt"), exclude=(body,)),
        "package no.such is not installed": Source("pkg://no.such/x.txt"),
    }
    for message, source in cases.items():
        with pytest.raises(InputError) as error:
            list(read_records(source))
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"replace": (("a", r"\2"),)}, "replace: .*invalid group reference"),
        ({"replace": (("a", r"\g<x>"),)}, "replace: .*unknown group name"),
        ({"match": "(?P<text>b)"}, "match: a group cannot be called text"),
    ],
)
def test_replacements_and_groups_are_checked_with_the_config(fields, message):
    with pytest.raises(ValueError, match=message):
        Source("x", **fields)
