"""Tokenizers: SentencePiece training, an exact round trip, the chat template and its loss mask."""

import codecs
import hashlib
import io
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from jaxllm.config import InputError

PAD, BOS, EOS, UNK = "<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
MAX_VOCAB_SIZE = 262_144
RULE_OF_THUMB = (
    1000  # tokens are about 750 English words or 500 Chinese characters, as publishers say
)
_SPACE = "\u2581"  # SentencePiece writes a space as this character, and would read it back as one
_MAX_SENTENCE_BYTES = 4096


class Tokenizer:
    """A trained SentencePiece model.

    Special tokens are control symbols: no text encodes to them, whatever it spells. Decoding joins bytes, so that
    decode(encode(text)) == text for every Unicode string (unknown characters are spelled in byte tokens).
    """

    kind, record = "sentencepiece", "tokenizer.json"
    chat_refusal = ""  # why there are no conversations, empty where there are
    dummy_prefix = (
        False  # whether every text is encoded with a space before it, which decoding takes away
    )

    def __init__(self, model: bytes):
        self.model, self._files = model, {"tokenizer.model": model}
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._sp.vocab_size()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.pad_id, self.bos_id, self.eos_id, self.end_id = map(
            self._sp.piece_to_id, (PAD, BOS, EOS, END)
        )
        self.begin_ids: tuple[int, ...] = (
            self.bos_id,
        )  # what every text begins with; nothing in some models
        roles = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
        self.role_ids = {role: self._sp.piece_to_id(piece) for role, piece in roles.items()}
        self.stop_ids = (self.end_id, self.eos_id)
        self._bytes = [piece_bytes(self._sp, i) for i in range(self.vocab_size)]
        self._space = [self._sp.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]

    @property
    def start_id(self) -> int:
        """What stands before the first token that is scored: the named bos_id, added to texts or not, else eos_id."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, never a special one. Raises InputError on a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """`encode` of many texts, in as many threads (-1: all cores)."""
        check_unicode(texts)
        encoded = self._sp.encode(
            [text.replace(_SPACE, "") for text in texts], num_threads=num_threads
        )
        for i, text in enumerate(texts):
            if _SPACE in text:
                parts = [self._sp.encode(part) for part in text.split(_SPACE)]
                encoded[i] = parts[0] + [t for part in parts[1:] for t in (*self._space, *part)]
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special ones are skipped, invalid UTF-8 becomes U+FFFD."""
        data = b"".join(map(self.token_bytes, ids))
        return data.removeprefix(b" " if self.dummy_prefix else b"").decode(
            "utf-8", errors="replace"
        )

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes one token stands for; none for special tokens and for the padding of a model's vocabulary."""
        return self._bytes[token] if 0 <= token < self.vocab_size else b""

    def encode_document(self, text: str) -> list[int]:
        return self.document(self.encode(text))

    def document(self, ids: Sequence[int]) -> list[int]:
        """The ids of a whole text between those that begin and end one; some models have none that begins one."""
        return [*self.begin_ids, *ids, self.eos_id]

    def prompt(self, text: str) -> list[int]:
        """The ids of a text that goes on, at least one: a model that is given nothing continues start_id."""
        return [*self.begin_ids, *self.encode(text)] or [self.start_id]

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, reply: bool = False, **inputs: Any
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and where the assistant speaks (its end of turn included).

        With reply=True the conversation ends in an open assistant turn. One question and its answer "ok":

            ids   <|bos|> <|user|> hi <|end|> <|assistant|> ok <|end|>
            mask     .       .     .     .         .        1     1

        Raises InputError on an unknown role, a message without text, and on tools.
        """
        if inputs or any(message.get("tool_calls") for message in messages):
            raise InputError(
                "tools: the chat template of a tokenizer trained here has none; import a model's tokenizer"
            )
        ids, mask = [self.bos_id], [False]
        for number, message in enumerate(messages, start=1):
            role, content = message.get("role"), message.get("content")
            if role not in self.role_ids or not isinstance(content, str):
                needs = f"a role ({', '.join(self.role_ids)}) and content (a string)"
                raise InputError(f"message {number}: needs {needs}, not {message!r:.80}")
            body = [*self.encode(content), self.end_id]
            ids += [self.role_ids[role], *body]
            mask += [False, *[role == "assistant"] * len(body)]
        if reply:
            ids, mask = [*ids, self.role_ids["assistant"]], [*mask, False]
        return ids, mask

    def save(self, directory: Any, settings: Mapping[str, Any] | None = None) -> None:
        """Write the model's files and a record of them into a new directory, all at once; an older one is replaced."""
        record = {
            "type": self.kind,
            "vocab_size": self.vocab_size,
            "sha256": self.fingerprint,
            **(settings or {}),
        }
        target = Path(directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tokenizer-") as partial:
            placed = Path(partial) / "placed"
            placed.mkdir()
            for name, content in self._files.items():
                (placed / name).write_bytes(content)
            (placed / self.record).write_text(json.dumps(record, indent=1) + "\n")
            if target.exists():
                os.replace(target, Path(partial) / "old")
            os.replace(placed, target)

    @classmethod
    def load(cls, directory: Any) -> "Tokenizer":
        """Raises InputError where the files are missing, damaged or not those that were saved."""
        path = Path(directory) / "tokenizer.model"
        try:
            tokenizer = cls(path.read_bytes())
            recorded = json.loads((Path(directory) / "tokenizer.json").read_text())["sha256"]
        except FileNotFoundError as error:
            mend = "run the tokenizer stage first, or import the model with its tokenizer's files"
            raise InputError(f"{error.filename}: no such tokenizer; {mend}") from None
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(
                f"{path}: damaged tokenizer ({reason}); run the tokenizer stage again"
            ) from None
        if tokenizer.fingerprint != recorded:
            raise InputError(
                f"{path}: is not the file that was saved (sha256 differs); run the tokenizer stage again"
            )
        return tokenizer


def piece_bytes(sp: sentencepiece.SentencePieceProcessor, token: int) -> bytes:
    """The UTF-8 bytes of a SentencePiece token; none for control tokens and the unknown one."""
    if sp.is_control(token) or sp.is_unknown(token):
        return b""
    piece = sp.id_to_piece(token)
    return (
        bytes([int(piece[3:5], 16)]) if sp.is_byte(token) else piece.replace(_SPACE, " ").encode()
    )


def check_unicode(texts: Iterable[str]) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text: not valid Unicode ({error}); repair the source's encoding"
        ) from None


