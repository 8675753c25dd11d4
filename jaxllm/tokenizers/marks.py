"""Marks that no text can spell: of control tokens, and over text that must not become one."""

import re
import secrets

# A chat template writes a conversation as one text. The control tokens that the template writes must
# become control tokens, and the same characters in a message must stay text. A user says "<|end|>":
#
#   the message                 <|end|>
#   1. veiled                   v(<|end|>)
#   2. in the template          <|user|>v(<|end|>)<|end|>
#   3. control tokens marked    m(<|user|>)v(<|end|>)m(<|end|>)
#   4. unveiled                 m(<|user|>)<|end|>m(<|end|>)
#   5. encoded                  only the two marks become control tokens
#
# v(...) and m(...) are the secret, the letter and the text in hexadecimal.

# No text can spell it, and no template, normalizer or JSON encoder changes it.
SECRET = f"q{secrets.token_hex(12)}"
_VEIL = re.compile(f"{SECRET}v([0-9a-f]*)z")
_MARK = re.compile(f"({SECRET}m[0-9a-f]*z)")


def mark(control: str) -> str:
    """The mark of a control token."""
    return f"{SECRET}m{control.encode().hex()}z"


def is_mark(text: str) -> bool:
    """Whether a piece of `split_marks`, or a whole token, is a mark."""
    return text.startswith(SECRET)


def marked(mark: str) -> str:
    """The control token of a mark."""
    return bytes.fromhex(mark[len(SECRET) + 1 : -1]).decode()


def split_marks(text: str) -> list[str]:
    """The text in pieces: marks and what is between them."""
    return _MARK.split(text)


def veil(text: str) -> str:
    """A veil over a text."""
    return f"{SECRET}v{text.encode().hex()}z"


def unveil(text: str) -> str:
    """The text without its veils."""
    return _VEIL.sub(lambda match: bytes.fromhex(match[1]).decode(), text)
