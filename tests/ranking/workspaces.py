"""A run directory whose sample stage is finished, for the tests of ranking."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
from etils import epath

from jaxllm.ranking.records import read_rankings
from jaxllm.runtime.goodput import Ledger
from jaxllm.stages import rank
from jaxllm.stages.config import RankConfig
from jaxllm.workspace import Workspace

SIMULATED = RankConfig(annotator="jaxllm.demo.annotators:keyword_sentiment")
WORDS = ("good", "bad", "nice good", "ugly bad", "table", "很好", "[b]x[/b]", "not good")


def open_workspace(run_dir) -> Workspace:
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    run_dir = epath.Path(run_dir)
    return Workspace(run_dir, mesh, 7, {}, Ledger(run_dir / "goodput.jsonl"))


def make_workspace(run_dir, count: int = 6) -> Workspace:
    """With `count` samples of four responses each, the second of them held out."""
    workspace = open_workspace(run_dir)
    directory = workspace.stage_dir("sample")
    directory.mkdir(parents=True)
    lines = []
    for i in range(count):
        line = {
            "messages": [{"role": "user", "content": f"prompt {i}\u2028 说"}],
            "responses": [f"{WORDS[(i * 3 + k) % 8]} {k}" for k in range(4)],
            "finished": [True] * 4,
            "split": "held_out" if i == 1 else "train",
            "source": "SECRET-SOURCE",
            "seed": 7,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (directory / "samples.jsonl").write_text("".join(lines))
    workspace.finish("sample", {})
    return workspace


def run_rank(
    workspace: Workspace, config: RankConfig, ask: Callable[[], str] | None = None
) -> dict[str, Any]:
    """The stage with this section of the config."""
    return rank.run(workspace, SimpleNamespace(rank=config), "rank", ask)


def answers_from(*texts: str) -> Callable[[], str]:
    """A person who types these lines, then ends the input."""
    left = list(texts)

    def ask() -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return ask


def rankings(workspace: Workspace) -> list[dict[str, Any]]:
    return read_rankings(workspace.stage_dir("rank") / "rankings.jsonl")


def samples(workspace: Workspace) -> list[dict[str, Any]]:
    # Not splitlines: a prompt holds U+2028, which is a line end for it.
    text = (workspace.stage_dir("sample") / "samples.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n")[:-1]]


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]
