"""Tokenize once. Sources -> units, made in parallel -> the examples of each source and split, without duplicates.

A unit is ~32 MB of a source: a folder with its tokens and examples of both splits, and a hash of each content, named
by a key of everything it depends on. A store joins units: of each content it says which example stays, in which split.
No JAX here: the worker processes import this module.
"""

import concurrent.futures.process
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import (
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxllm.config import InputError
from jaxllm.data import readers, sources
from jaxllm.data.cache import (
    ArrayFile,
    build_once,
    clean,
    fingerprint_file,
    get_or_build,
    key_of,
    open_valid,
)
from jaxllm.data.file_formats import format_of
from jaxllm.data.files import compression_of, remote_info
from jaxllm.data.format import Example, assign_splits
from jaxllm.data.readers import PART_BYTES, Part
from jaxllm.data.sources import DataConfig, Source, read_records
from jaxllm.data.splits import nothing_there, require_examples
from jaxllm.tokenizers.published import restore
from jaxllm.tokenizers.trained import Tokenizer

_VERSION = "v3"
_SPLITS = ("train", "held_out")
_RUN = 1 << 17  # hashes sorted at once
_IN_PROCESS = 1 << 24  # bytes of text for which starting workers takes longer
_DOCUMENT = [
    ("start", "<i8"),
    ("size", "<u4"),
    ("bytes", "<u4"),
]  # first token, tokens, bytes of the targets
EXAMPLE = {
    "document": np.dtype(_DOCUMENT),
    "chat": np.dtype([*_DOCUMENT, ("part", "<u4"), ("line", "<u4")]),
}
_KEY = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("index", "<u4"), ("side", "u1")]
)  # a content's hash; 1 + its split


class Unit(NamedTuple):
    """What one worker makes."""

    folder: Path
    data: DataConfig
    kind: str
    source: int  # index into data.sources
    parts: tuple[Part, ...]
    size: int  # bytes


