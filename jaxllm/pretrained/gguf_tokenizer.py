"""The tokenizer's files of a GGUF file's metadata: as the format that the tokenizer was published in."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sentencepiece import sentencepiece_model_pb2

from jaxllm.pretrained.checked_values import CheckedValues
from jaxllm.tokenizers.json_backend import added_token
from jaxllm.tokenizers.tiktoken_backend import split_pattern

# A file has one of two kinds of tokenizers:
#   tokenizer.ggml.model    in the metadata       becomes
#   "gpt2"                  tokens, merges        tokenizer.json, a byte-level BPE
#   "llama"                 pieces with scores    tokenizer.model, a SentencePiece model

# tokenizer.ggml.token_type, as in SentencePiece
_NORMAL = 1
_CONTROL = 3
_USER_DEFINED = 4
_BYTE = 6
# Ends of a text, of a turn and of a message: llama.cpp stops at each.
_ENDS = ("eos", "eot", "eom")


class _Splitting(NamedTuple):
    """How a byte-level tokenizer prepares a text for its merges."""

    pattern: str = ""
    """Regular expression of its words; empty: GPT-2's own, "digits": that, and digits apart."""
    normalizer: dict[str, str] | None = None
    ignore_merges: bool = False
    """A word that is a token is not built from merges."""


_LLAMA3 = _Splitting(split_pattern(3), None, True)
_QWEN2 = _Splitting(split_pattern(1), {"type": "NFC"}, False)
# tokenizer.ggml.pre -> how text is split
SPLITTINGS = {
    "": _Splitting(),
    "default": _Splitting(),
    "gpt-2": _Splitting(),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _Splitting("digits"),
}


def read_tokenizer(metadata: CheckedValues) -> dict[str, bytes]:
    """{name: content} of the tokenizer's files, empty if the metadata has none.

    Raises:
        ValueError: an unknown kind, or a key of a wrong type or length.
    """
    tokens = metadata.items("tokenizer.ggml.tokens", str)
    kind = metadata.text("tokenizer.ggml.model")
    pre = metadata.text("tokenizer.ggml.pre") or ""
    if not tokens:
        return {}
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"a tokenizer of kind {kind!r} is not known; known: gpt2, llama")
    types = _per_token(metadata, "token_type", int, tokens) or [_NORMAL] * len(tokens)
    ids = _special_ids(metadata, kind, len(tokens))
    adds_bos = metadata.flag("tokenizer.ggml.add_bos_token", _adds_bos(kind, pre)) and "bos" in ids
    if kind == "gpt2":
        merges = metadata.items("tokenizer.ggml.merges", str)
        spec = byte_level(tokens, types, merges, pre)
        if adds_bos:
            spec["post_processor"] = _bos_post_processor(tokens[ids["bos"]], ids["bos"])
        files = {"tokenizer.json": json.dumps(spec).encode()}
    else:
        scores = _per_token(metadata, "scores", float, tokens) or [0.0] * len(tokens)
        adds_space = metadata.flag("tokenizer.ggml.add_space_prefix", True)
        files = {"tokenizer.model": _sentencepiece(tokens, types, scores, ids, adds_space)}
    # The order of keys counts: a tokenizer's fingerprint is a hash of its files.
    config: dict[str, Any] = {}
    for role in ("bos", "eos", "pad"):
        if role in ids:
            config[f"{role}_token"] = tokens[ids[role]]
    config["add_bos_token"] = adds_bos
    template = metadata.values.get("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False).encode()
    ends = [ids[role] for role in _ENDS if role in ids]
    if ends:
        files["generation_config.json"] = json.dumps({"eos_token_id": ends}).encode()
    return files


def _adds_bos(kind: str, pre: str) -> bool:
    """Whether llama.cpp puts BOS before a text if the file does not say it (add_bos_token)."""
    # For every SentencePiece vocabulary, and for no byte-level one but Llama 3's.
    return kind == "llama" or pre in ("llama-bpe", "llama3", "llama-v3")


def _special_ids(metadata: CheckedValues, kind: str, num_tokens: int) -> dict[str, int]:
    """{role: id} of the special tokens; llama.cpp has defaults for SentencePiece vocabularies."""
    defaults = {"bos": 1, "eos": 2, "unk": 0} if kind == "llama" else {}
    keys = {"pad": "padding_token_id", "unk": "unknown_token_id"}
    ids: dict[str, int] = {}
    for role in ("bos", *_ENDS, "pad", "unk"):
        key = f"tokenizer.ggml.{keys.get(role, f'{role}_token_id')}"
        token = metadata.integer(key, defaults.get(role))
        if token is None:
            continue
        # A file that was cut or edited; the id would be used as an index later.
        if token >= num_tokens:
            raise ValueError(
                f"{key} is {token}, and there are {num_tokens} tokens; fetch the file again"
            )
        ids[role] = token
    return ids


def _per_token(metadata: CheckedValues, name: str, kind: type, tokens: Sequence[str]) -> list[Any]:
    """A list with a value for each token, empty if the file has none."""
    values = metadata.items(f"tokenizer.ggml.{name}", kind)
    if values and len(values) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.{name} has {len(values)} values for {len(tokens)} tokens; fetch the "
            "file again"
        )
    return values


def _bos_post_processor(text: str, token: int) -> dict[str, Any]:
    """A post-processor of tokenizer.json that puts a token before every text."""
    bos = {"SpecialToken": {"id": text, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }


def byte_level(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str
) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE. Raises ValueError if `pre` is not known."""
    if pre not in SPLITTINGS:
        known = ", ".join(filter(None, SPLITTINGS))
        raise ValueError(f"the tokenizer splits text by {pre!r}; known: {known}")
    splitting = SPLITTINGS[pre]
    added = []
    for token, kind in enumerate(types):
        if kind in (_CONTROL, _USER_DEFINED):
            added.append(added_token(token, tokens[token], special=kind == _CONTROL))
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": splitting.normalizer,
        "pre_tokenizer": _pre_tokenizer(splitting.pattern),
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": splitting.ignore_merges,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _pre_tokenizer(pattern: str) -> dict[str, Any]:
    # The library splits by GPT-2's words itself if ByteLevel has use_regex:
    #   ""         ByteLevel, use_regex
    #   "digits"   Digits, then ByteLevel, use_regex
    #   a regex    Split by it, then ByteLevel without
    gpt2_words = pattern in ("", "digits")
    to_bytes: dict[str, Any] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": gpt2_words,
    }
    if not pattern:
        return to_bytes
    split: dict[str, Any] = {"type": "Digits", "individual_digits": True}
    if not gpt2_words:
        split = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
    return {"type": "Sequence", "pretokenizers": [split, to_bytes]}


def _sentencepiece(
    tokens: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
    ids: Mapping[str, int],
    adds_space: bool,
) -> bytes:
    """A SentencePiece model of these pieces; adds_space: it puts a space before a text."""
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    for token, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    spec = model.trainer_spec
    spec.model_type = spec.BPE
    spec.vocab_size = len(tokens)
    # With a piece for every byte, characters outside the vocabulary are spelled in bytes.
    spec.byte_fallback = types.count(_BYTE) == 256
    for role in ("unk", "bos", "eos"):
        if role in ids:
            setattr(spec, f"{role}_id", ids[role])
            setattr(spec, f"{role}_piece", tokens[ids[role]])
    spec.pad_id = -1  # none
    normalizer = model.normalizer_spec
    # The defaults would change the text: they join repeated spaces.
    normalizer.name = "identity"
    normalizer.remove_extra_whitespaces = False
    normalizer.add_dummy_prefix = adds_space
    return model.SerializeToString()
