"""Rank: people in a browser or in the terminal, a file written elsewhere, or a SIMULATED annotator order K responses to
each prompt.

rankings.jsonl grows by one whole line per answer, so that an interrupted run resumes at the first prompt without an
answer. The parts that know the files and the terminal are in `jaxllm.ranking`, the page is in `jaxllm.web.rank`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxllm.config import InputError
from jaxllm.config.functions import resolve_function
from jaxllm.data.messages import prompt_text
from jaxllm.ranking import records
from jaxllm.ranking.answer_files import count_skipped
from jaxllm.ranking.answers import Answers
from jaxllm.ranking.terminal import ask_person, terminal_input
from jaxllm.rl.score_functions import score_all
from jaxllm.runtime.console import console
from jaxllm.runtime.files import json_line, write_whole
from jaxllm.runtime.store.working import share
from jaxllm.stages.config import RankConfig
from jaxllm.workspace import StageCut, Workspace


def run(
    workspace: Workspace, life: Any, stage: str, ask: Callable[[], str] | None = None
) -> dict[str, Any]:
    """Rank the responses in samples.jsonl into rankings.jsonl; returns `records.summarize`.

    Args:
      workspace: the run directory.
      life: the whole config.
      stage: the stage's name.
      ask: reads one answer of a person, instead of the terminal.

    Raises:
      StageCut: the person stops before the end.
      InputError: bad samples, a bad rankings file, a missing annotator, or a person without a terminal.
    """
    config: RankConfig = getattr(life, stage)
    directory = workspace.stage_dir(stage)
    rankings = directory / "rankings.jsonl"
    # One process asks, scores and writes; the others wait, then read the same files.
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        if config.annotator.startswith("file:"):
            _import_file(rankings, config)
        else:
            _rank_samples(workspace, directory, config, ask)
    share(rankings, "rank")
    # From the file, so that the result also counts what an earlier run ranked.
    lines = records.read_rankings(rankings)
    return records.summarize(lines, count_skipped(directory)) | _compare(lines, config)


def _compare(rankings: Sequence[Mapping[str, Any]], config: RankConfig) -> dict[str, float]:
    """How often people order two responses as a simulated annotator does."""
    people = [ranking for ranking in rankings if not ranking["simulated"]]
    if not config.compare_with or not people:
        return {}
    function = resolve_function(config.compare_with, "compare_with")
    groups = []
    for ranking in people:
        responses = ranking["responses"]
        prompt = prompt_text(ranking["messages"])
        scores = score_all(function, [prompt] * len(responses), responses)
        simulated = _rank_scores(scores, config.tie_margin)
        groups.append([("person", ranking["ranks"]), ("function", simulated)])
    found = records.pair_agreement(groups)
    return {"agreement_with_simulated": found[0]} if found else {}


def _import_file(target: epath.Path, config: RankConfig) -> None:
    """Check every line of a rankings file, then write rankings.jsonl in one piece."""
    rankings = records.import_rankings(
        Path(config.annotator.removeprefix("file:")).expanduser(),
        annotator=config.annotator_name,
        held_out=config.held_out,
        max_prompts=config.max_prompts,
    )
    write_whole(target, "".join(map(json_line, rankings)))


def _rank_samples(
    workspace: Workspace, directory: epath.Path, config: RankConfig, ask: Callable[[], str] | None
) -> None:
    workspace.require("sample", "rank")
    path = workspace.stage_dir("sample") / "samples.jsonl"
    # Answers given before an interruption are kept, whoever gave them.
    answers = Answers(
        directory,
        records.read_samples(path, config.max_prompts),
        seed=workspace.seed,
        overlap=config.overlap,
        overlap_annotators=config.overlap_annotators,
    )
    if config.annotator == "browser":
        _ask_in_browser(answers, config, workspace.seed)
    elif config.annotator == "person":
        name = config.annotator_name or "person"
        ask_person(answers, name, workspace.seed, ask or terminal_input())
    else:
        _simulate(answers, config, workspace.seed)
    if answers.remaining:
        raise StageCut(
            f"rank: {answers.remaining} answers of other people are still needed (rank.overlap); rank on with "
            "--rank.annotator-name NAME --allow-change rank.annotator_name"
        )


def _ask_in_browser(answers: Answers, config: RankConfig, seed: int) -> None:
    try:
        # Imports packages of an extra, which may be missing.
        from jaxllm.web.rank import rank_in_browser
    except ModuleNotFoundError as error:
        raise InputError(
            f"rank.annotator: browser needs {error.name}; pip install 'jaxllm[web]'"
        ) from None
    rank_in_browser(
        answers,
        seed,
        guidelines=config.guidelines,
        host=config.host,
        port=config.port,
        api_key=os.environ.get("JAXLLM_API_KEY", ""),
        open_browser=config.open_browser,
    )


def _simulate(answers: Answers, config: RankConfig, seed: int) -> None:
    """Rank the samples without an answer by the scores of a function."""
    # Resolved first: a missing function is an error before anything is printed or written.
    function = resolve_function(config.annotator, "annotator")
    # The whole specification by default, so that rankings of two functions can be told apart.
    name = config.annotator_name or config.annotator
    # Marked in the log and in every line: a program's rankings must not pass for a person's.
    total = answers.needed
    begin = total - answers.remaining
    console.print(
        f"rank: SIMULATED annotator {config.annotator}, no person: {total - begin} prompts to rank",
        soft_wrap=True,
    )
    columns = (
        TextColumn("[bold]rank (SIMULATED)"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        # Ends when there is no sample left for it.
        open_samples = iter(lambda: answers.next_for(name), None)
        for index in bar.track(open_samples, total=total, completed=begin):
            responses = answers.samples[index]["responses"]
            prompt = prompt_text(answers.samples[index]["messages"])
            scores = score_all(function, [prompt] * len(responses), responses)
            # A function of the seed and the index alone: a resumed run adds the same noise.
            noise = np.random.default_rng([seed, index]).standard_normal(len(responses))
            ranks = _rank_scores(scores + config.noise * noise, config.tie_margin)
            answers.rank(index, ranks, name, simulated=True)


def _rank_scores(scores: np.ndarray, tie_margin: float) -> list[int]:
    """Ranks without gaps, 1 for the highest of scores float[K].

    A score ties with the best of its group if it is within tie_margin of that one. With a margin of 0.1:

        scores 0.50 0.45 0.38 0.30      groups {0.50 0.45} {0.38 0.30}      ranks 1 1 2 2
    """
    ranks = [0] * len(scores)
    rank = 0
    best = np.inf  # of the current group
    # Best first; stable, so that equal scores keep the order of the responses.
    for i in np.argsort(-scores, kind="stable"):
        if best - scores[i] > tie_margin:
            rank += 1
            best = scores[i]
        ranks[i] = rank
    return ranks
