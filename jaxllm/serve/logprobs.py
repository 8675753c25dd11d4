"""Tokens and their probabilities as OpenAI's clients read them: for completions, and for chats."""

from collections.abc import Sequence
from typing import Any

from jaxllm.engine.request import Draw
from jaxllm.tokenizers.trained import Tokenizer


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text: a special one by its name, bytes that are part of a character by their numbers."""
    data = tokenizer.token_bytes(token)
    if not data:
        names = (name for name, control in tokenizer.controls.items() if control == token)
        return next(names, f"<|{token}|>")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionLogprobs:
    """`logprobs` of a completion, as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, num_alternatives: int):
        self._tokenizer = tokenizer
        self._num_alternatives = num_alternatives
        self._offset = 0  # characters before the next token

    def add(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """The fields for further tokens."""
        tokens = [token_text(self._tokenizer, draw.id) for draw in draws]
        offsets = []
        for draw in draws:
            offsets.append(self._offset)
            data = self._tokenizer.token_bytes(draw.id)
            # Bytes that begin a character count for it, those that continue it do not.
            self._offset += sum(byte & 0xC0 != 0x80 for byte in data)
        return {
            "tokens": tokens,
            "token_logprobs": [draw.logprob for draw in draws],
            "top_logprobs": [self._likeliest(draw) for draw in draws],
            "text_offset": offsets,
        }

    def add_first(self, token: int) -> dict[str, Any]:
        """The fields for a token that nothing is before."""
        fields = self.add([Draw(token, 0.0)])
        return {**fields, "token_logprobs": [None], "top_logprobs": [None]}

    def _likeliest(self, draw: Draw) -> dict[str, float]:
        """{token: log-probability} of the likeliest tokens and of the one that is there."""
        pairs = {}
        for other in draw.alternatives[: self._num_alternatives]:
            # Two tokens may be the same text: the likelier one comes first.
            pairs.setdefault(token_text(self._tokenizer, other.id), other.logprob)
        pairs.setdefault(token_text(self._tokenizer, draw.id), draw.logprob)
        return pairs


def chat_logprobs(
    tokenizer: Tokenizer, draws: Sequence[Draw], num_alternatives: int
) -> dict[str, Any]:
    """`logprobs` of a message's tokens."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": list(data)}

    content = []
    for draw in draws:
        likeliest = [entry(*other) for other in draw.alternatives[:num_alternatives]]
        content.append({**entry(draw.id, draw.logprob), "top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fields of parts of a response as those of the whole: their lists one after the other."""
    return {name: [item for part in parts for item in part[name]] for name in parts[0]}
