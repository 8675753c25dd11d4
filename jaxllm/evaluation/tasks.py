"""What models score on task files, and the command `jaxllm score`."""

import dataclasses
import math
import os
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

import jaxllm
from jaxllm.config import InputError, to_tree
from jaxllm.data.format import Example
from jaxllm.data.messages import message_text
from jaxllm.evaluation import measures
from jaxllm.evaluation.config import ScoreArgs, ScoringConfig
from jaxllm.evaluation.scoring import (
    Model,
    Row,
    fit,
    generate_texts,
    response_numbers,
    score_rows,
    split,
    windows,
)
from jaxllm.evaluation.task_files import Task, describe, read_tasks
from jaxllm.model_store import load_policy
from jaxllm.rl import numerals, rewards
from jaxllm.runtime.checkpoint import committed_steps
from jaxllm.runtime.console import console
from jaxllm.runtime.files import read_json, write_json
from jaxllm.runtime.mesh import make_mesh
from jaxllm.runtime.store.working import local_folder
from jaxllm.workspace import provenance

# {metric: value}, or {stage: value} of one metric. None is a value too large for a float.
Numbers = dict[str, float | None]

# Between the answered questions that precede a question, if it is not asked in the chat format.
_BETWEEN_SHOTS = "\n\n"


class Asking(NamedTuple):
    """A model and the lines of a task that it is asked."""

    model: Model
    shots: Sequence[Example]
    """Shown with their answers before each question."""
    items: Sequence[Example]
    """Scored."""
    config: ScoringConfig
    chat: bool
    """Whether questions are asked in the chat format."""
    seed: int


def load(stage_dir: epath.PathLike, mesh: jax.sharding.Mesh) -> Model:
    """The model and tokenizer in a stage directory.

    Raises:
        InputError: the directory holds no model.
    """
    return Model(*load_policy(stage_dir, mesh), mesh)


def add_scores(
    scores: dict[str, Numbers],
    stage: str,
    model: Model,
    tasks: Sequence[Task],
    config: ScoringConfig,
    seed: int,
) -> None:
    """Write scores["TASK METRIC"][stage] for every task.

    The metrics are those of the task's kind and `examples`, the number of lines scored. `truncated` is the number of
    lines whose context was cut to fit.
    """
    for task in tasks:
        shots = 0 if task.kind == "perplexity" else config.shots
        shown, scored = task.items[:shots], task.items[shots:]
        asking = Asking(model, shown, scored, config, config.chats(stage), seed)
        numbers = _MEASURES[task.kind](asking)
        numbers["examples"] = float(len(scored))
        for metric, value in numbers.items():
            scores.setdefault(f"{task.name} {metric}", {})[stage] = value


def _multiple_choice(asking: Asking) -> Numbers:
    """acc, acc_norm, majority and truncated.

    acc: the right choice has the highest log-probability, summed over its tokens (acc of the harness). acc_norm: the
    same per byte of the choice (acc_norm of the harness if characters are bytes, acc_bytes if not). majority: the
    accuracy of always giving the index that is right most often.
    """
    rows: list[Row] = []
    cut: set[str] = set()
    for item in asking.items:
        for choice in item.responses:
            context, ids = question_ids(asking, item, choice)
            rows.append(fit(context, ids, asking.model.config, item.origin))
            if len(context) + len(ids) > len(rows[-1].ids):
                cut.add(item.origin)
    # The scores come in the order of the rows: item by item, choice by choice.
    scores = iter(score_rows(asking.model, rows, asking.config.batch_size))
    acc = []
    acc_norm = []
    right_indices = []
    for item in asking.items:
        nats = np.array([next(scores)[0] for _ in item.responses])
        num_bytes = [len(choice.encode()) for choice in item.responses]
        right_indices.append(item.ranks.index(1))
        # The index of the largest sum is the model's choice; the right one has rank 1.
        acc.append(float(item.ranks[nats.argmax()] == 1))
        acc_norm.append(float(item.ranks[(nats / num_bytes).argmax()] == 1))
    numbers = _means(acc=acc, acc_norm=acc_norm)
    numbers["majority"] = measures.majority(right_indices)
    numbers["truncated"] = float(len(cut))
    return numbers


