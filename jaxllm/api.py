"""The program as a library, for notebooks and scripts: `import jaxllm` brings these names, and imports JAX when one is used.

model = jaxllm.load("runs/tiny/ppo")
model.chat([{"role": "user", "content": "Review: the soup"}], temperature=0.0)
jaxllm.run_stages("tiny", ["tokenizer", "pretrain"], {"pretrain": {"num_steps": 20}})
jaxllm.read_metrics("runs/tiny/pretrain/metrics.jsonl")
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import chat, losses, run
from jaxllm.config import InputError, build
from jaxllm.config import load as load_config
from jaxllm.config.shipped import find_config
from jaxllm.evaluation import scoring
from jaxllm.generate import SamplingConfig, complete
from jaxllm.life import Config
from jaxllm.models import transformer
from jaxllm.runtime.files import read_jsonl as read_metrics
from jaxllm.stages import named

__all__ = ["LoadedModel", "load", "read_config", "read_metrics", "run_stages"]


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A stage's model and tokenizer on one device. Sampling settings are the fields of `SamplingConfig`."""

    model: scoring.Model

    def generate(
        self, prompt: str, *, num_samples: int = 1, seed: int = 0, **sampling: Any
    ) -> list[str]:
        """`num_samples` completions of a text. Raises InputError where prompt and completion exceed the context."""
        return self._complete(self.model.tokenizer.prompt(prompt), num_samples, seed, sampling)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, seed: int = 0, **sampling: Any) -> str:
        """The assistant's reply to a conversation, in the model's own chat template."""
        ids, _ = self.model.tokenizer.encode_chat(messages, reply=True)
        return self._complete(ids, 1, seed, sampling)[0]

    def logprobs(self, text: str) -> tuple[list[bytes], np.ndarray]:
        """(the bytes of each token of a text, float32[T]: log p of each given those before it), in nats.

        The first token is conditioned on the token that begins a text. Raises InputError on a text beyond the context.
        """
        tokenizer, limit = self.model.tokenizer, self.model.config.max_length
        ids = tokenizer.encode(text)
        if not 0 < len(ids) <= limit:
            raise InputError(f"text: takes {len(ids)} tokens, and the context holds 1 to {limit}")
        row = np.array([[tokenizer.start_id, *ids]], np.int32)
        with jax.set_mesh(self.model.mesh):
            found = _token_logprobs(self.model.params, row, config=self.model.config)
        return [tokenizer.token_bytes(token) for token in ids], np.asarray(found)[0]

    def score(self, context: str, answers: Sequence[str]) -> list[float]:
        """The log-probability of each answer behind a context, in nats, summed over its tokens."""
        rows = []
        for answer in answers:
            before, after = scoring.split(self.model.tokenizer.encode, context, answer)
            begun = [self.model.tokenizer.start_id, *before]
            rows.append(scoring.fit(begun, after, self.model.config, "answers"))
        return [nats for nats, _ in scoring.score_rows(self.model, rows)]

    def _complete(
        self, ids: Sequence[int], num_samples: int, seed: int, sampling: Mapping[str, Any]
    ) -> list[str]:
        model, tokenizer = self.model, self.model.tokenizer
        with jax.set_mesh(model.mesh):
            drawn = complete(
                model.params,
                model.config,
                [ids],
                mesh=model.mesh,
                seed=seed,
                num_samples=num_samples,
                sampling=build(SamplingConfig, sampling, name="sampling"),
                stop_ids=tokenizer.stop_ids,
                pad_id=tokenizer.pad_id,
            )
            return [tokenizer.decode(completion.ids) for completion in next(drawn)]


@jax.jit(static_argnames="config")
def _token_logprobs(params: Any, tokens: jax.Array, *, config: Any) -> jax.Array:
    """float32[B, T] of tokens int32[B, T + 1]: log p of each but the first."""
    hidden = transformer.apply(params, config, tokens[:, :-1], jnp.ones_like(tokens[:, :-1]))
    return losses.token_logprobs(
        hidden, transformer.head(params), tokens[:, 1:], cap=config.logit_softcap
    ).logprob


def load(stage_dir: str | os.PathLike) -> LoadedModel:
    """The model in a stage directory, trained here or imported. Raises InputError where it holds none to talk to."""
    return LoadedModel(scoring.Model(*chat.load(os.fspath(stage_dir))))


def read_config(path: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """A config file, or a shipped config by its name; overrides: a nested mapping that takes precedence."""
    return load_config(Config, find_config(path), overrides)


def run_stages(
    path: str, stages: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> None:
    """Run stages of a config, without any all that it names; a finished one is skipped, a cut one resumes.

    Raises InputError where a stage is unknown, before anything runs.
    """
    config = read_config(path, overrides)
    for stage in stages:
        try:
            named(stage)
        except ValueError as error:
            raise InputError(str(error)) from None
    run.run_stages(config, path, stages or config.stages)
