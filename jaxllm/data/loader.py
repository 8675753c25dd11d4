"""Examples -> tokenized store -> rows -> `batch_at(step)`, a pure function of (data, seed, step).

Batches never depend on the number of hosts: every process reads only the rows its own devices hold.
"""

import fractions
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxllm.config import InputError
from jaxllm.data.cache import ArrayFile, get_or_build, key_of
from jaxllm.data.packing import Row, best_fit, concat_and_split, materialise
from jaxllm.data.sources import DataConfig
from jaxllm.data.splits import examples, nothing_there, require_examples, require_room, shuffled
from jaxllm.data.store import EXAMPLE, Examples, Tokens, open_store
from jaxllm.tokenizers.trained import Tokenizer

Batch = dict[str, jax.Array]
BatchAt = Callable[[int], Batch]
_BEGIN = np.dtype([("example", "<i8"), ("offset", "<i8")])


class Rows(NamedTuple):
    """The packed rows of one source; all that grows with them is on disk."""

    tokens: Tokens
    table: ArrayFile  # EXAMPLE[kind], in the order of the rows
    begins: ArrayFile  # _BEGIN: where each row begins
    length: int
    pad_id: int
    num_examples: int
    num_dropped: int  # longer than a row
    num_tokens: int  # tokens that are targets
    num_bytes: int  # UTF-8 bytes that these targets stand for
    fingerprint: str  # of the contents, the tokenizer, the split and the length
    epochs: float = 1.0  # passes over these rows in one over the mixture
    phases: tuple[tuple[int, float], ...] = ()  # (step, weight from that step on)

    @property
    def num_rows(self) -> int:
        return len(self.begins)

    def row(self, index: int) -> Row:
        begin = self.begins.read(index, min(index + 2, self.num_rows))
        first, offset = begin[0].tolist()
        stop = begin["example"][1] + (begin["offset"][1] > 0) if len(begin) > 1 else len(self.table)
        table = self.table.read(first, int(stop))
        starts, sizes = table["start"].astype(np.int64), table["size"].astype(np.int64)
        starts[0], sizes[0] = starts[0] + offset, sizes[0] - offset
        sizes[-1] -= max(0, sizes.sum() - self.length)  # the document goes on in the next row
        return materialise(*self.tokens.read(starts, sizes), sizes, self.length, self.pad_id)


