"""Evaluate: the stages' models side by side on held-out data."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import InputError
from jaxllm.config.functions import resolve_function
from jaxllm.data.config import DataConfig
from jaxllm.data.contamination import measure_contamination, some_documents
from jaxllm.data.loader import load_prompts
from jaxllm.data.messages import message_text
from jaxllm.data.splits import examples, shuffled
from jaxllm.data.store import load_texts, open_store
from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.rollouts import Completion, Rollout, completions, response_logprobs
from jaxllm.evaluation import measures, scoring, tasks
from jaxllm.evaluation.task_files import describe, read_tasks
from jaxllm.model_store import load_model
from jaxllm.models.config import ModelConfig
from jaxllm.rl.score_functions import score_all
from jaxllm.runtime.console import console
from jaxllm.runtime.store.working import exchange_of
from jaxllm.runtime.transfer import fetch
from jaxllm.stages.config import EvaluateConfig
from jaxllm.tokenizers.trained import Tokenizer
from jaxllm.workspace import Workspace

# Held-out documents that are searched for in the training data: enough for a share within a percent.
MAX_HELD_OUT = 20_000


class Measured(NamedTuple):
    """What was measured of one model; without prompts only the numbers."""

    numbers: dict[str, float]
    prompts: list[str]
    answers: list[str]
    """One for each prompt."""
    scores: np.ndarray | None
    """float64[prompts], the annotator's; None without an annotator."""


def build(workspace: Workspace, life: Any, stage: str) -> dict[str, Any]:
    """`run` with the stage's section and the data of pretraining and fine-tuning."""
    return run(workspace, getattr(life, stage), life.pretrain.data, life.sft.data)


def run(
    workspace: Workspace,
    config: EvaluateConfig,
    documents: DataConfig,
    chats: DataConfig | None = None,
) -> dict[str, Any]:
    """Measure every stage's model; returns {"stages": {stage: numbers}, "samples": [...], ...}.

    documents, chats: the training data of pretraining and fine-tuning, searched for contamination.

    Raises:
        InputError: none of the stages has finished, or data is missing or malformed.
    """
    present = [stage for stage in config.stages if workspace.result(stage) is not None]
    if not present:
        message = f"none of the stages {', '.join(config.stages)} has finished; run them first"
        raise InputError(f"{workspace.run_dir}: {message}")
    tokenizer = workspace.tokenizer()
    # Before any model is loaded: a malformed line should not cost minutes.
    task_files = read_tasks(config.tasks, config.scoring.shots)
    task_scores: dict[str, tasks.Numbers] = {}
    measured: dict[str, Measured] = {}
    sft = load_model(workspace.stage_dir("sft"), workspace.mesh)[0] if "sft" in present else None
    for stage in present:
        console.print(f"evaluate: {stage}")
        # One tokenizer for all: stages of one run share it, and their numbers must be comparable.
        params, model_config = load_model(workspace.stage_dir(stage), workspace.mesh)
        model = scoring.Model(params, model_config, tokenizer, workspace.mesh)
        measured[stage] = _measure(workspace, config, stage, model, sft)
        tasks.add_scores(task_scores, stage, model, task_files, config.scoring, workspace.seed)
    # The report shows result.json in this order.
    result: dict[str, Any] = {"stages": {stage: measured[stage].numbers for stage in present}}
    if config.prompts.sources:
        result["samples"] = _side_by_side(measured, config.num_shown)
    if task_files:
        result["tasks"] = task_scores
        result["task_files"] = describe(task_files)
    if config.annotator:
        result |= _annotator_gain(measured)
        result["annotator"] = config.annotator
        result["annotator_simulated"] = True
    if "pretrain" in present:
        result |= _compare_with_documents(workspace, config, tokenizer, documents, chats)
    return result


def _compare_with_documents(
    workspace: Workspace,
    config: EvaluateConfig,
    tokenizer: Tokenizer,
    documents: DataConfig,
    chats: DataConfig | None,
) -> dict[str, Any]:
    """What is measured on the documents of pretraining alone, without a model."""
    result: dict[str, Any] = {}
    if config.contamination_n:
        console.print("evaluate: contamination")
        result["contamination"] = contamination(workspace, config, tokenizer, documents, chats)
    if config.compare_xz:
        cache = workspace.run_dir / "cache"
        train = load_texts(documents, "train", cache)
        held_out = load_texts(documents, "held_out", cache)
        result["xz_bits_per_byte"] = measures.xz_bits_per_byte(train, held_out)
    return result


