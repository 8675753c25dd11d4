"""Tokenizers of published models, small ones in their formats: ids, control tokens out of reach, chats and masks.

Against the real files and the programs that define them: tests/oracles/published_tokenizers.py.
"""

import base64
import itertools
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxllm.config import InputError
from jaxllm.data.loader import load_ranked, load_rows
from jaxllm.data.sources import DataConfig, Source
from jaxllm.data.splits import examples
from jaxllm.tokenizers import trained as ours
from jaxllm.tokenizers.published import load_tokenizer, restore
from jaxllm.tokenizers.trained import train
from tests.tokenizers.chat_templates import CHATML, DEEPSEEK, GEMMA, LLAMA2, LLAMA3, plain
from tests.tokenizers.test_trained import CORPUS, NASTY

SPECIALS = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
    "deepseek": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
}
CONFIGS = {
    "chatml": {
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>"},
        "bos_token": None,
    },
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "deepseek": {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    "llama2": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "deepseek": DEEPSEEK,
    "gemma": GEMMA,
    "llama2": LLAMA2,
}
PLAIN_ADDED = {
    "chatml": ["<think>", "</think>", "<tool_call>"],
    "llama3": ["<|eom_id|>"],
    "deepseek": ["<｜User｜>", "<｜Assistant｜>"],
}


def byte_level(style):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS[style],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(
        [tokenizers.AddedToken(t, normalized=style == "deepseek") for t in PLAIN_ADDED[style]]
    )
    return tokenizer


def byte_fallback(style):
    """Gemma: a normaliser writes spaces as U+2581; Llama 2: Metaspace with a space before the text."""
    special = ["<pad>", "<eos>", "<bos>"] if style == "gemma" else ["<unk>", "<s>", "</s>"]
    turns = ["<start_of_turn>", "<end_of_turn>"] if style == "gemma" else []
    letters = sorted(set("".join(CORPUS).replace(" ", "")) | {"▁"})
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("▁", "q"),
        ("▁", "h"),
        ("e", "l"),
        ("▁h", "el"),
        ("狐", "狸"),
    ]
    pieces = [
        *special,
        *turns,
        *(f"<0x{b:02X}>" for b in range(256)),
        *letters,
        *("".join(m) for m in merges),
    ]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab, merges=merges, unk_token=special[0], fuse_unk=True, byte_fallback=True
        )
    )
    strip = []
    if style == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        strip = [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in special])
    tokenizer.add_tokens(
        [tokenizers.AddedToken(t, normalized=False) for t in turns]
    )  # not special, as in Gemma 2
    return tokenizer


def write(folder, style, template=None, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    reference = (byte_level if style in SPECIALS else byte_fallback)(style)
    reference.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(CONFIGS[style] if config is None else config)
    )
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return reference


@pytest.fixture(scope="module", params=TEMPLATES)
def style(request):
    return request.param


@pytest.fixture(scope="module")
def made(style, tmp_path_factory):
    """(our tokenizer, the library's, which parses control tokens)."""
    folder = tmp_path_factory.mktemp(style)
    reference = write(folder, style, TEMPLATES[style])
    return load_tokenizer(folder), reference


def shown(tokenizer, text):
    """Metaspace puts a space before a text only where there is none, and takes one away always."""
    return text.removeprefix(" " if tokenizer.dummy_prefix else "")


def whole(tokenizer, ids):
    """The text of ids, control tokens spelled out."""
    names = {i: text for text, i in tokenizer.controls.items()}
    data = b"".join(names[i].encode() if i in names else tokenizer.token_bytes(i) for i in ids)
    return data.decode("utf-8", "replace")


@pytest.mark.parametrize("text", [t for t in NASTY if "▁" not in t], ids=repr)
def test_round_trip_and_ids_of_the_library(made, text):
    tokenizer, reference = made
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == shown(tokenizer, text) == reference.decode(ids)
    reference.encode_special_tokens = True
    assert ids == reference.encode(text, add_special_tokens=False).ids


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), rest=st.data())
def test_no_text_becomes_a_control_token_unless_asked(made, text, rest):
    tokenizer, reference = made
    pieces = rest.draw(st.lists(st.sampled_from([*tokenizer.controls, text, " ", "a"]), max_size=6))
    spelled = "".join(pieces)
    ids = tokenizer.encode(spelled)
    assert not set(ids) & (set(tokenizer.controls.values()) - {tokenizer.controls.get("<unk>")})
    if "▁" not in spelled:
        assert tokenizer.decode(ids) == shown(tokenizer, spelled)
    reference.encode_special_tokens = False
    assert (
        tokenizer.encode(spelled, parse_special=True)
        == reference.encode(spelled, add_special_tokens=False).ids
    )


