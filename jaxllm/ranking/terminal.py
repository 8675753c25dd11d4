"""A person ranks in the terminal. Responses are shown in a random order, without a trace of their source."""

import sys
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.panel import Panel
from rich.text import Text

from jaxllm.config import InputError
from jaxllm.data.messages import message_text
from jaxllm.ranking.answers import Answers
from jaxllm.ranking.orders import LABELS, parse_order, shown_order, unshuffle
from jaxllm.runtime.console import console
from jaxllm.workspace import StageCut

_HELP = Text.from_markup(
    "Best first: [b]B>A=D>C[/b] says B is best, A and D are equal, C is worst. Name every response once.\n"
    "[b]s[/b] skip this prompt   [b]u[/b] undo the previous answer   [b]q[/b] stop and resume later   [b]?[/b] this help"
)


def terminal_input() -> Callable[[], str]:
    """A function that reads one answer from the terminal.

    Raises:
      InputError: standard input is not a terminal.
    """
    if not sys.stdin.isatty():
        raise InputError(
            "rank.annotator: person needs a terminal; rank elsewhere and give --rank.annotator file:RANKINGS.jsonl"
        )
    return lambda: console.input(Text("order> ", style="bold"))


def ask_person(answers: Answers, annotator: str, seed: int, ask: Callable[[], str]) -> None:
    """Ask for the order of every sample that a person may answer.

    Raises:
      StageCut: the person stops before the end; the answers so far are on disk.
    """
    if answers.remaining:
        console.print(_HELP)
    # Asked again each time: an undo moves it back.
    while (index := answers.next_for(annotator)) is not None:
        sample = answers.samples[index]
        order = shown_order(seed, index, len(sample["responses"]))
        _show(sample, order, f"{index + 1} of {len(answers.samples)}")
        newest = answers.newest(annotator)
        reply = _read_reply(ask, len(order), can_undo=newest is not None)
        if reply == "q":
            # Not a plain return: the stage has no result yet.
            raise cut(answers)
        if reply == "s":
            answers.skip(index, annotator)
        elif reply == "u":
            assert newest is not None
            answers.undo(newest, annotator)
        else:
            assert isinstance(reply, list)
            answers.rank(index, unshuffle(reply, order), annotator)


def cut(answers: Answers) -> StageCut:
    """What ends the stage before all answers are there."""
    given = answers.needed - answers.remaining
    # Where several people answer one prompt, there are more answers than prompts.
    what = "prompts answered" if answers.needed == len(answers.samples) else "answers given"
    return StageCut(f"rank: {given} of {answers.needed} {what}; run the same command to resume")


def _read_reply(ask: Callable[[], str], num_responses: int, can_undo: bool) -> str | list[int]:
    """A command (s, u, q), or the ranks of the responses as shown; asks until it gets one."""
    while True:
        try:
            text = ask()
        except (EOFError, KeyboardInterrupt):  # Ctrl-D and Ctrl-C: every answer is on disk already
            return "q"
        except UnicodeDecodeError:
            # On a terminal that counts bytes, erasing a character may leave half of it.
            text = "\N{REPLACEMENT CHARACTER}"
        # NFKC: a person who has just typed Chinese may still type full-width letters.
        command = unicodedata.normalize("NFKC", text).strip().lower()
        if command in ("q", "s") or (command == "u" and can_undo):
            return command
        if command == "u":
            console.print("There is nothing to undo.")
        elif command in ("", "?"):
            console.print(_HELP)
        else:
            try:
                return parse_order(text, num_responses)
            except InputError as error:
                console.print(Text(str(error), style="red"))  # and ask again


def _show(sample: Mapping[str, Any], order: np.ndarray, title: str) -> None:
    """Print the prompt and its responses; label j is response order[j]."""
    console.rule(f"Prompt {title}")
    # Text objects, not strings with markup: "[b]" in a response is shown as it was written.
    for message in sample["messages"]:
        role = Text(f"{message['role']}: ", style="bold")
        console.print(role + Text(_printable(message_text(message))))
    for label, i in zip(LABELS, order, strict=False):
        response = Text(_printable(sample["responses"][i]))
        console.print(Panel(response, title=Text(label, style="bold"), title_align="left"))


def _printable(text: str) -> str:
    """The text without control characters, with which a response could move the cursor or recolor the screen."""
    allowed = "\n\t\u3000"  # U+3000 is the wide space of Chinese text
    return "".join(
        c if c.isprintable() or c in allowed else "\N{REPLACEMENT CHARACTER}" for c in text
    )
