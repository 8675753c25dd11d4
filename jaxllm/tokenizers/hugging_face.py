"""A tokenizer that was trained here, as the files that Hugging Face's libraries read.

    tokenizer.json           vocabulary, merges and special tokens
    tokenizer_config.json    the names of special tokens, and the chat template

The same ids for every text but one kind: U+2581 in a text is a space there, as in every SentencePiece model of theirs.
"""

import json
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from jaxllm.tokenizers.trained import (
    ASSISTANT,
    BOS,
    END,
    EOS,
    PAD,
    SPACE,
    SYSTEM,
    UNK,
    USER,
    Tokenizer,
)

# Its classes are made when it is imported: no checker knows them.
model_pb2: Any = sentencepiece_model_pb2

_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '"
    + END
    + "' }}{% endfor %}{% if add_generation_prompt %}{{ '"
    + ASSISTANT
    + "' }}{% endif %}"
)


def files_of(tokenizer: Tokenizer) -> dict[str, str]:
    """{name: content} of the files."""
    spec = {"version": "1.0", "truncation": None, "padding": None, **_spec(tokenizer)}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT, END],
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": _TEMPLATE,
    }
    return {
        "tokenizer.json": json.dumps(spec, ensure_ascii=False, indent=1) + "\n",
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1) + "\n",
    }


def _spec(tokenizer: Tokenizer) -> dict[str, Any]:
    proto = model_pb2.ModelProto.FromString(tokenizer.model)
    is_bpe = proto.trainer_spec.model_type == model_pb2.TrainerSpec.BPE
    return {
        "added_tokens": [_added(name, token) for name, token in _specials(tokenizer).items()],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": _beginning(tokenizer),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": _bpe(proto) if is_bpe else _unigram(proto),
    }


def _specials(tokenizer: Tokenizer) -> dict[str, int]:
    return {**tokenizer.controls, UNK: 3}


def _added(name: str, token: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": name, **flags, "special": True}


def _beginning(tokenizer: Tokenizer) -> dict[str, Any]:
    """Every text begins with BOS."""
    first = {"SpecialToken": {"id": BOS, "type_id": 0}}
    sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, sequences[0]],
        "pair": [first, *sequences],
        "special_tokens": {BOS: {"id": BOS, "ids": [tokenizer.bos_id], "tokens": [BOS]}},
    }


def _bpe(proto: Any) -> dict[str, Any]:
    vocab = {piece.piece: token for token, piece in enumerate(proto.pieces)}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": UNK,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": _merges(proto),
    }


def _merges(proto: Any) -> list[list[str]]:
    """The pairs that SentencePiece joins, first those whose piece has the highest score."""
    normal = _normal_pieces(proto)
    merges = []
    for piece in sorted(normal, key=lambda piece: -normal[piece]):
        for cut in range(1, len(piece)):
            if piece[:cut] in normal and piece[cut:] in normal:
                merges.append([piece[:cut], piece[cut:]])
    return merges


def _normal_pieces(proto: Any) -> dict[str, float]:
    """{piece: score} of the pieces that text is made of."""
    kind = model_pb2.ModelProto.SentencePiece.NORMAL
    return {piece.piece: piece.score for piece in proto.pieces if piece.type == kind}


def _unigram(proto: Any) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": 3,
        "vocab": [[piece.piece, piece.score] for piece in proto.pieces],
        "byte_fallback": True,
    }
