"""Examples -> tokenised store -> rows -> `batch_at(step)`, a pure function of (data, seed, step).

Batches never depend on the number of hosts: every process computes the same global indices, and reads only the
rows its own devices hold.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from jaxllm.config import InputError
from jaxllm.data.format import Example, examples, shuffled
from jaxllm.data.packing import Row, best_fit, concat_and_split, materialise, row_starts
from jaxllm.data.sources import DataConfig, Source, canonical, files, read_records
from jaxllm.tokenizer import Tokenizer

Batch = dict[str, jax.Array]
BatchAt = Callable[[int], Batch]


class Rows(NamedTuple):
    """The packed rows of one source."""

    plan: np.ndarray  # int64[pieces, 4]
    starts: np.ndarray  # int64[rows + 1]
    tokens: np.ndarray  # int32, all examples one after the other (memory-mapped)
    mask: np.ndarray  # bool, likewise
    offsets: np.ndarray  # int64[examples + 1]
    length: int
    pad_id: int
    num_examples: int
    num_dropped: int  # longer than a row
    num_tokens: int  # tokens that are targets
    num_bytes: int  # UTF-8 bytes of the text that is learnt

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> Row:
        pieces = self.plan[self.starts[index] : self.starts[index + 1]]
        return materialise(pieces, self.tokens, self.mask, self.offsets, self.length, self.pad_id)


class PromptExample(NamedTuple):
    """A prompt, ready for the model to answer."""

    messages: list[dict[str, str]]
    ids: list[int]
    answer: str = ""  # what a verifiable reward compares with


class RankedExample(NamedTuple):
    """K conversations that differ in the last reply, and their ranks (1 = best, equal = tie)."""

    rows: list[list[int]]
    ranks: list[int]
    prompt_length: int  # tokens that all rows begin with
    scores: tuple[float, ...] = ()  # empty: only ranked
    annotator: str = ""


Mixture = Sequence[tuple[Rows, float]]


def load_rows(
    data: DataConfig, kind: str, split: str, tokenizer: Tokenizer, length: int, cache_dir: Any
) -> list[tuple[Rows, float]]:
    """Packed rows of `length` tokens and the weight of each source; kind "document" or "chat".

    Tokenised examples are kept in cache_dir, by a key of everything they depend on. Raises InputError: an example
    that does not fit (data.too_long: error), one without a target, a split without examples.
    """
    if length < 2:
        raise InputError(f"length: rows of {length} tokens hold no target; set it to at least 2")
    store = _store(data, kind, split, tokenizer, Path(cache_dir))
    meta = json.loads((store / "meta.json").read_text())
    arrays = {
        name: np.load(store / f"{name}.npy", mmap_mode="r") for name in ("tokens", "mask", "offsets", "source", "bytes")
    }
    mixture = []
    for index, source in enumerate(data.sources):
        mine = np.flatnonzero(arrays["source"] == index)
        if len(mine):
            mixture.append((_rows(data, kind, arrays, mine, meta["origins"], length, tokenizer), source.weight))
    if not any(rows.num_rows for rows, _ in mixture):
        raise InputError(f"data.sources: every {kind} example of the {split} split is too long for {length} tokens")
    return [(rows, weight or float(rows.num_rows)) for rows, weight in mixture if rows.num_rows]


def _rows(
    data: DataConfig,
    kind: str,
    arrays: dict[str, np.ndarray],
    mine: np.ndarray,
    origins: list[str],
    length: int,
    tokenizer: Tokenizer,
) -> Rows:
    offsets, mask = arrays["offsets"], arrays["mask"]
    sizes = np.diff(offsets)[mine]
    kept, stops = mine, sizes
    if kind == "chat":
        kept, stops = _fit(data, mask, offsets, mine, sizes, origins, length)
        plan = best_fit(stops.tolist(), length)
    else:
        plan = concat_and_split(sizes.tolist(), length)
    plan[:, 1] = kept[plan[:, 1]]
    targets = sum(int(mask[offsets[e] + 1 : offsets[e] + n].sum()) for e, n in zip(kept, stops, strict=True))
    counts = {"num_examples": len(kept), "num_dropped": len(mine) - len(kept), "num_tokens": targets}
    sizes, cut = np.diff(offsets)[kept], arrays["bytes"][kept]
    for i in np.flatnonzero(stops < sizes):  # truncated: only the bytes of the targets that are left
        part = slice(offsets[kept[i]], offsets[kept[i]] + stops[i])
        cut[i] = sum(len(tokenizer.token_bytes(int(t))) for t in arrays["tokens"][part][mask[part]])
    counts["num_bytes"] = int(cut.sum())
    return Rows(plan, row_starts(plan), arrays["tokens"], mask, offsets, length, tokenizer.pad_id, **counts)


def _fit(
    data: DataConfig, mask, offsets, mine, sizes, origins: list[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The examples that stay and how many of their tokens: data.too_long decides about the long ones."""
    long = sizes > length
    if long.any() and data.too_long == "error":
        worst = mine[np.argmax(long)]
        raise InputError(
            f"{origins[worst]}: this conversation takes {offsets[worst + 1] - offsets[worst]} tokens and a row holds {length}; "
            "raise the length, shorten it, or set data.too_long to drop or truncate"
        )
    stops = np.minimum(sizes, length)
    keep = ~long if data.too_long == "drop" else np.ones(len(mine), bool)
    for example, stop, kept in zip(mine, stops, keep, strict=True):
        if kept and not mask[offsets[example] + 1 : offsets[example] + stop].any():
            raise InputError(
                f"{origins[example]}: not one token of this example is a target (no reply is left in {length} tokens); "
                "remove it, raise the length, or set data.too_long to drop"
            )
    return mine[keep], stops[keep]


