"""Tokenizers that are trained here: SentencePiece, an exact round trip, and the chat format with its loss mask."""

import codecs
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from jaxllm.config import InputError
from jaxllm.runtime.files import new_folder, read_json

PAD = "<|pad|>"
BOS = "<|bos|>"
EOS = "<|eos|>"
UNK = "<|unk|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END = "<|end|>"
RULE_OF_THUMB = 1000
"""Tokens in about 750 English words or 500 Chinese characters, as publishers say."""
SPACE = "\u2581"
"""SentencePiece writes a space as this character, and would read the character back as a space."""
_MAX_SENTENCE_BYTES = 4096


class Tokenizer:
    """A SentencePiece model trained here, and the interface of all tokenizers.

    Special tokens are control symbols: no text encodes to them, whatever it spells. Decoding joins bytes,
    so that decode(encode(text)) == text for every Unicode string.
    """

    # How bytes, pieces and special tokens relate, for a vocabulary without a piece for é:
    #   text                   h       é
    #   UTF-8                  68      C3      A9
    #   pieces       <|bos|>   h       <0xC3>  <0xA9>   <|eos|>
    #   document     1         366     203     177      2
    #   token_bytes  (none)    68      C3      A9       (none)

    kind = "sentencepiece"
    """Name of the class in a saved tokenizer's record."""
    record = "tokenizer.json"
    """File name of that record."""
    exported_record = "sentencepiece.json"
    """Its name in an exported model, whose tokenizer.json is that of Hugging Face's libraries."""
    chat_refusal = ""
    """Why there are no conversations; empty if there are."""
    dummy_prefix = False
    """Whether every text is encoded with a space before it, which decoding removes."""

    def __init__(self, model: bytes):
        """model: a serialized SentencePiece model."""
        self.model = model
        self._files = {"tokenizer.model": model}
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._sp.vocab_size()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.pad_id = self._sp.piece_to_id(PAD)
        self.bos_id = self._sp.piece_to_id(BOS)
        self.eos_id = self._sp.piece_to_id(EOS)
        self.end_id = self._sp.piece_to_id(END)
        # Special tokens by their names.
        self.controls = {
            self._sp.id_to_piece(token): token
            for token in range(self.vocab_size)
            if self._sp.is_control(token)
        }
        # What every text begins with; some published models have nothing there.
        self.begin_ids: tuple[int, ...] = (self.bos_id,)
        self.role_ids = {
            "system": self._sp.piece_to_id(SYSTEM),
            "user": self._sp.piece_to_id(USER),
            "assistant": self._sp.piece_to_id(ASSISTANT),
        }
        self.stop_ids = (self.end_id, self.eos_id)
        self._bytes = [piece_bytes(self._sp, token) for token in range(self.vocab_size)]
        self._space_ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @property
    def start_id(self) -> int:
        """The token before the first one that is scored: bos_id, whether texts begin with it or not, or eos_id."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, never a special one. Raises InputError on a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """`encode` of many texts, in as many threads (-1: all cores)."""
        check_unicode(texts)
        # All texts go to the library at once, for its threads; the few with U+2581 are encoded again.
        encoded = self._sp.encode(list(texts), num_threads=num_threads)
        for number, text in enumerate(texts):
            if SPACE in text:
                encoded[number] = self._encode_with_spaces(text)
        return encoded

    def _encode_with_spaces(self, text: str) -> list[int]:
        """Token ids of a text that holds U+2581 itself: it becomes the tokens of its three bytes."""
        #   text    a▁b       the character itself, which the library would decode as a space
        #   ids     a <0xE2> <0x96> <0x81> b
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            if number:
                ids += self._space_ids
            ids += self._sp.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special ones are skipped, invalid UTF-8 becomes U+FFFD."""
        data = b"".join(map(self.token_bytes, ids))
        # Bytes first, then text: a character may be spread over tokens.
        if self.dummy_prefix:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of a token; none for special tokens, and for the padding of a model's vocabulary."""
        return self._bytes[token] if 0 <= token < self.vocab_size else b""

    def encode_document(self, text: str) -> list[int]:
        """`document` of a text's token ids."""
        return self.document(self.encode(text))

    def document(self, ids: Sequence[int]) -> list[int]:
        """The ids of a whole text between those that begin and end one; some models have none that begins one."""
        return [*self.begin_ids, *ids, self.eos_id]

    def prompt(self, text: str) -> list[int]:
        """The ids of a text to be continued, at least one: a model that is given nothing continues start_id."""
        return [*self.begin_ids, *self.encode(text)] or [self.start_id]

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, reply: bool = False, **inputs: Any
    ) -> tuple[list[int], list[bool]]:
        """Token ids [T] of a conversation, and where the assistant speaks [T] (its end of turn included).

        With reply=True the conversation ends in an open assistant turn. One question and its answer "ok":

            ids   <|bos|> <|user|> hi <|end|> <|assistant|> ok <|end|>
            mask     .       .     .     .         .        1     1

        Raises:
            InputError: an unknown role, a message without text, or tools.
        """
        if inputs or any(message.get("tool_calls") for message in messages):
            raise InputError(
                "tools: the chat template of a tokenizer trained here has none; import a model's "
                "tokenizer"
            )
        ids = [self.bos_id]
        mask = [False]
        for number, message in enumerate(messages, start=1):
            role = message.get("role")
            content = message.get("content")
            if role not in self.role_ids or not isinstance(content, str):
                roles = ", ".join(self.role_ids)
                raise InputError(
                    f"message {number}: needs a role ({roles}) and content (a string), not "
                    f"{message!r:.80}"
                )
            body = [*self.encode(content), self.end_id]
            ids += [self.role_ids[role], *body]
            mask += [False, *[role == "assistant"] * len(body)]
        if reply:
            ids.append(self.role_ids["assistant"])
            mask.append(False)
        return ids, mask

    def save(self, directory: Any, settings: Mapping[str, Any] | None = None) -> None:
        """Write the model's files and a record of them as a new directory, at once; an older one is replaced."""
        record = {"type": self.kind, "vocab_size": self.vocab_size, "sha256": self.fingerprint}
        record |= settings or {}
        with new_folder(Path(directory)) as folder:
            for name, content in self._files.items():
                (folder / name).write_bytes(content)
            (folder / self.record).write_text(json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Any) -> "Tokenizer":
        """The tokenizer that `save` wrote. Raises InputError if files are missing, damaged or changed."""
        path = Path(directory) / "tokenizer.model"
        record_path = Path(directory) / cls.exported_record
        if not record_path.exists():
            record_path = Path(directory) / cls.record
        for required in (path, record_path):
            if not required.exists():
                raise InputError(
                    f"{required}: no such tokenizer; run the tokenizer stage first, or import the "
                    "model with its tokenizer's files"
                )
        fix = "run the tokenizer stage again"
        record = read_json(record_path, fix) or {}
        try:
            tokenizer = cls(path.read_bytes())
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{path}: damaged tokenizer ({reason}); {fix}") from None
        if tokenizer.fingerprint != record.get("sha256"):
            raise InputError(f"{path}: is not the file that was saved (sha256 differs); {fix}")
        return tokenizer