class PromptExample(NamedTuple):
    """A prompt for the model to answer."""

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

    Raises InputError: an example that does not fit (data.too_long: error), one without a target, an empty split.
    """
    if length < 2:
        raise InputError(f"length: rows of {length} tokens hold no target; set it to at least 2")
    share, folder = (jax.process_index(), jax.process_count()), Path(cache_dir)
    found = open_store(data, kind, tokenizer, folder, share)[split]
    if not any(len(each.table) for each in found):
        raise nothing_there(data, kind, split)
    require_examples(data, kind, split, [len(each.table) for each in found])
    mixture, kept = [], []
    for index, each in enumerate(found):
        rows = _rows(data, kind, each, length, tokenizer, folder)
        rows = rows._replace(
            phases=tuple((phase.step, phase.weights[index]) for phase in data.curriculum)
        )
        if rows.num_rows:
            kept.append(index)
            mixture.append((rows, each.source.weight or float(rows.num_rows * rows.epochs)))
    if not mixture:
        raise InputError(
            f"data.sources: every {kind} example of the {split} split is too long for {length} tokens"
        )
    if not any(rows.num_bytes for rows, _ in mixture):
        none = f"no {kind} example of the {split} split has a target that stands for text"
        raise InputError(f"data.sources: {none} (a first token is none); give longer texts")
    require_room(
        data, kind, split, [i for i, each in enumerate(found) if len(each.table)], kept, length
    )
    for phase in (
        zip(*(rows.phases for rows, _ in mixture), strict=True) if split == "train" else ()
    ):
        if not any(weight for _, weight in phase):
            raise InputError(
                f"data.curriculum: step {phase[0][0]} gives weight only to sources without examples"
            )
    return mixture


def _rows(
    data: DataConfig, kind: str, each: Examples, length: int, tokenizer: Tokenizer, folder: Path
) -> Rows:
    key = key_of(each.key, length, data.too_long if kind == "chat" else "")
    plan = folder / f"rows-{key}"
    make = _plan_chats if kind == "chat" else _plan_documents
    meta = get_or_build(plan, functools.partial(make, each, data, length, tokenizer))
    table = ArrayFile(plan / "table", EXAMPLE[kind]) if kind == "chat" else each.table
    del meta["files"]
    names = {"fingerprint": key, "epochs": each.source.epochs}
    return Rows(
        each.tokens,
        table,
        ArrayFile(plan / "begins", _BEGIN),
        length,
        tokenizer.pad_id,
        **meta,
        **names,
    )


def _plan_documents(
    each: Examples, data: DataConfig, length: int, tokenizer: Tokenizer, to: Path
) -> dict[str, int]:
    sizes = (chunk["size"].astype(np.int64) for chunk in each.table.chunks())
    with open(to / "begins", "wb") as file:
        file.writelines(
            begins.astype("<i8").tobytes() for begins in concat_and_split(sizes, length)
        )
    numbers = {"num_tokens": each.num_tokens - len(each.table), "num_bytes": each.num_bytes}
    return {"num_examples": len(each.table), "num_dropped": 0, **numbers}


def _plan_chats(
    each: Examples, data: DataConfig, length: int, tokenizer: Tokenizer, to: Path
) -> dict[str, int]:
    """data.too_long decides about long conversations; the table has the others row by row, truncated."""
    table = each.table.read(0, len(each.table)).copy()
    long = table["size"] > length
    if long.any() and data.too_long == "error":
        worst = table[np.argmax(long)]
        takes = f"this conversation takes {worst['size']} tokens and a row holds {length}"
        raise InputError(
            f"{each.origin(worst)}: {takes}; raise the length, or set data.too_long to drop or truncate"
        )
    dropped = int(long.sum()) if data.too_long == "drop" else 0
    table = table[~long] if dropped else table
    cut = table["size"] > length
    table["size"] = np.minimum(table["size"], length)
    targets = 0
    for part in np.array_split(np.arange(len(table)), 1 + len(table) // 4096) if len(table) else ():
        sizes = table["size"][part].astype(np.int64)
        (ids, mask), firsts = (
            each.tokens.read(table["start"][part], sizes),
            np.cumsum(sizes) - sizes,
        )
        assert mask is not None
        mask[firsts] = False
        counts = np.add.reduceat(mask, firsts, dtype=np.int64)
        if not counts.all():
            wrong = f"{each.origin(table[part[np.argmin(counts)]])}: not one token of this example is a target"
            raise InputError(
                f"{wrong} (no reply in {length} tokens); raise the length, or set data.too_long to drop"
            )
        targets += int(counts.sum())
        for i in np.flatnonzero(cut[part]):  # only the bytes of the targets that are left
            where = slice(firsts[i], firsts[i] + sizes[i])
            table["bytes"][part[i]] = sum(
                len(tokenizer.token_bytes(int(t))) for t in ids[where][mask[where]]
            )
    plan = best_fit(table["size"].tolist(), length)
    (to / "table").write_bytes(table[plan[:, 1]].tobytes())
    begins = np.zeros(len(np.unique(plan[:, 0])), _BEGIN)
    begins["example"] = np.searchsorted(plan[:, 0], np.arange(len(begins)))
    (to / "begins").write_bytes(begins.tobytes())
    numbers = {"num_tokens": targets, "num_bytes": int(table["bytes"].sum(dtype=np.int64))}
    return {"num_examples": len(table), "num_dropped": dropped, **numbers}


def fingerprint(loaded: Sequence[Any]) -> str:
    """One name for what batches are made of: a mixture of rows with its weights, or loaded prompts or rankings."""
    rows = (
        (r.fingerprint, weight, r.epochs, r.phases) for r, weight in loaded if isinstance(r, Rows)
    )
    return key_of(*(rows if loaded and isinstance(loaded[0][0], Rows) else loaded))


def make_batch_at(mixture: Mixture, *, batch_size: int, seed: int, sharding: Sharding) -> BatchAt:
    """step -> {tokens, segment_ids, positions int32[B, T], loss_mask bool[B, T]}; see `_order` and `_Stretch`."""
    order = _order([rows.num_rows for rows, _ in mixture], _phases(mixture, batch_size), seed)
    return _batch_at(
        order, lambda _, source, number: mixture[source][0].row(number), batch_size, sharding
    )


def epoch_rows(mixture: Mixture) -> float:
    """Rows in one pass over a mixture whose weights go by size."""
    return sum(rows.num_rows * rows.epochs for rows, _ in mixture)


def epochs_of(mixture: Mixture, num_steps: int, batch_size: int) -> list[float]:
    """Passes over each source in so many steps."""
    total = num_steps * batch_size
    phase = next(phase for phase in reversed(_phases(mixture, batch_size)) if phase.begin <= total)
    return [
        count / rows.num_rows for count, (rows, _) in zip(phase.until(total), mixture, strict=True)
    ]


def epoch_batches(
    mixture: Mixture, *, batch_size: int, sharding: Sharding, max_batches: int = 0
) -> Iterator[Batch]:
    """Every row once, in order, or from everywhere as many as max_batches hold; the last is filled up with padding."""
    ends = np.cumsum([rows.num_rows for rows, _ in mixture])
    total = int(ends[-1])
    count = min(total, max_batches * batch_size or total)

    def row(number: int) -> Row:
        source = int(np.searchsorted(ends, number, "right"))
        return mixture[source][0].row(number - int(ends[source]) + mixture[source][0].num_rows)

    return _epoch(np.linspace(0, total - 1, count).astype(int), row, batch_size, sharding)


def load_prompts(
    data: DataConfig, split: str, tokenizer: Tokenizer, max_length: int
) -> list[PromptExample]:
    """Prompts of at most max_length tokens, the chat template's included, in a fixed shuffled order.

    Raises InputError on a longer one, unless data.too_long is "drop", and where no prompt would fit.
    """
    if max_length < 1:
        raise InputError(
            "sampling.max_new_tokens: leaves no room for a prompt in model.max_length; lower it"
        )
    prompts, kept = [], []
    every = shuffled(examples(data, "prompt", split))
    for example in every:
        ids, _ = example.encode(tokenizer, reply=True)
        if len(ids) <= max_length:
            prompts.append(PromptExample(example.messages, ids, example.answer))
            kept.append(example.source)
        elif data.too_long != "drop":
            takes = f"the prompt takes {len(ids)} tokens and {max_length} fit beside the response"
            raise InputError(
                f"{example.origin}: {takes}; raise model.max_length, or set data.too_long to drop"
            )
    if not prompts:
        raise InputError(
            f"data.sources: every prompt of the {split} split is longer than {max_length} tokens"
        )
    require_room(data, "prompt", split, [example.source for example in every], kept, max_length)
    return prompts


def make_prompt_batch_at(
    prompts: Sequence[PromptExample],
    *,
    batch_size: int,
    seed: int,
    length: int,
    pad_id: int,
    sharding: Sharding,
) -> BatchAt:
    """step -> {tokens int32[B, P], mask bool[B, P] (left-padded), index, prompt int32[B]}: in the batch, in prompts."""

    def row(i: int, _: int, prompt: int) -> Row:
        ids = prompts[prompt].ids
        tokens, mask = np.full(length, pad_id, np.int32), np.zeros(length, bool)
        tokens[length - len(ids) :], mask[length - len(ids) :] = ids, True
        return {"tokens": tokens, "mask": mask, "index": np.int32(i), "prompt": np.int32(prompt)}

    return _batch_at(_order([len(prompts)], _WHOLE, seed), row, batch_size, sharding)


def load_ranked(
    data: DataConfig, split: str, tokenizer: Tokenizer, length: int
) -> list[RankedExample]:
    """Rankings whose conversations fit `length` tokens. Raises InputError on a longer one (data.too_long: error)."""
    ranked, found, kept = [], [], []
    for example in examples(data, "ranked", split):
        found.append(example.source)
        encoded = [example.encode(tokenizer, response) for response in example.responses]
        longest = max(len(ids) for ids, _ in encoded)
        if longest > length and data.too_long == "error":
            take = f"prompt and response take {longest} tokens and the limit is {length}"
            raise InputError(
                f"{example.origin}: {take}; raise the length, or set data.too_long to drop or truncate"
            )
        if longest > length and data.too_long == "drop":
            continue
        if not all(any(mask[:length]) for _, mask in encoded):
            left = f"no token of a response is left in {length} tokens"
            raise InputError(
                f"{example.origin}: {left}; raise the length, or set data.too_long to drop"
            )
        prompt, _ = example.encode(tokenizer, reply=True)
        # Through the end of turn, as a rollout ends: some templates write a line end behind it.
        rows = [ids[: min(length, len(mask) - mask[::-1].index(True))] for ids, mask in encoded]
        ranked.append(
            RankedExample(rows, example.ranks, len(prompt), example.scores, example.annotator)
        )
        kept.append(example.source)
    if not ranked:
        raise InputError(
            f"data.sources: every ranking of the {split} split is longer than {length} tokens"
        )
    require_room(data, "ranked", split, found, kept, length)
    return ranked


def make_ranked_batch_at(
    ranked: Sequence[RankedExample], *, batch_size: int, seed: int, sharding: Sharding
) -> BatchAt:
    """step -> {tokens, segment_ids int32[B, K, T], loss_mask bool[B, K, T], ranks int32[B, K], scores float32[B, K]}.

    loss_mask is True on a reply's tokens, rank 0 is no response.
    """
    row = _ranked_row(ranked)
    return _batch_at(
        _order([len(ranked)], _WHOLE, seed), lambda *place: row(place[-1]), batch_size, sharding
    )


def ranked_epoch(
    ranked: Sequence[RankedExample], *, batch_size: int, sharding: Sharding
) -> Iterator[Batch]:
    """Every ranking once, in order; the last batch is filled up with prompts without responses (rank 0)."""
    return _epoch(np.arange(len(ranked)), _ranked_row(ranked), batch_size, sharding)


def _ranked_row(ranked: Sequence[RankedExample]) -> Callable[[int], Row]:
    """Number -> the arrays [K, T] and [K] of a ranking: K the most responses, T the longest rounded up to 16."""
    num_responses = max(len(example.rows) for example in ranked)
    length = -(-max(len(ids) for example in ranked for ids in example.rows) // 16) * 16

    def row(number: int) -> Row:
        example = ranked[number]
        tokens, segment_ids = (np.zeros((num_responses, length), np.int32) for _ in range(2))
        ranks, scores = np.zeros(num_responses, np.int32), np.zeros(num_responses, np.float32)
        ranks[: len(example.ranks)], scores[: len(example.scores)] = example.ranks, example.scores
        for k, ids in enumerate(example.rows):
            tokens[k, : len(ids)], segment_ids[k, : len(ids)] = ids, 1
        loss_mask = (segment_ids > 0) & (np.arange(length)[None] >= example.prompt_length)
        return {
            "tokens": tokens,
            "segment_ids": segment_ids,
            "loss_mask": loss_mask,
            "ranks": ranks,
            "scores": scores,
        }

    return row


class _Stretch(NamedTuple):
    """Rows from number `begin` on are drawn in these shares."""

    begin: int
    shares: list[int]
    drawn: list[int]  # of each source, before

    def until(self, number: int) -> list[int]:
        """How many of the first `number` rows come from each source: of the first its share of the phase's rows, rounded,
        of the second its share of the rest, and so on."""
        rows, rest, counts = number - self.begin, sum(self.shares), []
        for share, before in zip(self.shares, self.drawn, strict=True):
            left = rows * (rest - share) // rest if rest else 0
            counts.append(before + rows - left)
            rows, rest = left, rest - share
        return counts


_WHOLE = [_Stretch(0, [1], [0])]  # of a single source


def _phases(mixture: Mixture, batch_size: int) -> list[_Stretch]:
    phases = [_Stretch(0, _shares([weight for _, weight in mixture]), [0] * len(mixture))]
    for changes in zip(*(rows.phases for rows, _ in mixture), strict=True):
        begin = changes[0][0] * batch_size
        phases.append(
            _Stretch(begin, _shares([weight for _, weight in changes]), phases[-1].until(begin))
        )
    return phases


def _shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in exactly the proportion of the weights as they are written (Grain's mix rounds them to 1%)."""
    exact = [fractions.Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return [number // math.gcd(*whole) for number in whole]


def _order(
    sizes: Sequence[int], phases: Sequence[_Stretch], seed: int
) -> Callable[[int], tuple[int, int]]:
    """Number in an endless sequence -> (source, row): each source is shuffled anew every epoch, and goes on where it
    was when the weights change."""
    shuffles = [
        grain.MapDataset.range(size).seed((seed + k) % 2**32).shuffle()
        for k, size in enumerate(sizes)
    ]

    def order(number: int) -> tuple[int, int]:
        phase = next(phase for phase in reversed(phases) if phase.begin <= number)
        now, then = phase.until(number), phase.until(number + 1)
        source = next(k for k, count in enumerate(then) if count > now[k])
        row: Any = shuffles[source][now[source]]
        return source, int(row)

    return order


def _batch_at(
    order: Callable[[int], tuple[int, int]],
    row: Callable[[int, int, int], Row],
    batch_size: int,
    sharding: Any,
) -> BatchAt:
    """step -> the batch of the rows that come then; row(place in the batch, source, row of the source)."""
    return lambda step: _place(
        lambda i: row(i, *order(step * batch_size + i)), batch_size, sharding
    )


def _epoch(
    numbers: np.ndarray, row: Callable[[int], Row], batch_size: int, sharding: Any
) -> Iterator[Batch]:
    """Batches of these rows in order; the last one is filled up with zeros."""
    for start in range(0, len(numbers), batch_size):
        part = numbers[start : start + batch_size].tolist()

        def filled(i: int, part=part) -> Row:
            made = row(part[min(i, len(part) - 1)])
            return (
                made
                if i < len(part)
                else {name: np.zeros_like(value) for name, value in made.items()}
            )

        yield _place(filled, batch_size, sharding)


def _place(row: Callable[[int], Row], batch_size: int, sharding: Any) -> Batch:
    """Global arrays [B, ...] from a function of the row number; only the rows of this host's devices are made."""
    row, axes = functools.cache(row), tuple(sharding.spec)
    along = lambda rank: NamedSharding(sharding.mesh, PartitionSpec(*axes[:rank]))

    def array(name: str, shape: tuple[int, ...]) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return np.stack([row(i)[name] for i in range(batch_size)[index[0]]])[
                (slice(None), *index[1:])
            ]

        return jax.make_array_from_callback(shape, along(len(shape)), part)

    here: Any = along(1).addressable_devices_indices_map((batch_size,)).values()
    first = row(min(index[0].start or 0 for index in here))
    return {name: array(name, (batch_size, *np.shape(value))) for name, value in first.items()}