def _store(data: DataConfig, kind: str, split: str, tokenizer: Tokenizer, cache_dir: Path) -> Path:
    """The folder with the tokenised examples; made if it is not there, whole or not at all."""
    key = hashlib.sha256(json.dumps(_identity(data, kind, split, tokenizer), sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir / f"{kind}-{split}-{key}"
    if folder.exists():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache_dir, prefix=".partial-"))
    try:
        _write_store(partial, examples(data, kind, split), kind, tokenizer)
        os.replace(partial, folder)
    except OSError:
        if not folder.exists():  # another process may have been faster, with the same contents
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _identity(data: DataConfig, kind: str, split: str, tokenizer: Tokenizer) -> list[Any]:
    prints = [
        _fingerprint(dataclasses.replace(source, path=path, exclude=()))
        for source in data.sources
        for path in (source.path, *source.exclude)
    ]
    config = dataclasses.asdict(data) | {"too_long": ""}  # decided later, from the lengths
    return ["v1", config, prints, kind, split, tokenizer.fingerprint]


def _fingerprint(source: Source) -> list[Any]:
    """(name, sha256) of each file; of a function, what it yields. Not the time: a copied file is the same data."""
    if names := files(source):
        return [(name, _sha256(name)) for name in names]
    digest = hashlib.sha256()
    for record in read_records(dataclasses.replace(source, match="", min_chars=0, max_chars=0, max_records=0)):
        digest.update(canonical(record.fields).encode() + b"\n")
    return [(source.path, digest.hexdigest())]


def _sha256(name: str) -> str:
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_store(folder: Path, stream: Iterator[Example], kind: str, tokenizer: Tokenizer) -> None:
    sizes, origins, sources, num_bytes = [], [], [], []
    with open(folder / "tokens.raw", "wb") as tokens_file, open(folder / "mask.raw", "wb") as mask_file:
        for chunk in itertools.batched(stream, 1024):
            for example, (ids, mask) in zip(chunk, _encode(chunk, kind, tokenizer), strict=True):
                tokens_file.write(np.array(ids, np.int32).tobytes())
                mask_file.write(np.array(mask, bool).tobytes())
                sizes.append(len(ids))
                origins.append(example.origin)
                sources.append(example.source)
                num_bytes.append(len(_learnt(example).encode()))
    for name, dtype in (("tokens", np.int32), ("mask", bool)):
        np.save(folder / f"{name}.npy", np.memmap(folder / f"{name}.raw", dtype, "r"))
        os.remove(folder / f"{name}.raw")
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
    np.save(folder / "source.npy", np.array(sources, np.int32))
    np.save(folder / "bytes.npy", np.array(num_bytes, np.int64))
    (folder / "meta.json").write_text(json.dumps({"origins": origins}))