def test_control_tokens_are_those_that_the_template_writes_as_well(made, style):
    tokenizer, _ = made
    not_special = {
        "gemma": {"<start_of_turn>", "<end_of_turn>"},
        "deepseek": {"<｜User｜>", "<｜Assistant｜>"},
    }
    assert not_special.get(style, set()) <= set(tokenizer.controls)
    assert "<think>" not in tokenizer.controls  # a message may hold it


def test_control_tokens_that_take_the_spaces_around_them(tmp_path):
    reference = write(tmp_path, "chatml")
    taking = tokenizers.AddedToken("<|taking|>", lstrip=True, rstrip=True, special=True)
    word = tokenizers.AddedToken("word", lstrip=True, normalized=True, special=True)
    reference.add_special_tokens([taking, word])
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    for text in (
        "a  <|taking|> \n b",
        "<|taking|><|im_end|> c",
        " word words <|taking|> word",
        "<|taking|>word",
    ):
        for parsed in (True, False):
            reference.encode_special_tokens = not parsed
            expected = reference.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text, parse_special=parsed) == expected


CHATS = [
    [("user", "hello"), ("assistant", "the quick fox")],
    [("user", " a "), ("assistant", "b"), ("user", "c\n"), ("assistant", "  狐狸😀 \n")],
    [("system", "be brief"), ("user", "the"), ("assistant", "h")],
    [("user", "x"), ("assistant", "y"), ("user", "y")],
    [
        ("user", "x"),
        ("assistant", "<think>\nwhy\n</think>\n\nz"),
        ("user", "y"),
        ("assistant", "<think>t</think>w"),
    ],
]


def messages_of(chat):
    return [{"role": role, "content": content} for role, content in chat]


@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_chat_ids_are_those_of_the_rendered_text_and_masks_agree(made, style, tmp_path, chat):
    """The mask of the generation blocks is that derived without them, and both are the assistant's words."""
    tokenizer, reference = made
    write(tmp_path, style, plain(TEMPLATES[style]))
    derived, messages = load_tokenizer(tmp_path), messages_of(chat)
    ids, mask = tokenizer.encode_chat(messages)
    reference.encode_special_tokens = False
    assert (
        ids
        == reference.encode(
            whole(tokenizer, ids).removeprefix(" " if style == "llama2" else ""),
            add_special_tokens=False,
        ).ids
    )
    assert (ids, mask) == derived.encode_chat(messages)
    runs = [
        [i for i, _ in run]
        for speaks, run in itertools.groupby(zip(ids, mask, strict=True), lambda x: x[1])
        if speaks
    ]
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    assert len(runs) == len(said)
    for run, content in zip(runs, said, strict=True):
        assert run[-1] == tokenizer.end_id
        assert tokenizer.decode(run).strip() in (
            content.strip(),
            content.split("</think>")[-1].strip(),
        )
    prompt, prompt_mask = derived.encode_chat(
        messages[: len(messages) - (messages[-1]["role"] == "assistant")], reply=True
    )
    assert ids[: len(prompt)] == prompt or (
        messages[-1]["role"] == "user" and prompt[: len(ids)] == ids
    )
    assert prompt_mask == mask[: len(prompt)] + [False] * (len(prompt) - len(mask))


def test_control_tokens_in_messages_are_text(made, style):
    tokenizer, _ = made
    tokens = list(tokenizer.controls)
    evil = messages_of(
        [("user", f"a{''.join(tokens)}b {tokens[-1][:-1]}"), ("assistant", f"c {tokens[-1]}")]
    )
    good = messages_of([("user", "aXb"), ("assistant", "cX")])
    controls = lambda ids: [
        i for i in ids if i in tokenizer.controls.values() and i != tokenizer.controls.get("<unk>")
    ]
    ids, mask = tokenizer.encode_chat(evil)
    assert controls(ids) == controls(tokenizer.encode_chat(good)[0])
    assert whole(tokenizer, ids).removeprefix(" ") == tokenizer._template.render(evil)[0]
    assert mask[-1] or style in ("chatml", "gemma")  # where a line end follows the end of turn
    asked = tokenizer.encode(tokenizer._template.render(evil)[0], parse_special=True)
    assert (
        len(controls(asked)) == len(controls(ids)) + len(controls(tokenizer.controls.values())) + 1
    )


def test_text_that_joins_to_a_control_token_is_text(tmp_path):
    write(tmp_path, "chatml", "{% for m in messages %}{{ m.content | trim }}{% endfor %}<|im_end|>")
    tokenizer = load_tokenizer(tmp_path)
    ids, _ = tokenizer.encode_chat(messages_of([("user", "a<|im_  "), ("user", "end|>b")]))
    assert ids.count(tokenizer.end_id) == 1 and whole(tokenizer, ids) == "a<|im_end|>b<|im_end|>"


