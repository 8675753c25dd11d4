"""Vocabularies whose libraries encode plain text only: SentencePiece models and tiktoken ranks."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.tokenizers.files import spelling
from jaxllm.tokenizers.marks import is_mark, marked, split_marks

Span = tuple[int, int]


@dataclasses.dataclass
class PlainBackend:
    """A library's vocabulary with control tokens: the text between two of them is encoded by itself."""

    named: Mapping[str, str]
    """{"bos_token": its spelling, ...}"""
    controls: dict[str, int]
    """{spelling: id} of the control tokens; no text encodes to one."""
    token_bytes: list[bytes]
    """The UTF-8 bytes of every token id; empty for control tokens."""
    batch: Callable[[Sequence[str], int], list[list[int]]]
    """From texts and a number of threads to their token ids."""
    offsets: Callable[[str], tuple[list[int], Sequence[Span]]]
    """From a text without control tokens to its token ids and the (start, end) characters of each."""
    dummy_prefix: bool = False
    """Whether a text is encoded with a space before it, which decoding removes."""
    begin_ids: tuple[int, ...] | None = None
    """None: these files do not say what begins a text; tokenizer_config.json does."""

    def add_tokens(self, records: Mapping[str, Any]) -> None:
        """Add control tokens beyond the vocabulary; records: added_tokens_decoder of tokenizer_config.json."""
        for key, record in records.items():
            token = int(key)
            self.token_bytes += [b""] * (token + 1 - len(self.token_bytes))
            # The list repeats tokens of the vocabulary; those with bytes are text.
            if not self.token_bytes[token]:
                self.controls[spelling(record)] = token

    def spans(self, text: str) -> tuple[list[int], np.ndarray]:
        """(ids [T], their (start, end) characters int[T, 2]) of a text with marks for control tokens."""
        #   text       mark of <|user|>    hi                   mark of <|end|>
        #   ids        5                   366, 371             7
        #   offsets    (0, 43)             (43, 44), (44, 45)   (45, 86)
        ids: list[int] = []
        offsets: list[Span] = []
        position = 0
        for piece in split_marks(text):
            if is_mark(piece):
                ids.append(self.controls[marked(piece)])
                offsets.append((position, position + len(piece)))
            else:
                piece_ids, piece_offsets = self.offsets(piece)
                ids += piece_ids
                offsets += [(position + start, position + end) for start, end in piece_offsets]
            position += len(piece)
        return ids, np.array(offsets, int).reshape(-1, 2)
