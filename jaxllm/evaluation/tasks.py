"""Tasks in files, and what models score on them. One object a line (or row of a table), and its fields tell the kind:

{"question": text or "messages": [...], "choices": [texts], "answer": the right one's index from 0}
{"text": ...}
{"prompt": text or "messages": [...], "answer": text or number}
"""

import dataclasses
import hashlib
import math
import os
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
from jaxllm.config import InputError, to_tree
from jaxllm.config.ranges import NonNegativeInt, PositiveInt, Seed
from jaxllm.data.format import Example, make_example
from jaxllm.data.messages import message_text
from jaxllm.data.records import Record, spelled
from jaxllm.data.sources import Source, files, read_records
from jaxllm.evaluation import measures
from jaxllm.evaluation.scoring import Model, fit, generate_texts, score_rows, split, windows
from jaxllm.generate import SamplingConfig
from jaxllm.model_store import load_policy
from jaxllm.rl import numerals, rewards
from jaxllm.runtime.console import console
from jaxllm.runtime.files import read_json, write_json
from jaxllm.runtime.mesh import MeshConfig, make_mesh
from jaxllm.runtime.provenance import provenance
from jaxllm.runtime.seal import committed_steps

Numbers = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """How models are asked the questions of task files."""

    shots: NonNegativeInt = 0
    """Lines at the head of a file that stand, answered, before each question and are not scored; not for perplexity."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Ask in the chat format; auto: every stage but pretrain."""
    delimiter: str = " "
    """Between question and answer where the chat format is not used."""
    batch_size: PositiveInt = 32
    """Rows per batch."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=64, temperature=0.0)
    """How answers are generated; greedily by default."""

    def chats(self, stage: str) -> bool:
        return self.chat == "always" or (
            self.chat == "auto" and epath.Path(stage).name != "pretrain"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreArgs(ScoringConfig):
    """Score stages' models on task files, side by side."""

    stage_dirs: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STAGE_DIR ...")
    ]
    """Directories of stages that trained a model, for example runs/quickstart/pretrain runs/quickstart/ppo."""
    task: tuple[str, ...]
    """Files of JSONL or another format of the data, one kind of line in each: multiple choice, perplexity or generation."""
    json: str = ""
    """File for the numbers and where they come from."""
    mesh: MeshConfig = MeshConfig()
    """How devices are laid out."""
    seed: Seed = 0
    """Seed of the draws."""


class Task(NamedTuple):
    """A task file. Items of multiple choice have the choices as responses, the right one of rank 1."""

    name: str  # the file's, without folder and ending
    path: str
    sha256: str
    kind: str
    items: list[Example]  # at least one


class Asking(NamedTuple):
    """A model, and the lines of a task that it is asked."""

    model: Model
    shots: Sequence[Example]
    items: Sequence[Example]
    config: ScoringConfig
    chat: bool
    seed: int


def read_tasks(paths: Sequence[str], config: ScoringConfig) -> list[Task]:
    """Read task files, here or on an object store; files of one name go by their paths."""
    tasks = []
    for path in dict.fromkeys(paths):
        items = [_item(record) for record in read_records(Source(path, min_chars=0))]
        if not items:
            raise InputError(f"{path}: holds not a single line; give one JSON object a line")
        kind = _kind(items[0])
        if other := next((item for item in items if _kind(item) != kind), None):
            raise InputError(
                f"{other.origin}: {_kind(other)} after {kind}; one file holds one kind, split it"
            )
        if kind != "perplexity" and len(items) <= config.shots:
            raise InputError(
                f"{path}: {config.shots} shots of {len(items)} lines leave none to score"
            )
        content = b"".join(
            fsspec.core.url_to_fs(file)[0].cat_file(file) for file in files(Source(path))
        )
        name = epath.Path(path).name.split(".")[0]
        tasks.append(Task(name, path, hashlib.sha256(content).hexdigest(), kind, items))
    often = Counter(task.name for task in tasks)
    return [task._replace(name=task.path) if often[task.name] > 1 else task for task in tasks]


def _kind(item: Example) -> str:
    return "perplexity" if item.text else "multiple choice" if item.responses else "generation"


def _item(record: Record) -> Example:
    fields, origin = record.fields, record.origin
    asked = next((name for name in ("messages", "prompt", "question") if name in fields), "")
    choices, text = fields.get("choices"), fields.get("text")
    if not asked and choices is None and isinstance(text, str) and text:
        return Example(text, [], [], [], 0, origin)
    if not asked:
        wanted = 'give "question", "choices" and "answer", or "prompt" and "answer", or "text"'
        raise InputError(f"{origin}: is no task; {wanted}")
    known = {
        "messages" if asked == "messages" else "prompt": fields[asked]
    }  # checked as training prompts are
    item = make_example("prompt", Source(), Record(known, origin))
    if choices is None:
        return item._replace(answer=_answer(fields, origin))
    return _with_choices(item, choices, fields.get("answer"))


