"""What a stage loads: rows of text, prompts, or rankings; and its batches, pure functions of (data, seed, step)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from jaxllm.config import InputError
from jaxllm.data.batches import Batch, BatchAt, epoch, global_batch, make_batch_function
from jaxllm.data.cache import key_of
from jaxllm.data.config import DataConfig
from jaxllm.data.format import Example
from jaxllm.data.mixture import SINGLE_SOURCE, Mixture, interval_at, intervals, make_order
from jaxllm.data.packing import Row
from jaxllm.data.rows import Rows, pack_rows
from jaxllm.data.splits import examples, nothing_there, require_examples, require_room, shuffled
from jaxllm.data.store import open_store
from jaxllm.runtime.store.working import exchange_of
from jaxllm.tokenizers.trained import Tokenizer


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
    labels: tuple[bool, ...] = ()  # whether each is desirable by itself; empty: only ranked


# --- rows of text


def load_rows(
    data: DataConfig, kind: str, split: str, tokenizer: Tokenizer, length: int, cache_dir: Any
) -> list[tuple[Rows, float]]:
    """Packed rows of `length` tokens and the weight of each source; kind "document" or "chat".

    Raises:
        InputError: an example does not fit (data.too_long: error) or has no target, or a split is empty.
    """
    if length < 2:
        raise InputError(f"length: rows of {length} tokens hold no target; set it to at least 2")
    folder = Path(cache_dir)
    share = (jax.process_index(), jax.process_count())
    # Both splits are tokenized together; the second call finds them in the cache.
    found = open_store(data, kind, tokenizer, folder, share, exchange_of(folder))[split]
    counts = [len(source.table) for source in found]
    if not any(counts):
        raise nothing_there(data, kind, split)
    require_examples(data, kind, split, counts)
    mixture = []
    kept = []
    for index, source_examples in enumerate(found):
        rows = pack_rows(data, kind, source_examples, length, tokenizer, folder)
        phases = tuple((phase.step, phase.weights[index]) for phase in data.curriculum)
        rows = rows._replace(phases=phases)
        # All conversations of a source may have been dropped as too long.
        if rows.num_rows:
            kept.append(index)
            # Without weights every row is used as often as `epochs` says.
            weight = source_examples.source.weight or float(rows.num_rows * rows.epochs)
            mixture.append((rows, weight))
    _check_targets(mixture, kind, split, length)
    with_examples = np.flatnonzero(counts).tolist()
    require_room(data, kind, split, with_examples, kept, length)
    if split == "train":
        _check_curriculum(data, kept)
    return mixture


def _check_targets(mixture: Mixture, kind: str, split: str, length: int) -> None:
    if not mixture:
        raise InputError(
            f"data.sources: every {kind} example of the {split} split is too long for {length} tokens"
        )
    # Bits per byte would divide by zero.
    if not any(rows.num_bytes for rows, _ in mixture):
        raise InputError(
            f"data.sources: no {kind} example of the {split} split has a target that stands for text "
            "(a first token is not a target); give longer texts"
        )


def _check_curriculum(data: DataConfig, kept: Sequence[int]) -> None:
    for phase in data.curriculum:
        if not any(phase.weights[index] for index in kept):
            raise InputError(
                f"data.curriculum: step {phase.step} gives weight only to sources without examples; "
                "give weight to another source"
            )


def rows_fingerprint(mixture: Mixture) -> str:
    """A name for everything that the batches of a mixture depend on, except for seed and batch size."""
    # A resumed run compares this with its checkpoint's: the values and their order are fixed.
    return key_of(*((r.fingerprint, weight, r.epochs, r.phases) for r, weight in mixture))


def make_batch_at(mixture: Mixture, *, batch_size: int, seed: int, sharding: Sharding) -> BatchAt:
    """step -> {tokens, segment_ids, positions: int32[B, T], loss_mask: bool[B, T]}; see `mixture` for the order.

    With a teacher's soft targets also {teacher_ids: int32[B, T, K], teacher_logprobs: float32[B, T, K]}.
    """
    sizes = [rows.num_rows for rows, _ in mixture]
    order = make_order(sizes, intervals(mixture, batch_size), seed)

    def row(_: int, source: int, number: int) -> Row:
        return mixture[source][0].row(number)

    return make_batch_function(order, row, batch_size, sharding)


def epoch_rows(mixture: Mixture) -> float:
    """Rows in one pass over a mixture whose sources are weighted by size."""
    return sum(rows.num_rows * rows.epochs for rows, _ in mixture)


def epochs_of(mixture: Mixture, num_steps: int, batch_size: int) -> list[float]:
    """Passes over each source in so many steps."""
    total = num_steps * batch_size
    counts = interval_at(intervals(mixture, batch_size), total).counts(total)
    return [count / rows.num_rows for count, (rows, _) in zip(counts, mixture, strict=True)]


def epoch_batches(
    mixture: Mixture, *, batch_size: int, sharding: Sharding, max_batches: int = 0
) -> Iterator[Batch]:
    """Every row once, in order; the last batch is filled with padding.

    max_batches: if it is not 0 and does not hold all rows, take rows that are evenly spaced over all sources.
    """
    ends = np.cumsum([rows.num_rows for rows, _ in mixture])
    total = int(ends[-1])
    # A sample is spread evenly: the first rows would be those of the first source.
    count = min(total, max_batches * batch_size or total)

    def row(number: int) -> Row:
        source = int(np.searchsorted(ends, number, "right"))
        rows, _ = mixture[source]
        # ends[source] - num_rows is the number of the source's first row.
        return rows.row(number - int(ends[source]) + rows.num_rows)

    return epoch(np.linspace(0, total - 1, count).astype(int), row, batch_size, sharding)


# --- prompts and rankings


def examples_fingerprint(loaded: Sequence[PromptExample] | Sequence[RankedExample]) -> str:
    """A name for the contents of loaded prompts or rankings."""
    # Prompts and rankings are tuples of JSON values.
    return key_of(*loaded)


def load_prompts(
    data: DataConfig, split: str, tokenizer: Tokenizer, max_length: int
) -> list[PromptExample]:
    """Prompts of at most max_length tokens, the chat template's included, in a fixed shuffled order.

    Raises:
        InputError: a prompt is longer (unless data.too_long is "drop"), or all are.
    """
    if max_length < 1:
        raise InputError(
            "sampling.max_new_tokens: leaves no room for a prompt in model.max_length; lower it"
        )
    prompts = []
    found = []
    kept = []
    for example in shuffled(examples(data, "prompt", split)):
        found.append(example.source)
        # With the beginning of the reply, which the template writes.
        ids, _ = example.encode(tokenizer, reply=True)
        if len(ids) <= max_length:
            prompts.append(PromptExample(example.messages, ids, example.answer))
            kept.append(example.source)
        elif data.too_long != "drop":
            raise InputError(
                f"{example.origin}: the prompt takes {len(ids)} tokens and {max_length} fit next to "
                "the response; raise model.max_length, or set data.too_long to drop"
            )
    if not prompts:
        raise InputError(
            f"data.sources: every prompt of the {split} split is longer than {max_length} tokens; "
            "give shorter ones, or raise model.max_length"
        )
    require_room(data, "prompt", split, found, kept, max_length)
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
    """step -> {tokens: int32[B, P], mask: bool[B, P], index: int32[B], prompt: int32[B]}.

    index is the position in the batch. prompt, the index into prompts, is a NumPy array: it is whole on every process,
    which scores the texts of all of them. Prompts are padded on the left, so that a
    response begins at the same position in every row:

        tokens  . . a b c      mask  0 0 1 1 1
    """

    def padded(ids: Sequence[int], position: int) -> Row:
        tokens = np.full(length, pad_id, np.int32)
        mask = np.zeros(length, bool)
        tokens[length - len(ids) :] = ids
        mask[length - len(ids) :] = True
        return {
            "tokens": tokens,
            "mask": mask,
            "index": np.int32(position),
        }

    order = make_order([len(prompts)], SINGLE_SOURCE, seed)

    def batch_at(step: int) -> Batch:
        first = step * batch_size
        numbers = [order(number)[1] for number in range(first, first + batch_size)]

        def row(position: int) -> Row:
            return padded(prompts[numbers[position]].ids, position)

        on_devices = global_batch(row, batch_size, sharding)
        return {**on_devices, "prompt": np.array(numbers, np.int32)}

    return batch_at


def load_ranked(
    data: DataConfig, split: str, tokenizer: Tokenizer, length: int
) -> list[RankedExample]:
    """Rankings whose conversations fit `length` tokens.

    Raises:
        InputError: a conversation is longer (data.too_long: error), a response is cut away, or all are too long.
    """
    ranked = []
    found = []
    kept = []
    for example in examples(data, "ranked", split):
        found.append(example.source)
        encoded = _encode_ranked(example, data, tokenizer, length)
        if encoded is not None:
            ranked.append(encoded)
            kept.append(example.source)
    if not ranked:
        raise InputError(
            f"data.sources: every ranking of the {split} split is longer than {length} tokens; raise "
            "the length"
        )
    require_room(data, "ranked", split, found, kept, length)
    return ranked


def _encode_ranked(
    example: Example, data: DataConfig, tokenizer: Tokenizer, length: int
) -> RankedExample | None:
    """None: the ranking is too long, and data.too_long is "drop"."""
    rows, masks = zip(*(example.encode(tokenizer, r) for r in example.responses), strict=True)
    longest = max(map(len, rows))
    if longest > length and data.too_long == "error":
        raise InputError(
            f"{example.origin}: prompt and response take {longest} tokens and the limit is {length}; "
            "raise the length, or set data.too_long to drop or truncate"
        )
    if longest > length and data.too_long == "drop":
        return None
    cut_rows = []
    for ids, mask in zip(rows, masks, strict=True):
        if not any(mask[:length]):
            raise InputError(
                f"{example.origin}: no token of a response is left in {length} tokens; raise the "
                "length, or set data.too_long to drop"
            )
        # Up to the end of the turn, where a rollout ends too: some templates write a newline after it.
        end_of_turn = len(mask) - mask[::-1].index(True)
        cut_rows.append(ids[: min(length, end_of_turn)])
    # All rows begin with it; what follows is the reply.
    prompt, _ = example.encode(tokenizer, reply=True)
    return RankedExample(
        cut_rows, example.ranks, len(prompt), example.scores, example.annotator, example.labels
    )


def make_ranked_batch_at(
    ranked: Sequence[RankedExample], *, batch_size: int, seed: int, sharding: Sharding
) -> BatchAt:
    """step -> {tokens, segment_ids: int32[B, K, T], loss_mask: bool[B, K, T], ranks, labels: int32[B, K], scores: float32[B, K]}.

    loss_mask is True on a reply's tokens. Rank 0 is no response: K is the largest number of responses. Labels are 1
    (desirable), -1 or 0 (not given). A prompt of 2 tokens and replies of 3 and 1, T is 6 here:

        segment_ids  1 1 1 1 1 0      loss_mask  . . x x x .
                     1 1 1 0 0 0                 . . x . . .
    """
    build = _ranked_row(ranked)
    order = make_order([len(ranked)], SINGLE_SOURCE, seed)
    return make_batch_function(
        order, lambda _position, _source, number: build(number), batch_size, sharding
    )


def ranked_epoch(
    ranked: Sequence[RankedExample], *, batch_size: int, sharding: Sharding
) -> Iterator[Batch]:
    """Every ranking once, in order; prompts without responses (rank 0) fill the last batch."""
    return epoch(np.arange(len(ranked)), _ranked_row(ranked), batch_size, sharding)


def _ranked_row(ranked: Sequence[RankedExample]) -> Callable[[int], Row]:
    """Number -> the arrays [K, T] and [K] of a ranking: K the most responses, T the longest rounded up to 16."""
    num_responses = max(len(example.rows) for example in ranked)
    # Of all rankings, not of a batch: one shape is one compilation.
    longest = max(len(ids) for example in ranked for ids in example.rows)
    length = -(-longest // 16) * 16

    def row(number: int) -> Row:
        example = ranked[number]
        tokens = np.zeros((num_responses, length), np.int32)
        segment_ids = np.zeros((num_responses, length), np.int32)
        ranks = np.zeros(num_responses, np.int32)
        scores = np.zeros(num_responses, np.float32)
        labels = np.zeros(num_responses, np.int32)
        ranks[: len(example.ranks)] = example.ranks
        scores[: len(example.scores)] = example.scores
        labels[: len(example.labels)] = np.where(example.labels, 1, -1)
        for k, ids in enumerate(example.rows):
            tokens[k, : len(ids)] = ids
            segment_ids[k, : len(ids)] = 1
        is_reply = np.arange(length)[None] >= example.prompt_length
        return {
            "tokens": tokens,
            "segment_ids": segment_ids,
            "loss_mask": (segment_ids > 0) & is_reply,
            "ranks": ranks,
            "scores": scores,
            "labels": labels,
        }

    return row
