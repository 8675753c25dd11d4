"""Rank: a person in the terminal, a file made elsewhere, or a SIMULATED annotator orders K responses to each prompt.

rankings.jsonl grows by one whole line per answer, so that a run killed at any instant goes on at the first prompt
without an answer. Answers are in the order of samples.jsonl; prompts that were skipped are in skipped.jsonl.
"""

import dataclasses
import datetime
import os
import re
import string
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from jaxllm.config import InputError
from jaxllm.config.functions import FunctionName, resolve_function
from jaxllm.config.ranges import NonNegativeFloat, NonNegativeInt, ProportionBelowOne
from jaxllm.data.file_formats import format_of
from jaxllm.data.format import is_held_out
from jaxllm.data.messages import message_text, prompt_text, question
from jaxllm.data.schema import check_messages, known_parts
from jaxllm.data.sources import Source, read_records
from jaxllm.rl.score_functions import score_all
from jaxllm.runtime.console import console
from jaxllm.runtime.files import json_line, write_whole
from jaxllm.sharding import barrier
from jaxllm.workspace import StageCut, Workspace

LABELS = string.ascii_uppercase
HELP = Text.from_markup(
    "Best first: [b]B>A=D>C[/b] says B is best, A and D are equal, C is worst. Name every response once.\n"
    "[b]s[/b] skip this prompt   [b]u[/b] undo the previous answer   [b]q[/b] stop and resume later   [b]?[/b] this help"
)


@dataclasses.dataclass(frozen=True)
class RankConfig:
    """Who ranks the sampled responses."""

    annotator: FunctionName = "person"
    """person (asks in the terminal), file:PATH (a rankings JSONL), or module:function (SIMULATED: scores responses)."""
    noise: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise added to the scores of a simulated annotator."""
    tie_margin: NonNegativeFloat = 0.0
    """Scores of a simulated annotator no further apart than this are a tie."""
    annotator_name: str = ""
    """Recorded with each ranking; empty: person, or the simulated annotator's module:function."""
    max_prompts: NonNegativeInt = 0
    """Rank only the first so many prompts; 0: all."""
    held_out: ProportionBelowOne = 0.1
    """Share of the prompts kept for evaluation, where the lines of a file name no split."""

    def __post_init__(self) -> None:
        if self.annotator != "person" and not re.fullmatch(r"file:.+|[\w.]+:\w+", self.annotator):
            raise ValueError(
                f"annotator: person, file:PATH or module:function, not {self.annotator!r}"
            )


def build(workspace: Workspace, life: Any, stage: str) -> dict[str, Any]:
    """`run` with the stage's section."""
    return run(workspace, getattr(life, stage))


def run(
    workspace: Workspace, config: RankConfig, ask: Callable[[], str] | None = None
) -> dict[str, Any]:
    """Rank the responses in samples.jsonl into rankings.jsonl; returns counts and the share of tied pairs.

    ask: reads one answer of a person, instead of the terminal. Raises StageCut where the person stops, InputError
    for bad samples, a bad rankings file, a missing annotator, or a person without a terminal.
    """
    directory = workspace.stage_dir("rank")
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        _rank(workspace, directory, config, ask)
    barrier("rank")
    skipped = directory / "skipped.jsonl"
    result = _summary(
        read_rankings(directory / "rankings.jsonl"),
        len(_read_lines(skipped)) if skipped.exists() else 0,
    )
    _print_summary(result)
    return result


def _rank(
    workspace: Workspace, directory: epath.Path, config: RankConfig, ask: Callable[[], str] | None
) -> None:
    if config.annotator.startswith("file:"):
        return _import_file(
            Path(config.annotator.removeprefix("file:")).expanduser(), directory, config
        )
    workspace.require("sample", "rank")
    answers = _Answers(
        directory,
        _read_samples(workspace.stage_dir("sample") / "samples.jsonl", config.max_prompts),
    )
    if config.annotator == "person":
        return _ask_person(
            answers, config.annotator_name or "person", workspace.seed, ask or _terminal()
        )
    return _simulate(answers, config, workspace.seed)


