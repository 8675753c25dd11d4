"""Tasks in local files, and what models score on them: multiple choice, perplexity, generation.

The kind of a file is seen from its fields, one JSON object a line:

    {"question": text or "messages": [...], "choices": [texts], "answer": the right one's index from 0}
    {"text": ...}
    {"prompt": text or "messages": [...], "answer": text or number}
"""

import dataclasses
import hashlib
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import fsspec
import jax
import numpy as np
import tyro
from etils import epath
from rich.console import Console
from rich.table import Table

import jaxllm
from jaxllm import evaluate, rewards
from jaxllm.checkpoint import committed_steps
from jaxllm.config import InputError, to_tree
from jaxllm.data.format import sided
from jaxllm.data.sources import DataConfig, Record, Source, files, read_records
from jaxllm.generate import SamplingConfig
from jaxllm.metrics import console
from jaxllm.score import Model, fit, generate_texts, score_rows, shorten, split, windows
from jaxllm.sharding import MeshConfig, make_mesh
from jaxllm.tokenizer import Tokenizer
from jaxllm.workspace import load_model, provenance, read_json, write_json

Kind = Literal["multiple choice", "perplexity", "generation"]
Numbers = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """How models are asked the questions of task files."""

    shots: int = 0
    """Lines at the head of a file that stand, answered, before each question and are not scored; not for perplexity."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Ask in the chat format; auto: every stage but pretrain."""
    delimiter: str = " "
    """Between question and answer where the chat format is not used."""
    stride: int = 0
    """Tokens the window moves by in a text longer than the context; 0: as many as it holds."""
    batch_size: int = 32
    """Rows per batch."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=64, temperature=0.0)
    """How answers are generated; greedily by default."""

    def __post_init__(self) -> None:
        for name, least in (("shots", 0), ("stride", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}")


@dataclasses.dataclass(frozen=True)
class ScoreArgs:
    """Score stages' models on task files, side by side."""

    stage_dirs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Directories of stages that trained a model, for example runs/quickstart/pretrain runs/quickstart/ppo."""
    task: tuple[str, ...]
    """JSONL files, one kind of line in each: multiple choice, perplexity or generation."""
    json: str = ""
    """File for the numbers and where they come from."""
    settings: Annotated[ScoringConfig, tyro.conf.arg(name="")] = ScoringConfig()
    """How models are asked."""
    mesh: MeshConfig = MeshConfig()
    """How devices are laid out."""
    seed: int = 0
    """Seed of the draws."""


class Item(NamedTuple):
    """One line of a task file."""

    kind: Kind
    origin: str  # "path:line"
    answer: str = ""  # of multiple choice the right choice's text
    text: str = ""  # of perplexity
    messages: Sequence[Mapping[str, str]] = ()
    choices: tuple[str, ...] = ()
    right: int = 0  # index of the right choice


class Task(NamedTuple):
    """A task file."""

    name: str  # the file's, without folder and ending
    path: str
    sha256: str
    items: list[Item]  # at least one, all of one kind


def read_task(path: str) -> Task:
    """Read a task file, here or on an object store. Raises InputError on a line that is none, or of another kind."""
    items = [_item(record) for record in read_records(Source(path, min_chars=0))]
    if not items:
        raise InputError(f"{path}: holds not a single line; give one JSON object a line")
    if other := next((item for item in items if item.kind != items[0].kind), None):
        raise InputError(f"{other.origin}: {other.kind} after {items[0].kind}; one file holds one kind, split it")
    digest = hashlib.sha256()
    for file in files(Source(path)):
        with fsspec.open(file, "rb") as opened:
            digest.update(opened.read())  # pyright: ignore[reportAttributeAccessIssue] - typed as a list
    return Task(epath.Path(path).name.split(".")[0], path, digest.hexdigest(), items)


def _item(record: Record) -> Item:
    fields, origin = record
    asked = next((name for name in ("messages", "prompt", "question") if name in fields), "")
    answer, choices, text = (fields.get(name) for name in ("answer", "choices", "text"))
    if not asked and choices is None and isinstance(text, str) and text:
        return Item("perplexity", origin, text=text)
    if not asked:
        wanted = '"question", "choices" and "answer", or "prompt" and "answer", or "text"'
        raise InputError(f"{origin}: is no task; give {wanted}")
    known = {"messages" if asked == "messages" else "prompt": fields[asked]}  # checked as training prompts are
    messages = next(sided(DataConfig((Source(),)), "prompt", 0, [Record(known, origin)]))[0].messages
    if choices is None:
        if not isinstance(answer, str | int | float) or isinstance(answer, bool):
            raise InputError(f'{origin}: generation needs "answer", a text or a number; add it (or "choices")')
        return Item("generation", origin, str(answer), messages=messages)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise InputError(f'{origin}: "choices" must be a list of at least 2 texts that are not empty; mend the list')
    if type(answer) is not int or not 0 <= answer < len(choices):
        last = len(choices) - 1
        raise InputError(f'{origin}: "answer" must be the right choice\'s index, 0 to {last}, not {answer!r:.40}')
    return Item("multiple choice", origin, choices[answer], messages=messages, choices=tuple(choices), right=answer)


def load(stage_dir: epath.PathLike, mesh: jax.sharding.Mesh) -> Model:
    """Model and tokenizer of a stage directory. Raises InputError where it holds none."""
    params, config = load_model(stage_dir, mesh)
    return Model(params, config, Tokenizer.load(epath.Path(stage_dir) / "tokenizer"), mesh)


def compare(
    stage_dirs: Sequence[str], paths: Sequence[str], config: ScoringConfig, mesh: jax.sharding.Mesh, seed: int
) -> dict[str, Any]:
    """Every stage's model on every task file: {"scores": {"task metric": {stage: value}}, "tasks", ...} and provenance.

    Raises InputError before a model is loaded where a file or a directory is wrong.
    """
    tasks = read_tasks(paths, config)
    steps = {stage: _step(epath.Path(stage)) for stage in stage_dirs}
    scores: dict[str, Numbers] = {}
    with jax.set_mesh(mesh):
        for stage in stage_dirs:
            console.print(f"score: {stage}")
            add_scores(scores, stage, load(stage, mesh), tasks, config, seed)
    made = {"version": jaxllm.__version__, **provenance(mesh)}
    stages = {stage: {"step": step, "chat": _chats(stage, config)} for stage, step in steps.items()}
    settings = {**to_tree(config), "seed": seed}
    return {"provenance": made, "settings": settings, "stages": stages, "tasks": describe(tasks), "scores": scores}


def read_tasks(paths: Sequence[str], config: ScoringConfig) -> list[Task]:
    """`read_task` of each; files of one name go by their paths. Raises InputError where the shots leave no line."""
    tasks = [read_task(path) for path in dict.fromkeys(paths)]
    for task in tasks:
        if task.items[0].kind != "perplexity" and len(task.items) <= config.shots:
            raise InputError(f"{task.path}: {config.shots} shots of {len(task.items)} lines leave none to score")
    often = Counter(task.name for task in tasks)
    return [task._replace(name=task.path) if often[task.name] > 1 else task for task in tasks]


def describe(tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    return {t.name: {"path": t.path, "sha256": t.sha256, "kind": t.items[0].kind, "lines": len(t.items)} for t in tasks}


def add_scores(
    scores: dict[str, Numbers], stage: str, model: Model, tasks: Sequence[Task], config: ScoringConfig, seed: int
) -> None:
    """Write scores["task metric"][stage]: one row for each task and metric, one column for each stage."""
    for task in tasks:
        for metric, value in score_task(model, task, config, _chats(stage, config), seed).items():
            scores.setdefault(f"{task.name} {metric}", {})[stage] = value


def score_task(model: Model, task: Task, config: ScoringConfig, chat: bool, seed: int = 0) -> Numbers:
    """The metrics of a task; `examples` lines are scored, and of `truncated` ones the context was cut."""
    if task.items[0].kind == "perplexity":
        return _perplexity(model, task.items, config)
    shots, items = task.items[: config.shots], task.items[config.shots :]
    if task.items[0].kind == "multiple choice":
        return _multiple_choice(model, shots, items, config, chat)
    return _generation(model, shots, items, config, chat, seed)


def _multiple_choice(model: Model, shots: list[Item], items: list[Item], config: ScoringConfig, chat: bool) -> Numbers:
    """acc: the right choice has the highest summed log-probability (the harness's acc); acc_norm: the highest per byte
    (its acc_norm where characters are bytes, else its acc_bytes); majority: always the index that is right most often.
    """
    pairs = [
        fit(*question_ids(model, shots, i, config, chat, c), model.config, i.origin) for i in items for c in i.choices
    ]
    rows, cuts = zip(*pairs, strict=True)
    scores = score_rows(*model[:2], rows, mesh=model.mesh, batch_size=config.batch_size)
    right, right_by_byte, truncated, end = [], [], 0, 0
    for item in items:
        begin, end = end, end + len(item.choices)
        sums = np.array([score.logprob for score in scores[begin:end]])
        right.append(float(sums.argmax() == item.right))
        right_by_byte.append(float((sums / [len(c.encode()) for c in item.choices]).argmax() == item.right))
        truncated += any(cuts[begin:end])
    majority = Counter(item.right for item in items).most_common(1)[0][1] / len(items)
    return {
        **_mean("acc", right),
        **_mean("acc_norm", right_by_byte),
        "majority": majority,
        **_counts(items, truncated),
    }


def _perplexity(model: Model, items: list[Item], config: ScoringConfig) -> Numbers:
    """Every token of every text is scored once, the first behind <|bos|>; words as the harness counts them."""
    tokenizer, context = model.tokenizer, model.config.max_length
    encoded = tokenizer.encode_batch([item.text for item in items])
    rows = [row for ids in encoded for row in windows(ids, tokenizer.bos_id, context, min(config.stride, context))]
    found = score_rows(*model[:2], rows, mesh=model.mesh, batch_size=config.batch_size)
    nats, tokens = -sum(s.logprob for s in found), sum(s.count for s in found)
    words, size = sum(len(re.split(r"\s+", i.text)) for i in items), sum(len(i.text.encode()) for i in items)
    per_word = nats / words
    return {
        "nats_per_token": nats / tokens,
        "bits_per_byte": evaluate.bits_per_byte(nats / tokens, tokens, size),
        "word_perplexity": math.exp(per_word) if per_word < 700 else None,  # beyond a float: texts without spaces
        **{"tokens": float(tokens), "examples": float(len(items))},
    }


def _generation(
    model: Model, shots: list[Item], items: list[Item], config: ScoringConfig, chat: bool, seed: int
) -> Numbers:
    """exact: the answer, spaces around it aside; normalised: `normalise` of both; numeric: the last number of both."""
    room = model.config.max_length - config.sampling.max_new_tokens
    if room < 2:
        raise InputError(
            f"sampling.max_new_tokens: {config.sampling.max_new_tokens} leaves no room for a question in a context "
            f"of {model.config.max_length}; lower it"
        )
    asked = [question_ids(model, shots, item, config, chat)[0] for item in items]
    stops = [] if chat or not shots else ["\n\n"]  # what parts the shots
    prompts = [shorten(ids, room) for ids in asked]
    given = [*generate_texts(model, prompts, config.sampling, stops, seed=seed, batch_size=config.batch_size)]
    pairs = [(text, item.answer) for (text, _), item in zip(given, items, strict=True)]
    plain = [(_plain_number(text), _plain_number(answer)) for text, answer in pairs]
    numeric = [rewards.last_number("", *pair) for pair in plain if re.search(r"\d", pair[1])]
    return {
        **_mean("exact", [rewards.exact_match("", *pair) for pair in pairs]),
        **_mean("normalised", [float(normalise(text) == normalise(answer)) for text, answer in pairs]),
        **(_mean("numeric", numeric) if numeric else {}),
        "response_tokens": sum(len(drawn.ids) for _, drawn in given) / len(given),
        "finished": sum(drawn.finished for _, drawn in given) / len(given),
        **_counts(items, sum(len(p) < len(ids) for p, ids in zip(prompts, asked, strict=True))),
    }


def normalise(text: str) -> str:
    """Lower case, without punctuation, English articles and doubled spaces (SQuAD, Rajpurkar et al. 2016), in NFKC."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(c for c in folded if not unicodedata.category(c).startswith("P"))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _plain_number(text: str) -> str:
    """1,234 as 1234."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def question_ids(
    model: Model, shots: Sequence[Item], item: Item, config: ScoringConfig, chat: bool, choice: str = ""
) -> tuple[list[int], list[int]]:
    """(ids of the question behind its answered shots, ids of the choice).

    Plain text: the contents of the messages a line each, blank lines between shots.
    """
    tokenizer = model.tokenizer
    if chat:
        answered = [m for s in shots for m in (*s.messages, {"role": "assistant", "content": s.answer})]
        return tokenizer.encode_chat([*answered, *item.messages], reply=True)[0], tokenizer.encode(choice)
    asked = lambda item: "\n".join(m["content"] for m in item.messages)
    text = "\n\n".join([*(asked(shot) + config.delimiter + shot.answer for shot in shots), asked(item)])
    if not choice:
        return [tokenizer.bos_id, *tokenizer.encode(text)], []
    context, ids = split(tokenizer.encode, text, config.delimiter + choice)
    return [tokenizer.bos_id, *context], ids


def _mean(name: str, values: list[float]) -> Numbers:
    mean, error = evaluate.mean_and_error(values)
    return {name: mean, f"{name}_error": error}


def _counts(items: list[Item], truncated: int) -> Numbers:
    return {"truncated": float(truncated), "examples": float(len(items))}


def _chats(stage: str, config: ScoringConfig) -> bool:
    return config.chat == "always" or (config.chat == "auto" and epath.Path(stage).name != "pretrain")


def _step(stage_dir: epath.Path) -> int | None:
    """The step of the checkpoint `load` takes. Raises InputError where the directory is no trained stage's."""
    if not (stage_dir / "model.json").exists():
        raise InputError(f"{stage_dir}: is not the directory of a trained stage (no model.json); give runs/NAME/STAGE")
    saved = stage_dir / "checkpoints"
    steps = committed_steps(saved) if saved.exists() else []
    return (read_json(stage_dir / "result.json") or {}).get("checkpoint", steps[-1] if steps else None)


def table(record: Mapping[str, Any]) -> Table:
    """What `compare` found: a row for each task and metric, a column for each stage."""
    shown = Table("task", "metric", *record["stages"], title="score")
    show = lambda value: "–" if value is None else f"{value:,.4g}"
    for name, values in record["scores"].items():
        errors = record["scores"].get(f"{name}_error")
        cells = [show(value) + (f" ± {errors[stage]:.2g}" if errors else "") for stage, value in values.items()]
        if not name.endswith("_error"):
            shown.add_row(*name.rsplit(" ", 1), *cells)
    return shown


def command(args: ScoreArgs) -> None:
    """`jaxllm score`: the table goes to standard output."""
    if not args.stage_dirs or not args.task:
        raise InputError("jaxllm score: give STAGE_DIR ... --task FILE.jsonl ..., at least one of each")
    if args.json and (not epath.Path(args.json).parent.is_dir() or epath.Path(args.json).is_dir()):
        raise InputError(f"--json {args.json}: is no file in an existing folder; make the folder or name another")
    record = compare(args.stage_dirs, args.task, args.settings, make_mesh(args.mesh), args.seed)
    if args.json:
        write_json(args.json, record)
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table(record))
