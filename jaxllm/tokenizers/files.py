"""What a published model's files say about its tokenizer besides the vocabulary: special tokens, where a text ends, how
a conversation is written. They are read as `transformers` 5.24 reads them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import InputError

# What is kept of config.json beside a tokenizer, so that a stage's directory knows it as well.
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
_LISTS = ("additional_special_tokens", "extra_special_tokens")

Files = Mapping[str, bytes]


def read_files(folder: Path, vocabularies: Sequence[str]) -> dict[str, bytes]:
    """{name: content} of the files in a folder that a tokenizer is made of; of config.json only what ends a text."""
    names = (*vocabularies, *SIDE_FILES)
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if IDS not in files and (folder / "config.json").is_file():
        config = json_object(
            {"config.json": (folder / "config.json").read_bytes()}, "config.json", str(folder)
        )
        if config.get("eos_token_id") is not None:
            files[IDS] = json.dumps({"eos_token_id": config["eos_token_id"]}).encode()
    return files


def json_object(files: Files, name: str, origin: str) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file; a byte order mark is skipped."""
    try:
        if isinstance(value := json.loads(files.get(name, b"{}").decode("utf-8-sig")), dict):
            return value
        error = "must be a JSON object"
    except RecursionError:
        error = "nested too deeply"
    except ValueError as found:
        error = found
    raise InputError(f"{origin}/{name}: damaged ({error}); copy the file again")


def named_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    """{"bos_token": its spelling, ...} of tokenizer_config.json and special_tokens_map.json.

    The second goes first where the first lists no added tokens: so files were written before the lists were.
    """
    new = "added_tokens_decoder" in config
    first, second = (special_map, config) if new else (config, special_map)
    return _spellings(first) | _spellings(second)


def special_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> list[str]:
    """The spellings of every token that one of the two files calls special."""
    found = [*_spellings(config).values(), *_spellings(special_map).values()]
    for source in (config, special_map):
        for name in _LISTS:
            given = source.get(name) or []
            found += map(spelling, given.values() if isinstance(given, Mapping) else given)
    return [*dict.fromkeys(filter(None, found))]


def end_spellings(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> list[str]:
    """The end-of-text tokens that the two files name, the one that documents end in first."""
    named = (named_tokens(config, special_map), _spellings(config), _spellings(special_map))
    return [*dict.fromkeys(tokens["eos_token"] for tokens in named if "eos_token" in tokens)]


def end_ids(files: Files, origin: str) -> list[int]:
    """Every id that ends a text in generation_config.json and config.json; negative ones are of no token."""
    ids: list[int] = []
    for name in ("generation_config.json", IDS):
        given = json_object(files, name, origin).get("eos_token_id")
        listed = given if isinstance(given, list) else [] if given is None else [given]
        if any(type(token) is not int for token in listed):
            place = "config.json" if name == IDS else name
            wanted = "must be a token's id or a list of ids"
            raise InputError(f"{origin}/{place}: eos_token_id {wanted}, not {given!r:.60}; mend it")
        ids += listed
    return [token for token in dict.fromkeys(ids) if 0 <= token < 2**31]


def template_source(files: Files, config: Mapping[str, Any], origin: str) -> str:
    """The source of the chat template: chat_template.jinja's, else the config's, of several the one called "default".

    Raises InputError where there is none that could be rendered.
    """
    place, given = f"{origin}/tokenizer_config.json", config.get("chat_template")
    if "chat_template.jinja" in files:
        place = f"{origin}/chat_template.jinja"
        given = _text(files["chat_template.jinja"], place)
    elif given is None and "chat_template.json" in files:
        place = f"{origin}/chat_template.json"
        given = json_object(files, "chat_template.json", origin).get("chat_template")
    if given is None:
        mend = "give a chat_template.jinja beside the downloaded files and import the model again"
        raise InputError(f"{origin}: no chat template; {mend}")
    source = _default(given)
    if not isinstance(source, str) or not source.strip():
        mend = "give one as chat_template.jinja"
        raise InputError(f"{place}: {_no_template(given, source)}; {mend}")
    return source


def _default(given: Any) -> Any:
    """The template called "default" of several: a list of {"name", "template"}, or an object by name."""
    if isinstance(given, list):
        entries = [entry for entry in given if isinstance(entry, Mapping)]
        return next(
            (entry.get("template") for entry in entries if entry.get("name") == "default"), None
        )
    return given.get("default") if isinstance(given, Mapping) else given


def _no_template(given: Any, source: Any) -> str:
    if isinstance(source, str):
        return "the chat template is empty"
    if source is None and isinstance(given, list | Mapping):
        return 'of several chat templates none is called "default"'
    return f"the chat template must be a text, not {source!r:.40}"


def _text(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: the chat template is not UTF-8 ({error}); copy the file again"
        ) from None


def _spellings(source: Mapping[str, Any]) -> dict[str, str]:
    found = {
        name: spelling(source.get(name))
        for name in dict.fromkeys([*_ROLES, *source])
        if name.endswith("_token")
    }
    return {name: text for name, text in found.items() if text}


def spelling(token: Any) -> str:
    """The text of a token, which is given as a text or as an object with "content"."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else ""