def _perplexity(asking: Asking) -> Numbers:
    """nats_per_token, bits_per_byte, word_perplexity and tokens of all texts together.

    Every token of every text is scored once, the first one after <|bos|>. Words are counted as in the harness.
    """
    model = asking.model
    texts = [item.text for item in asking.items]
    encoded = model.tokenizer.encode_batch(texts)
    rows: list[Row] = []
    for ids in encoded:
        rows += windows(ids, model.tokenizer.start_id, model.config.max_length)
    scores = score_rows(model, rows, asking.config.batch_size)
    nats = -sum(row_nats for row_nats, _ in scores)
    num_tokens = sum(map(len, encoded))
    num_bytes = 0
    num_words = 0
    for text in texts:
        num_bytes += len(text.encode())
        # Not text.split(): the harness counts the empty words at the ends of a text too.
        num_words += len(re.split(r"\s+", text))
    nats_per_word = nats / num_words
    return {
        "nats_per_token": nats / num_tokens,
        "bits_per_byte": measures.bits_per_byte(nats / num_tokens, num_tokens, num_bytes),
        # A text without spaces is one word, whose perplexity may be beyond a float.
        "word_perplexity": math.exp(nats_per_word) if nats_per_word < 700 else None,
        "tokens": float(num_tokens),
    }


def _generation(asking: Asking) -> Numbers:
    """exact, normalised, numeric, response_tokens, finished and truncated.

    exact: the answer is the response, outer spaces aside. normalised: the same after `normalize` of both. numeric: both
    end in the same number, over the lines whose answer has one.
    """
    config = asking.config
    room = asking.model.config.max_length - config.sampling.max_new_tokens
    if room < 2:
        message = f"leaves {room} tokens of the context to a question; lower it"
        raise InputError(f"sampling.max_new_tokens: {message}")
    prompts = [question_ids(asking, item)[0] for item in asking.items]
    # After shots in plain text a model continues with a question that it invents.
    stops = [] if asking.chat or not asking.shots else [_BETWEEN_SHOTS]
    settings: dict[str, Any] = {"seed": asking.seed, "batch_size": config.batch_size}
    generated = generate_texts(asking.model, prompts, config.sampling, stops, **settings)
    texts, responses = zip(*generated, strict=True)
    exact = []
    normalised = []
    numeric = []
    for text, item in zip(texts, asking.items, strict=True):
        exact.append(rewards.exact_match("", text, item.answer))
        normalised.append(float(normalize(text) == normalize(item.answer)))
        # Without a number in the answer every response would be wrong.
        if numerals.last(item.answer):
            numeric.append(rewards.last_number("", text, item.answer))
    numbers = _means(exact=exact, normalised=normalised, numeric=numeric)
    numbers |= response_numbers(responses)
    numbers["truncated"] = float(sum(len(ids) > room for ids in prompts))
    return numbers


_MEASURES = {
    "multiple choice": _multiple_choice,
    "perplexity": _perplexity,
    "generation": _generation,
}


def _means(**values_by_name: list[float]) -> Numbers:
    """The mean of each measure that has values and, as NAME_error, its standard error."""
    numbers: Numbers = {}
    for name, values in values_by_name.items():
        if values:
            numbers[name], numbers[f"{name}_error"] = measures.mean_and_error(values)
    return numbers


