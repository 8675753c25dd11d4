"""The lines of samples.jsonl and rankings.jsonl, and what is checked of them.

    samples.jsonl   {"messages": [...], "responses": [K texts], "split": "train", ...}
    rankings.jsonl  {"messages": [...], "responses": [K texts], "ranks": [K numbers], "annotator": "Lee",
                     "simulated": false, "time": "2026-01-31T12:00:00+00:00", "split": "train"}

A ranking may have a "note", a remark of the annotator. Every error is an InputError "path:line: field: what is wrong".
"""

import datetime
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from jaxllm.config import InputError
from jaxllm.data.config import Source
from jaxllm.data.file_formats import format_of
from jaxllm.data.format import is_held_out
from jaxllm.data.messages import question
from jaxllm.data.schema import check_messages, known_parts
from jaxllm.data.sources import read_records
from jaxllm.ranking.orders import LABELS, parse_order


def read_lines(path: epath.PathLike) -> list[tuple[dict[str, Any], str]]:
    """(fields, "path:line") of each record; a file whose name does not tell its format holds lines of JSON."""
    path = str(path)
    file_format = "jsonl" if format_of(path) == "text" else "auto"
    # The reader of every stage's data, so that compressed files, tables and byte order marks work here too. min_chars is
    # for pre-training texts: a short answer is a record.
    records = read_records(Source(path, format=file_format, min_chars=0))
    return [(record.fields, record.origin) for record in records]


