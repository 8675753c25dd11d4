"""Sample: the fine-tuned model writes K responses to each prompt, to be ranked."""

import os
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from jaxllm.config import InputError
from jaxllm.data.loader import PromptExample, load_prompts
from jaxllm.engine.responses import complete, whole_batch
from jaxllm.engine.rollouts import Completion
from jaxllm.model_store import load_model
from jaxllm.runtime.console import console
from jaxllm.runtime.files import json_line, read_jsonl, write_whole
from jaxllm.runtime.processes import barrier
from jaxllm.runtime.store.working import share
from jaxllm.stages.config import SampleConfig
from jaxllm.tokenizers.trained import Tokenizer
from jaxllm.workspace import Workspace


def run(workspace: Workspace, life: Any, stage: str) -> dict[str, Any]:
    """Write samples.jsonl, one line per prompt; an interrupted run resumes after its last full batch.

    Raises:
      InputError: no model to sample from, no usable prompts, or no room for them.
      Stopped: after a signal, between two batches.
    """
    config: SampleConfig = getattr(life, stage)
    source = workspace.source(config.init_from, "sft", stage)
    params, model = load_model(source, workspace.mesh)
    tokenizer = workspace.tokenizer()
    max_length = model.max_length - config.sampling.max_new_tokens
    if max_length < 1:
        raise InputError(
            f"{stage}.sampling.max_new_tokens: leaves no room for a prompt in model.max_length "
            f"{model.max_length}; lower it"
        )
    # A prompt and its response share the model's context.
    prompts = _load_prompts(config, tokenizer, max_length)
    path = workspace.stage_dir(stage) / "samples.jsonl"
    batch_size = whole_batch(workspace.mesh, min(config.batch_size, len(prompts)))
    num_done = _keep_whole_batches(path, batch_size)
    # A generator: a batch is computed when the loop below asks for its first prompt.
    responses = complete(
        params,
        model,
        [prompt.ids for _, prompt in prompts],
        mesh=workspace.mesh,
        sampling=config.sampling,
        stop_ids=tokenizer.stop_ids,
        seed=workspace.seed,
        num_samples=config.num_responses,
        batch_size=batch_size,
        start=num_done,
        engine=config.engine,
    )
    # All processes have counted the lines before one appends to them.
    barrier("samples so far")
    about = {"source": source, "seed": workspace.seed}
    # Every process takes part in the generation, and one of them writes.
    file = epath.Path(os.devnull if jax.process_index() else path).open("a")
    with file, workspace.signals as signals:
        for count, completions in enumerate(responses, start=num_done + 1):
            file.write(json_line(_sample(*prompts[count - 1], completions, tokenizer) | about))
            # Only between batches: a run that stops within one would sample its rows again.
            if count % batch_size == 0:
                file.flush()
                console.print(
                    f"{stage} {count}/{len(prompts)} prompts, {config.num_responses} responses each"
                )
                if signals.stop_after() and count < len(prompts):
                    raise signals.stopped(
                        f"{stage}: {count} of {len(prompts)} prompts are answered"
                    )
    # The file is closed, hence complete, before any process reads it.
    share(path, "samples")
    return _summarize(read_jsonl(path), config.num_responses)


def _sample(
    split: str, prompt: PromptExample, completions: Sequence[Completion], tokenizer: Tokenizer
) -> dict[str, Any]:
    """A line of samples.jsonl; finished: whether a response ended by itself, before max_new_tokens."""
    return {
        "messages": prompt.messages,
        "responses": [tokenizer.decode(completion.ids) for completion in completions],
        "finished": [completion.finished for completion in completions],
        "split": split,
    }


def _load_prompts(
    config: SampleConfig, tokenizer: Tokenizer, max_length: int
) -> list[tuple[str, PromptExample]]:
    """(split, prompt) of the prompts to sample, those of the training split first."""
    prompts = []
    # In a fixed order: the number of a line in samples.jsonl is the number of its prompt.
    for split, count in (("train", config.num_prompts), ("held_out", config.num_held_out)):
        if count:  # loading an empty split is an error, also if nothing is wanted of it
            for prompt in load_prompts(config.data, split, tokenizer, max_length)[:count]:
                prompts.append((split, prompt))
    return prompts


def _keep_whole_batches(path: epath.Path, batch_size: int) -> int:
    """Drop the lines after the last full batch, or after a damaged line; returns the number of lines kept.

    The remaining batches then have the same rows, and so the same bits, as in a run that was not interrupted. In
    batches of 2, interrupted while the fourth line was written:

        lines    0 1 2 3-      kept  0 1      next batch  2 3
    """
    # "stop" at a damaged line: the number of a line says which prompt it answers.
    lines = read_jsonl(path, "stop")
    num_kept = len(lines) // batch_size * batch_size
    if jax.process_index() == 0:
        write_whole(path, "".join(map(json_line, lines[:num_kept])))
    return num_kept


def _summarize(lines: Sequence[dict[str, Any]], num_responses: int) -> dict[str, Any]:
    """The stage's result from the lines of samples.jsonl."""
    # Over all lines of the file, those of an interrupted run included.
    total = 0
    num_finished = 0
    num_characters = 0
    for line in lines:
        total += len(line["responses"])
        num_finished += sum(line["finished"])
        num_characters += sum(map(len, line["responses"]))
    return {
        "prompts": len(lines),
        "responses": total,
        "responses_per_prompt": num_responses,
        "finished": num_finished / total,
        "mean_characters": num_characters / total,
    }
