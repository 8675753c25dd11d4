"""What a tokenizer's other files say: what begins and ends a text (as `transformers` reads it), and chat templates."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.chat import answer_once, load
from jaxllm.config import InputError
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.loader import load_prompts, load_rows
from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.responses import complete, stream, stream_engine
from jaxllm.pretrained.convert import export_model, import_model
from jaxllm.tokenizers.published import load_tokenizer
from tests.oracles import text_beginnings as oracle
from tests.pretrained.test_convert import hf_folder
from tests.test_wrong_input import refused

RECORD = json.loads((oracle.HERE / "text_beginnings.json").read_text())
CHAT = [{"role": "user", "content": "ab"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{case: its tokenizer}."""
    root, found = tmp_path_factory.mktemp("cases"), {}
    for number, case in enumerate(oracle.CASES):
        oracle.write(root / str(number), *case)
        found[", ".join(case)] = load_tokenizer(root / str(number))
    return found


@pytest.mark.parametrize("case", RECORD)
def test_a_text_begins_as_in_the_reference(made, case):
    """The reference ends some texts as well; a prompt goes on, and a document ends in EOS always."""
    text, empty, chat = RECORD[case]
    tokenizer = made[case]
    without_end = lambda ids: ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids
    assert tokenizer.prompt("ab") == without_end(text)
    assert tokenizer.encode_document("ab") == [*without_end(text), tokenizer.eos_id]
    assert tokenizer.prompt("") == (without_end(empty) or [tokenizer.bos_id])
    assert tokenizer.encode_chat(CHAT)[0] == chat


def test_what_stands_before_a_scored_text_is_the_named_bos_else_eos(made, tmp_path):
    for tokenizer in made.values():
        assert tokenizer.start_id == tokenizer.bos_id == 0
    oracle.write(tmp_path, "byte level", "another", "absent")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.start_id, tokenizer.begin_ids) == (None, 1, (2,))


def folder_of(path, **files):
    """A byte-level tokenizer with these further JSON files, or texts."""
    oracle.write(path, "byte level", "none", "absent")
    for name, content in files.items():
        name = "chat_template.jinja" if name == "jinja" else f"{name}.json"
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (path / name).write_bytes(raw)
    return path


NAMING = {  # file: (what it holds, the ids that it names)
    "tokenizer_config": ({"eos_token": "</s>"}, {1}),
    "special_tokens_map": ({"eos_token": {"content": "<s>"}}, {0}),
    "generation_config": ({"eos_token_id": 70}, {70}),
    "config": ({"eos_token_id": [2, 71]}, {2, 71}),
}


@pytest.mark.parametrize(
    "names", [names for n in (1, 2, 4) for names in itertools.combinations(NAMING, n)]
)
def test_every_file_that_names_an_end_is_heard(tmp_path, names):
    files = {"tokenizer_config": {}} | {name: NAMING[name][0] for name in names}
    found = load_tokenizer(folder_of(tmp_path, **files)).stop_ids
    assert set(found) == set().union(*(NAMING[name][1] for name in names))


@pytest.mark.parametrize("files, eos", [
    ({"tokenizer_config": {}, "special_tokens_map": {"eos_token": "</s>"}}, 1),
    ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": {"content": "<x>"}}}, 2),
    ({"tokenizer_config": {}, "config": {"eos_token_id": 2}}, 2),
    ({"tokenizer_config": {}, "generation_config": {"eos_token_id": None}, "config": {"eos_token_id": [1]}}, 1),
    ({"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": [-1, 2**40]}}, 1),
    ({"tokenizer_config": {"eos_token": "a"}}, 68),  # in the vocabulary, and no added token
    ({"tokenizer_config": {"eos_token": "</s>"}, "special_tokens_map": {"eos_token": "<x>"}}, 2),  # the older way
    ({"tokenizer_config": {"eos_token": "</s>", "added_tokens_decoder": {}}, "special_tokens_map": {"eos_token": "<x>"}}, 1),
])  # fmt: skip
def test_one_of_them_ends_documents(tmp_path, files, eos):
    assert load_tokenizer(folder_of(tmp_path, **files)).encode_document("")[-1:] == [eos]


