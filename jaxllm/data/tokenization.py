"""The content of one unit: its records are read, split, tokenized and written. No JAX: worker processes import this."""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data import units
from jaxllm.data.format import Example, assign_splits
from jaxllm.data.sources import read_records
from jaxllm.data.units import EXAMPLE, KEY, SPLITS, Unit, token_dtype
from jaxllm.tokenizers.trained import Tokenizer

# A chunk is encoded in one call and is in memory at once: it ends at so many examples or characters.
_CHUNK_EXAMPLES = 1024
_CHUNK_CHARS = 1 << 20


class Item(NamedTuple):
    """An example that belongs to a split."""

    example: Example
    digest: bytes  # of its content
    side: int  # 1 + the index of its split in SPLITS


def write_unit(folder: Path, unit: Unit, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Writes the files of a unit into a folder (see `units`) and returns {"tokens": their number}.

    tokenizer: None gives each example one dummy token, so that its `start` is its number.
    """
    total = 0
    keys: list[tuple[bytes, int]] = []
    with contextlib.ExitStack() as stack:
        files = {}
        for name in ("tokens", "mask", "examples", "keys"):
            files[name] = stack.enter_context(open(folder / name, "wb"))
        for chunk in _chunks(distinct_items(unit)):
            examples, digests, sides = zip(*chunk, strict=True)
            ids, masks = _encode(examples, unit.kind, tokenizer)
            table = _example_table(examples, ids, unit, first_token=total)
            table["bytes"] = _scored_bytes(examples, ids, masks, tokenizer)
            size = int(table["size"].sum(dtype=np.int64))
            # fromiter, since one list of all ids of a chunk would take 36 bytes a token.
            tokens = np.fromiter(itertools.chain.from_iterable(ids), token_dtype(tokenizer), size)
            mask = np.fromiter(itertools.chain.from_iterable(masks), bool)
            files["tokens"].write(tokens.tobytes())
            files["mask"].write(mask.tobytes())
            files["examples"].write(table.tobytes())
            total += size
            keys += zip(digests, sides, strict=True)
            # A run is complete only when it has RUN keys, so that run i holds examples [i RUN, (i + 1) RUN).
            while len(keys) >= units.RUN:
                files["keys"].write(_sorted_run(keys[: units.RUN]).tobytes())
                keys = keys[units.RUN :]
        files["keys"].write(_sorted_run(keys).tobytes())
    return {"tokens": total}


def distinct_items(unit: Unit) -> Iterator[Item]:
    """The examples of a unit that belong to a split, without repetitions that are near each other.

    Only the store compares all contents. Here a text that occurs a million times is dropped early, so that it is
    sorted only a few times.
    """
    records = read_records(unit.data.sources[unit.source], unit.parts)
    seen: set[tuple[bytes, int]] = set()
    for example, split in assign_splits(unit.data, unit.kind, unit.source, records):
        if split is None:
            continue
        key = (example.digest(), 1 + SPLITS.index(split))
        if key in seen:
            continue
        # A bounded memory of what was seen lately.
        if len(seen) >= units.RUN:
            seen.clear()
        seen.add(key)
        yield Item(example, *key)


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


def _encode(
    examples: Sequence[Example], kind: str, tokenizer: Tokenizer | None
) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[bool]]]:
    """(token ids, target mask) of each example; no masks for documents, where all tokens but the first are targets."""
    if tokenizer is None:
        # The dummy token; its mask is not needed.
        return [[0]] * len(examples), []
    if kind == "chat":
        encoded = [example.encode(tokenizer) for example in examples]
        ids, masks = zip(*encoded, strict=True)
        return ids, masks
    encoded = tokenizer.encode_batch([example.text for example in examples])
    return list(map(tokenizer.document, encoded)), []


def _example_table(
    examples: Sequence[Example], ids: Sequence[Sequence[int]], unit: Unit, first_token: int
) -> np.ndarray:
    """EXAMPLE[kind][examples] without the bytes, which `_scored_bytes` counts."""
    sizes = np.array(list(map(len, ids)), np.int64)
    table = np.zeros(len(examples), EXAMPLE[unit.kind])
    table["start"] = first_token + np.cumsum(sizes) - sizes
    table["size"] = sizes
    if unit.kind == "chat":
        number_of = {part.path: number for number, part in enumerate(unit.parts)}
        # A path can hold colons, a line number cannot.
        for row, example in zip(table, examples, strict=True):
            path, _, line = example.origin.rpartition(":")
            row["part"] = number_of[path]
            row["line"] = int(line)
    return table


def _scored_bytes(
    examples: Sequence[Example],
    ids: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]],
    tokenizer: Tokenizer | None,
) -> list[int]:
    """UTF-8 bytes that the targets of each example stand for. The first token is never a target: nothing predicts it.

    For a document these are the bytes of its text, without those of the first token if no special token comes before
    the text. So changes by a normalizer, and the space that some tokenizers put before a text, do not count.
    """
    if masks:
        counts = []
        for example_ids, mask in zip(ids, masks, strict=True):
            sizes = _token_sizes(tokenizer)[list(example_ids)]
            counts.append(int((sizes * mask)[1:].sum()))
        return counts
    counts = [len(e.target_text().encode("utf-8", "surrogatepass")) for e in examples]
    if tokenizer is None or tokenizer.begin_ids:
        return counts
    for number, example_ids in enumerate(ids):
        first = len(tokenizer.token_bytes(example_ids[0]))
        # Of an empty text the first token is the one that ends it, which has no such space.
        if tokenizer.dummy_prefix and len(example_ids) > 1:
            first -= 1
        counts[number] = max(0, counts[number] - first)
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
