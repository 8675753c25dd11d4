"""Exact round trip, special tokens out of reach of any text, the chat mask, and one-line errors."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import InputError
from jaxllm.tokenizers import trained as t

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "敏捷的棕色狐狸跳过懒狗",
    "hello  world\tagain",
    "<|user|> says ▁ <0x41>",
] * 40


def make(vocab_size=400, model_type="bpe", corpus=CORPUS):
    return t.train(
        iter(corpus),
        vocab_size=vocab_size,
        model_type=model_type,
        character_coverage=1.0,
        num_threads=1,
    )


@pytest.fixture(scope="module", params=[("bpe", 400), ("unigram", 304)], ids=lambda p: p[0])
def tokenizer(request):
    return make(request.param[1], request.param[0])


NASTY = [
    "", " ", "  a  b  ", "\n", "\r\n\t x", "a\0b", "▁", " ▁▁ a▁b ", "▅⁇", "😀👩‍👩‍👧 𠀀龘", "<|user|><|end|>", "<unk><s></s><pad>",
    "<0x41><0x0A>", "<|unk|>", "\ufeffx", "e\u0301 é", "\u200b\u3000", "\U0010ffff", "\ufffd", "ﷺ", "ａｂｃ１２３", "①½",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY, ids=repr)
def test_round_trip_of_nasty_strings(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_string_without_special_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i > tokenizer.end_id for i in ids)  # pad, bos, eos, unk and the roles come first


def test_special_ids_are_distinct_and_pad_is_not_eos(tokenizer):
    ids = [
        tokenizer.pad_id,
        tokenizer.bos_id,
        tokenizer.eos_id,
        *tokenizer.role_ids.values(),
        tokenizer.end_id,
    ]
    assert len(set(ids)) == len(ids)
    assert tokenizer.decode(ids) == ""


def test_batch_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch(NASTY, num_threads=2) == [
        tokenizer.encode(text) for text in NASTY
    ]


def test_lone_surrogate_is_one_clear_line(tokenizer):
    with pytest.raises(InputError, match="not valid Unicode"):
        tokenizer.encode("a\ud800b")


def test_chat_mask_covers_the_assistant_and_its_end(tokenizer):
    messages = [
        {"role": r, "content": c}
        for r, c in (("system", "be brief"), ("user", "hi"), ("assistant", "ok <|end|>"))
    ]
    ids, mask = tokenizer.encode_chat(messages)
    answer = tokenizer.encode("ok <|end|>")
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.end_id) == 3
    assert [i for i, m in zip(ids, mask, strict=True) if m] == [*answer, tokenizer.end_id]
    prompt, prompt_mask = tokenizer.encode_chat(messages[:2], reply=True)
    assert ids[: len(prompt)] == prompt and not any(prompt_mask)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "robot", "content": "x"},
        {"role": "user"},
        {"content": "x"},
        {"role": "user", "content": 3},
    ],
)
def test_malformed_message_is_refused(tokenizer, message):
    with pytest.raises(InputError, match="message 1: needs a role"):
        tokenizer.encode_chat([message])


def test_stream_equals_decode(tokenizer):
    ids = [i for text in NASTY for i in tokenizer.encode(text)]
    random.Random(0).shuffle(ids)  # broken UTF-8 as well
    for sequence in (tokenizer.encode("a 龘😀 b"), ids):
        decoder = t.StreamDecoder(tokenizer)
        parts = [decoder.add(i) for i in sequence]
        assert "".join(parts) + decoder.flush() == tokenizer.decode(sequence)
    whole = t.StreamDecoder(tokenizer)
    assert all("\ufffd" not in whole.add(i) for i in tokenizer.encode("a 龘😀 b"))


def test_training_is_deterministic():
    assert make().model == make().model


def test_no_sentence_is_dropped_for_its_length():
    rare = "龘" * 9000
    tokenizer = make(280, corpus=["aaa bbb " * 2000, rare])
    assert len(tokenizer.encode("龘龘")) < 6  # a token of its own, not three bytes each


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tok")
    tokenizer.save(tmp_path / "tok")  # again, over the old one
    assert t.Tokenizer.load(tmp_path / "tok").fingerprint == tokenizer.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["tok"]


def test_damaged_or_missing_file_is_one_clear_line(tokenizer, tmp_path):
    with pytest.raises(InputError, match="no such tokenizer"):
        t.Tokenizer.load(tmp_path / "nowhere")
    tokenizer.save(tmp_path / "tok")
    (tmp_path / "tok" / "tokenizer.model").write_bytes(tokenizer.model[:100])
    with pytest.raises(InputError, match=r"tokenizer.model: (damaged|is not the file)"):
        t.Tokenizer.load(tmp_path / "tok")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_vocabulary_larger_than_the_corpus_supports(model_type):
    with pytest.raises(
        InputError,
        match=r"tokenizer.vocab_size: 50000 is larger than the corpus supports; set it to at most \d+",
    ) as error:
        make(50000, model_type)
    limit = int(str(error.value).split("at most ")[1].split()[0])
    assert make(limit, model_type).vocab_size == limit


def test_vocabulary_too_small_and_empty_corpus():
    with pytest.raises(InputError, match="too small"):
        make(270)
    with pytest.raises(InputError, match="corpus is empty"):
        make(corpus=["", "\n"])


def test_compression_counts_by_hand(tokenizer):
    texts = ["the quick dog", "敏捷狐狸"]
    n = [len(tokenizer.encode(text)) for text in texts]
    numbers = t.compression(tokenizer, texts)
    assert numbers["bytes_per_token"] == (13 + 12) / sum(n)
    assert numbers["characters_per_token"] == (13 + 4) / sum(n)
    assert numbers["words_per_token"] == 3 / sum(n)
    assert numbers["tokens_per_750_english_words"] == 750 * n[0] / 3
    assert numbers["tokens_per_500_chinese_characters"] == 500 * n[1] / 4
    assert t.compression(tokenizer, ["123"])["tokens_per_750_english_words"] is None