def piece_bytes(sp: sentencepiece.SentencePieceProcessor, token: int) -> bytes:
    """The UTF-8 bytes of a SentencePiece token; none for control tokens and the unknown one."""
    if sp.is_control(token) or sp.is_unknown(token):
        return b""
    piece = sp.id_to_piece(token)
    if sp.is_byte(token):
        return bytes([int(piece[3:5], 16)])  # <0xC3>
    return piece.replace(SPACE, " ").encode()


def check_unicode(texts: Sequence[str]) -> None:
    """Raise InputError if a text has a lone surrogate, which UTF-8 cannot hold."""
    try:
        "".join(texts).encode()
        return
    except UnicodeEncodeError:
        pass
    # Found now, so that the error counts characters from the beginning of its text.
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text: not valid Unicode ({error}); repair the source's encoding"
        ) from None


class StreamDecoder:
    """Decodes ids as they come: a character that several byte tokens spell is held back until it is complete."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # To be removed from the first token that has bytes.
        self._prefix = b" " if tokenizer.dummy_prefix else b""

    def add(self, token: int) -> str:
        """The text that is certain with this token; joined, these texts are decode(ids)."""
        data = self._tokenizer.token_bytes(token)
        if data:
            data = data.removeprefix(self._prefix)
            self._prefix = b""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The text that is left at the end: U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", final=True)


def train(
    texts: Iterator[str],
    *,
    vocab_size: int,
    model_type: str,
    character_coverage: float,
    num_threads: int,
) -> Tokenizer:
    """Train a SentencePiece model; deterministic in texts and settings.

    Args:
        model_type: "bpe" or "unigram" (Kudo and Richardson 2018).
        character_coverage: share of the corpus's characters that get a token; the rest is spelled in bytes.

    Raises:
        InputError: no text, or a vocabulary larger (for unigram also smaller) than the texts support.
    """
    # An empty corpus is found here, before the library fails on it with another message.
    sentences = itertools.chain.from_iterable(map(_sentences, texts))
    first = next(sentences, None)
    if first is None:
        raise InputError("tokenizer.data: the corpus is empty; name sources that hold text")
    out = io.BytesIO()
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
            # Identity: decoding gives back every text.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # A number is spelled in one way only.
            split_digits=True,
            max_sentence_length=2 * _MAX_SENTENCE_BYTES,
            train_extremely_large_corpus=True,
            minloglevel=2,
            pad_id=0,
            pad_piece=PAD,
            bos_id=1,
            bos_piece=BOS,
            eos_id=2,
            eos_piece=EOS,
            unk_id=3,
            unk_piece=UNK,
        )
    except RuntimeError as error:
        reason = _training_failure(" ".join(str(error).split()))
        raise InputError(f"tokenizer.vocab_size: {vocab_size} {reason}") from None
    return Tokenizer(out.getvalue())


def _training_failure(message: str) -> str:
    """What the library's message means, and the fix."""
    limit = re.search(r"too high.*<= (\d+)", message)
    if limit:
        return f"is larger than the corpus supports; set it to at most {limit[1]} or give more text"
    if "smaller than required_chars" in message or "too small" in message:
        return (
            "is too small for the corpus and the 256 bytes; raise it or lower "
            "tokenizer.character_coverage"
        )
    return f"(or the corpus) is refused by SentencePiece: {message:.200}"