def read_rankings(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a rankings.jsonl, checked."""
    rankings = []
    for line, where in read_lines(path):
        _check_ranking(line, where)
        rankings.append(line)
    return rankings


def read_samples(path: epath.PathLike, max_prompts: int) -> list[dict[str, Any]]:
    """What a ranking keeps of the first `max_prompts` samples (0: of all): messages, responses and split."""
    samples = []
    for line, where in read_lines(path)[: max_prompts or None]:
        _check_responses(line, where)
        split = line.get("split", "train")
        _check_split(split, where)
        sample = {"messages": line["messages"], "responses": line["responses"], "split": split}
        samples.append(sample)
    if not samples:
        raise InputError(f"{path}: holds no samples to rank; run the sample stage again")
    return samples


def import_rankings(
    path: epath.PathLike, *, annotator: str = "", held_out: float = 0.1, max_prompts: int = 0
) -> list[dict[str, Any]]:
    """The lines for a rankings.jsonl from a file written elsewhere.

    Its lines may give "prompt" instead of messages and "order" instead of ranks, and leave out split and time.

    Args:
      path: the file, in any format that data is read in.
      annotator: who ranked; empty: as each line says.
      held_out: share of the prompts kept for evaluation, for lines without a split.
      max_prompts: read only the first so many lines; 0: all.
    """
    # All lines are checked before one is used: nothing is written from a file with a bad line.
    rankings = []
    for line, where in read_lines(path)[: max_prompts or None]:
        rankings.append(_complete(line, where, annotator, held_out))
    if not rankings:
        raise InputError(
            f"{path}: holds no rankings; each line is one JSON object with messages, responses and ranks"
        )
    return rankings


def _complete(
    line: Mapping[str, Any], where: str, annotator: str, held_out: float
) -> dict[str, Any]:
    """A checked ranking from a line of an imported file."""
    # In the order of the fields in rankings.jsonl; fields that it does not have are left out.
    ranking: dict[str, Any] = {
        "messages": line.get("messages"),
        "responses": line.get("responses"),
    }
    if "messages" not in line and isinstance(line.get("prompt"), str):
        ranking["messages"] = [{"role": "user", "content": line["prompt"]}]
    _check_responses(ranking, where)
    if "ranks" in line:
        ranking["ranks"] = line["ranks"]
    elif isinstance(line.get("order"), str):
        try:
            ranking["ranks"] = parse_order(line["order"], len(ranking["responses"]))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    if "simulated" in line:
        ranking["simulated"] = line["simulated"]
    ranking["annotator"] = annotator or line.get("annotator")
    ranking["time"] = line.get("time", now())
    ranking["split"] = line.get("split", split_of(ranking["messages"], held_out))
    if "note" in line:
        ranking["note"] = line["note"]
    _check_ranking(ranking, where)
    return ranking


def split_of(messages: Sequence[Mapping[str, Any]], held_out: float) -> str:
    """The split of a prompt, by its content: it is the same in the data of every stage."""
    # By a hash of what is asked, as in `data.format`: a prompt held out here must not be trained on elsewhere.
    content = question(known_parts(messages))
    return "held_out" if is_held_out(content, held_out) else "train"


def now() -> str:
    """The time in ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def summarize(rankings: Sequence[Mapping[str, Any]], num_skipped: int) -> dict[str, Any]:
    """The result of the rank stage: counts, the share of tied pairs, who ranked, and whether they agree.

    Raises:
      InputError: there are no rankings, since every prompt was skipped.
    """
    # Without rankings there is no mean, and nothing for the reward stage to read.
    if not rankings:
        raise InputError(
            "rank: every prompt was skipped; remove rank/skipped.jsonl in the run directory to rank again"
        )
    num_pairs = 0
    num_ties = 0
    num_responses = 0
    num_held_out = 0
    for ranking in rankings:
        num_responses += len(ranking["responses"])
        num_held_out += ranking["split"] == "held_out"
        # Ties are counted in pairs, since pairs are what a reward model learns from.
        for rank, other in itertools.combinations(ranking["ranks"], 2):
            num_pairs += 1
            num_ties += rank == other
    annotators = sorted({ranking["annotator"] for ranking in rankings})
    result = {
        "prompts": len(rankings),
        "train_prompts": len(rankings) - num_held_out,
        "held_out_prompts": num_held_out,
        "skipped": num_skipped,
        "responses_per_prompt": num_responses / len(rankings),
        "tie_fraction": num_ties / num_pairs,
        "simulated": any(ranking["simulated"] for ranking in rankings),
        "annotator": ", ".join(annotators),
        "annotators": len(annotators),
    }
    if agreement := pair_agreement(_by_content(rankings)):
        result["agreement"], result["agreement_pairs"] = agreement
    return result


def pair_agreement(
    groups: Iterable[Sequence[tuple[str, Sequence[int]]]],
) -> tuple[float, int] | None:
    """(share, pairs): of the pairs of responses that two annotators have ordered, how many both order the same.

    Pairs that either of them has tied are left out. None: there are no pairs.

    groups: for each sample (annotator, ranks int[K] in the order of its responses) of those who ranked it.
    """
    num_alike = 0
    num_pairs = 0
    for group in groups:
        for (name, first), (other, second) in itertools.combinations(group, 2):
            # Two rankings of one person are of identical samples, and say nothing of others.
            if name == other:
                continue
            for i, j in itertools.combinations(range(len(first)), 2):
                # Positive if both order the pair the same, 0 if either ties it.
                product = (first[i] - first[j]) * (second[i] - second[j])
                num_pairs += product != 0
                num_alike += product > 0
    return (num_alike / num_pairs, num_pairs) if num_pairs else None


def _by_content(
    rankings: Sequence[Mapping[str, Any]],
) -> Iterable[list[tuple[str, Sequence[int]]]]:
    """Groups of rankings of the same prompt and responses, as (annotator, ranks)."""
    groups: dict[str, list[tuple[str, Sequence[int]]]] = {}
    for ranking in rankings:
        content = json.dumps([ranking["messages"], ranking["responses"]], sort_keys=True)
        groups.setdefault(content, []).append((ranking["annotator"], ranking["ranks"]))
    return groups.values()


def _check_ranking(line: Mapping[str, Any], where: str) -> None:
    _check_responses(line, where)
    _check_ranks(line.get("ranks"), len(line["responses"]), where)
    annotator = line.get("annotator")
    if not isinstance(annotator, str) or not annotator:
        raise InputError(f"{where}: annotator: name who ranked (or set rank.annotator_name)")
    # Required, not guessed: every number made from simulated rankings is marked as such.
    if not isinstance(line.get("simulated"), bool):
        raise InputError(
            f"{where}: simulated: must be false for a person's ranking, true for a program's"
        )
    if not isinstance(line.get("note", ""), str):
        raise InputError(f"{where}: note: must be a text")
    _check_split(line.get("split"), where)
    # The time tells apart the sessions of one annotator; it is kept as text.
    try:
        datetime.datetime.fromisoformat(line["time"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{where}: time: must be an ISO-8601 time, such as 2026-01-31T12:00:00+00:00"
        ) from None


def _check_responses(line: Mapping[str, Any], where: str) -> None:
    messages = line.get("messages")
    responses = line.get("responses")
    if not isinstance(messages, list) or not messages:
        example = '[{"role": "user", "content": "..."}]'
        raise InputError(
            f'{where}: messages: must be a list such as {example} (or give a "prompt")'
        )
    check_messages(messages, where)
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
        raise InputError(f"{where}: responses: must be a list of texts")
    # One response has no pair; more than there are letters cannot be named.
    if not 2 <= len(responses) <= len(LABELS):
        raise InputError(
            f"{where}: responses: must be 2 to {len(LABELS)} texts to rank, not {len(responses)}"
        )


def _check_ranks(ranks: Any, num_responses: int, where: str) -> None:
    fault = ranks_fault(ranks, num_responses)
    if fault:
        raise InputError(f"{where}: ranks: {fault}")


def ranks_fault(ranks: Any, num_responses: int) -> str:
    """What is wrong with the ranks of so many responses; empty if nothing is."""
    # Not isinstance(rank, int), which holds for a bool as well.
    whole_numbers = isinstance(ranks, list) and all(type(rank) is int for rank in ranks)
    if not whole_numbers or len(ranks) != num_responses:
        return f'must be {num_responses} whole numbers, 1 = best (or give an "order")'
    # Numbers with gaps may be scores, of which the largest is best: better to ask than to guess.
    levels = sorted(set(ranks))
    if levels != list(range(1, len(levels) + 1)):
        return f"must count 1, 2, ... without a gap, equal numbers for a tie, not {ranks}"
    return ""


def _check_split(split: Any, where: str) -> None:
    if split not in ("train", "held_out"):
        raise InputError(f"{where}: split: must be train or held_out, not {split!r:.40}")