def _encode(chunk: Sequence[Example], kind: str, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    if kind == "chat":
        yield from (tokenizer.encode_chat(example.messages) for example in chunk)
        return
    for ids in tokenizer.encode_batch([example.text for example in chunk], num_threads=-1):
        document = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        yield document, [False] + [True] * (len(document) - 1)


def _learnt(example: Example) -> str:
    """The text whose tokens are targets."""
    return example.text or "".join(m["content"] for m in example.messages if m["role"] == "assistant")


def make_batch_at(mixture: Mixture, *, batch_size: int, seed: int, sharding: jax.sharding.Sharding) -> BatchAt:
    """step -> {tokens, segment_ids, positions int32[B, T], loss_mask bool[B, T]}.

    Rows of each source are shuffled anew every epoch, and sources mixed in proportion to their weights (a share of
    rows). Row number n of the run is a function of (data, seed, n) alone.
    """
    order = _order([rows.num_rows for rows, _ in mixture], [weight for _, weight in mixture], seed)

    def batch_at(step: int) -> Batch:
        picked = [order[step * batch_size + i] for i in range(batch_size)]
        return _place(lambda i: mixture[picked[i][0]][0].row(picked[i][1]), batch_size, sharding)

    return batch_at


def epoch_batches(
    mixture: Mixture, *, batch_size: int, sharding: jax.sharding.Sharding, max_batches: int = 0
) -> Iterator[Batch]:
    """Every row once, in order; the last batch is filled up with rows of padding. max_batches 0: all."""
    index = [(rows, i) for rows, _ in mixture for i in range(rows.num_rows)]
    if max_batches and len(index) > max_batches * batch_size:  # rows from everywhere, not the first ones
        index = [index[i] for i in np.linspace(0, len(index) - 1, max_batches * batch_size).astype(int)]
    for start in range(0, len(index), batch_size):
        part = index[start : start + batch_size]

        def row(i: int, part=part) -> Row:
            rows, number = part[min(i, len(part) - 1)]
            row = rows.row(number)
            return row if i < len(part) else {name: np.zeros_like(value) for name, value in row.items()}

        yield _place(row, batch_size, sharding)


def load_prompts(data: DataConfig, split: str, tokenizer: Tokenizer, max_length: int) -> list[PromptExample]:
    """Prompts of at most max_length tokens, the chat template's included, in a fixed shuffled order.

    Raises InputError on a longer one, unless data.too_long is "drop", and where no prompt would fit.
    """
    if max_length < 1:
        raise InputError(
            "sampling.max_new_tokens: a response of so many tokens leaves no room for a prompt in model.max_length; "
            "lower the one or raise the other"
        )
    prompts = []
    for example in shuffled(examples(data, "prompt", split)):
        ids, _ = tokenizer.encode_chat(example.messages, reply=True)
        if len(ids) <= max_length:
            prompts.append(PromptExample(example.messages, ids, example.answer))
        elif data.too_long != "drop":
            raise InputError(
                f"{example.origin}: the prompt takes {len(ids)} tokens and {max_length} fit beside the response; "
                "shorten it, raise model.max_length, or set data.too_long to drop"
            )
    if not prompts:
        raise InputError(f"data.sources: every prompt of the {split} split is longer than {max_length} tokens")
    return prompts


def make_prompt_batch_at(
    prompts: Sequence[PromptExample],
    *,
    batch_size: int,
    seed: int,
    length: int,
    pad_id: int,
    sharding: jax.sharding.Sharding,
) -> BatchAt:
    """step -> {tokens int32[B, P], mask bool[B, P] (left-padded), index, prompt int32[B]}.

    index tells the prompts of a batch apart, for their random numbers; prompt is the place in `prompts`.
    """
    order = _order([len(prompts)], [1.0], seed)

    def batch_at(step: int) -> Batch:
        def row(i: int) -> Row:
            prompt = order[step * batch_size + i][1]
            ids = prompts[prompt].ids
            tokens, mask = np.full(length, pad_id, np.int32), np.zeros(length, bool)
            tokens[length - len(ids) :], mask[length - len(ids) :] = ids, True
            return {"tokens": tokens, "mask": mask, "index": np.int32(i), "prompt": np.int32(prompt)}

        return _place(row, batch_size, sharding)

    return batch_at


def load_ranked(data: DataConfig, split: str, tokenizer: Tokenizer, length: int) -> list[RankedExample]:
    """Rankings whose conversations fit `length` tokens. Raises InputError on a longer one (data.too_long: error)."""
    ranked = []
    for example in examples(data, "ranked", split):
        replies = [[*example.messages, {"role": "assistant", "content": r}] for r in example.responses]
        encoded = [tokenizer.encode_chat(messages) for messages in replies]
        longest = max(len(ids) for ids, _ in encoded)
        if longest > length and data.too_long == "error":
            raise InputError(
                f"{example.origin}: prompt and response take {longest} tokens and the limit is {length}; "
                "raise the length, or set data.too_long to drop or truncate"
            )
        if longest > length and data.too_long == "drop":
            continue
        if not all(any(mask[:length]) for _, mask in encoded):
            raise InputError(
                f"{example.origin}: no token of a response is left in {length} tokens, so nothing tells them apart; "
                "raise the length, or set data.too_long to drop"
            )
        prompt, _ = tokenizer.encode_chat(example.messages, reply=True)
        rows = [ids[:length] for ids, _ in encoded]
        ranked.append(RankedExample(rows, example.ranks, len(prompt), example.scores, example.annotator))
    if not ranked:
        raise InputError(f"data.sources: every ranking of the {split} split is longer than {length} tokens")
    return ranked


def make_ranked_batch_at(
    ranked: Sequence[RankedExample], *, batch_size: int, seed: int, sharding: jax.sharding.Sharding
) -> BatchAt:
    """step -> {tokens, segment_ids int32[B, K, T], loss_mask bool[B, K, T], ranks int32[B, K], scores float32[B, K]}.

    B prompts, K the most responses of any; loss_mask is True on a reply's tokens, rank 0 is no response.
    """
    order, shape = _order([len(ranked)], [1.0], seed), _ranked_shape(ranked)

    def batch_at(step: int) -> Batch:
        return _place(lambda i: _ranked_row(ranked[order[step * batch_size + i][1]], *shape), batch_size, sharding)

    return batch_at


def ranked_epoch(
    ranked: Sequence[RankedExample], *, batch_size: int, sharding: jax.sharding.Sharding
) -> Iterator[Batch]:
    """Every ranking once, in order; the last batch is filled up with prompts without responses (rank 0)."""
    shape, nothing = _ranked_shape(ranked), RankedExample([], [], 0)
    for start in range(0, len(ranked), batch_size):
        part = [*ranked[start : start + batch_size]]
        part += [nothing] * (batch_size - len(part))
        yield _place(lambda i, part=part: _ranked_row(part[i], *shape), batch_size, sharding)


def _ranked_shape(ranked: Sequence[RankedExample]) -> tuple[int, int]:
    """(K, T): the most responses, and the longest conversation rounded up to 16."""
    longest = max(len(row) for example in ranked for row in example.rows)
    return max(len(example.rows) for example in ranked), -(-longest // 16) * 16


def _ranked_row(example: RankedExample, num_responses: int, length: int) -> Row:
    tokens, segment_ids = (np.zeros((num_responses, length), np.int32) for _ in range(2))
    ranks, scores = np.zeros(num_responses, np.int32), np.zeros(num_responses, np.float32)
    ranks[: len(example.ranks)], scores[: len(example.scores)] = example.ranks, example.scores
    for k, ids in enumerate(example.rows):
        tokens[k, : len(ids)], segment_ids[k, : len(ids)] = ids, 1
    loss_mask = (segment_ids > 0) & (np.arange(length)[None] >= example.prompt_length)
    return {"tokens": tokens, "segment_ids": segment_ids, "loss_mask": loss_mask, "ranks": ranks, "scores": scores}


def _order(sizes: Sequence[int], weights: Sequence[float], seed: int) -> Any:
    """An endless sequence of (source, row): each source shuffled anew every epoch, mixed by weight."""
    parts = [
        grain.MapDataset.range(size).seed(seed + k).shuffle().map(lambda i, k=k: (k, int(i))).repeat()
        for k, size in enumerate(sizes)
    ]
    return grain.MapDataset.mix(parts, weights=list(weights)) if len(parts) > 1 else parts[0]


def _place(row: Callable[[int], Row], batch_size: int, sharding: Any) -> Batch:
    """Global arrays [B, ...] from a function of the row number; only the rows of this host's devices are made."""
    rows: dict[int, Row] = {}

    def part(name: str, index: Any) -> np.ndarray:
        numbers = range(batch_size)[index[0]]
        for i in numbers:
            if i not in rows:
                rows[i] = row(i)
        return np.stack([rows[i][name] for i in numbers])[(slice(None), *index[1:])]

    spec = tuple(sharding.spec)

    def array(name: str, shape: tuple[int, ...]) -> jax.Array:
        where = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec[: len(shape)]))
        return jax.make_array_from_callback(shape, where, lambda index: part(name, index))

    first = min(r.start or 0 for r in (i[0] for i in _local_indices(sharding, batch_size)))
    rows[first] = row(first)
    return {name: array(name, (batch_size, *np.shape(value))) for name, value in rows[first].items()}


def _local_indices(sharding: Any, batch_size: int) -> list[Any]:
    batch_only = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*tuple(sharding.spec)[:1]))
    return list(batch_only.addressable_devices_indices_map((batch_size,)).values())
