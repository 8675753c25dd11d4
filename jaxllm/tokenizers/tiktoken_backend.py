"""tiktoken rank files (GPT-2, cl100k, o200k, Llama 3), and how they split text into words."""

import base64
import concurrent.futures
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tiktoken

from jaxllm.config import InputError
from jaxllm.runtime.hardware import num_cores
from jaxllm.tokenizers.plain_backend import PlainBackend, Span

# Parts of the patterns that split a text into words before the ranks merge bytes in each word:
#   "It's 2024\n"    cl100k: It|'s| |202|4|\n    o200k: It's| |202|4|\n

# English contractions, in either case.
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# One character before a word: a space, or a sign such as a bracket.
_PREFIX = r"[^\r\n\p{L}\p{N}]?"
# Line ends; spaces up to the one before the next word; the rest.
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def split_pattern(digits: int) -> str:
    """How cl100k and Llama 3 (at most 3 digits in a word) and Qwen 2 (1) split a text into words."""
    number = rf"\p{{N}}{{1,{digits}}}" if digits > 1 else r"\p{N}"
    return rf"{_ENDINGS}|{_PREFIX}\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


_CL100K = split_pattern(3)
_O200K = "|".join((
    rf"{_PREFIX}{_UPPER}*{_LOWER}+{_ENDINGS}?",
    rf"{_PREFIX}{_UPPER}+{_LOWER}*{_ENDINGS}?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    _SPACES,
))  # fmt: skip
# In the order of their ids, from 128,000 on.
_LLAMA3_TOKENS = """
begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id
step_id start_header_id end_header_id eom_id eot_id python_tag image
""".split()  # noqa: SIM905
_LLAMA3_TOKENS += [f"reserved_special_token_{number}" for number in range(2, 246)]
_END_OF_TEXT = {"eos_token": "<|endoftext|>"}


class _Ranks(NamedTuple):
    """What a rank file does not say."""

    pattern: str
    """How text is split into words."""
    count: int
    """Ranks in the file."""
    special: dict[str, int]
    """{special token, without <| and |>: id}"""
    named: dict[str, str] = _END_OF_TEXT
    """{"eos_token": its spelling, ...}"""


_KINDS = {
    "gpt2": _Ranks(_GPT2, 50_256, {"endoftext": 50_256}),
    "cl100k_base": _Ranks(
        _CL100K,
        100_256,
        {
            "endoftext": 100_257,
            "fim_prefix": 100_258,
            "fim_middle": 100_259,
            "fim_suffix": 100_260,
            "endofprompt": 100_276,
        },
    ),
    "o200k_base": _Ranks(_O200K, 199_998, {"endoftext": 199_999, "endofprompt": 200_018}),
    "llama3": _Ranks(
        _CL100K,
        128_000,
        {name: 128_000 + number for number, name in enumerate(_LLAMA3_TOKENS)},
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "pad_token": "<|finetune_right_pad_id|>",
        },
    ),
}
RANK_FILES = tuple(f"{kind}.tiktoken" for kind in _KINDS)


def read_ranks(name: str, content: bytes, origin: str) -> PlainBackend:
    """The vocabulary of a rank file: on each line the bytes of a token, in base64, and its rank.

    Args:
        name: the file's name, which says the kind; tokenizer.model is Llama 3's.

    Raises:
        InputError: damaged, or not the ranks of this kind.
    """
    kind = "llama3" if name == "tokenizer.model" else name.removesuffix(".tiktoken")
    pattern, count, special, named = _KINDS[kind]
    ranks = _parse(content)
    if sorted(ranks.values()) != list(range(count)):
        raise InputError(
            f"{origin}/{name}: damaged, or not the {count:,} ranks of {kind}; copy the file again"
        )
    controls = {f"<|{token}|>": token_id for token, token_id in special.items()}
    encoding = tiktoken.Encoding(
        kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=controls
    )
    # Ids without a token (between special ones) have no bytes.
    data = sorted(ranks, key=ranks.__getitem__)
    data += [b""] * (1 + max(special.values()) - count)

    def batch(texts: Sequence[str], num_threads: int) -> list[list[int]]:
        # Not the library's own batches, which hand every text to a thread: of short ones that takes twice as long.
        encode = encoding.encode_ordinary
        if num_threads == 1:
            return list(map(encode, texts))
        threads = num_threads if num_threads > 0 else num_cores()
        size = -(-len(texts) // threads)
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            encoded = pool.map(lambda part: list(map(encode, part)), parts)
            return list(itertools.chain.from_iterable(encoded))

    def offsets(text: str) -> tuple[list[int], Sequence[Span]]:
        ids = encoding.encode_ordinary(text)
        return ids, _character_spans(text, [len(data[token]) for token in ids])

    return PlainBackend(named, dict(controls), data, batch, offsets)


def _parse(content: bytes) -> dict[bytes, int]:
    """{bytes of a token: its rank}, empty if the file is damaged."""
    ranks: dict[bytes, int] = {}
    try:
        for line in content.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        return {}
    return ranks


def _character_spans(text: str, sizes: Sequence[int]) -> list[Span]:
    """The (start, end) characters of tokens of these sizes in bytes."""
    # A token may end inside a character, which then belongs to both. "Hé" in tokens of 2 bytes and 1:
    #   byte         0x48  0xC3  0xA9
    #   character    0     1     1
    #   tokens       [---------] [--]    spans (0, 2) and (1, 2)
    character_of: list[int] = []
    for number, character in enumerate(text):
        character_of += [number] * len(character.encode())
    edges = np.cumsum([0, *sizes]).tolist()
    spans = []
    for start, end in itertools.pairwise(edges):
        spans.append((character_of[start], character_of[end - 1] + 1))
    return spans
