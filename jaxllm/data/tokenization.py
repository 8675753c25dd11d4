"""The content of one unit: its records are read, split, tokenized and written. No JAX: worker processes import this."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data import units
from jaxllm.data.documents import Documents, distinct_documents
from jaxllm.data.format import Example, assign_splits
from jaxllm.data.sources import read_records
from jaxllm.data.units import EXAMPLE, KEY, SPLITS, Recent, Unit, token_dtype
from jaxllm.tokenizers.trained import Tokenizer

# Conversations are encoded in chunks: so many, or so many characters.
_CHUNK_EXAMPLES = 1024
_CHUNK_CHARS = 1 << 20


class Item(NamedTuple):
    """An example that belongs to a split."""

    example: Example
    digest: bytes  # of its content
    side: int  # 1 + the index of its split in SPLITS


class _Encoded(NamedTuple):
    """Some examples of a unit as arrays."""

    tokens: np.ndarray  # token_dtype[n]
    mask: np.ndarray  # bool[n]; empty for documents, where all tokens but the first are targets
    table: np.ndarray  # EXAMPLE[kind][examples], without `start`
    keys: list[tuple[bytes, int]]  # (digest, side) of each


def write_unit(
    folder: Path,
    unit: Unit,
    tokenizer: Tokenizer | None,
    num_threads: Callable[[], int] = lambda: 1,
) -> dict[str, Any]:
    """Writes the files of a unit into a folder (see `units`) and returns {"tokens": their number}.

    Args:
        tokenizer: None gives each example one dummy token, so that its `start` is its number.
        num_threads: how many threads the tokenizer may use now; asked again for each batch of documents.
    """
    total = 0
    keys: list[tuple[bytes, int]] = []
    with contextlib.ExitStack() as stack:
        files = {}
        for name in ("tokens", "mask", "examples", "keys"):
            files[name] = stack.enter_context(open(folder / name, "wb"))
        for encoded in _encoded(unit, tokenizer, num_threads):
            sizes = encoded.table["size"].astype(np.int64)
            encoded.table["start"] = total + np.cumsum(sizes) - sizes
            files["tokens"].write(encoded.tokens)
            files["mask"].write(encoded.mask)
            files["examples"].write(encoded.table)
            total += len(encoded.tokens)
            keys += encoded.keys
            # A run is complete only when it has RUN keys, so that run i holds examples [i RUN, (i + 1) RUN).
            while len(keys) >= units.RUN:
                files["keys"].write(_sorted_run(keys[: units.RUN]))
                keys = keys[units.RUN :]
        files["keys"].write(_sorted_run(keys))
    return {"tokens": total}


def _encoded(
    unit: Unit, tokenizer: Tokenizer | None, num_threads: Callable[[], int]
) -> Iterator[_Encoded]:
    if unit.kind == "document":
        for documents in distinct_documents(unit):
            yield _encode_documents(documents, tokenizer, num_threads())
    else:
        for chunk in _chunks(distinct_items(unit)):
            yield _encode_chats(chunk, unit, tokenizer)


def distinct_items(unit: Unit) -> Iterator[Item]:
    """The examples of a unit that belong to a split, without repetitions that are near each other (see `Recent`)."""
    records = read_records(unit.data.sources[unit.source], unit.parts)
    recent = Recent()
    for example, split in assign_splits(unit.data, unit.kind, unit.source, records):
        if split is None:
            continue
        item = Item(example, example.digest(), 1 + SPLITS.index(split))
        if recent.is_new(item.digest, item.side):
            yield item


def _encode_documents(
    documents: Documents, tokenizer: Tokenizer | None, num_threads: int
) -> _Encoded:
    texts = documents.texts
    table = np.zeros(len(texts), EXAMPLE["document"])
    num_bytes = np.array(list(map(_num_bytes, texts)), np.int64)
    table["bytes"] = num_bytes
    keys = list(zip(documents.digests, documents.sides, strict=True))
    nothing = np.zeros(0, bool)
    if tokenizer is None:
        table["size"] = 1  # the dummy token
        return _Encoded(np.zeros(len(texts), token_dtype(None)), nothing, table, keys)
    ids = tokenizer.encode_batch(texts, num_threads)
    if not tokenizer.begin_ids:
        table["bytes"] = np.maximum(num_bytes - _first_bytes(ids, tokenizer), 0)
    sizes, tokens = _join_documents(ids, tokenizer)
    table["size"] = sizes
    return _Encoded(tokens, nothing, table, keys)


def _join_documents(
    ids: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """(int64[documents], token_dtype[n]): the size of each document, and the tokens of all. As `Tokenizer.document`.

    ids       [7 8] [9]        begin_ids 1, eos_id 2
    sizes     4 3
    tokens    1 7 8 2 1 9 2
    """
    num_ids = np.fromiter(map(len, ids), np.int64, len(ids))
    # fromiter, since one list of all ids would take 36 bytes a token.
    flat = np.fromiter(
        itertools.chain.from_iterable(ids), token_dtype(tokenizer), int(num_ids.sum())
    )
    sizes = len(tokenizer.begin_ids) + num_ids + 1
    ends = np.cumsum(sizes)
    tokens = np.empty(int(sizes.sum()), flat.dtype)
    is_text = np.ones(len(tokens), bool)
    for number, token in enumerate(tokenizer.begin_ids):
        tokens[ends - sizes + number] = token
        is_text[ends - sizes + number] = False
    tokens[ends - 1] = tokenizer.eos_id
    is_text[ends - 1] = False
    tokens[is_text] = flat
    return sizes, tokens


def _first_bytes(ids: Sequence[Sequence[int]], tokenizer: Tokenizer) -> np.ndarray:
    """int64[documents]: UTF-8 bytes of the first token, which is no target if nothing comes before it.

    Changes by a normalizer, and the space that some tokenizers put before a text, do not count.
    """
    counts = []
    for text_ids in ids:
        # Of an empty text the first token is the one that ends it, which has no such space.
        first = len(tokenizer.token_bytes(text_ids[0] if text_ids else tokenizer.eos_id))
        counts.append(first - 1 if tokenizer.dummy_prefix and text_ids else first)
    return np.array(counts, np.int64)


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    chunk = []
    chars = 0
    for item in items:
        chunk.append(item)
        chars += len(item.example.full_text())
        if len(chunk) == _CHUNK_EXAMPLES or chars > _CHUNK_CHARS:
            yield chunk
            chunk = []
            chars = 0
    if chunk:
        yield chunk


def _encode_chats(chunk: Sequence[Item], unit: Unit, tokenizer: Tokenizer | None) -> _Encoded:
    table = np.zeros(len(chunk), EXAMPLE["chat"])
    table["part"], table["line"] = _origins(chunk, unit)
    keys = [(item.digest, item.side) for item in chunk]
    if tokenizer is None:
        table["size"] = 1  # the dummy token, whose mask is not needed
        table["bytes"] = [_num_bytes(item.example.target_text()) for item in chunk]
        return _Encoded(np.zeros(len(chunk), token_dtype(None)), np.zeros(0, bool), table, keys)
    encoded = [item.example.encode(tokenizer) for item in chunk]
    ids, masks = zip(*encoded, strict=True)
    table["size"] = list(map(len, ids))
    table["bytes"] = _target_bytes(ids, masks, tokenizer)
    size = sum(map(len, ids))
    tokens = np.fromiter(itertools.chain.from_iterable(ids), token_dtype(tokenizer), size)
    mask = np.fromiter(itertools.chain.from_iterable(masks), bool, size)
    return _Encoded(tokens, mask, table, keys)


def _origins(chunk: Sequence[Item], unit: Unit) -> tuple[list[int], list[int]]:
    """(index of the file part, line) of each conversation, for error messages."""
    number_of = {part.path: number for number, part in enumerate(unit.parts)}
    parts = []
    lines = []
    for item in chunk:
        # A path can hold colons, a line number cannot.
        path, _, line = item.example.origin.rpartition(":")
        parts.append(number_of[path])
        lines.append(int(line))
    return parts, lines


def _target_bytes(
    ids: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], tokenizer: Tokenizer
) -> list[int]:
    """UTF-8 bytes that the targets of each conversation stand for. The first token is never one: nothing predicts it."""
    counts = []
    for example_ids, mask in zip(ids, masks, strict=True):
        sizes = _token_sizes(tokenizer)[list(example_ids)]
        counts.append(int((sizes * mask)[1:].sum()))
    return counts


@functools.lru_cache(maxsize=1)
def _token_sizes(tokenizer: Tokenizer) -> np.ndarray:
    """int64[vocabulary]: the UTF-8 bytes of each token."""
    sizes = map(len, map(tokenizer.token_bytes, range(tokenizer.vocab_size)))
    return np.fromiter(sizes, np.int64, tokenizer.vocab_size)


def _sorted_run(keys: Sequence[tuple[bytes, int]]) -> np.ndarray:
    """KEY[len(keys)] in the order of the hashes; `index` is the position before sorting."""
    digests, sides = zip(*keys, strict=True) if keys else ((), ())
    # Big-endian, so that numbers are ordered as bytes are.
    halves = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2)
    run = np.zeros(len(keys), KEY)
    run["high"] = halves[:, 0]
    run["low"] = halves[:, 1]
    run["index"] = np.arange(len(keys))
    run["side"] = sides
    return run[np.lexsort((run["low"], run["high"]))]
