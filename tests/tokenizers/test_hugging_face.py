"""A tokenizer that was trained here gives other programs, and itself when it is imported again, the same ids."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.tokenizers.hugging_face import files_of
from jaxllm.tokenizers.published import PretrainedTokenizer, load_tokenizer
from jaxllm.tokenizers.trained import SPACE, train

TEXTS = [
    "the soup is good and the waiter was kind 汤很好喝，服务员很热情。\n",
    "one two three four five six seven 1 2 3 45 678\n",
    "hello world, good and bad, cold and hot, sky and grass\n",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request):
    return train(
        iter(TEXTS * 20),
        vocab_size=311,
        model_type=request.param,
        character_coverage=1.0,
        num_threads=1,
    )


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """A folder as `jaxllm export` makes it."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer.save(folder / "own")
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    (folder / "own/tokenizer.json").rename(folder / "sentencepiece.json")
    for name, content in files_of(tokenizer).items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def tokenizer_is_bpe(exported):
    return json.loads((exported / "tokenizer.json").read_text())["model"]["type"] == "BPE"


TEXT = st.text(
    alphabet=st.characters(exclude_characters=SPACE, exclude_categories=["Cs"])
) | st.text(alphabet="the soup isgodanwr 汤很好喝，123\n")


@given(text=TEXT)
@settings(max_examples=300, deadline=None)
def test_hugging_face_s_library_gives_the_same_ids_and_texts(tokenizer, exported, text):
    theirs = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    ids = theirs.encode(text, add_special_tokens=False).ids
    if not any(name in text for name in tokenizer.controls):
        assert ids == tokenizer.encode(text)
        assert theirs.decode(ids) == text
        assert theirs.encode(text).ids == tokenizer.prompt(text)


def test_their_chat_template_writes_our_conversations(tokenizer, exported):
    # Of a unigram model, whose tokenizer.json only their library reads, the model itself.
    vocabulary = "tokenizer.json" if tokenizer_is_bpe(exported) else "tokenizer.model"
    files = {name: (exported / name).read_bytes() for name in (vocabulary, "tokenizer_config.json")}
    theirs = PretrainedTokenizer(files)
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": " hi <|end|> 汤\n"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "bye"},
    ]
    for reply in (False, True):
        assert theirs.encode_chat(messages, reply=reply) == tokenizer.encode_chat(
            messages, reply=reply
        )
    names = ("bos_id", "eos_id", "pad_id", "end_id", "vocab_size", "begin_ids")
    assert [getattr(theirs, name) for name in names] == [getattr(tokenizer, name) for name in names]
    assert {*theirs.stop_ids} == {*tokenizer.stop_ids}


def test_imported_again_it_is_the_same_tokenizer(tokenizer, exported):
    again = load_tokenizer(exported)
    assert type(again) is type(tokenizer) and again.fingerprint == tokenizer.fingerprint
    assert again.encode(f"a{SPACE}b") == tokenizer.encode(f"a{SPACE}b")
    assert json.loads((exported / "tokenizer_config.json").read_text())["eos_token"] == "<|eos|>"
