"""Tokenizers of published models, small ones in their formats: ids, control tokens out of reach, chats and masks.

Against the real files and the programs that define them: tests/oracles/published_tokenizers.py.
"""

import itertools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import InputError
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.loader import load_ranked, load_rows
from jaxllm.data.splits import examples
from jaxllm.tokenizers import trained as ours
from jaxllm.tokenizers.published import load_tokenizer, restore
from tests.tokenizers.chat_templates import CHATML, GEMMA, LLAMA3, plain
from tests.tokenizers.small_tokenizers import (
    TEMPLATES,
    messages_of,
    tokenizer_of_ours,
    whole,
    write,
)
from tests.tokenizers.test_trained import NASTY


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


@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_chat_ids_are_those_of_the_rendered_text_and_masks_agree(made, style, tmp_path, chat):
    """The mask of the generation blocks is that derived without them, and both are the assistant's words."""
    tokenizer, reference = made
    write(tmp_path, style, plain(TEMPLATES[style]))
    derived, messages = load_tokenizer(tmp_path), messages_of(chat)
    ids, mask = tokenizer.encode_chat(messages)
    reference.encode_special_tokens = False
    text = whole(tokenizer, ids).removeprefix(" " if style == "llama2" else "")
    assert ids == reference.encode(text, add_special_tokens=False).ids
    assert (ids, mask) == derived.encode_chat(messages)
    contents = [m["content"] for m in messages if m["role"] == "assistant"]
    for run, content in zip(masked_runs(ids, mask), contents, strict=True):
        assert run[-1] == tokenizer.end_id
        # A template may drop thoughts of the past.
        without_thoughts = content.split("</think>")[-1]
        assert tokenizer.decode(run).strip() in (content.strip(), without_thoughts.strip())
    # What the model is shown before its last message is the beginning of the conversation.
    answered = messages[-1]["role"] == "assistant"
    shown = messages[:-1] if answered else messages
    prompt, prompt_mask = derived.encode_chat(shown, reply=True)
    assert ids[: len(prompt)] == prompt or (not answered and prompt[: len(ids)] == ids)
    assert prompt_mask == mask[: len(prompt)] + [False] * (len(prompt) - len(mask))


def masked_runs(ids, mask):
    """The ids of every run of the mask."""
    runs = []
    for inside, run in itertools.groupby(zip(ids, mask, strict=True), lambda pair: pair[1]):
        if inside:
            runs.append([token for token, _ in run])
    return runs


def test_control_tokens_in_messages_are_text(made, style):
    tokenizer, _ = made
    tokens = list(tokenizer.controls)
    evil = messages_of(
        [("user", f"a{''.join(tokens)}b {tokens[-1][:-1]}"), ("assistant", f"c {tokens[-1]}")]
    )
    good = messages_of([("user", "aXb"), ("assistant", "cX")])
    known = set(tokenizer.controls.values()) - {tokenizer.controls.get("<unk>")}
    controls = lambda ids: [token for token in ids if token in known]
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
    with pytest.raises(
        InputError,
        match=r"chats\.jsonl:1: messages.2: has no content; a message needs a role .* and content",
    ):
        list(examples(data, "chat", "train"))


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


def test_stream_equals_decode(made):
    tokenizer, _ = made
    ids = [i for text in NASTY for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    for sequence in (ids, ids[::-1], [tokenizer.eos_id, *tokenizer.encode(" a")]):
        decoder = ours.StreamDecoder(tokenizer)
        assert "".join(map(decoder.add, sequence)) + decoder.flush() == tokenizer.decode(sequence)


def test_files_are_carried_byte_by_byte(made, style, tmp_path):
    tokenizer, _ = made
    tokenizer.save(tmp_path / "copy", {"from": "test"})
    copied = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    del copied["jaxllm.json"]
    assert copied == dict(tokenizer.model)
    assert load_tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint
    assert restore(tokenizer.model).fingerprint == tokenizer.fingerprint
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match="not the files that were saved"):
        load_tokenizer(tmp_path / "copy")


def test_the_right_kind_is_chosen_or_one_line_says_why_not(tmp_path):
    tokenizer_of_ours().save(tmp_path / "ours")
    assert type(load_tokenizer(tmp_path / "ours")) is ours.Tokenizer
    with pytest.raises(InputError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    for number, (content, error) in enumerate(
        (
            (b'{"model":', "tokenizer.json: not valid JSON"),
            (b"[]", "must hold a JSON object, not a list"),
            (b'{"model": {}, "decoder": {"type": "ByteLevel"}}', "not a tokenizer"),
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
