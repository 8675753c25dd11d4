"""tokenizer.json, through the library that defines it (`tokenizers`)."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from jaxllm.config import InputError
from jaxllm.tokenizers.marks import is_mark, mark

# Byte-level BPE spells every byte as a visible character: itself if it is one, if not the next from
# U+0100 on. The bytes of " é":
#     byte        0x20    0xC3    0xA9
#     spelled     Ġ       Ã       ©
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_INVISIBLE = sorted({*range(256)} - {*_VISIBLE})
_BYTE_OF = dict(zip(map(chr, _VISIBLE), _VISIBLE, strict=True)) | {
    chr(256 + number): byte for number, byte in enumerate(_INVISIBLE)
}
_KNOWN_DECODERS = {"ByteLevel", "ByteFallback", "Metaspace"}


class JsonBackend:
    """A byte-level or SentencePiece-like BPE in a tokenizer.json.

    The library knows control tokens as their marks only: no text spells one, and a conversation is
    encoded as one text.
    """

    controls: dict[str, int]
    """{spelling: id} of the control tokens."""
    token_bytes: list[bytes]
    """The UTF-8 bytes of every token id; empty for control tokens."""
    dummy_prefix: bool
    """Whether decoding removes a space from the beginning of a text."""
    begin_ids: tuple[int, ...]
    """What the post-processor puts before a text."""

    def __init__(self, spec: dict[str, Any], special: Collection[str], scaffold: str, origin: str):
        """Make control tokens of three kinds of tokens, and load the library.

        Args:
            spec: the content of tokenizer.json; it is changed.
            special: the tokens that the configuration calls special.
            scaffold: what the chat template writes around messages; its tokens are control as well.
            origin: names the tokenizer in errors.
        """
        model = spec["model"]
        vocabulary = model.get("vocab", {})
        # A unigram model has a list of pieces with scores.
        if not isinstance(vocabulary, dict):
            raise InputError(
                f"{origin}/tokenizer.json: only BPE and SentencePiece vocabularies are supported"
            )
        added = spec.get("added_tokens") or []
        known = {token["content"] for token in added}
        for text in special:
            # A special token may be in the vocabulary only.
            if text not in known and text in vocabulary:
                added.append(added_token(vocabulary[text], text, special=True))
        marks = _mark_controls(added, special, scaffold)
        model["vocab"] = {marks.get(text, text): token for text, token in vocabulary.items()}
        # It may be a control token itself, which the vocabulary now spells as its mark.
        model["unk_token"] = marks.get(model.get("unk_token"), model.get("unk_token"))
        # Some files cut and pad every text; here that is decided elsewhere.
        spec |= {"added_tokens": added, "truncation": None, "padding": None}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises no other class
            reason = f"{error}".replace("\n", " ")[:120]
            raise InputError(
                f"{origin}/tokenizer.json: not a tokenizer ({reason}); copy the file again"
            ) from None
        self.controls = {}
        for text, marked_text in marks.items():
            token = self._tokenizer.token_to_id(marked_text)
            self.controls[text] = token  # pyright: ignore[reportArgumentType]
        # Texts are encoded without the post-processor, whose tokens may not be wanted.
        self.begin_ids = _begin_ids(spec.get("post_processor"))
        self._read_decoder(spec.get("decoder") or {"type": None}, origin)
        self.token_bytes = self._read_bytes({token["content"] for token in added})

    def _read_decoder(self, decoder: Mapping[str, Any], origin: str) -> None:
        steps = decoder.get("decoders", [decoder])
        kinds = {step["type"] for step in steps}
        if not kinds & _KNOWN_DECODERS:
            raise InputError(
                f"{origin}/tokenizer.json: a decoder of {kinds}; byte-level and SentencePiece's "
                "are known"
            )
        self._is_byte_level = "ByteLevel" in kinds
        self.dummy_prefix = any(map(_removes_space, steps))

    def _read_bytes(self, added: Collection[str]) -> list[bytes]:
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        data = [b""] * (1 + max(vocabulary.values(), default=-1))
        for text, token in vocabulary.items():
            if is_mark(text):
                continue  # control tokens have no bytes
            if self._is_byte_level and text not in added:
                data[token] = _byte_level_bytes(text)
            elif self._is_byte_level:
                data[token] = text.encode()  # added tokens are spelled in plain text
            else:
                data[token] = _piece_bytes(text)
        return data

    def batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        """Token ids of many texts without control tokens; num_threads 1, or all cores for any other."""
        # The library spreads over all cores what it is given at once.
        size = 1 if num_threads == 1 else max(1, len(texts))
        ids: list[list[int]] = []
        for start in range(0, len(texts), size):
            chunk = list(texts[start : start + size])
            encodings = self._tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
            ids.extend(encoding.ids for encoding in encodings)
        return ids

    def spans(self, marked: str) -> tuple[list[int], np.ndarray]:
        """(ids [T], their (start, end) characters int[T, 2]) of a text with marks for control tokens."""
        encoding = self._tokenizer.encode(marked, add_special_tokens=False)
        return encoding.ids, np.array(encoding.offsets, int).reshape(-1, 2)


def added_token(token: int, text: str, special: bool) -> dict[str, Any]:
    """An entry of added_tokens in a tokenizer.json."""
    return {
        "id": token,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _mark_controls(
    added: Sequence[dict[str, Any]], special: Collection[str], scaffold: str
) -> dict[str, str]:
    """{control token: its mark}; the marks replace the tokens in `added`."""
    marks: dict[str, str] = {}
    for token in added:
        text = token["content"]
        in_scaffold = text.strip() and text in scaffold
        if token["special"] or text in special or in_scaffold:
            marks[text] = mark(text)
            token["content"] = marks[text]
            token["single_word"] = False  # a mark next to a letter would be text
    return marks


def _begin_ids(post_processor: Any) -> tuple[int, ...]:
    """The ids that a post-processor of tokenizer.json puts before a text."""
    # Asked of the library, with a vocabulary of one word: there are many kinds of post-processors.
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    spec = json.dumps({"model": model, "post_processor": post_processor})
    encoding = tokenizers.Tokenizer.from_str(spec).encode("a")
    #   post-processor        "a" becomes       special_tokens_mask
    #   <s> text </s>         1 0 2             1 0 1                   begin_ids (1,)
    return tuple(encoding.ids[: encoding.special_tokens_mask.index(0)])


def _removes_space(step: Mapping[str, Any]) -> bool:
    """Whether a step of a decoder removes a space from the beginning of a text.

    It is Strip with a start, or Metaspace unless it never puts a space there.
    """
    return bool(step.get("start")) or step.get("prepend_scheme", "never") != "never"


def _byte_level_bytes(text: str) -> bytes:
    # A token from outside of the alphabet was put into the vocabulary by hand, in plain text.
    if all(character in _BYTE_OF for character in text):
        return bytes(_BYTE_OF[character] for character in text)
    return text.encode()


def _piece_bytes(text: str) -> bytes:
    #   <0xC3>    the byte C3
    #   ▁the      " the"
    byte = re.fullmatch("<0x([0-9A-F]{2})>", text)
    return bytes.fromhex(byte[1]) if byte else text.replace("\u2581", " ").encode()
