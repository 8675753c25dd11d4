"""SentencePiece models of others (tokenizer.model)."""

from collections.abc import Sequence

import sentencepiece

from jaxllm.config import InputError
from jaxllm.tokenizers.plain_backend import PlainBackend, Span
from jaxllm.tokenizers.trained import SPACE, piece_bytes


def read_pieces(content: bytes, origin: str) -> PlainBackend:
    """The vocabulary of a tokenizer.model. Raises InputError if it is not a SentencePiece model."""
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        raise InputError(
            f"{origin}/tokenizer.model: not a SentencePiece model; copy the file again"
        ) from None
    ids = {
        "bos_token": sp.bos_id(),
        "eos_token": sp.eos_id(),
        "pad_token": sp.pad_id(),
        "unk_token": sp.unk_id(),
    }
    # The library has -1 for a role that no piece has.
    named = {role: sp.id_to_piece(token) for role, token in ids.items() if token >= 0}
    controls: dict[str, int] = {}
    data: list[bytes] = []
    for token in range(sp.vocab_size()):
        data.append(piece_bytes(sp, token))
        if sp.is_control(token) or sp.is_unknown(token):
            controls[sp.id_to_piece(token)] = token

    def batch(texts: Sequence[str], num_threads: int) -> list[list[int]]:
        return sp.encode(list(texts), num_threads=num_threads)

    def offsets(text: str) -> tuple[list[int], Sequence[Span]]:
        mapping = sp.encode_as_offset_mapping(text)
        return list(mapping["ids"]), _widen_bytes(list(mapping["offsets"]))

    # The model does not say it, so it is tried.
    adds_space = "".join(sp.id_to_piece(sp.encode("a"))).startswith(SPACE)
    return PlainBackend(named, controls, data, batch, offsets, adds_space)


def _widen_bytes(spans: list[Span]) -> list[Span]:
    """Gives every byte token of a character the character's span."""
    # The library gives it to the last one only. The bytes of "é" after "H":
    #   piece          H       <0xC3>  <0xA9>
    #   the library    (0, 1)  (1, 1)  (1, 2)
    #   widened        (0, 1)  (1, 2)  (1, 2)
    # From the end, so that a span spreads over all bytes before it.
    for i in range(len(spans) - 2, -1, -1):
        start, end = spans[i]
        if start == end == spans[i + 1][0]:
            spans[i] = spans[i + 1]
    return spans