def _answer(fields: Mapping[str, Any], origin: str) -> str:
    """The text of a generation's answer, a number as JSON spells it."""
    answer = fields.get("answer")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise InputError(
            f'{origin}: generation needs "answer", a text or a number; add it (or "choices")'
        )
    return spelled(answer, origin)


def _with_choices(item: Example, choices: Any, answer: Any) -> Example:
    """A question of multiple choice; answer: the right choice's index."""
    origin = item.origin
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c for c in choices)
    ):
        raise InputError(
            f'{origin}: "choices" must be a list of at least 2 texts that are not empty; mend the list'
        )
    if answer is None:
        raise InputError(
            f'{origin}: multiple choice needs "answer", the right choice\'s index from 0; add it'
        )
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(
            f'{origin}: "answer" must be the right choice\'s index from 0, not {answer!r:.40}'
        )
    ranks = [1 + (i != answer) for i in range(len(choices))]
    return item._replace(answer=choices[answer], responses=choices, ranks=ranks)


def describe(tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    return {
        t.name: {"path": t.path, "sha256": t.sha256, "kind": t.kind, "lines": len(t.items)}
        for t in tasks
    }


def load(stage_dir: epath.PathLike, mesh: jax.sharding.Mesh) -> Model:
    """Model and tokenizer of a stage directory. Raises InputError where it holds none."""
    return Model(*load_policy(stage_dir, mesh), mesh)


def add_scores(
    scores: dict[str, Numbers],
    stage: str,
    model: Model,
    tasks: Sequence[Task],
    config: ScoringConfig,
    seed: int,
) -> None:
    """Write scores["task metric"][stage]; of `examples` lines scored, `truncated` ones had their context cut."""
    for task in tasks:
        shots = config.shots if task.kind != "perplexity" else 0
        asking = Asking(
            model, task.items[:shots], task.items[shots:], config, config.chats(stage), seed
        )
        for metric, value in {
            **_KINDS[task.kind](asking),
            "examples": float(len(asking.items)),
        }.items():
            scores.setdefault(f"{task.name} {metric}", {})[stage] = value


def _multiple_choice(asking: Asking) -> Numbers:
    """acc, acc_norm: the right choice has the highest log-probability, summed (the harness's acc) or per byte (its
    acc_norm where characters are bytes, else its acc_bytes); majority: always the index that is right most often."""
    model, _, items, config, *_ = asking
    asked = [
        (item, *question_ids(asking, item, choice)) for item in items for choice in item.responses
    ]
    rows = [fit(context, ids, model.config, item.origin) for item, context, ids in asked]
    cut = {
        item.origin
        for (item, *ids), row in zip(asked, rows, strict=True)
        if sum(map(len, ids)) > len(row.ids)
    }
    scores, acc, acc_norm = iter(score_rows(model, rows, config.batch_size)), [], []
    for item in items:
        sums = np.array([next(scores)[0] for _ in item.responses])
        acc.append(float(item.ranks[sums.argmax()] == 1))
        acc_norm.append(
            float(item.ranks[(sums / [len(c.encode()) for c in item.responses]).argmax()] == 1)
        )
    majority = Counter(item.ranks.index(1) for item in items).most_common(1)[0][1] / len(items)
    return _means(acc=acc, acc_norm=acc_norm) | {"majority": majority, "truncated": float(len(cut))}


def _perplexity(asking: Asking) -> Numbers:
    """Every token of every text is scored once, the first behind <|bos|>; words as the harness counts them."""
    model, texts = asking.model, [item.text for item in asking.items]
    encoded = model.tokenizer.encode_batch(texts)
    rows = [
        row
        for ids in encoded
        for row in windows(ids, model.tokenizer.start_id, model.config.max_length)
    ]
    nats, tokens = (
        -sum(nats for nats, _ in score_rows(model, rows, asking.config.batch_size)),
        sum(map(len, encoded)),
    )
    per_word = nats / sum(len(re.split(r"\s+", text)) for text in texts)
    return {
        "nats_per_token": nats / tokens,
        "bits_per_byte": measures.bits_per_byte(
            nats / tokens, tokens, sum(len(text.encode()) for text in texts)
        ),
        "word_perplexity": math.exp(per_word)
        if per_word < 700
        else None,  # beyond a float: texts without spaces
        "tokens": float(tokens),
    }


def _generation(asking: Asking) -> Numbers:
    """exact: the answer, spaces around it aside; normalised: `normalise` of both; numeric: the last number of both."""
    model, shots, items, config, chat, seed = asking
    room = model.config.max_length - config.sampling.max_new_tokens
    if room < 2:
        raise InputError(
            f"sampling.max_new_tokens: leaves {room} tokens of the context to a question; lower it"
        )
    prompts = [question_ids(asking, item)[0] for item in items]
    stops = [] if chat or not shots else ["\n\n"]  # what parts the shots
    given = generate_texts(
        model, prompts, config.sampling, stops, seed=seed, batch_size=config.batch_size
    )
    pairs = [(text, item.answer) for (text, _), item in zip(given, items, strict=True)]
    numeric = [pair for pair in pairs if numerals.last(pair[1])]
    counted = {
        "exact": [rewards.exact_match("", *pair) for pair in pairs],
        "normalised": [float(normalise(text) == normalise(answer)) for text, answer in pairs],
        "numeric": [rewards.last_number("", *pair) for pair in numeric],
    }
    return _means(**counted) | {
        "response_tokens": sum(len(drawn.ids) for _, drawn in given) / len(given),
        "finished": sum(drawn.finished for _, drawn in given) / len(given),
        "truncated": float(sum(len(ids) > room for ids in prompts)),
    }


_KINDS = {"multiple choice": _multiple_choice, "perplexity": _perplexity, "generation": _generation}


def _means(**lists: list[float]) -> Numbers:
    """The mean of each measure that has values and, as NAME_error, its standard error."""
    found = {name: measures.mean_and_error(values) for name, values in lists.items() if values}
    return {
        f"{name}{end}": x
        for name, pair in found.items()
        for end, x in zip(("", "_error"), pair, strict=True)
    }


def normalise(text: str) -> str:
    """Lower case, without punctuation, English articles and doubled spaces (SQuAD, Rajpurkar et al. 2016), in NFKC."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(c for c in folded if not unicodedata.category(c).startswith("P"))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def question_ids(asking: Asking, item: Example, choice: str = "") -> tuple[list[int], list[int]]:
    """(ids of the question behind its answered shots, ids of the choice); of plain text with blank lines between."""
    tokenizer, shots, delimiter = asking.model.tokenizer, asking.shots, asking.config.delimiter
    if asking.chat:
        answered = [
            m for s in shots for m in (*s.messages, {"role": "assistant", "content": s.answer})
        ]
        return tokenizer.encode_chat([*answered, *item.messages], reply=True)[0], tokenizer.encode(
            choice
        )
    asked = lambda item: "\n".join(map(message_text, item.messages))
    text = "\n\n".join([*(asked(shot) + delimiter + shot.answer for shot in shots), asked(item)])
    context, ids = (
        split(tokenizer.encode, text, delimiter + choice)
        if choice
        else (tokenizer.encode(text), [])
    )
    return [tokenizer.start_id, *context], ids


def command(args: ScoreArgs) -> None:
    """`jaxllm score`: the table goes to standard output, the numbers and where they come from to args.json."""
    if not args.stage_dirs or not args.task:
        raise InputError(
            "jaxllm score: give STAGE_DIR ... --task FILE.jsonl ..., at least one of each"
        )
    if args.json and (not epath.Path(args.json).parent.is_dir() or epath.Path(args.json).is_dir()):
        raise InputError(
            f"--json {args.json}: is no file in an existing folder; make the folder or name another"
        )
    args = dataclasses.replace(args, stage_dirs=tuple(map(os.path.expanduser, args.stage_dirs)))
    if wrong := next(
        (s for s in args.stage_dirs if not (epath.Path(s) / "model.json").exists()), ""
    ):
        raise InputError(
            f"{wrong}: is not the directory of a trained stage (no model.json); give runs/NAME/STAGE"
        )
    tasks, mesh = read_tasks(args.task, args), make_mesh(args.mesh)
    stages, scores = {}, {}
    for stage in args.stage_dirs:
        console.print(f"score: {stage}")
        add_scores(scores, stage, load(stage, mesh), tasks, args, args.seed)
        finished, saved = (
            read_json(epath.Path(stage) / "result.json") or {},
            epath.Path(stage) / "checkpoints",
        )
        stages[stage] = {
            "step": finished.get("checkpoint", committed_steps(saved)[-1]),
            "chat": args.chats(stage),
        }
    if args.json:
        made = {"version": jaxllm.__version__, **provenance(mesh)}
        numbers = {"stages": stages, "tasks": describe(tasks), "scores": scores}
        write_json(args.json, {"provenance": made, "settings": to_tree(args), **numbers})
    table = Table("task", "metric", *stages, title="score")
    show = lambda value: "–" if value is None else f"{value:,.4g}"
    for name, values in scores.items():
        errors = scores.get(f"{name}_error")
        if not name.endswith("_error"):
            cells = (
                show(value) + (f" ± {errors[stage]:.2g}" if errors else "")
                for stage, value in values.items()
            )
            table.add_row(*name.rsplit(" ", 1), *cells)
    Console(
        highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160
    ).print(table)