class StreamDecoder:
    """Decode ids as they come: a character split over byte tokens is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._prefix = b" " if tokenizer.dummy_prefix else b""

    def add(self, token: int) -> str:
        """The text that has become certain with this token; joined, all of them are decode(ids)."""
        data = self._tokenizer.token_bytes(token)
        prefix, self._prefix = self._prefix, b"" if data else self._prefix
        return self._decoder.decode(data.removeprefix(prefix))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def train(
    texts: Iterator[str],
    *,
    vocab_size: int,
    model_type: str,
    character_coverage: float,
    num_threads: int,
) -> Tokenizer:
    """Train a SentencePiece BPE or unigram model (Kudo and Richardson 2018); deterministic in texts and settings.

    Raises InputError: no text, or a vocabulary larger (for unigram also smaller) than the texts support.
    """
    sentences = itertools.chain.from_iterable(map(_sentences, texts))
    if (first := next(sentences, None)) is None:
        raise InputError("tokenizer.data: the corpus is empty; name sources that hold text")
    out = io.BytesIO()
    ids: dict[str, Any] = {}
    for i, (name, piece) in enumerate((("pad", PAD), ("bos", BOS), ("eos", EOS), ("unk", UNK))):
        ids |= {f"{name}_id": i, f"{name}_piece": piece}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], sentences),
            model_writer=out,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            num_threads=num_threads,
            byte_fallback=True,
            control_symbols=[SYSTEM, USER, ASSISTANT, END],
            # Identity: what goes in comes out. Digits apart, as numbers are then spelled one way only.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=2 * _MAX_SENTENCE_BYTES,
            train_extremely_large_corpus=True,
            minloglevel=2,
            **ids,
        )
    except RuntimeError as error:
        text = " ".join(str(error).split())
        reason = f"(or the corpus) is refused by SentencePiece: {text:.200}"
        if limit := re.search(r"too high.*<= (\d+)", text):
            reason = f"is larger than the corpus supports; set it to at most {limit[1]} or give more text"
        elif "smaller than required_chars" in text or "too small" in text:
            reason = "is too small for the corpus and the 256 bytes; raise it or lower tokenizer.character_coverage"
        raise InputError(f"tokenizer.vocab_size: {vocab_size} {reason}") from None
    return Tokenizer(out.getvalue())


def _sentences(text: str) -> Iterator[str]:
    """Pieces of a text for training, cut at line ends and at a length, since the trainer drops longer ones."""
    size = _MAX_SENTENCE_BYTES // 4  # a character has at most 4 bytes
    for line in text.replace("\0", "\n").replace(_SPACE, "\n").split("\n"):
        for start in range(0, len(line), size):
            yield line[start : start + size]


def compression(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, float | None]:
    """How much text a token holds: bytes, characters and words per token, and the rule of thumb's two counts.

    Words are whitespace-separated runs with an ASCII letter. tokens_per_750_english_words is of texts whose letters are
    mostly ASCII, tokens_per_500_chinese_characters of texts mostly of Chinese characters; None where there is none.
    """
    total, english, chinese = np.zeros(4), np.zeros(2), np.zeros(2)
    for text in texts:
        tokens, words = len(tokenizer.encode(text)), len(_WORD.findall(text))
        han, letters = len(_HAN.findall(text)), len(_LETTER.findall(text))
        total += (len(text.encode()), len(text), words, tokens)
        if letters > 4 * han and words:
            english += (tokens, words)
        elif han > letters:
            chinese += (tokens, han)
    names = ("bytes_per_token", "characters_per_token", "words_per_token")
    measured: dict[str, float | None] = dict(
        zip(names, (total[:3] / max(total[3], 1)).tolist(), strict=True)
    )
    for name, count, (tokens, unit) in (
        ("750_english_words", 750, english),
        ("500_chinese_characters", 500, chinese),
    ):
        measured[f"tokens_per_{name}"] = count * float(tokens) / float(unit) if unit else None
    return measured


_WORD, _LETTER = re.compile(r"\S*[A-Za-z]\S*"), re.compile(r"[A-Za-z]")
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
