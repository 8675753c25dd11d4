"""Evaluate: the stages' models side by side on held-out data."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import InputError
from jaxllm.config.functions import FunctionName, resolve_function
from jaxllm.config.ranges import NonNegativeInt, PositiveInt
from jaxllm.data.contamination import measure_contamination, some_documents
from jaxllm.data.loader import load_prompts
from jaxllm.data.messages import message_text
from jaxllm.data.sources import DataConfig
from jaxllm.data.splits import examples, shuffled
from jaxllm.data.store import load_texts, open_store
from jaxllm.evaluation import measures, tasks
from jaxllm.evaluation.tasks import ScoringConfig
from jaxllm.generate import SamplingConfig, complete, completions, roll_out
from jaxllm.model_store import load_model
from jaxllm.models.config import ModelConfig
from jaxllm.rl.score_functions import score_all
from jaxllm.rollouts import response_logprobs
from jaxllm.runtime.console import console
from jaxllm.runtime.transfer import fetch
from jaxllm.stages import names
from jaxllm.tokenizers.trained import Tokenizer
from jaxllm.workspace import Workspace

MAX_HELD_OUT = 20_000  # held-out documents that are looked for in the training data


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on held-out data, and on which stages' models."""

    stages: tuple[str, ...] = names("policy")
    """Stages whose models are measured; the ones that have not run are left out."""
    accuracy: DataConfig = DataConfig()
    """Conversations whose last reply is a label, answered greedily; no sources: not measured."""
    max_accuracy_examples: PositiveInt = 1000
    """At most this many of them."""
    prompts: DataConfig = DataConfig()
    """Prompts for open answers; without sources those of the sample stage."""
    num_prompts: PositiveInt = 200
    """At most this many held-out prompts."""
    annotator: FunctionName = ""
    """module:function scoring (prompt, response): a SIMULATED annotator; empty: none."""
    sampling: SamplingConfig = SamplingConfig()
    """How open answers are drawn."""
    label_tokens: PositiveInt = 8
    """Longest label in tokens."""
    num_shown: NonNegativeInt = 8
    """Prompts whose answers are shown side by side."""
    batch_size: PositiveInt = 64
    """Prompts per batch."""
    contamination_n: NonNegativeInt = 13
    """Look for this many tokens in a row of the evaluation sets in the training data; 0: do not."""
    compare_xz: bool = True
    """Also compress the held-out documents with xz -9 behind the training documents."""
    tasks: tuple[str, ...] = ()
    """Files of multiple choice, perplexity or generation, as for `jaxllm score`."""
    scoring: ScoringConfig = ScoringConfig()
    """How their questions are asked."""


def build(workspace: Workspace, life: Any, stage: str) -> dict[str, Any]:
    """`run` with the stage's section and the data of pre-training and fine-tuning."""
    return run(workspace, getattr(life, stage), life.pretrain.data, life.sft.data)


def run(
    workspace: Workspace,
    config: EvaluateConfig,
    documents: DataConfig,
    chats: DataConfig | None = None,
) -> dict[str, Any]:
    """Measure every stage's model; returns {"stages": {stage: numbers}, "samples": [...], ...}.

    documents, chats: what pre-training and fine-tuning trained on.
    """
    present = [stage for stage in config.stages if workspace.result(stage) is not None]
    if not present:
        raise InputError(
            f"{workspace.run_dir}: none of the stages {', '.join(config.stages)} has finished; run them first"
        )
    tokenizer = workspace.tokenizer()
    result: dict[str, Any] = {
        "stages": {stage: _training_numbers(workspace, stage) for stage in present}
    }
    answers: dict[str, list[str]] = {}
    scores: dict[str, np.ndarray] = {}
    files = tasks.read_tasks(config.tasks, config.scoring)
    task_scores: dict[str, tasks.Numbers] = {}
    reference = load_model(workspace.stage_dir("sft"), workspace.mesh) if "sft" in present else None
    for stage in present:
        console.print(f"evaluate: {stage}")
        params, model = load_model(workspace.stage_dir(stage), workspace.mesh)
        numbers = result["stages"][stage]
        if config.accuracy.sources and stage != "pretrain":
            numbers |= label_accuracy(workspace, config, tokenizer, params, model)
        if config.prompts.sources:
            ref_params = reference[0] if reference and stage not in ("pretrain", "sft") else None
            open_numbers, answers[stage], prompts = open_answers(
                workspace, config, tokenizer, params, model, ref_params
            )
            numbers |= open_numbers
            if config.annotator:
                scores[stage] = score_all(
                    resolve_function(config.annotator, "annotator"), prompts, answers[stage]
                )
                mean, error = measures.mean_and_error(scores[stage])
                numbers |= {"annotator_score": mean, "annotator_score_error": error}
            result["samples"] = _side_by_side(prompts, answers, config.num_shown)
        named = tasks.Model(params, model, tokenizer, workspace.mesh)
        tasks.add_scores(task_scores, stage, named, files, config.scoring, workspace.seed)
    if files:
        result |= {"tasks": task_scores, "task_files": tasks.describe(files)}
    final = present[-1]
    if {"sft", final} <= scores.keys() and final != "sft":
        gain, error = measures.mean_and_error(scores[final] - scores["sft"])
        result |= {"annotator_gain": gain, "annotator_gain_error": error}
        result["win_rate"] = measures.win_rate(scores[final], scores["sft"])
    if config.annotator:
        result |= {"annotator": config.annotator, "annotator_simulated": True}
    if config.contamination_n and "pretrain" in present:
        console.print("evaluate: contamination")
        result["contamination"] = contamination(workspace, config, tokenizer, documents, chats)
    if config.compare_xz and "pretrain" in present:
        texts = (
            load_texts(documents, split, workspace.run_dir / "cache")
            for split in ("train", "held_out")
        )
        result["xz_bits_per_byte"] = measures.xz_bits_per_byte(*texts)
    return result