def _measure(
    workspace: Workspace, config: EvaluateConfig, stage: str, model: scoring.Model, sft: Any
) -> Measured:
    """Everything about one stage's model except the task files; sft: parameters of the SFT model, or None."""
    numbers: dict[str, float] = {}
    pretrained = workspace.result(stage) if stage == "pretrain" else None
    if pretrained and "bits_per_byte" in pretrained:
        numbers["bits_per_byte"] = pretrained["bits_per_byte"]
    # A pretrained model has not seen the chat format, so a label would be chance.
    if config.accuracy.sources and stage != "pretrain":
        numbers |= label_accuracy(model, config, workspace.seed)
    if not config.prompts.sources:
        return Measured(numbers, [], [], None)
    # The KL to itself is 0, and that of pretraining would only say that fine-tuning moved the model.
    reference = None if stage in ("pretrain", "sft") else sft
    open_numbers, prompts, answers = open_answers(model, config, reference, workspace.seed)
    numbers |= open_numbers
    if not config.annotator:
        return Measured(numbers, prompts, answers, None)
    # A program's scores, not a person's; the report says so wherever they are shown.
    scores = score_all(resolve_function(config.annotator, "annotator"), prompts, answers)
    mean, error = measures.mean_and_error(scores)
    numbers |= {"annotator_score": mean, "annotator_score_error": error}
    return Measured(numbers, prompts, answers, scores)


def _annotator_gain(measured: Mapping[str, Measured]) -> dict[str, float]:
    """How much higher the annotator scores the last model than the SFT model; empty if either has no scores."""
    *_, last = measured
    if "sft" not in measured or last == "sft":
        return {}
    scores, baseline = measured[last].scores, measured["sft"].scores
    if scores is None or baseline is None:
        return {}
    # Of differences prompt by prompt: the error is smaller than that of two separate means.
    gain, error = measures.mean_and_error(scores - baseline)
    win_rate = measures.win_rate(scores, baseline)
    return {"annotator_gain": gain, "annotator_gain_error": error, "win_rate": win_rate}


def contamination(
    workspace: Workspace,
    config: EvaluateConfig,
    tokenizer: Tokenizer,
    documents: DataConfig,
    chats: DataConfig | None,
) -> dict[str, dict[str, float]]:
    """{"held_out_in_pretrain": shares, "accuracy_in_pretrain": ..., "accuracy_in_sft": ...}.

    The shares are those of `measure_contamination`. Documents and conversations are as in `run`.
    """
    cache = Path(workspace.run_dir / "cache")
    # Every process builds a part of a store that is not in the cache.
    share = (jax.process_index(), jax.process_count())
    exchange = exchange_of(cache)
    pretrain = open_store(documents, "document", tokenizer, cache, share, exchange)
    training = {"pretrain": pretrain["train"]}
    if chats and chats.sources:
        training["sft"] = open_store(chats, "chat", tokenizer, cache, share, exchange)["train"]
    held_out = some_documents(pretrain["held_out"], MAX_HELD_OUT, len(tokenizer.begin_ids))
    n = config.contamination_n
    found = {"held_out_in_pretrain": measure_contamination(held_out, training["pretrain"], n)}
    if config.accuracy.sources:
        chosen = shuffled(examples(config.accuracy, "chat", "held_out"))
        questions = []
        # The question alone: a label of one word is in every text.
        for example in chosen[: config.max_accuracy_examples]:
            questions.append("\n".join(map(message_text, example.messages[:-1])))
        ids = tokenizer.encode_batch(questions)
        for name, store in training.items():
            found[f"accuracy_in_{name}"] = measure_contamination(ids, store, n)
    return found


