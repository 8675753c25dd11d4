"""Documents read many at a time are those read one by one: same texts, hashes, splits, order, tokens and errors."""

import itertools
import json
import random

import numpy as np
import pytest

from jaxllm.config import InputError
from jaxllm.data import readers, units
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.documents import distinct_documents
from jaxllm.data.tokenization import distinct_items, write_unit
from jaxllm.data.units import list_units
from jaxllm.tokenizers.trained import train

ALPHABET = [
    "a",
    "B ",
    "é",
    "文字",
    "\r",
    "\u2028",
    "\u2581",
    "\x85",
    "\t",
    "[",
    "{",
    '"',
    "\\",
    "😀",
    ".",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train(
        iter(["ab ba aB 文字文 é.", "[{a}] 😀 文"] * 20),
        vocab_size=290,
        model_type="bpe",
        character_coverage=1.0,
        num_threads=1,
    )


def some_texts(seed, count=3000):
    rng = random.Random(seed)
    texts = ["".join(rng.choices(ALPHABET, k=rng.choice([0, 1, 3, 20]))) for _ in range(count)]
    # Repetitions near each other and far apart.
    return [rng.choice(texts[:50]) if rng.random() < 0.2 else text for text in texts]


def text_file(path, seed):
    ends = random.Random(seed)
    lines = [text + ends.choice(["\n", "\n", "\r\n"]) for text in some_texts(seed)]
    path.write_bytes(("\ufeff" * (seed % 2) + "".join(lines) + "no end").encode())


def json_file(path, seed):
    rng = random.Random(seed)
    lines = []
    for text in some_texts(seed):
        fields = {"body": text, "other": rng.choice([None, 1.5, [text], {"a": {}}])}
        # Few blocks have a record that names its split: the others are read at once.
        if rng.random() < 0.0005:
            fields["split"] = rng.choice(["train", "held_out", "", None])
        lines.append(json.dumps(fields, ensure_ascii=rng.random() < 0.3 and "😀" not in text))
    path.write_text("\n".join(["", *lines, "  "]), encoding="utf-8")


def all_units(tmp_path, path, **settings):
    data_settings = {
        name: settings.pop(name) for name in ("held_out_fraction", "split_salt") if name in settings
    }
    data = DataConfig((Source(str(path), **settings),), **data_settings)
    return list_units(data, "document", None, tmp_path)


def one_by_one(unit):
    return [(item.example.text, item.digest, item.side) for item in distinct_items(unit)]


def at_once(unit):
    batches = distinct_documents(unit)
    return list(itertools.chain.from_iterable(zip(*batch, strict=True) for batch in batches))


SETTINGS = [
    {},
    {"min_chars": 0},
    {"min_chars": 5, "max_chars": 30, "held_out_fraction": 0.5, "split_salt": "other 盐"},
    {"replace": (("[ab]+", "<>"), ("<", "")), "held_out_fraction": 0.0},
    {"exclude": True, "held_out_fraction": 0.99999},
    {"match": r"(?P<letter>a).*文"},
    {"max_records": 40},
    {"record": "paragraph"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings) or "plain")
@pytest.mark.parametrize(("kind", "seed"), [("txt", 0), ("txt", 1), ("jsonl", 2)])
def test_documents_at_once_are_those_one_by_one(tmp_path, monkeypatch, kind, seed, settings):
    # Parts and blocks of a few lines, and a memory of few repetitions.
    monkeypatch.setattr(readers, "PART_BYTES", 20_000)
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 3000)
    monkeypatch.setattr(units, "RUN", 64)
    path = tmp_path / f"corpus.{kind}"
    (text_file if kind == "txt" else json_file)(path, seed)
    settings = dict(settings)
    if kind == "jsonl":
        settings["text_field"] = "body"
    if settings.pop("exclude", False):
        other = tmp_path / f"other.{kind}"
        other.write_bytes(path.read_bytes()[: path.stat().st_size // 4].rpartition(b"\n")[0])
        settings["exclude"] = (str(other),)
    found = all_units(tmp_path, path, **settings)
    assert len(found) > 1 or settings.get("max_records") or settings.get("record")
    for unit in found:
        assert at_once(unit) == one_by_one(unit)
    # Both splits occur, unless nothing is held out or few texts are taken.
    sides = {side for unit in found for _, _, side in at_once(unit)}
    assert (2 in sides) == (settings.get("held_out_fraction") != 0) or "max_records" in settings


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("c.txt", b"caf\xe9"),
        ("c.txt", b"a\0b"),
        ("c.jsonl", b'{"text": 7}'),
        ("c.jsonl", b'{"text": null}'),
        ("c.jsonl", b'["text"]'),
        ("c.jsonl", b'{"text": "a"'),
        ("c.jsonl", b'{"text": "\\ud800"}'),
        ("c.jsonl", b'{"text": "a", "more": ' + b"[" * 300 + b"]" * 300 + b"}"),
        ("c.jsonl", b'{"text": "a", "split": "test"}'),
        ("c.jsonl", b'{"text": "a", "number": ' + b"7" * 5000 + b"}"),
    ],
)
def test_a_bad_line_is_named_as_when_read_one_by_one(tmp_path, name, bad):
    good = b'{"text": "good"}' if name.endswith("jsonl") else b"good"
    (tmp_path / name).write_bytes(b"\n".join([good] * 70 + [bad, good]))
    (unit,) = all_units(tmp_path, tmp_path / name)
    with pytest.raises(InputError) as slow:
        one_by_one(unit)
    with pytest.raises(InputError) as fast:
        at_once(unit)
    assert str(fast.value) == str(slow.value) and f"{name}:71" in str(fast.value)


@pytest.mark.parametrize("begin_ids", [None, (), (5, 6)])
def test_the_tokens_of_a_unit_are_those_of_each_document(
    tmp_path, tokenizer, monkeypatch, begin_ids
):
    if begin_ids is not None:
        monkeypatch.setattr(tokenizer, "begin_ids", begin_ids)
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 3000)
    path = tmp_path / "corpus.txt"
    text_file(path, 3)
    (unit,) = all_units(tmp_path, path, min_chars=0)
    total = write_unit(tmp_path, unit, tokenizer)["tokens"]
    tokens = np.fromfile(tmp_path / "tokens", "<u2")
    table = np.fromfile(tmp_path / "examples", units.EXAMPLE["document"])
    texts = [text for text, _, _ in one_by_one(unit)]
    assert len(table) == len(texts) > 1000 and "" in texts and total == len(tokens)
    for row, text in zip(table, texts, strict=True):
        expected = tokenizer.encode_document(text)
        start, size = int(row["start"]), int(row["size"])
        assert tokens[start : start + size].tolist() == expected
        # The first token is no target.
        assert row["bytes"] == len(b"".join(map(tokenizer.token_bytes, expected[1:])))