def contamination(
    workspace: Workspace,
    config: EvaluateConfig,
    tokenizer: Tokenizer,
    documents: DataConfig,
    chats: DataConfig | None,
) -> dict[str, dict[str, float]]:
    """{"held_out_in_pretrain": shares, "accuracy_in_pretrain": ..., "accuracy_in_sft": ...}."""
    cache = Path(workspace.run_dir / "cache")
    share = (jax.process_index(), jax.process_count())
    pretrain = open_store(documents, "document", tokenizer, cache, share)
    training = {"pretrain": pretrain["train"]}
    if chats and chats.sources:
        training["sft"] = open_store(chats, "chat", tokenizer, cache, share)["train"]
    texts = some_documents(pretrain["held_out"], MAX_HELD_OUT, len(tokenizer.begin_ids))
    found = {"held_out_in_pretrain": (texts, "pretrain")}
    if config.accuracy.sources:
        chosen = shuffled(examples(config.accuracy, "chat", "held_out"))[
            : config.max_accuracy_examples
        ]
        asked = tokenizer.encode_batch(
            ["\n".join(map(message_text, example.messages[:-1])) for example in chosen]
        )
        found |= {f"accuracy_in_{name}": (asked, name) for name in training}
    return {
        k: measure_contamination(ids, training[name], config.contamination_n)
        for k, (ids, name) in found.items()
    }


def _training_numbers(workspace: Workspace, stage: str) -> dict[str, Any]:
    recorded = workspace.result(stage) or {}
    return {
        name: recorded[name]
        for name in ("bits_per_byte",)
        if name in recorded and stage == "pretrain"
    }


def _settings(workspace: Workspace, config: EvaluateConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    stops = {"stop_ids": tokenizer.stop_ids, "pad_id": tokenizer.pad_id}
    return {
        **stops,
        "mesh": workspace.mesh,
        "seed": workspace.seed,
        "batch_size": config.batch_size,
    }


def label_accuracy(
    workspace, config: EvaluateConfig, tokenizer: Tokenizer, params: Any, model: ModelConfig
) -> dict[str, float]:
    """Greedy answers against the labels: a match is the whole answer, not a likelier label."""
    sampling = SamplingConfig(max_new_tokens=config.label_tokens, temperature=0.0)
    limit = model.max_length - config.label_tokens
    prompts, labels = [], []
    for example in shuffled(examples(config.accuracy, "chat", "held_out")):
        ids, _ = tokenizer.encode_chat(list(example.messages[:-1]), reply=True)
        if len(ids) <= limit and len(prompts) < config.max_accuracy_examples:
            prompts.append(ids)
            labels.append(message_text(example.messages[-1]))
    if not prompts:
        raise InputError(
            "evaluate.accuracy: no held-out example fits the context; give more data or raise model.max_length"
        )
    drawn = complete(
        params, model, prompts, sampling=sampling, **_settings(workspace, config, tokenizer)
    )
    return measures.accuracy([tokenizer.decode(c[0].ids) for c in drawn], labels)


def open_answers(
    workspace,
    config: EvaluateConfig,
    tokenizer: Tokenizer,
    params: Any,
    model: ModelConfig,
    reference: Any,
):
    """(numbers, answers, prompts) on held-out prompts; KL to the reference's parameters where they are given."""
    limit = model.max_length - config.sampling.max_new_tokens
    held_out = load_prompts(config.prompts, "held_out", tokenizer, limit)[: config.num_prompts]
    temperature = config.sampling.divisor

    @jax.jit
    def kl(params, reference, rollout):
        ours, theirs = (
            response_logprobs(p, rollout, config=model, temperature=temperature)
            for p in (params, reference)
        )
        return jnp.where(rollout.mask, ours.logprob - theirs.logprob, 0.0).sum(1)

    kls, drawn = [], []
    settings = {"sampling": config.sampling, **_settings(workspace, config, tokenizer)}
    for rollout, count in roll_out(params, model, [p.ids for p in held_out], **settings):
        kls += (
            fetch(kl(params, reference, rollout))[:count].tolist() if reference is not None else []
        )
        drawn += completions(fetch(rollout), settings["stop_ids"])[:count]
    numbers = {
        **{"prompts": float(len(drawn)), "distinct_2": measures.distinct(c.ids for c in drawn)},
        **{"response_tokens": float(np.mean([len(c.ids) for c in drawn]))},
        **{"finished": float(np.mean([c.finished for c in drawn]))},
        **({"kl_to_sft": float(np.mean(kls))} if kls else {}),
    }
    return (
        numbers,
        [tokenizer.decode(c.ids) for c in drawn],
        [message_text(p.messages[-1]) for p in held_out],
    )


def _side_by_side(
    prompts: list[str], answers: dict[str, list[str]], count: int
) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "answers": {stage: texts[i] for stage, texts in answers.items()}}
        for i, prompt in enumerate(prompts[:count])
    ]