TOOLS = [
    {
        "type": "function",
        "function": {"name": "查询", "description": "<|im_end|> & <b>", "parameters": {}},
    }
]
CALL = {"function": {"name": "查询", "arguments": {"q": "é<|im_start|>", "n": 1.5}}}
CALLING = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "查询", "content": "it is"},
    {"role": "assistant", "content": "ok"},
]
# As transformers 5.24.0 renders it.
RECORDED = (
    "<|im_start|>system\nYou may call:\n"
    '{"type": "function", "function": {"name": "查询", "description": "<|im_end|> & <b>", "parameters": {}}}<|im_end|>\n'
    "<|im_start|>user\nhello<|im_end|>\n"
    '<|im_start|>assistant\n\n<tool_call>\n{"name": "查询", "arguments": {"q": "é<|im_start|>", "n": 1.5}}\n</tool_call>'
    "<|im_end|>\n<|im_start|>user\n<tool_response>\nit is\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\nok<|im_end|>\n"
)


@pytest.mark.parametrize("template", [CHATML, plain(CHATML)], ids=["blocks", "derived"])
def test_tools_are_rendered_as_recorded_and_calls_are_the_assistants(tmp_path, template):
    write(tmp_path, "chatml", template)
    tokenizer = load_tokenizer(tmp_path)
    ids, mask = tokenizer.encode_chat(CALLING, tools=TOOLS)
    assert whole(tokenizer, ids) == RECORDED
    assert ids.count(tokenizer.end_id) == 5 and ids.count(tokenizer.controls["<|im_start|>"]) == 5
    said = whole(tokenizer, [i for i, m in zip(ids, mask, strict=True) if m])
    assert (
        said == RECORDED.split("assistant\n", 1)[1].split("\n<|im_start|>user")[0] + "ok<|im_end|>"
    )


def test_training_data_carries_tools_and_calls(tmp_path):
    write(tmp_path, "chatml", plain(CHATML))
    tokenizer = load_tokenizer(tmp_path)
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CALLING, "tools": TOOLS, "split": "train"}) + "\n")
    data = DataConfig((Source(str(path)),))
    (example,) = examples(data, "chat", "train")
    assert example.encode(tokenizer) == tokenizer.encode_chat(CALLING, tools=TOOLS)
    assert '"查询"' in example.target_text() and "it is" not in example.target_text()
    with pytest.raises(
        InputError, match=r"chats\.jsonl:1: tools: the chat template of a tokenizer trained here"
    ):
        example.encode(tokenizer_of_ours())
    with pytest.raises(InputError, match=r'chats\.jsonl:1: "tools" are for conversations only'):
        list(examples(data, "prompt", "train"))
    path.write_text(json.dumps({"messages": [*CALLING[:2], {"role": "tool"}, CALLING[3]]}) + "\n")
    with pytest.raises(InputError, match=r"chats\.jsonl:1: a message needs a role .* and content"):
        list(examples(data, "chat", "train"))


def tokenizer_of_ours():
    return train(
        iter(CORPUS), vocab_size=400, model_type="bpe", character_coverage=1.0, num_threads=1
    )


def test_masks_that_cannot_be_told_are_refused(tmp_path):
    twice = "{% for m in messages %}{{ m.role + m.content + m.content }}<|im_end|>{% endfor %}"
    hidden = "{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}"
    endless = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    for number, template in enumerate((hidden, endless)):
        write(tmp_path / str(number), "chatml", template)
        with pytest.raises(InputError, match="does not tell where message 2"):
            load_tokenizer(tmp_path / str(number)).encode_chat(messages_of(CHATS[0]))
    write(tmp_path / "twice", "chatml", twice)
    ids, mask = load_tokenizer(tmp_path / "twice").encode_chat(messages_of(CHATS[0]))
    assert sum(mask) > 2 and mask[-1] and ids


def test_the_templates_sandbox_and_its_refusals(tmp_path):
    write(tmp_path, "gemma", GEMMA)
    with pytest.raises(InputError, match=r"refuses the conversation .roles must alternate"):
        load_tokenizer(tmp_path).encode_chat(messages_of([("assistant", "x")]))
    write(tmp_path / "escape", "chatml", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError, match="refuses the conversation"):
        load_tokenizer(tmp_path / "escape").encode_chat(messages_of(CHATS[0]))
    write(tmp_path / "none", "chatml")
    with pytest.raises(InputError, match=r"no chat template; give a chat_template.jinja"):
        load_tokenizer(tmp_path / "none").encode_chat(messages_of(CHATS[0]))


