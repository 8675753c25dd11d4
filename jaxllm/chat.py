"""Using a stage's model from the terminal: one prompt, or a conversation that streams and is kept."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import jax

from jaxllm.config import InputError
from jaxllm.generate import SamplingConfig, complete
from jaxllm.models import decode, scalar
from jaxllm.models.config import ModelConfig
from jaxllm.sharding import MeshConfig, make_mesh
from jaxllm.streaming import stream
from jaxllm.tokenizers.trained import StreamDecoder, Tokenizer
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
    shorten: bool = False,
) -> Iterator[str]:
    """Yield num_samples completions of a prompt; chat: the prompt is a user's message in the chat template.

    shorten: completions take no more tokens than the prompt leaves of the context.

    With best_of N each is the one of N that the reward model in the stage directory reward_from scores highest
    (best-of-N sampling; its KL to the policy is at most log N - (N - 1) / N, Stiennon et al. 2020, section 4.3).
    """
    params, model, tokenizer, mesh = load(stage_dir)
    if chat:
        ids, _ = tokenizer.encode_chat([{"role": "user", "content": prompt}], reply=True)
    else:
        ids = tokenizer.prompt(prompt)
    if shorten and 0 < model.max_length - len(ids) < sampling.max_new_tokens:
        sampling = dataclasses.replace(sampling, max_new_tokens=model.max_length - len(ids))
    stops = tokenizer.stop_ids
    with jax.set_mesh(mesh):
        settings: dict[str, Any] = {
            "sampling": sampling,
            "stop_ids": stops,
            "pad_id": tokenizer.pad_id,
        }
        count = num_samples * best_of
        drawn = next(
            complete(params, model, [ids], mesh=mesh, seed=seed, num_samples=count, **settings)
        )
        if best_of > 1:
            reward, reward_model = load_model(reward_from, mesh, "reward")
            rows = [[*ids, *c.ids, *[tokenizer.end_id] * c.finished] for c in drawn]
            scores = scalar.score_rows(reward, reward_model, rows).reshape(num_samples, best_of)
            drawn = [drawn[i * best_of + int(best)] for i, best in enumerate(scores.argmax(1))]
        for completion in drawn:
            yield tokenizer.decode(completion.ids)


def converse(
    stage_dir: str,
    sampling: SamplingConfig,
    seed: int,
    system: str = "",
    user: TextIO | None = sys.stdin,
    shorten: bool = False,
) -> None:
    """Read messages from `user` (default: standard input) and stream answers to standard output.

    shorten: an answer takes at most half of the context. Raises InputError where no message would fit beside an answer.
    """
    params, model, tokenizer, mesh = load(stage_dir)
    if tokenizer.chat_refusal:
        raise InputError(tokenizer.chat_refusal)
    if shorten:
        sampling = dataclasses.replace(
            sampling, max_new_tokens=min(sampling.max_new_tokens, model.max_length // 2)
        )
    room = model.max_length - sampling.max_new_tokens
    if room < 1:
        raise InputError(
            f"--max-new-tokens: {sampling.max_new_tokens} leaves no room for a message in the context of "
            f"{model.max_length} tokens; lower it"
        )
    params = jax.jit(lambda p: decode.unstack(p, decode.decoding_config(model)))(params)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    tokenizer.encode_chat(
        [*opening, {"role": "user", "content": "?"}], reply=True
    )  # a template may refuse the opening
    stops = tokenizer.stop_ids
    _note("Talk to the model. /reset starts anew, /quit or end of input ends.")
    with jax.set_mesh(mesh):
        for turn in range(sys.maxsize):
            if (text := _ask(user)) is None or text == "/quit":
                return
            if text == "/reset":
                messages = list(opening)
                continue
            asked = [*messages, {"role": "user", "content": text}]
            try:
                messages, ids = _fit(asked, len(opening), tokenizer, room)
            except InputError as error:  # of this message alone: the conversation before it is kept
                _note(f"({error}; send it again)")
                continue
            decoder, answer = StreamDecoder(tokenizer), ""
            settings: dict[str, Any] = {
                "sampling": sampling,
                "stop_ids": stops,
                "pad_id": tokenizer.pad_id,
            }
            for token in stream(params, model, ids, seed=(seed + turn) % 2**32, **settings):
                answer += _say(decoder.add(token))
            answer += _say(decoder.flush())
            print(flush=True)
            messages.append({"role": "assistant", "content": answer})


def _fit(
    messages: list[dict[str, str]], keep: int, tokenizer: Tokenizer, limit: int
) -> tuple[list[dict[str, str]], list[int]]:
    """Forget the oldest turns until the conversation fits; the first `keep` messages, the system's, stay.

    Raises InputError where the newest message alone does not fit, or the template refuses it.
    """
    alone, _ = tokenizer.encode_chat([*messages[:keep], messages[-1]], reply=True)
    if len(alone) > limit:
        raise InputError(
            f"this message takes {len(alone)} tokens and {limit} fit beside the answer; shorten it"
        )
    while True:
        ids, _ = tokenizer.encode_chat(messages, reply=True)
        if len(ids) <= limit:
            return messages, ids
        messages = [*messages[:keep], *messages[keep + 2 :]]
        _note("(the oldest turn no longer fits the context and is forgotten)")


def _ask(user: TextIO | None) -> str | None:
    """The next message that is not blank, None at the end of input, or where standard input is closed."""
    while user:
        if user.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        raw = getattr(user, "buffer", user).readline()
        try:
            line = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
            line.encode()
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            _note(
                f"(this line is not valid UTF-8, {error.reason} at byte {error.start}; send it again)"
            )
            continue
        if not line or line.strip():
            return line.strip() or None


def _say(text: str) -> str:
    print(text, end="", flush=True)
    return text


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
