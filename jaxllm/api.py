"""The program as a library, for notebooks and scripts.

`import jaxllm` offers the names below, and imports JAX only when one of them is used:

    import jaxllm

    jaxllm.run_stages("tiny", ["tokenizer", "pretrain"], {"pretrain": {"num_steps": 20}})
    jaxllm.read_metrics("runs/tiny/pretrain/metrics.jsonl")[-1]["eval/bits_per_byte"]

    model = jaxllm.load("runs/tiny/pretrain")
    model.generate("The soup", num_samples=2, temperature=0.7)    # ["...", "..."]
    model.score("The soup is", [" good", " bad"])                 # [-3.1, -4.5]
    tokens, logprobs = model.logprobs("The soup is good")         # [b"The", b" soup", ...], float32[4]

Errors in what is passed are `jaxllm.config.InputError`, whose message is one line.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import chat, output_layer, run
from jaxllm.config import InputError, build
from jaxllm.config import load as load_config
from jaxllm.config.shipped import find_config
from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.responses import complete
from jaxllm.evaluation import scoring
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.run import Config
from jaxllm.runtime.files import read_jsonl as read_metrics
from jaxllm.stages import named

__all__ = ["LoadedModel", "load", "read_config", "read_metrics", "run_stages"]


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A stage's model and tokenizer on one device.

    Sampling options are the fields of `jaxllm.engine.config.SamplingConfig`: max_new_tokens, temperature,
    top_k, top_p and min_p. The same seed gives the same text.
    """

    model: scoring.Model
    """Parameters, model config, tokenizer and mesh."""

    def generate(
        self, prompt: str, *, num_samples: int = 1, seed: int = 0, **sampling: Any
    ) -> list[str]:
        """Completes a text.

        Args:
            prompt: the text to complete.
            num_samples: number of completions.
            seed: random seed.
            **sampling: sampling options.

        Returns:
            `num_samples` completions, without the prompt.

        Raises:
            InputError: if prompt and completion exceed the context, or an option is out of range.
        """
        ids = self.model.tokenizer.prompt(prompt)
        return self._complete(ids, num_samples, seed, sampling)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, seed: int = 0, **sampling: Any) -> str:
        """Returns the assistant's reply to a conversation, in the model's own chat template.

            model.chat([{"role": "user", "content": "Review: the soup"}], temperature=0.0)

        Args:
            messages: the conversation so far; roles are "system", "user" and "assistant".
            seed: random seed.
            **sampling: sampling options.

        Raises:
            InputError: if the template refuses the conversation, or it and the reply exceed the context.
        """
        ids, _ = self.model.tokenizer.encode_chat(messages, reply=True)
        return self._complete(ids, 1, seed, sampling)[0]

    def logprobs(self, text: str) -> tuple[list[bytes], np.ndarray]:
        """Returns the log-probability of each token of a text, given those before it.

        The first token is conditioned on the token that starts every text:

            text             "The soup is"
            tokens           The    soup     is
            conditioned on   <bos>  <bos>    <bos>
                                    The      The
                                             soup

        Returns:
            The UTF-8 bytes of each token, and float32[T] in nats.

        Raises:
            InputError: if the text is empty or exceeds the context.
        """
        tokenizer = self.model.tokenizer
        limit = self.model.config.max_length
        ids = tokenizer.encode(text)
        if not 0 < len(ids) <= limit:
            raise InputError(f"text: takes {len(ids)} tokens, and the context holds 1 to {limit}")
        # int32[1, T + 1]: the last token is only a target, so T may fill the context.
        row = np.array([[tokenizer.start_id, *ids]], np.int32)
        with jax.set_mesh(self.model.mesh):
            logprobs = _token_logprobs(self.model.params, row, config=self.model.config)
        return [tokenizer.token_bytes(token) for token in ids], np.asarray(logprobs)[0]

    def score(self, context: str, answers: Sequence[str]) -> list[float]:
        """Returns the log-probability of each answer after a context, in nats, summed over its tokens.

        Context and answer are tokenized as one text. A context that is too long loses its oldest
        tokens, as in EleutherAI's lm-evaluation-harness.

        Raises:
            InputError: if an answer alone exceeds the context.
        """
        tokenizer = self.model.tokenizer
        rows = []
        for answer in answers:
            # Tokens may span the boundary of context and answer; `split` decides to whom they belong.
            before, after = scoring.split(tokenizer.encode, context, answer)
            before = [tokenizer.start_id, *before]
            rows.append(scoring.fit(before, after, self.model.config, "answers"))
        return [nats for nats, _ in scoring.score_rows(self.model, rows)]

    def _complete(
        self, ids: Sequence[int], num_samples: int, seed: int, sampling: Mapping[str, Any]
    ) -> list[str]:
        """Returns `num_samples` completions of token ids, decoded."""
        tokenizer = self.model.tokenizer
        with jax.set_mesh(self.model.mesh):
            batches = complete(
                self.model.params,
                self.model.config,
                [ids],
                mesh=self.model.mesh,
                seed=seed,
                num_samples=num_samples,
                sampling=build(SamplingConfig, sampling, name="sampling"),
                stop_ids=tokenizer.stop_ids,
            )
            # One prompt gives one batch.
            return [tokenizer.decode(completion.ids) for completion in next(batches)]


# The config is static: it decides the program. Each new length of text compiles once.
@jax.jit(static_argnames="config")
def _token_logprobs(params: Any, tokens: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Log-probabilities float32[B, T] of all but the first of tokens int32[B, T + 1]."""
    inputs = tokens[:, :-1]
    hidden = transformer.apply(params, config, inputs, jnp.ones_like(inputs))
    stats = output_layer.token_logprobs(
        hidden, transformer.head(params), tokens[:, 1:], cap=config.logit_softcap
    )
    return stats.logprob


def load(stage_dir: str | os.PathLike) -> LoadedModel:
    """Loads the model in a stage directory, trained here or imported, onto the first device.

    Raises:
        InputError: if the directory contains no policy (a model that generates text).
    """
    params, config, tokenizer, mesh = chat.load(os.fspath(stage_dir))
    return LoadedModel(scoring.Model(params, config, tokenizer, mesh))


def read_config(path: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads a config.

        jaxllm.read_config("tiny", {"seed": 3, "model": {"num_layers": 4}})

    Args:
        path: a YAML file, or the name of a shipped config.
        overrides: nested mapping of fields that replace those of the file.

    Raises:
        InputError: if a file is missing or a field is invalid.
    """
    return load_config(Config, find_config(path), overrides)


def run_stages(
    path: str, stages: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> None:
    """Runs stages in order; a finished one is skipped, an interrupted one resumes.

    Args:
        path: a YAML file, or the name of a shipped config.
        stages: names of stages; empty: those of the config.
        overrides: nested mapping of fields that replace those of the file.

    Raises:
        InputError: if a stage is unknown or a field is invalid, before anything runs.
    """
    config = read_config(path, overrides)
    # `read_config` has checked the config's own list of stages, but not this one.
    for stage in stages:
        try:
            named(stage)
        except ValueError as error:
            raise InputError(str(error)) from None
    # The path as it was given: messages name the next command with it.
    run.run_stages(config, path, stages or config.stages)