def parse_order(text: str, num_responses: int) -> list[int]:
    """Ranks of responses A, B, ... (at most 26) from an order such as ``B>A=D>C``: 1 is best, no number is left out.

    The labels, best first, are joined by ``>`` (better than) or ``=`` (as good as, a tie). Case, spaces and full width
    do not matter. Raises InputError where a label is missing, unknown or given twice.

    >>> parse_order("B>A=D>C", 4)
    [2, 1, 3, 2]
    >>> parse_order("ｃ ＞ a ＝ b", 3)
    [2, 2, 1]
    """
    groups = [
        group.split("=")
        for group in "".join(unicodedata.normalize("NFKC", text).upper().split()).split(">")
    ]
    known, order, ranks = [*LABELS[:num_responses]], f"order {text.strip()!r}", {}
    for rank, group in enumerate(groups, 1):
        for label in group:
            if label not in known:
                what = repr(label) if label else "an empty place"
                raise InputError(
                    f"{order}: {what} is not one of {', '.join(known)}; write it as {'>'.join(known)}"
                )
            if label in ranks:
                raise InputError(f"{order}: {label} is given twice; name every response once")
            ranks[label] = rank
    if missing := [label for label in known if label not in ranks]:
        raise InputError(f"{order}: {', '.join(missing)} is missing; name every response once")
    return [ranks[label] for label in known]


def format_order(ranks: Sequence[int]) -> str:
    """The order that `parse_order` reads as these ranks.

    >>> format_order([2, 1, 3, 2])
    'B>A=D>C'
    """
    groups = (
        "=".join(LABELS[i] for i, r in enumerate(ranks) if r == rank) for rank in sorted(set(ranks))
    )
    return ">".join(groups)


def read_rankings(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a rankings.jsonl, each checked. Raises InputError "path:line: what is wrong"."""
    return [_check_ranking(line, where) for line, where in _read_lines(path)]


def _read_lines(path: epath.PathLike) -> list[tuple[dict[str, Any], str]]:
    """(fields, "path:line") of each record, read as the data of every stage is; lines of JSON under any other name."""
    path = str(path)
    given = "jsonl" if format_of(path) == "text" else "auto"
    return [(r.fields, r.origin) for r in read_records(Source(path, format=given, min_chars=0))]


def _check_responses(line: Mapping[str, Any], where: str) -> None:
    messages, responses = line.get("messages"), line.get("responses")
    if not isinstance(messages, list) or not messages:
        example = '[{"role": "user", "content": "..."}]'
        raise InputError(
            f'{where}: messages: must be a list such as {example} (or give a "prompt")'
        )
    check_messages(messages, where)
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise InputError(f"{where}: responses: must be a list of texts")
    if not 2 <= len(responses) <= len(LABELS):
        raise InputError(
            f"{where}: responses: must be 2 to {len(LABELS)} texts to rank, not {len(responses)}"
        )


def _check_ranking(line: dict[str, Any], where: str) -> dict[str, Any]:
    _check_responses(line, where)
    ranks = line.get("ranks")
    if (
        not isinstance(ranks, list)
        or not all(type(r) is int for r in ranks)
        or len(ranks) != len(line["responses"])
    ):
        wanted = f'{len(line["responses"])} whole numbers, 1 = best (or give an "order")'
        raise InputError(f"{where}: ranks: must be {wanted}")
    if sorted(set(ranks)) != [*range(1, len(set(ranks)) + 1)]:
        raise InputError(
            f"{where}: ranks: must count 1, 2, ... without a gap, equal numbers for a tie, not {ranks}"
        )
    if not isinstance(line.get("annotator"), str) or not line["annotator"]:
        raise InputError(f"{where}: annotator: name who ranked (or set rank.annotator_name)")
    if not isinstance(line.get("simulated"), bool):
        raise InputError(
            f"{where}: simulated: must be false for a person's ranking, true for a program's"
        )
    _check_split(line.get("split"), where)
    try:
        datetime.datetime.fromisoformat(line["time"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{where}: time: must be an ISO-8601 time, such as 2026-01-31T12:00:00+00:00"
        ) from None
    return line


def _check_split(split: Any, where: str) -> None:
    if split not in ("train", "held_out"):
        raise InputError(f"{where}: split: must be train or held_out, not {split!r:.40}")


def _read_samples(path: epath.Path, limit: int) -> list[dict[str, Any]]:
    lines = _read_lines(path)[: limit or None]
    if not lines:
        raise InputError(f"{path}: holds no samples to rank; run the sample stage again")
    for line, where in lines:
        _check_responses(line, where)
        _check_split(line.get("split", "train"), where)
    kept = lambda line: (
        {k: line[k] for k in ("messages", "responses")} | {"split": line.get("split", "train")}
    )
    return [kept(line) for line, _ in lines]


class _Answers:
    """The answers so far, on disk: sample i is ranked, skipped, or not yet reached."""

    def __init__(self, directory: epath.Path, samples: list[dict[str, Any]]):
        self.samples = samples
        self.paths = {name: Path(directory / f"{name}.jsonl") for name in ("rankings", "skipped")}
        for path in self.paths.values():
            _drop_half_line(path)
        self.skipped = [_skipped(line, where) for line, where in _read_lines(self.paths["skipped"])]
        rankings = read_rankings(self.paths["rankings"])
        self.done = len(rankings) + len(self.skipped)
        expected = [s for i, s in enumerate(samples[: self.done]) if i not in self.skipped]
        same = ({k: line[k] for k in ("messages", "responses", "split")} for line in rankings)
        if list(same) != expected:
            raise InputError(
                f"{directory}: holds rankings of other samples; remove that directory to rank anew"
            )

    def rank(self, ranks: Sequence[int], annotator: str, simulated: bool) -> None:
        """Keep the ranks of the next sample, in the order of its responses."""
        sample = self.samples[self.done]
        who = {"annotator": annotator, "simulated": simulated, "time": _now()}
        shown = {
            "messages": sample["messages"],
            "responses": sample["responses"],
            "ranks": list(ranks),
        }
        self._append("rankings", {**shown, **who, "split": sample["split"]})

    def skip(self) -> None:
        self._append("skipped", {"index": self.done})
        self.skipped.append(self.done - 1)

    def undo(self) -> None:
        """Forget the answer to the previous sample."""
        self.done -= 1
        path = self.paths["skipped" if self.done in self.skipped else "rankings"]
        self.skipped = [i for i in self.skipped if i != self.done]
        write_whole(path, b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with self.paths[name].open("a", encoding="utf-8", errors="replace") as file:
            file.write(json_line(line))
            file.flush()
            os.fsync(file.fileno())
        self.done += 1


def _skipped(line: Mapping[str, Any], where: str) -> int:
    if type(line.get("index")) is not int:
        raise InputError(
            f"{where}: index: must be the number of a prompt that was skipped; remove the line"
        )
    return line["index"]


def _drop_half_line(path: Path) -> None:
    """Drop a last line that was cut while it was written (it has no newline); make the file if there is none."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        console.print(
            f"rank: {path}: the last line was cut in the middle and is dropped", soft_wrap=True
        )
    if whole != data or not path.exists():
        write_whole(path, whole)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _terminal() -> Callable[[], str]:
    if not sys.stdin.isatty():
        raise InputError(
            "rank.annotator: person needs a terminal; rank elsewhere and give --rank.annotator file:RANKINGS.jsonl"
        )
    return lambda: console.input(Text("order> ", style="bold"))


