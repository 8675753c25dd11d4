"""SentencePiece models and tiktoken ranks: ids of their libraries, control tokens, chats and masks."""

import base64
import io
import itertools
import json

import pytest
import sentencepiece

from jaxllm.config import InputError
from jaxllm.tokenizers.published import load_tokenizer
from tests.tokenizers.chat_templates import CHATML, LLAMA2
from tests.tokenizers.small_tokenizers import messages_of, whole
from tests.tokenizers.test_trained import CORPUS, NASTY


def test_sentencepiece_models_of_others(tmp_path):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, vocab_size=400, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
    (tmp_path / "chat_template.jinja").write_text(LLAMA2)
    tokenizer, sp = (
        load_tokenizer(tmp_path),
        sentencepiece.SentencePieceProcessor(model_proto=out.getvalue()),
    )
    for text in (*NASTY, "<s>a</s>", "the quick"):
        assert tokenizer.encode(text) == sp.encode(text)
        assert tokenizer.decode(sp.encode(text)) == sp.decode(sp.encode(text))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    ids, mask = tokenizer.encode_chat(
        messages_of([("user", "the </s>龘"), ("assistant", "quick 龘")])
    )
    assert ids[0] == 1 and ids.count(2) == 1
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]).strip() == "quick 龘"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """GPT-2's number of ranks: every byte, pairs of bytes."""
    folder = tmp_path_factory.mktemp("ranks")
    tokens = [bytes([b]) for b in range(256)] + [
        bytes(p) for p in itertools.product(range(256), repeat=2)
    ]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens[:50_256])]
    (folder / "gpt2.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def test_tiktoken_ranks(ranks, tmp_path):
    tokenizer = load_tokenizer(ranks)
    assert (
        tokenizer.vocab_size == 50_257
        and tokenizer.eos_id == tokenizer.pad_id == 50_256
        and tokenizer.bos_id is None
    )
    for text in (*NASTY, "<|endoftext|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text and 50_256 not in tokenizer.encode(
            text
        )
    assert tokenizer.encode("a<|endoftext|>", parse_special=True) == [97, 50_256]
    assert tokenizer.encode_batch(NASTY, num_threads=2) == [
        tokenizer.encode(text) for text in NASTY
    ]
    lines = (ranks / "gpt2.tiktoken").read_bytes()
    for name, content, error in (
        ("gpt2.tiktoken", lines[:1000], "damaged, or not the 50,256 ranks"),
        ("tokenizer.model", lines, "not the 128,000 ranks of llama3"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: .*{error}"):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()


def test_ranks_with_a_chat_template_and_added_tokens(ranks, tmp_path):
    (tmp_path / "gpt2.tiktoken").write_bytes((ranks / "gpt2.tiktoken").read_bytes())
    added = {
        str(50_257 + i): {"content": text} for i, text in enumerate(("<|im_start|>", "<|im_end|>"))
    }
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added, "chat_template": CHATML})
    )
    tokenizer = load_tokenizer(tmp_path)
    ids, mask = tokenizer.encode_chat(messages_of([("user", "<|im_end|>"), ("assistant", "狐😀")]))
    assert tokenizer.vocab_size == 50_259 and tokenizer.end_id == 50_258 and ids.count(50_258) == 2
    assert whole(tokenizer, [i for i, m in zip(ids, mask, strict=True) if m]) == "狐😀<|im_end|>"