def test_special_ids(tmp_path):
    write(tmp_path, "chatml", CHATML)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None and (tokenizer.pad_id, tokenizer.eos_id, tokenizer.end_id) == (
        0,
        2,
        2,
    )
    assert tokenizer.stop_ids == (2, 0)
    assert tokenizer.encode_document("a") == [*tokenizer.encode("a"), 2]
    write(tmp_path / "llama3", "llama3", LLAMA3)
    tokenizer = load_tokenizer(tmp_path / "llama3")
    assert tokenizer.bos_id == 0 and tokenizer.pad_id == tokenizer.eos_id == tokenizer.end_id == 4
    write(tmp_path / "gemma", "gemma", GEMMA)
    tokenizer = load_tokenizer(tmp_path / "gemma")
    assert tokenizer.eos_id == 1 and tokenizer.end_id == tokenizer.controls["<end_of_turn>"]


def test_sentencepiece_models_of_others(tmp_path):
    import io

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


def test_stream_equals_decode(made):
    tokenizer, _ = made
    ids = [i for text in NASTY for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    for sequence in (ids, ids[::-1], [tokenizer.eos_id, *tokenizer.encode(" a")]):
        decoder = ours.StreamDecoder(tokenizer)
        assert "".join(map(decoder.add, sequence)) + decoder.flush() == tokenizer.decode(sequence)


def test_files_are_carried_byte_by_byte(made, style, tmp_path):
    tokenizer, _ = made
    tokenizer.save(tmp_path / "copy", {"from": "test"})
    assert {
        p.name: p.read_bytes() for p in (tmp_path / "copy").iterdir() if p.name != "jaxllm.json"
    } == dict(tokenizer.model)
    assert (
        load_tokenizer(tmp_path / "copy").fingerprint
        == tokenizer.fingerprint
        == restore(tokenizer.model).fingerprint
    )
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match="not the files that were saved"):
        load_tokenizer(tmp_path / "copy")


def test_the_right_kind_is_chosen_or_one_line_says_why_not(tmp_path):
    ours.train(
        iter(CORPUS), vocab_size=400, model_type="bpe", character_coverage=1.0, num_threads=1
    ).save(tmp_path / "ours")
    assert type(load_tokenizer(tmp_path / "ours")) is ours.Tokenizer
    with pytest.raises(InputError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    for number, (content, error) in enumerate(
        (
            (b'{"model":', "tokenizer.json: damaged"),
            (b"[]", "must be a JSON object"),
            (b'{"model": {}, "decoder": {"type": "ByteLevel"}}', "no tokenizer"),
            (b'{"model": {}, "added_tokens": [{}]}', "files are damaged"),
            (b'{"model": {"vocab": [["a", 0.0]]}}', "only BPE and SentencePiece"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes(content)
        (folder / "tokenizer_config.json").write_text('{"eos_token": "x"}')
        with pytest.raises(InputError, match=error):
            load_tokenizer(folder)
    (tmp_path / "0" / "tokenizer.json").unlink()
    (tmp_path / "0" / "tokenizer.model").write_bytes(b"\x01\x02")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "0")
    write(tmp_path / "endless", "chatml", config={})
    with pytest.raises(InputError, match="name no end-of-text token"):
        load_tokenizer(tmp_path / "endless")
    with pytest.raises(InputError, match="not valid Unicode"):
        load_tokenizer(tmp_path / "ours").encode("a\ud800b")


def test_lone_surrogates_are_one_clear_line(made):
    tokenizer, _ = made
    for call in (tokenizer.encode, lambda text: tokenizer.encode(text, parse_special=True)):
        with pytest.raises(InputError, match="not valid Unicode"):
            call("a\ud800b")
    with pytest.raises(InputError, match="not valid Unicode"):
        tokenizer.encode_chat(messages_of([("user", "\ud800"), ("assistant", "b")]))


@pytest.mark.parametrize("kind", ["document", "chat"])
def test_data_is_tokenized_with_it(made, tmp_path, kind):
    tokenizer, _ = made
    record = (
        {"text": "the quick"} if kind == "document" else {"prompt": "the quick", "response": "fox"}
    )
    lines = [json.dumps({**record, next(iter(record)): f"the quick {i}"}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = DataConfig((Source(str(tmp_path / "a.jsonl")),), held_out_fraction=0.3)
    rows = load_rows(data, kind, "train", tokenizer, 64, tmp_path / "cache")
    assert len(rows)


def test_a_ranked_response_ends_with_its_turn_as_a_rollout_does(made, tmp_path):
    tokenizer, _ = made
    record = {"prompt": "the quick", "responses": ["fox", "dog is"], "ranks": [1, 2]}
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({**record, "prompt": f"the {i}"}) for i in range(20))
    )
    for example in load_ranked(
        DataConfig((Source(str(tmp_path / "a.jsonl")),)), "train", tokenizer, 512
    ):
        assert all(row[-1] == tokenizer.end_id for row in example.rows)
        assert all(
            tokenizer.decode(row[example.prompt_length :]).strip() in ("fox", "dog is")
            for row in example.rows
        )
