"""What a published model's files say about its tokenizer in addition to the vocabulary.

These are its special tokens, what ends a text, and how a conversation is written. They are read as
`transformers` 5.24 reads them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import InputError
from jaxllm.runtime.files import parse_json, read_json

# A stage's directory has no config.json of the model: this file keeps what it says about tokens.
IDS = "token_ids.json"
SIDE_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    IDS,
)
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Lists of further special tokens; `transformers` 5 renamed the field.
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FIX = "copy the file again"

Files = Mapping[str, bytes]


def read_files(folder: Path, vocabularies: Sequence[str]) -> dict[str, bytes]:
    """{name: content} of the files of a tokenizer in a folder; of config.json only what ends a text."""
    files: dict[str, bytes] = {}
    for name in (*vocabularies, *SIDE_FILES):
        if (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    if IDS not in files:
        config = read_json(folder / "config.json", _FIX) or {}
        if config.get("eos_token_id") is not None:
            files[IDS] = json.dumps({"eos_token_id": config["eos_token_id"]}).encode()
    return files


def json_object(files: Files, name: str, origin: str) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file. Raises InputError if it holds anything else."""
    return parse_json(files.get(name, b"{}"), f"{origin}/{name}", _FIX)


def named_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    """{"bos_token": its spelling, ...} of tokenizer_config.json and special_tokens_map.json.

    The first takes precedence if it lists added tokens. Older files do not, and then the second does.
    """
    # A wrong choice ends every document in another token:
    #   tokenizer_config.json      {"eos_token": "</s>", "added_tokens_decoder": {...}}    </s>
    #   special_tokens_map.json    {"eos_token": "<x>"}                                    <x> without the list
    if "added_tokens_decoder" in config:
        return _spellings(special_map) | _spellings(config)
    return _spellings(config) | _spellings(special_map)


def special_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> list[str]:
    """The spellings of every token that one of the two files calls special."""
    texts = [*_spellings(config).values(), *_spellings(special_map).values()]
    for source in (config, special_map):
        for name in _LISTS:
            tokens = source.get(name) or []
            if isinstance(tokens, Mapping):
                tokens = tokens.values()
            texts += map(spelling, tokens)
    return list(dict.fromkeys(filter(None, texts)))


def end_spellings(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> list[str]:
    """The end-of-text tokens that the two files name, the one that documents end in first."""
    ends: dict[str, None] = {}
    for tokens in (named_tokens(config, special_map), _spellings(config), _spellings(special_map)):
        if "eos_token" in tokens:
            ends[tokens["eos_token"]] = None
    return list(ends)


def end_ids(files: Files, origin: str) -> list[int]:
    """Every id that ends a text in generation_config.json and config.json."""
    ids: list[int] = []
    for name in ("generation_config.json", IDS):
        given = json_object(files, name, origin).get("eos_token_id")
        if given is None:
            continue
        # Llama 3 has several: of a text and of a turn.
        listed = given if isinstance(given, list) else [given]
        # isinstance would accept true and false.
        if any(type(token) is not int for token in listed):
            published_name = "config.json" if name == IDS else name
            raise InputError(
                f"{origin}/{published_name}: eos_token_id must be a token's id or a list of ids, not "
                f"{given!r:.60}; fix it"
            )
        ids += listed
    # Some files write -1 for none.
    return [token for token in dict.fromkeys(ids) if 0 <= token < 2**31]


def template_source(files: Files, config: Mapping[str, Any], origin: str) -> str:
    """The source of the chat template.

    It is chat_template.jinja, or if that is missing the config's, or if it has none chat_template.json's;
    of several templates the one called "default".

    Raises:
        InputError: no template, or not a text.
    """
    where = f"{origin}/tokenizer_config.json"
    given = config.get("chat_template")
    if "chat_template.jinja" in files:
        where = f"{origin}/chat_template.jinja"
        given = _text(files["chat_template.jinja"], where)
    elif given is None and "chat_template.json" in files:
        where = f"{origin}/chat_template.json"
        given = json_object(files, "chat_template.json", origin).get("chat_template")
    if given is None:
        raise InputError(
            f"{origin}: no chat template; give a chat_template.jinja in the folder of the downloaded "
            "files and import the model again"
        )
    source = _default(given)
    if not isinstance(source, str) or not source.strip():
        reason = _why_no_template(given, source)
        raise InputError(f"{where}: {reason}; give one as chat_template.jinja")
    return source


def _default(given: Any) -> Any:
    """The template called "default" of a list of {"name", "template"}, or of an object by name."""
    if isinstance(given, list):
        for entry in given:
            if isinstance(entry, Mapping) and entry.get("name") == "default":
                return entry.get("template")
        return None
    return given.get("default") if isinstance(given, Mapping) else given


def _why_no_template(given: Any, source: Any) -> str:
    if isinstance(source, str):
        return "the chat template is empty"
    if source is None and isinstance(given, list | Mapping):
        return 'of several chat templates none is called "default"'
    return f"the chat template must be a text, not {source!r:.40}"


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: the chat template is not UTF-8 ({error}); {_FIX}") from None


def _spellings(source: Mapping[str, Any]) -> dict[str, str]:
    """{"bos_token": its spelling, ...} of one file, the well-known roles first."""
    spellings: dict[str, str] = {}
    for name in dict.fromkeys([*_ROLES, *source]):
        text = spelling(source.get(name))
        if name.endswith("_token") and text:
            spellings[name] = text
    return spellings


def spelling(token: Any) -> str:
    """The text of a token, which is given as a text or as an object with "content"."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else ""
