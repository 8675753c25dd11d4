"""Bits per byte divide by the bytes that are predicted, and by no others."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import InputError
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.contamination import some_documents
from jaxllm.data.loader import load_rows
from jaxllm.data.splits import examples
from jaxllm.data.store import open_store
from jaxllm.tokenizers.published import load_tokenizer
from jaxllm.tokenizers.trained import train
from tests.tokenizers.chat_templates import CHATML
from tests.tokenizers.small_tokenizers import CORPUS, write

BOS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "BOS", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"BOS": {"id": "BOS", "ids": [1], "tokens": ["BOS"]}},
}


def begun(path):
    """The same tokenizer with token 1 before every text."""
    spec = json.loads((path / "tokenizer.json").read_text()) | {"post_processor": BOS}
    (path / "tokenizer.json").write_text(json.dumps(spec))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tokenizers with and without BOS, with and without a space before every text."""
    root = tmp_path_factory.mktemp("tokenizers")
    found = {
        "ours": train(
            iter(CORPUS), vocab_size=400, model_type="bpe", character_coverage=1.0, num_threads=1
        )
    }
    for style in ("chatml", "llama2"):
        for name in ("bare", "begun"):
            write(folder := root / f"{style} {name}", style, CHATML if style == "chatml" else None)
            found[f"{style} {name}"] = begun(folder) if name == "begun" else load_tokenizer(folder)
    assert (
        {bool(t.begin_ids) for t in found.values()}
        == {t.dummy_prefix for t in found.values()}
        == {True, False}
    )
    return found


NAMES = ["ours", "chatml bare", "chatml begun", "llama2 bare", "llama2 begun"]


def rows_of(root, tokenizer, kind, records, **how):
    path = root / "data.jsonl"
    path.write_text("\n".join(json.dumps({**record, "split": "train"}) for record in records))
    data = DataConfig((Source(str(path), min_chars=0),), **how)
    ((rows, _),) = load_rows(data, kind, "train", tokenizer, 48, root / "cache")
    return rows


def target_bytes(rows, tokenizer):
    targets = [row["tokens"][row["loss_mask"]] for row in map(rows.row, range(rows.num_rows))]
    targets = np.concatenate(targets)
    return len(targets), sum(len(tokenizer.token_bytes(int(token))) for token in targets)


TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), min_size=1, max_size=60
)
WORDS = st.lists(
    st.sampled_from(["the quick", " fox", "狐狸", "\n", "é", "hello", " "]), min_size=2
).map("".join)


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(NAMES), texts=st.lists(TEXT | WORDS, min_size=2, max_size=6, unique=True)
)
def test_bytes_of_documents_are_those_of_their_targets(made, tmp_path_factory, name, texts):
    tokenizer, root = made[name], tmp_path_factory.mktemp("rows")
    records = [{"text": "the quick brown fox"}, *({"text": text} for text in texts)]
    rows = rows_of(root, tokenizer, "document", records)
    kept = [
        e.text
        for e in examples(
            DataConfig((Source(str(root / "data.jsonl"), min_chars=0),)), "document", "train"
        )
    ]
    count, size = target_bytes(rows, tokenizer)
    assert rows.num_tokens == count
    assert rows.num_bytes == size - sum(spaces_of_its_own(tokenizer, text) for text in kept)


def spaces_of_its_own(tokenizer, text):
    """Bytes of the targets that are not of the text: the space that the tokenizer puts before it, where that is a
    target. A first token without BOS is none; there a space of the text's own (no other is put before it) counts."""
    own = sum(map(len, map(tokenizer.token_bytes, tokenizer.encode(text)))) - len(text.encode())
    return own if tokenizer.begin_ids else own - tokenizer.dummy_prefix


def test_short_lines_without_bos_count_what_is_scored(made, tmp_path):
    """A document's first token is never predicted: its bytes were 22% of those on short lines."""
    tokenizer = made["chatml bare"]
    texts = ["the fox", "hello hello", "quick"]
    rows = rows_of(tmp_path, tokenizer, "document", [{"text": text} for text in texts])
    firsts = [len(tokenizer.token_bytes(tokenizer.encode(text)[0])) for text in texts]
    assert rows.num_bytes == sum(map(len, texts)) - sum(firsts) > 0


@settings(max_examples=10, deadline=None)
@given(
    name=st.sampled_from(["ours", "chatml bare"]),
    replies=st.lists(WORDS, min_size=1, max_size=4, unique=True),
)
@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_bytes_of_conversations_are_those_of_their_targets(
    made, tmp_path_factory, name, too_long, replies
):
    records = [{"prompt": "a", "response": reply} for reply in ("the fox", *replies)]
    tokenizer = made[name]
    rows = rows_of(tmp_path_factory.mktemp("rows"), tokenizer, "chat", records, too_long=too_long)
    assert (rows.num_tokens, rows.num_bytes) == target_bytes(rows, tokenizer)


def test_texts_of_one_token_predict_nothing(made, tmp_path):
    tokenizer = made["chatml bare"]
    with pytest.raises(
        InputError, match=r"data\.sources: no document example .* has a target that stands for text"
    ):
        rows_of(tmp_path, tokenizer, "document", [{"text": "t"}, {"text": "h"}])


@pytest.mark.parametrize("name", NAMES)
def test_documents_compared_with_training_data_are_whole(made, tmp_path, name):
    tokenizer, text = made[name], "the quick brown fox"
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": text, "split": "held_out"}))
    data = DataConfig((Source(str(tmp_path / "data.jsonl")),))
    held_out = open_store(data, "document", tokenizer, tmp_path / "cache")["held_out"]
    (found,) = some_documents(held_out, 10, len(tokenizer.begin_ids))
    assert found.tolist() == tokenizer.encode(text)
