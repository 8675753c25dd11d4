"""Vocabularies whose libraries encode plain text only: SentencePiece models and tiktoken ranks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.tokenizers.files import spelling
from jaxllm.tokenizers.marks import is_mark, marked, split_marks

Span = tuple[int, int]


class PlainEncoder(NamedTuple):
    """A library's vocabulary, and how it encodes text without control tokens."""

    named: Mapping[str, str]
    """{"bos_token": its spelling, ...}"""
    controls: Mapping[str, int]
    """{spelling: id} of the control tokens; no text encodes to one."""
    token_bytes: Sequence[bytes]
    """The UTF-8 bytes of every token id; empty for control tokens."""
    batch: Callable[[Sequence[str], int], list[list[int]]]
    """From texts and a number of threads to their token ids."""
    offsets: Callable[[str], tuple[list[int], Sequence[Span]]]
    """From a text to its token ids and the (start, end) characters of each."""
    dummy_prefix: bool = False
    """Whether a text is encoded with a space before it, which decoding removes."""


class PlainBackend:
    """A `PlainEncoder` with control tokens: the text between two of them is encoded by itself."""

    begin_ids: tuple[int, ...] | None = None
    """Nothing in these files says what begins a text; tokenizer_config.json does."""

    def __init__(self, encoder: PlainEncoder, config: Mapping[str, Any]):
        """config: tokenizer_config.json, which may add tokens beyond the vocabulary."""
        self._offsets = encoder.offsets
        self.batch = encoder.batch
        self.named = encoder.named
        self.dummy_prefix = encoder.dummy_prefix
        self.controls = dict(encoder.controls)
        self.token_bytes = list(encoder.token_bytes)
        for key, record in config.get("added_tokens_decoder", {}).items():
            token = int(key)
            self.token_bytes += [b""] * (token + 1 - len(self.token_bytes))
            # The list repeats tokens of the vocabulary; those with bytes are text.
            if not self.token_bytes[token]:
                self.controls[spelling(record)] = token

    def spans(self, text: str) -> tuple[list[int], np.ndarray]:
        """(ids [T], their (start, end) characters int[T, 2]) of a text with marks for control tokens."""
        ids: list[int] = []
        offsets: list[Span] = []
        #   text       mark of <|user|>    hi                   mark of <|end|>
        #   ids        5                   366, 371             7
        #   offsets    (0, 43)             (43, 44), (44, 45)   (45, 86)
        position = 0
        for piece in split_marks(text):
            if is_mark(piece):
                piece_ids: list[int] = [self.controls[marked(piece)]]
                piece_offsets: Sequence[Span] = [(0, len(piece))]
            else:
                piece_ids, piece_offsets = self._offsets(piece)
            ids += piece_ids
            offsets += [(position + start, position + end) for start, end in piece_offsets]
            position += len(piece)
        return ids, np.array(offsets, int).reshape(-1, 2)
