"""Using a stage's model from the terminal: one prompt, or a conversation that streams and is kept."""

import sys
from collections.abc import Iterator
from typing import Any, TextIO

import jax

from jaxllm.config import InputError
from jaxllm.generate import SamplingConfig, complete, stream
from jaxllm.models import scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.sharding import MeshConfig, make_mesh
from jaxllm.tokenizer import StreamDecoder, Tokenizer
from jaxllm.workspace import load_model, load_policy


def load(stage_dir: str) -> tuple[Any, ModelConfig, Tokenizer, jax.sharding.Mesh]:
    """Model and tokenizer of a stage directory, on one device."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return *load_policy(stage_dir, mesh), mesh


def answer_once(
    stage_dir: str,
    prompt: str,
    chat: bool,
    sampling: SamplingConfig,
    num_samples: int,
    seed: int,
    best_of: int = 1,
    reward_from: str = "",
) -> Iterator[str]:
    """Yield num_samples completions of a prompt; chat: the prompt is a user's message in the chat template.

    With best_of N each is the one of N that the reward model in the stage directory reward_from scores highest
    (best-of-N sampling; its KL to the policy is at most log N - (N - 1) / N, Stiennon et al. 2020, section 4.3).
    """
    params, model, tokenizer, mesh = load(stage_dir)
    if chat:
        ids, _ = tokenizer.encode_chat([{"role": "user", "content": prompt}], reply=True)
    else:
        ids = tokenizer.prompt(prompt)
    stops = tokenizer.stop_ids
    with jax.set_mesh(mesh):
        settings: dict[str, Any] = {"sampling": sampling, "stop_ids": stops, "pad_id": tokenizer.pad_id}
        count = num_samples * best_of
        drawn = next(complete(params, model, [ids], mesh=mesh, seed=seed, num_samples=count, **settings))
        if best_of > 1:
            reward, reward_model = load_model(reward_from, mesh, "reward")
            rows = [[*ids, *c.ids, *[tokenizer.end_id] * c.finished] for c in drawn]
            scores = scalar.score_rows(reward, reward_model, rows).reshape(num_samples, best_of)
            drawn = [drawn[i * best_of + int(best)] for i, best in enumerate(scores.argmax(1))]
        for completion in drawn:
            yield tokenizer.decode(completion.ids)


def converse(stage_dir: str, sampling: SamplingConfig, seed: int, system: str = "", user: TextIO = sys.stdin) -> None:
    """Read messages from `user` (default: standard input) and stream answers to standard output."""
    params, model, tokenizer, mesh = load(stage_dir)
    if tokenizer.chat_refusal:
        raise InputError(tokenizer.chat_refusal)
    params = jax.jit(lambda p: transformer.unstack(p, transformer.decoding(model)))(params)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    stops = tokenizer.stop_ids
    _note("Talk to the model. /reset starts anew, /quit or end of input ends.")
    with jax.set_mesh(mesh):
        for turn in range(sys.maxsize):
            if (text := _ask(user)) is None or text == "/quit":
                return
            if text == "/reset":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": text})
            messages, ids = _fit(messages, len(opening), tokenizer, model.max_length - sampling.max_new_tokens)
            decoder, answer = StreamDecoder(tokenizer), ""
            settings: dict[str, Any] = {"sampling": sampling, "stop_ids": stops, "pad_id": tokenizer.pad_id}
            for token in stream(params, model, ids, seed=seed + turn, **settings):
                answer += _say(decoder.add(token))
            answer += _say(decoder.flush())
            print(flush=True)
            messages.append({"role": "assistant", "content": answer})


def _fit(
    messages: list[dict[str, str]], keep: int, tokenizer: Tokenizer, limit: int
) -> tuple[list[dict[str, str]], list[int]]:
    """Forget the oldest turns until the conversation fits; the system message stays."""
    while True:
        ids, _ = tokenizer.encode_chat(messages, reply=True)
        if len(ids) <= limit:
            return messages, ids
        if len(messages) <= keep + 1:
            raise InputError(f"the message takes {len(ids)} tokens, and {limit} fit beside the answer; shorten it")
        messages = [*messages[:keep], *messages[keep + 2 :]]
        _note("(the oldest turn no longer fits the context and is forgotten)")


def _ask(user: TextIO) -> str | None:
    """The next message that is not blank, None at the end of input."""
    while True:
        if user.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = user.readline()
        if not line or line.strip():
            return line.strip() or None


def _say(text: str) -> str:
    print(text, end="", flush=True)
    return text


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