def _ask_person(answers: _Answers, name: str, seed: int, ask: Callable[[], str]) -> None:
    total = len(answers.samples)
    if answers.done < total:
        console.print(HELP)
    while answers.done < total:
        index, sample = answers.done, answers.samples[answers.done]
        shuffle = np.random.default_rng([seed, index]).permutation(len(sample["responses"]))
        _show(sample, shuffle, f"{index + 1} of {total}")
        reply = _reply(ask, len(shuffle), can_undo=index > 0)
        if reply == "q":
            raise StageCut(
                f"rank: {index} of {total} prompts answered; run the same command to go on"
            )
        if reply == "s":
            answers.skip()
        elif reply == "u":
            answers.undo()
        else:
            ranks = np.empty(len(shuffle), int)
            ranks[shuffle] = reply  # what is labelled j-th is response shuffle[j]
            answers.rank(ranks.tolist(), name, simulated=False)


def _reply(ask: Callable[[], str], num_responses: int, can_undo: bool) -> str | list[int]:
    """A command (s, u, q), or the ranks of the responses as labelled; asks until it gets one."""
    while True:
        try:
            text = ask()
        except (EOFError, KeyboardInterrupt):
            return "q"
        except UnicodeDecodeError:  # half of a character was erased on a terminal that counts bytes
            text = "\N{REPLACEMENT CHARACTER}"
        command = unicodedata.normalize("NFKC", text).strip().lower()
        if command in ("q", "s") or (command == "u" and can_undo):
            return command
        if command == "u":
            console.print("There is nothing to undo.")
        elif command in ("", "?"):
            console.print(HELP)
        else:
            try:
                return parse_order(text, num_responses)
            except InputError as error:
                console.print(Text(str(error), style="red"))


def _show(sample: Mapping[str, Any], shuffle: np.ndarray, title: str) -> None:
    """The prompt and the responses, labelled in shuffled order: nothing tells where one comes from."""
    console.rule(f"Prompt {title}")
    for message in sample["messages"]:
        console.print(
            Text(f"{message['role']}: ", style="bold") + Text(_printable(message_text(message)))
        )
    for label, i in zip(LABELS, shuffle, strict=False):
        response = Text(_printable(sample["responses"][i]))
        console.print(Panel(response, title=Text(label, style="bold"), title_align="left"))


