"""Sample: K responses to each prompt, drawn from the fine-tuned model for ranking."""

import dataclasses
import os
from typing import Any

import jax
from etils import epath

from jaxllm.config import InputError
from jaxllm.config.ranges import NonNegativeInt, PositiveInt
from jaxllm.data.loader import PromptExample, load_prompts
from jaxllm.data.sources import DataConfig
from jaxllm.generate import SamplingConfig, complete, whole_batch
from jaxllm.model_store import load_model
from jaxllm.runtime.console import console
from jaxllm.runtime.files import json_line, read_jsonl, write_whole
from jaxllm.runtime.processes import barrier
from jaxllm.workspace import Workspace


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Which prompts, and how many responses to each."""

    data: DataConfig = DataConfig()
    """Prompts."""
    init_from: str = ""
    """Stage directory of the model to sample from; empty: sft."""
    num_prompts: PositiveInt = 1000
    """Prompts of the training split to sample; fewer if there are fewer."""
    num_held_out: NonNegativeInt = 200
    """Prompts of the held-out split, for measuring the reward model."""
    num_responses: PositiveInt = 4
    """Responses drawn to each prompt (K)."""
    batch_size: PositiveInt = 32
    """Prompts per batch."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are drawn."""

    def __post_init__(self) -> None:
        if self.num_responses < 2:
            raise ValueError("num_responses: at least 2 responses are needed to rank them")


def build(workspace: Workspace, life: Any, stage: str) -> dict[str, Any]:
    """`run` with the stage's section."""
    return run(workspace, getattr(life, stage))


def run(workspace: Workspace, config: SampleConfig) -> dict[str, Any]:
    """Write samples.jsonl, a line per prompt; a killed run goes on after its last whole batch."""
    source = workspace.source(config.init_from, "sft", "sample")
    params, model = load_model(source, workspace.mesh)
    tokenizer, path = workspace.tokenizer(), workspace.stage_dir("sample") / "samples.jsonl"
    limit = model.max_length - config.sampling.max_new_tokens
    if limit < 1:
        raise InputError(
            f"sample.sampling.max_new_tokens: leaves no room for a prompt in model.max_length {model.max_length}"
        )
    prompts: list[tuple[str, PromptExample]] = []
    for split, count in (("train", config.num_prompts), ("held_out", config.num_held_out)):
        prompts += (
            [(split, p) for p in load_prompts(config.data, split, tokenizer, limit)[:count]]
            if count
            else []
        )
    batch_size = whole_batch(workspace.mesh, min(config.batch_size, len(prompts)))
    done = _keep_whole_batches(path, batch_size)
    asked, stops = [prompt.ids for _, prompt in prompts], tokenizer.stop_ids
    settings = {
        "sampling": config.sampling,
        "stop_ids": stops,
        "pad_id": tokenizer.pad_id,
        "seed": workspace.seed,
    }
    settings |= {"num_samples": config.num_responses, "batch_size": batch_size, "start": done}
    drawn = complete(params, model, asked, mesh=workspace.mesh, **settings)
    barrier("samples so far")
    file = epath.Path(os.devnull if jax.process_index() else path).open("a")
    with file, workspace.signals as signals:
        for i, completions in enumerate(drawn, start=done):
            split, prompt = prompts[i]
            line = {
                "messages": prompt.messages,
                "responses": [tokenizer.decode(c.ids) for c in completions],
                "finished": [c.finished for c in completions],
                **{"split": split, "source": source, "seed": workspace.seed},
            }
            file.write(json_line(line))
            if (i + 1) % batch_size == 0:
                file.flush()
                console.print(
                    f"sample {i + 1}/{len(prompts)} prompts, {config.num_responses} responses each"
                )
                if signals.stop_after() and i + 1 < len(prompts):
                    raise signals.stopped(f"sample: {i + 1} of {len(prompts)} prompts are answered")
    barrier("samples")
    lines = read_jsonl(path)
    responses = [r for line in lines for r in line["responses"]]
    return {
        **{
            "prompts": len(lines),
            "responses": len(responses),
            "responses_per_prompt": config.num_responses,
        },
        "finished": sum(f for line in lines for f in line["finished"]) / len(responses),
        "mean_characters": sum(map(len, responses)) / len(responses),
    }


def _keep_whole_batches(path: epath.Path, batch_size: int) -> int:
    """Drop what a killed run wrote past its last whole batch; the number of lines kept.

    Batches then have the same rows as in a run never cut, and so the same bits. What follows a damaged line is drawn again.
    """
    lines = read_jsonl(path, "stop")
    keep = len(lines) // batch_size * batch_size
    if jax.process_index() == 0:
        write_whole(path, "".join(map(json_line, lines[:keep])))
    return keep