class Tokens:
    """The tokens of all units, one after the other, and for chats which of them are targets."""

    def __init__(
        self, folders: Sequence[Path], counts: Sequence[int], dtype: np.dtype, masked: bool
    ):
        self.bases, self.masked = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), masked
        opened = functools.lru_cache(maxsize=256)(
            ArrayFile
        )  # systems limit the number of open files
        self._tokens = lambda unit: opened(folders[unit] / "tokens", dtype)
        self._mask = lambda unit: opened(folders[unit] / "mask", np.bool_)

    def read(self, starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(tokens int32[n], targets bool[n], or None for all) of pieces, one after the other; neighbours at once."""
        units = np.searchsorted(self.bases, starts, "right") - 1
        alone = (starts[1:] != starts[:-1] + sizes[:-1]) | (units[1:] != units[:-1])
        firsts = np.flatnonzero(np.concatenate([[True], alone]))
        begin, counts = starts[firsts] - self.bases[units[firsts]], np.add.reduceat(sizes, firsts)
        pieces = [
            (int(u), int(a), int(a + n))
            for u, a, n in zip(units[firsts], begin, counts, strict=True)
        ]
        tokens = np.concatenate([self._tokens(u).read(a, b) for u, a, b in pieces]).astype(np.int32)
        return tokens, np.concatenate(
            [self._mask(u).read(a, b) for u, a, b in pieces]
        ) if self.masked else None


class Examples(NamedTuple):
    """The examples of one source in one split, on disk."""

    source: Source
    tokens: Tokens
    table: ArrayFile  # EXAMPLE[kind]
    num_tokens: int
    num_bytes: int
    parts: Sequence[Part]
    key: str  # names the contents, the tokenizer and the split

    def origin(self, example: Any) -> str:
        return f"{self.parts[example['part']].path}:{example['line']}"


def open_store(
    data: DataConfig,
    kind: str,
    tokenizer: Tokenizer | None,
    folder: Path,
    share: tuple[int, int] = (0, 1),
) -> dict[str, list[Examples]]:
    """split -> the examples of each source, tokenized and cached if they are not; share: (this process, of how many)."""
    if not data.sources:
        raise InputError(
            f"data.sources: none given, and {kind} examples are needed; name at least one source"
        )
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    units = _units(data, kind, tokenizer, folder)
    metas = _prepare(units, tokenizer, share)
    tokens = Tokens(
        [u.folder for u in units], [m["tokens"] for m in metas], _dtype(tokenizer), kind == "chat"
    )
    key = key_of([(u.source, u.folder.name) for u in units])
    store = folder / f"{kind}-{key}"
    meta = get_or_build(store, lambda partial: _join(partial, units, metas, tokens.bases, kind))
    parts = [part for unit in units for part in unit.parts]

    def examples(split: str, index: int) -> Examples:
        name = f"{split}-{index}"
        num_tokens, num_bytes = meta["counts"][name]
        table = ArrayFile(store / name, EXAMPLE[kind])
        return Examples(
            data.sources[index], tokens, table, num_tokens, num_bytes, parts, f"{key}-{name}"
        )

    return {split: [examples(split, i) for i in range(len(data.sources))] for split in _SPLITS}


def load_texts(data: DataConfig, split: str, cache_dir: Any = None) -> Iterator[str]:
    """The texts of one split, for the tokenizer and for xz; a conversation gives its contents, a line each."""
    if not data.sources:
        raise InputError("data.sources: none given, and texts are needed; name at least one source")
    chats = tuple(s for s in data.sources if _is_chat(s))
    plain = tuple(s for s in data.sources if s not in chats)
    with tempfile.TemporaryDirectory() as temporary:
        texts = (
            _kept_texts(
                dataclasses.replace(data, sources=some, curriculum=()),
                kind,
                split,
                cache_dir or temporary,
            )
            for some, kind in ((plain, "document"), (chats, "chat"))
            if some
        )
        empty = True
        for text in itertools.chain.from_iterable(texts):
            empty = False
            yield text
    if empty:
        raise nothing_there(data, "text", split)


def _kept_texts(data: DataConfig, kind: str, split: str, cache_dir: Any) -> Iterator[str]:
    """Without a tokenizer each example gets one dummy token, so `start` is its index; then comes a second pass."""
    folder = Path(cache_dir)
    tables = [each.table for each in open_store(data, kind, None, folder)[split]]
    require_examples(data, kind, split, [len(table) for table in tables], word="text")
    kept = (
        number for table in tables for chunk in table.chunks() for number in chunk["start"].tolist()
    )
    stream = itertools.chain.from_iterable(
        _distinct(_read(unit)) for unit in _units(data, kind, None, folder)
    )
    wanted = next(kept, None)
    for number, (example, *_) in enumerate(stream):
        if number == wanted:
            yield example.whole()
            wanted = next(kept, None)


def _is_chat(source: Source) -> bool:
    if source.prompt:
        return True
    first = next(iter(read_records(source)), None)
    return (
        first is not None
        and "text" not in first.fields
        and bool({"messages", "prompt"} & first.fields.keys())
    )


def _units(data: DataConfig, kind: str, tokenizer: Tokenizer | None, folder: Path) -> list[Unit]:
    """The units of all sources in their order, which is that of their examples."""
    units = []
    for index, source in enumerate(data.sources):
        rules = dataclasses.asdict(source) | {"path": "", "exclude": (), "weight": 0, "epochs": 1}
        rules["format"] = (
            source.format if source.exclude else ""
        )  # the excluded files are read by it as well
        others = (dataclasses.replace(source, path=path, exclude=()) for path in source.exclude)
        excluded = [
            version
            for other in others
            for group in _grouped(other, folder)
            for _, version, _ in group
        ]
        side_rules = (data.held_out_fraction, data.split_salt)
        same = (_VERSION, kind, tokenizer and tokenizer.fingerprint, *side_rules, rules, excluded)
        for pieces in _grouped(source, folder):
            prints = [
                (
                    version,
                    *part[1:3],
                    format_of(part.path, source.format),
                    compression_of(part.path),
                )
                for part, version, _ in pieces
            ]
            name = folder / f"unit-{key_of(*same, prints)}"
            units.append(
                Unit(
                    name,
                    data,
                    kind,
                    index,
                    tuple(p for p, *_ in pieces),
                    sum(n for *_, n in pieces),
                )
            )
    return units


def _grouped(source: Source, folder: Path) -> Iterator[list[tuple[Part, str, int]]]:
    """(part, what changes with its content, bytes) of each unit; a function, or a sample of a source, is one unit."""
    if not (names := sources.files(source)):
        digest = hashlib.sha256()
        plain = Source(
            source.path, text_field=source.text_field, replace=source.replace, min_chars=0
        )
        for record in read_records(plain):
            digest.update(sources.canonical(record.fields).encode("utf-8", "surrogatepass") + b"\n")
        yield [(Part(source.path), digest.hexdigest(), 0)]
        return
    group: list[tuple[Part, str, int]] = []
    for name in names:
        found = remote_info(name) if "://" in name else fingerprint_file(name, PART_BYTES, folder)
        parts = readers.split(
            name, source.format, source.record, found["size"], found.get("lines", ())
        )
        for part in parts:
            group.append((part, found["version"], found["size"] // len(parts)))
            if sum(n for *_, n in group) >= PART_BYTES // 2 and not source.max_records:
                yield group
                group = []
    if group:
        yield group


def _prepare(
    units: Sequence[Unit], tokenizer: Tokenizer | None, share: tuple[int, int]
) -> list[dict[str, Any]]:
    """What is remembered of each unit; missing ones are made, by worker processes where there is much text."""
    metas = {unit.folder: open_valid(unit.folder) for unit in units}
    first = share[0] * len(units) // share[1]  # every process begins elsewhere
    missing = [
        u
        for u in {u.folder: u for u in (*units[first:], *units[:first])}.values()
        if metas[u.folder] is None
    ]
    total = sum(unit.size for unit in missing)
    make = functools.partial(_make_unit, model=tokenizer and tokenizer.model)
    quiet = total < _IN_PROCESS or share[0] > 0
    columns = (TextColumn("data:"), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=quiet)
    task = bar.add_task("", total=total)
    with bar, _pool(len(missing), total) as pool:
        while missing:
            functions = [u for u in missing if u.data.sources[u.source].path.startswith("py://")]
            others = [
                u for u in missing if u not in functions
            ]  # a function of the user's stays in this process
            main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
            try:  # workers that start here do not run the user's script again, as `spawn` would have them
                made_there, busy = (pool.map if pool else map)(make, others), []
            finally:
                sys.modules["__main__"] = main
            results = itertools.chain(map(make, functions), made_there)
            for unit, done in zip((*functions, *others), results, strict=True):
                bar.advance(task, unit.size if done else 0)
                busy += [] if done else [unit]
            if len(busy) == len(missing):  # all of them in the hands of other processes
                time.sleep(0.1)
            missing = busy
    return [
        metas[u.folder] or get_or_build(u.folder, lambda to, u=u: _write(to, u, tokenizer))
        for u in units
    ]


@contextlib.contextmanager
def _pool(num_units: int, total: int) -> Iterator[concurrent.futures.ProcessPoolExecutor | None]:
    """Worker processes, one for each core; None for little text."""
    if total < _IN_PROCESS:
        yield None
        return
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    context = multiprocessing.get_context("spawn")  # a fork would take JAX's locks with it
    pool = concurrent.futures.ProcessPoolExecutor(
        min(num_units, cores), context, initializer=_end_with_parent
    )
    try:
        yield pool
    except concurrent.futures.process.BrokenProcessPool:
        raise InputError(
            "data: a process that tokenizes was killed (out of memory?); run again to go on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


_tokenizer = functools.lru_cache(maxsize=1)(restore)


def _make_unit(unit: Unit, model: Any) -> bool:
    return build_once(
        unit.folder, lambda partial: _write(partial, unit, _tokenizer(model) if model else None)
    )


def _dtype(tokenizer: Tokenizer | None) -> np.dtype:
    return np.dtype("<u2" if tokenizer is None or tokenizer.vocab_size <= 1 << 16 else "<u4")


def _read(unit: Unit) -> Iterator[tuple[Example, str | None]]:
    return assign_splits(
        unit.data, unit.kind, unit.source, read_records(unit.data.sources[unit.source], unit.parts)
    )


def _write(folder: Path, unit: Unit, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """tokens, mask (of chats), examples (EXAMPLE), keys (_KEY, sorted in runs of _RUN) of both splits."""
    dtype = _dtype(tokenizer)
    index = {part.path: i for i, part in enumerate(unit.parts)}
    total, keys = 0, []
    with contextlib.ExitStack() as stack:
        out = {
            n: stack.enter_context(open(folder / n, "wb"))
            for n in ("tokens", "mask", "examples", "keys")
        }
        for chunk in _chunks(_distinct(_read(unit))):
            ids, masks = _encode([example for example, _, _ in chunk], unit.kind, tokenizer)
            sizes = np.array([len(i) for i in ids], np.int64)
            out["tokens"].write(
                np.fromiter(itertools.chain.from_iterable(ids), dtype, int(sizes.sum())).tobytes()
            )
            out["mask"].write(np.fromiter(itertools.chain.from_iterable(masks), bool).tobytes())
            table = np.zeros(len(chunk), EXAMPLE[unit.kind])
            table["start"], table["size"] = total + np.cumsum(sizes) - sizes, sizes
            table["bytes"] = _scored_bytes(
                [example for example, _, _ in chunk], ids, masks, tokenizer
            )
            if unit.kind == "chat":
                places = [example.origin.rpartition(":") for example, _, _ in chunk]
                table["part"], table["line"] = (
                    [index[p] for p, *_ in places],
                    [int(n) for *_, n in places],
                )
            out["examples"].write(table.tobytes())
            total += int(sizes.sum())
            keys += [(digest, side) for _, digest, side in chunk]
            while len(keys) >= _RUN:
                out["keys"].write(_sorted(keys[:_RUN]).tobytes())
                keys = keys[_RUN:]
        out["keys"].write(_sorted(keys).tobytes())
    return {"tokens": total}


Item = tuple[Example, bytes, int]  # its content's hash, and 1 + its split


def _distinct(stream: Iterator[tuple[Example, str | None]]) -> Iterator[Item]:
    """What has a side, without the repetitions that stand near: a text there a million times is sorted a few times."""
    seen: set[tuple[bytes, int]] = set()
    for example, side in stream:
        if side and (key := (example.digest(), 1 + _SPLITS.index(side))) not in seen:
            if len(seen) >= _RUN:
                seen.clear()
            seen.add(key)
            yield example, *key


def _chunks(stream: Iterator[Item]) -> Iterator[list[Item]]:
    """At most 1,024 examples, of about a million characters."""
    chunk, size = [], 0
    for item in stream:
        chunk.append(item)
        size += len(item[0].whole())
        if len(chunk) == 1024 or size > 1 << 20:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(chunk: Sequence[Example], kind: str, tokenizer: Tokenizer | None) -> tuple[Any, Any]:
    """(token ids, targets) of each example; of a document all but the first token are targets, and none are given."""
    if tokenizer is None:
        return [[0]] * len(chunk), []
    if kind == "chat":
        ids, masks = zip(*(example.encode(tokenizer) for example in chunk), strict=True)
        return ids, masks
    return [
        *map(tokenizer.document, tokenizer.encode_batch([example.text for example in chunk]))
    ], []


def _scored_bytes(
    chunk: Sequence[Example],
    ids: Sequence[Sequence[int]],
    masks: Sequence[Any],
    tokenizer: Tokenizer | None,
) -> list[int]:
    """UTF-8 bytes that the targets of each example stand for: nothing predicts the first token of an example.

    A document's are those of its text, less the first token's where no token begins it; so a normalizer's changes and
    the space that some tokenizers put before a text do not count.
    """
    if masks:
        return [
            int((_token_sizes(tokenizer)[list(i)] * m)[1:].sum())
            for i, m in zip(ids, masks, strict=True)
        ]
    sizes = [len(example.learnt().encode("utf-8", "surrogatepass")) for example in chunk]
    if tokenizer is None or tokenizer.begin_ids:
        return sizes
    firsts = [
        len(tokenizer.token_bytes(i[0])) - (tokenizer.dummy_prefix and len(i) > 1) for i in ids
    ]
    return [max(0, size - first) for size, first in zip(sizes, firsts, strict=True)]


@functools.lru_cache(maxsize=1)
def _token_sizes(tokenizer: Tokenizer) -> np.ndarray:
    return np.array(
        [len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)], np.int64
    )


def _sorted(keys: Sequence[tuple[bytes, int]]) -> np.ndarray:
    run = np.zeros(len(keys), _KEY)
    numbers = np.frombuffer(b"".join(digest for digest, _ in keys), ">u8").reshape(-1, 2)
    run["high"], run["low"], run["index"] = numbers[:, 0], numbers[:, 1], np.arange(len(keys))
    run["side"] = [side for _, side in keys]
    return run[np.lexsort((run["low"], run["high"]))]


def _join(
    folder: Path, units: Sequence[Unit], metas: Sequence[Any], bases: np.ndarray, kind: str
) -> dict[str, Any]:
    """A file of EXAMPLE for each split and source: what stays, in the order of the sources."""
    opened = functools.lru_cache(maxsize=256)(ArrayFile)
    paths = [unit.folder / "keys" for unit in units]
    runs = [(path, i) for path in paths for i in range(0, len(opened(path, _KEY)), _RUN)]
    counts = {f"{split}-{u.source}": [0, 0] for u in units for split in _SPLITS}
    with contextlib.ExitStack() as stack:
        stays = stack.enter_context(open(folder / "stays", "w+b"))
        _decide(stays.fileno(), runs, opened)
        out = {name: stack.enter_context(open(folder / name, "wb")) for name in counts}
        place = part = 0
        for number, unit in enumerate(units):
            keys, table = (
                opened(paths[number], _KEY),
                ArrayFile(unit.folder / "examples", EXAMPLE[kind]),
            )
            for run, mine in zip(keys.chunks(_RUN), map(np.copy, table.chunks(_RUN)), strict=True):
                side = np.zeros(len(run), np.uint8)
                side[run["index"]] = np.frombuffer(
                    os.pread(stays.fileno(), len(run), place), np.uint8
                )
                place += len(run)
                mine["start"] += bases[number]
                if kind == "chat":
                    mine["part"] += part
                for value, name in enumerate(_SPLITS, start=1):
                    kept, target = mine[side == value], f"{name}-{unit.source}"
                    out[target].write(kept.tobytes())
                    counts[target][0] += int(kept["size"].sum(dtype=np.int64))
                    counts[target][1] += int(kept["bytes"].sum(dtype=np.int64))
            part += len(unit.parts)
    os.remove(folder / "stays")
    return {"counts": counts}


def _decide(stays: int, runs: Sequence[tuple[Path, int]], opened: Callable[..., ArrayFile]) -> None:
    """Write 1 + its split, or 0, for every key of all runs into the file `stays`, in the order of the keys.

    Of examples with one content the first held-out one stays, else the first. About _RUN keys are in memory at once.
    """
    read = lambda run, a, b: opened(run[0], _KEY).read(run[1] + int(a), run[1] + int(b))
    sizes = [min(_RUN, len(opened(path, _KEY)) - begin) for path, begin in runs]
    firsts = np.cumsum([0, *sizes])
    count = max(1, int(firsts[-1]) // _RUN)
    limits = np.array([2**64 * i // count for i in range(1, count)], np.uint64)
    inner = (
        np.searchsorted(read(run, 0, n)["high"], limits) for run, n in zip(runs, sizes, strict=True)
    )
    cuts = np.array([[0, *cut, n] for cut, n in zip(inner, sizes, strict=True)], np.int64).reshape(
        -1, count + 1
    )
    for begin, end in itertools.pairwise(cuts.T if runs else ()):
        slices = [read(run, a, b) for run, a, b in zip(runs, begin, end, strict=True)]
        keys = np.concatenate([np.zeros(0, _KEY), *slices])
        order = np.repeat(firsts[:-1], end - begin) + keys["index"]
        ranked = np.lexsort(
            (order, keys["side"] == 1, keys["low"], keys["high"])
        )  # held-out ones first
        numbers = keys[["high", "low"]][ranked]
        winners = ranked[np.concatenate([numbers[:1] == numbers[:1], numbers[1:] != numbers[:-1]])]
        side = np.zeros(len(keys), np.uint8)
        side[winners] = keys["side"][winners]
        for place, piece in zip(
            firsts[:-1] + begin, np.split(side, np.cumsum(end - begin)[:-1]), strict=True
        ):
            os.pwrite(stays, piece.tobytes(), int(place))