def _sentences(text: str) -> Iterator[str]:
    """Pieces of a text for training, cut at line ends and at a length: the trainer drops longer ones."""
    # Neither NUL nor U+2581, which SentencePiece reads as a space, may be in a sentence.
    size = _MAX_SENTENCE_BYTES // 4  # a character has at most 4 bytes
    for line in text.replace("\0", "\n").replace(SPACE, "\n").split("\n"):
        for start in range(0, len(line), size):
            yield line[start : start + size]


_WORD = re.compile(r"\S*[A-Za-z]\S*")
_LETTER = re.compile(r"[A-Za-z]")
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af]")


def compression(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, float | None]:
    """How much text a token holds: bytes, characters and words per token, and the two counts of the rule of thumb.

    Words are whitespace-separated runs with an ASCII letter. tokens_per_750_english_words counts texts
    whose letters are mostly ASCII, tokens_per_500_chinese_characters texts mostly of Chinese characters;
    None if there are no such texts.
    """
    # Texts of both kinds, or of neither, count in the total only.
    total = np.zeros(4)  # bytes, characters, words, tokens
    english = np.zeros(2)  # tokens, words
    chinese = np.zeros(2)  # tokens, characters
    for text in texts:
        num_tokens = len(tokenizer.encode(text))
        num_words = len(_WORD.findall(text))
        num_han = len(_HAN.findall(text))
        total += (len(text.encode()), len(text), num_words, num_tokens)
        num_letters = len(_LETTER.findall(text))
        if num_letters > 4 * num_han and num_words:
            english += (num_tokens, num_words)
        elif num_han > num_letters:
            chinese += (num_tokens, num_han)
    per_token = (total[:3] / max(total[3], 1)).tolist()
    return {
        "bytes_per_token": per_token[0],
        "characters_per_token": per_token[1],
        "words_per_token": per_token[2],
        "tokens_per_750_english_words": _tokens_per(750, *english.tolist()),
        "tokens_per_500_chinese_characters": _tokens_per(500, *chinese.tolist()),
    }


def _tokens_per(count: int, tokens: float, units: float) -> float | None:
    return count * tokens / units if units else None