def label_accuracy(model: scoring.Model, config: EvaluateConfig, seed: int) -> dict[str, float]:
    """Accuracy of greedy answers: the whole answer must be the label, it is not enough that the label is likelier.

    Raises:
        InputError: no held-out conversation fits the context.
    """
    # `config.sampling` is for open answers, where a temperature of 0 would show one answer of many.
    sampling = SamplingConfig(max_new_tokens=config.label_tokens, temperature=0.0)
    room = model.config.max_length - config.label_tokens
    prompts: list[list[int]] = []
    labels: list[str] = []
    # The order is that of hashes, so that the first ones are a sample of all and the same for every model.
    for example in shuffled(examples(config.accuracy, "chat", "held_out")):
        ids, _ = model.tokenizer.encode_chat(list(example.messages[:-1]), reply=True)
        if len(ids) <= room and len(prompts) < config.max_accuracy_examples:
            prompts.append(ids)
            labels.append(message_text(example.messages[-1]))
    if not prompts:
        message = "no held-out example fits the context; give more data or raise model.max_length"
        raise InputError(f"evaluate.accuracy: {message}")
    answers = scoring.generate_texts(
        model, prompts, sampling, [], seed=seed, batch_size=config.batch_size
    )
    return measures.accuracy([text for text, _ in answers], labels)


def open_answers(
    model: scoring.Model, config: EvaluateConfig, reference: Any, seed: int
) -> tuple[dict[str, float], list[str], list[str]]:
    """(numbers, prompts, answers) on held-out prompts.

    reference: parameters of a model of the same shape. The numbers then include the KL divergence from it, in nats per
    response; None: they do not.
    """
    sampling = config.sampling
    room = model.config.max_length - sampling.max_new_tokens
    held_out = load_prompts(config.prompts, "held_out", model.tokenizer, room)
    ids: list[list[int]] = []
    prompts: list[str] = []
    for prompt in held_out[: config.num_prompts]:
        ids.append(prompt.ids)
        prompts.append(message_text(prompt.messages[-1]))
    kl: list[float] = []
    responses: list[Completion] = []
    settings: dict[str, Any] = {"seed": seed, "batch_size": config.batch_size}
    # Not `generate_texts`, which keeps the texts only: the KL needs the tokens, while they are still on the devices.
    for rollout, count in scoring.rollouts(model, ids, sampling, **settings):
        if reference is not None:
            divergence = _response_kl(
                model.params, reference, rollout, config=model.config, temperature=sampling.divisor
            )
            # Rows that only fill the last batch are dropped.
            kl += fetch(divergence)[:count].tolist()
        responses += completions(fetch(rollout), model.tokenizer.stop_ids)[:count]
    numbers = {"prompts": float(len(responses))}
    numbers["distinct_2"] = measures.distinct(response.ids for response in responses)
    numbers |= scoring.response_numbers(responses)
    if kl:
        numbers["kl_to_sft"] = float(np.mean(kl))
    answers = [model.tokenizer.decode(response.ids) for response in responses]
    return numbers, prompts, answers


@functools.partial(jax.jit, static_argnames=("config", "temperature"))
def _response_kl(
    params: Any, reference: Any, rollout: Rollout, *, config: ModelConfig, temperature: float
) -> jax.Array:
    """float32[B]: log p(response) - log p_reference(response), whose mean over samples of p estimates the KL divergence."""
    logprobs = functools.partial(response_logprobs, config=config, temperature=temperature)
    log_ratio = logprobs(params, rollout).logprob - logprobs(reference, rollout).logprob
    # A response of two tokens of three; the padding has a log-ratio as well, which is garbage:
    #
    #     mask       1 1 .
    #     log-ratio  a b c      sum  a + b
    return jnp.where(rollout.mask, log_ratio, 0.0).sum(1)


def _side_by_side(measured: Mapping[str, Measured], count: int) -> list[dict[str, Any]]:
    """The first prompts, each with the answers of all models, for the report."""
    # The same for all models, unless their contexts differ so much that prompts were dropped.
    *_, last = measured.values()
    samples = []
    for i, prompt in enumerate(last.prompts[:count]):
        answers = {stage: model.answers[i] for stage, model in measured.items()}
        samples.append({"prompt": prompt, "answers": answers})
    return samples
