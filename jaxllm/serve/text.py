"""The text of a response as its tokens come, up to the stop text that is complete first."""

from collections.abc import Sequence

from jaxllm.tokenizers.trained import StreamDecoder, Tokenizer


class ResponseText:
    """Text that is certain: characters are complete, and no stop text can begin before its end.

    With the stop text "\\n\\n" and the tokens "a", "\\n", "b", "\\n", "\\n":

        add returns     "a"  ""  "\\nb"  ""  ""      and then `stopped` is true
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._decoder = StreamDecoder(tokenizer)
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that has become certain with a token."""
        return self._release(self._decoder.add(token))

    def finish(self) -> str:
        """The rest, when the response has ended."""
        text = self._release(self._decoder.flush()) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [self._place(stop) for stop in self._stops if stop in self._held]
        if found:
            self.stopped = True
            # The one that is complete first; of two that end together, the longer one.
            _, begin = min(found)
            certain, self._held = self._held[:begin], ""
            return certain
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain

    def _place(self, stop: str) -> tuple[int, int]:
        """(end, begin) of a stop text."""
        begin = self._held.index(stop)
        return begin + len(stop), begin

    def _overlap(self, stop: str) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