def test_roles_and_special_tokens_of_the_map_are_known(tmp_path):
    given = {
        "bos_token": "<s>",
        "pad_token": "<x>",
        "additional_special_tokens": ["a", {"content": "!"}],
    }
    folder = folder_of(tmp_path, tokenizer_config={"eos_token": "</s>"}, special_tokens_map=given)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id) == (0, 2, 1)
    assert {"a", "!"} <= tokenizer.controls.keys()


@pytest.mark.parametrize("place", ["generation_config", "config"])
@pytest.mark.parametrize("wrong", ["2", ["2"], [[2]], 2.0, True, {}, [None]])
def test_ids_that_are_none_are_one_line(tmp_path, place, wrong):
    folder = folder_of(tmp_path, **{place: {"eos_token_id": wrong}})
    with pytest.raises(
        InputError, match=rf"/{place}\.json: eos_token_id must be a token's id or a list of ids"
    ):
        load_tokenizer(folder)


def test_ids_of_the_models_config_go_with_the_stage(tmp_path):
    folder, _ = hf_folder(tmp_path / "in", "llama3", eos_token_id=[2, 0])
    import_model(str(folder), str(tmp_path / "stage"))
    assert load_tokenizer(tmp_path / "stage" / "tokenizer").stop_ids == (2, 0)
    export_model(str(tmp_path / "stage"), str(tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json"} <= names and "token_ids.json" not in names
    assert load_tokenizer(tmp_path / "out").stop_ids == (2, 0)


def test_a_tokenizer_saved_without_these_files_still_loads(tmp_path):
    """As stages before them were imported: the recorded hash is over the files that there are."""
    tokenizer = load_tokenizer(folder_of(tmp_path / "in"))
    tokenizer.save(tmp_path / "stage")
    assert load_tokenizer(tmp_path / "stage").fingerprint == tokenizer.fingerprint
    assert not (tmp_path / "stage" / "token_ids.json").exists()


GOOD = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
OTHER = {"name": "other", "template": "x"}
NAMED = {"eos_token": "</s>"}


@pytest.mark.parametrize("files", [
    {"tokenizer_config": {**NAMED, "chat_template": GOOD}},
    {"tokenizer_config": {**NAMED, "chat_template": [OTHER, {"name": "default", "template": GOOD}]}},
    {"tokenizer_config": {**NAMED, "chat_template": {"default": GOOD, "other": "x"}}},
    {"tokenizer_config": {**NAMED, "chat_template": 3}, "jinja": GOOD.encode()},
    {"tokenizer_config": NAMED, "jinja": b"\xef\xbb\xbf" + GOOD.encode()},
    {"tokenizer_config": NAMED, "chat_template": {"chat_template": GOOD}},
])  # fmt: skip
def test_the_template_is_found_where_it_is(tmp_path, files):
    tokenizer = load_tokenizer(folder_of(tmp_path, **files))
    assert (
        tokenizer.encode_chat(CHAT)[0] == [*tokenizer.encode("ab"), 1]
        and not tokenizer.chat_refusal
    )


BROKEN = {
    "no chat template": {"tokenizer_config": NAMED},
    "not valid Jinja": {"tokenizer_config": {**NAMED, "chat_template": "{% for %}"}},
    'none is called "default"': {"tokenizer_config": {**NAMED, "chat_template": [OTHER, 3]}},
    "must be a text, not 3": {"tokenizer_config": {**NAMED, "chat_template": 3}},
    "must be a text, not {}": {
        "tokenizer_config": {**NAMED, "chat_template": [{"name": "default", "template": {}}]}
    },
    "is empty": {"tokenizer_config": {**NAMED, "chat_template": ""}},
    "chat_template.jinja: the chat template is empty": {
        "tokenizer_config": {**NAMED, "chat_template": GOOD},
        "jinja": b"",
    },
    "is not UTF-8": {"tokenizer_config": NAMED, "jinja": b"\xff{{"},
    "must hold a JSON object": {"tokenizer_config": NAMED, "chat_template": b"[]"},
}


@pytest.mark.parametrize("reason", BROKEN)
def test_without_a_template_only_chats_are_refused(tmp_path, reason):
    tokenizer = load_tokenizer(folder_of(tmp_path, **BROKEN[reason]))
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
    with pytest.raises(InputError) as refused:
        tokenizer.encode_chat(CHAT, reply=True)
    assert reason in str(refused.value) and str(refused.value) == tokenizer.chat_refusal
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


@settings(max_examples=100, deadline=None)
@given(source=st.text() | st.text("{}%#- abforendifmessages=.|()[]'", max_size=30))
def test_any_text_as_template_is_a_chat_or_one_line(tmp_path_factory, source):
    folder = folder_of(
        tmp_path_factory.mktemp("t"), tokenizer_config={**NAMED, "chat_template": source}
    )
    tokenizer = load_tokenizer(folder)
    try:
        assert tokenizer.encode_chat(CHAT)[0]
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("command", [["chat"], ["generate", "--prompt", "a", "--chat"]])
def test_commands_that_chat_refuse_with_the_reason(tmp_path, capsys, command):
    folder, _ = hf_folder(tmp_path / "in", "llama3")
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "<eos>", "chat_template": [{"name": "x"}]}'
    )
    import_model(str(folder), str(tmp_path / "stage"))
    capsys.readouterr()
    line = refused(capsys, command[0], tmp_path / "stage", *command[1:])
    assert 'tokenizer_config.json: of several chat templates none is called "default"' in line