def _printable(text: str) -> str:
    """The text without control characters, by which a response could move the cursor or colour the screen."""
    return "".join(
        c if c.isprintable() or c in "\n\t　" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _simulate(answers: _Answers, config: RankConfig, seed: int) -> None:
    """Rank what is left; the noise is a function of the seed and the prompt's index, so a resumed run is exact."""
    function, name = (
        resolve_function(config.annotator, "annotator"),
        config.annotator_name or config.annotator,
    )
    begin, total = answers.done, len(answers.samples)
    left = f"{total - begin} prompts to rank"
    console.print(
        f"rank: SIMULATED annotator {config.annotator}, no person: {left}", soft_wrap=True
    )
    columns = (
        TextColumn("[bold]rank (SIMULATED)"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        for index in bar.track(range(begin, total), total=total, completed=begin):
            messages, responses = (answers.samples[index][key] for key in ("messages", "responses"))
            scores = score_all(function, [prompt_text(messages)] * len(responses), responses)
            scores = scores + config.noise * np.random.default_rng([seed, index]).standard_normal(
                len(responses)
            )
            answers.rank(_rank_scores(scores, config.tie_margin), name, simulated=True)


def _rank_scores(scores: np.ndarray, tie_margin: float) -> list[int]:
    """Dense ranks, 1 for the highest score; a score ties with the best of its group where within tie_margin of it."""
    ranks, rank, best = [0] * len(scores), 0, np.inf
    for i in np.argsort(-scores, kind="stable"):
        if best - scores[i] > tie_margin:
            rank, best = rank + 1, scores[i]
        ranks[i] = rank
    return ranks


def _import_file(path: Path, directory: epath.Path, config: RankConfig) -> None:
    """Check every line of a rankings file, then write rankings.jsonl at once."""
    lines = [
        _complete(line, where, config)
        for line, where in _read_lines(path)[: config.max_prompts or None]
    ]
    if not lines:
        raise InputError(
            f"{path}: holds no rankings; each line is one JSON object with messages, responses and ranks"
        )
    write_whole(directory / "rankings.jsonl", "".join(map(json_line, lines)))


def _complete(line: dict[str, Any], where: str, config: RankConfig) -> dict[str, Any]:
    """A checked ranking from a line that may say prompt for messages and order for ranks, without split or time."""
    if "messages" not in line and isinstance(line.get("prompt"), str):
        line = {**line, "messages": [{"role": "user", "content": line["prompt"]}]}
    _check_responses(line, where)
    if "ranks" not in line and isinstance(line.get("order"), str):
        try:
            line = {**line, "ranks": parse_order(line["order"], len(line["responses"]))}
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    given = {k: line[k] for k in ("messages", "responses", "ranks", "simulated") if k in line}
    given["annotator"] = config.annotator_name or line.get("annotator")
    given |= {
        "time": line.get("time", _now()),
        "split": line.get("split", _split(line["messages"], config.held_out)),
    }
    return _check_ranking(given, where)


def _split(messages: Sequence[Mapping[str, Any]], held_out: float) -> str:
    """By content, as the data of every stage is split: a prompt stands on the same side in all of them."""
    content = question(known_parts(messages))
    return "held_out" if is_held_out(content, held_out) else "train"


def _summary(rankings: list[dict[str, Any]], skipped: int) -> dict[str, Any]:
    if not rankings:
        raise InputError(
            "rank: every prompt was skipped; remove rank/skipped.jsonl in the run directory to rank again"
        )
    pairs = [
        a == b for line in rankings for i, a in enumerate(line["ranks"]) for b in line["ranks"][:i]
    ]
    held_out = sum(line["split"] == "held_out" for line in rankings)
    return {
        **{
            "prompts": len(rankings),
            "train_prompts": len(rankings) - held_out,
            "held_out_prompts": held_out,
        },
        "skipped": skipped,
        "responses_per_prompt": sum(len(line["responses"]) for line in rankings) / len(rankings),
        "tie_fraction": sum(pairs) / len(pairs),
        "simulated": any(line["simulated"] for line in rankings),
        "annotator": ", ".join(sorted({line["annotator"] for line in rankings})),
    }


def _print_summary(result: Mapping[str, Any]) -> None:
    mark = " (SIMULATED annotator)" if result["simulated"] else ""
    table = Table(title=f"rank{mark}", show_header=False, title_justify="left")
    table.add_row("annotator", Text(f"{result['annotator']}{mark}"))
    table.add_row(
        "prompts ranked", f"{result['prompts']:,} ({result['held_out_prompts']:,} held out){mark}"
    )
    table.add_row("prompts skipped", f"{result['skipped']:,}")
    table.add_row("responses per prompt (K)", f"{result['responses_per_prompt']:g}")
    table.add_row("tied pairs", f"{result['tie_fraction']:.1%}{mark}")
    console.print(table)