def normalize(text: str) -> str:
    """Text in NFKC and lower case, without punctuation, English articles and repeated spaces.

    As SQuAD compares answers (Rajpurkar et al. 2016), here for any script.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(c for c in folded if not unicodedata.category(c).startswith("P"))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def question_ids(asking: Asking, item: Example, choice: str = "") -> tuple[list[int], list[int]]:
    """(ids of the shots and the question, ids of the choice).

    Without the chat format the shots, with their answers, and the question are separated by blank lines:

        <|bos|> grass is green \\n\\n the sky is        choice   blue
    """
    tokenizer = asking.model.tokenizer
    if asking.chat:
        messages = []
        for shot in asking.shots:
            messages += [*shot.messages, {"role": "assistant", "content": shot.answer}]
        context, _ = tokenizer.encode_chat([*messages, *item.messages], reply=True)
        return context, tokenizer.encode(choice)
    delimiter = asking.config.delimiter
    answered = [_question_text(shot) + delimiter + shot.answer for shot in asking.shots]
    text = _BETWEEN_SHOTS.join([*answered, _question_text(item)])
    if not choice:
        return [tokenizer.start_id, *tokenizer.encode(text)], []
    context, ids = split(tokenizer.encode, text, delimiter + choice)
    return [tokenizer.start_id, *context], ids


def _question_text(item: Example) -> str:
    return "\n".join(map(message_text, item.messages))


def command(args: ScoreArgs) -> None:
    """`jaxllm score`: print the table to standard output, write scores and provenance to args.json."""
    args = dataclasses.replace(args, stage_dirs=tuple(map(os.path.expanduser, args.stage_dirs)))
    _check_paths(args)
    mesh = make_mesh(args.mesh)
    tasks = read_tasks(args.task, args.shots)
    stages: dict[str, Any] = {}
    scores: dict[str, Numbers] = {}
    for stage in args.stage_dirs:
        console.print(f"score: {stage}")
        add_scores(scores, stage, load(stage, mesh), tasks, args, args.seed)
        stages[stage] = {"step": _step(local_folder(stage)), "chat": args.chats(stage)}
    if args.json:
        record = {
            "provenance": {"version": jaxllm.__version__, **provenance(mesh)},
            "settings": to_tree(args),
            "stages": stages,
            "tasks": describe(tasks),
            "scores": scores,
        }
        write_json(args.json, record)
    # The table alone goes to standard output, so that it can be piped.
    # A file or a pipe has no width; this is enough for five stages.
    width = None if sys.stdout.isatty() else 160
    terminal = Console(highlight=False, markup=False, emoji=False, width=width)
    terminal.print(_score_table(scores, args.stage_dirs))


def _check_paths(args: ScoreArgs) -> None:
    """Raise InputError before the models are loaded, which may take minutes."""
    if not args.stage_dirs or not args.task:
        raise InputError(
            "jaxllm score: give STAGE_DIR ... --task FILE.jsonl ..., at least one of each"
        )
    output = epath.Path(args.json)
    if args.json and (not output.parent.is_dir() or output.is_dir()):
        message = "is not a file in an existing folder; make the folder or name another file"
        raise InputError(f"--json {args.json}: {message}")
    for stage in args.stage_dirs:
        if not (local_folder(stage) / "model.json").exists():
            message = "is not the directory of a trained stage (no model.json)"
            raise InputError(f"{stage}: {message}; give runs/NAME/STAGE")


def _step(stage_dir: epath.Path) -> int:
    """The step of the checkpoint that `load` takes: the newest one if the stage is unfinished."""
    result = read_json(stage_dir / "result.json") or {}
    return result.get("checkpoint", committed_steps(stage_dir / "checkpoints")[-1])


def _score_table(scores: Mapping[str, Numbers], stages: Sequence[str]) -> Table:
    """A row for each metric with its standard error, a column for each stage."""
    table = Table("task", "metric", *stages, title="score")
    for name, values in scores.items():
        if name.endswith("_error"):
            continue
        errors = scores.get(f"{name}_error", {})
        cells = [_cell(value, errors.get(stage)) for stage, value in values.items()]
        # A task's name may contain spaces, a metric's does not.
        table.add_row(*name.rsplit(" ", 1), *cells)
    return table


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.4g}" + ("" if error is None else f" ± {error:.2g}")