def test_training_on_chats_refuses_with_the_reason_and_the_place(tmp_path):
    folder = folder_of(tmp_path / "in", tokenizer_config=NAMED)
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a", "response": "b", "split": "train"}\n')
    data = DataConfig((Source(str(tmp_path / "chats.jsonl")),))
    for ask in (
        lambda tokenizer: load_rows(data, "chat", "train", tokenizer, 16, tmp_path / "cache"),
        lambda tokenizer: load_prompts(data, "train", tokenizer, 16),
    ):
        with pytest.raises(
            InputError, match=r"chats\.jsonl:1: .*no chat template; give a chat_template\.jinja"
        ):
            ask(load_tokenizer(folder))


def test_the_import_says_that_chat_will_not_work_and_why(tmp_path, capsys):
    folder, _ = hf_folder(tmp_path / "in", "llama3")
    (folder / "chat_template.jinja").write_text("{% for %}")
    import_model(str(folder), str(tmp_path / "stage"))
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: no chats" in said and "not valid Jinja" in said and "jaxllm generate" in said
    with pytest.raises(InputError, match="not valid Jinja"):
        load_tokenizer(tmp_path / "stage" / "tokenizer").encode_chat(CHAT)


@pytest.mark.parametrize("bos", [True, False])
def test_generation_from_nothing_starts_from_what_begins_a_text(tmp_path, bos):
    folder, _ = hf_folder(tmp_path / "in", "llama3")
    if not bos:
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    import_model(str(folder), str(tmp_path / "stage"))
    sampling = SamplingConfig(max_new_tokens=4, temperature=0.0)
    params, model, tokenizer, mesh = load(str(tmp_path / "stage"))
    assert tokenizer.begin_ids == () and tokenizer.prompt("") == [1 if bos else 2]
    more = {
        "sampling": sampling,
        "stop_ids": tokenizer.stop_ids,
        "seed": 0,
    }
    ((wanted,),) = complete(params, model, [[tokenizer.start_id]], mesh=mesh, **more)
    assert [*answer_once(str(tmp_path / "stage"), "", False, sampling, 1, 0)] == [
        tokenizer.decode(wanted.ids)
    ]
    with pytest.raises(InputError, match="prompt: has no tokens"):
        next(complete(params, model, [[1], []], mesh=mesh, **more))
    with pytest.raises(InputError, match="prompt: has no tokens"):
        next(stream(stream_engine(params, model, mesh), [], **more))
