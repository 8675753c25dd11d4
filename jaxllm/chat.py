"""Uses a stage's model in the terminal: one prompt, or a conversation that streams."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import jax

from jaxllm.config import InputError
from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.engine import Engine
from jaxllm.engine.responses import complete, stream, stream_engine
from jaxllm.engine.rollouts import Completion
from jaxllm.model_store import load_model, load_policy
from jaxllm.models import scalar
from jaxllm.models.config import ModelConfig
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.tokenizers.trained import StreamDecoder, Tokenizer

Message = dict[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""


def load(stage_dir: str) -> tuple[Any, ModelConfig, Tokenizer, jax.sharding.Mesh]:
    """Loads a stage's model onto the first device; returns (parameters, config, tokenizer, mesh).

    Raises:
        InputError: if the directory contains no policy.
    """
    # One device: a single conversation has no batch to share out.
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    params, model, tokenizer = load_policy(stage_dir, mesh)
    return params, model, tokenizer, mesh


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
    """Yields completions of a prompt.

    Args:
        stage_dir: directory of the stage whose model completes it.
        prompt: the text.
        chat: send it as a user's message in the chat template.
        sampling: how tokens are sampled.
        num_samples: number of completions.
        seed: random seed.
        best_of: best-of-N sampling, if above 1: each completion is the one of N samples with the
            highest reward. Its KL to the policy is at most log N - (N - 1) / N (Stiennon et al. 2020,
            section 4.3).
        reward_from: stage directory of the reward model for best_of.
        shorten: limit completions to the room that the prompt leaves in the context.

    Raises:
        InputError: if a directory contains no such model, or the prompt does not fit.
    """
    params, model, tokenizer, mesh = load(stage_dir)
    if chat:
        ids, _ = tokenizer.encode_chat([{"role": "user", "content": prompt}], reply=True)
    else:
        ids = tokenizer.prompt(prompt)
    room = model.max_length - len(ids)
    # Without any room the limit is kept, and the error that follows says what does not fit.
    if shorten and 0 < room < sampling.max_new_tokens:
        sampling = dataclasses.replace(sampling, max_new_tokens=room)
    with jax.set_mesh(mesh):
        batches = complete(
            params,
            model,
            [ids],
            mesh=mesh,
            seed=seed,
            num_samples=num_samples * best_of,
            sampling=sampling,
            stop_ids=tokenizer.stop_ids,
        )
        completions = next(batches)
        if best_of > 1:
            rows = [_reward_row(ids, completion, tokenizer) for completion in completions]
            reward, reward_model = load_model(reward_from, mesh, "reward")
            # With 2 completions, best of 3: samples 0 1 2 | 3 4 5 -> scores [2, 3] -> one of each row.
            scores = scalar.score_rows(reward, reward_model, rows).reshape(num_samples, best_of)
            best = scores.argmax(axis=1)
            completions = [completions[i * best_of + best[i]] for i in range(num_samples)]
    for completion in completions:
        yield tokenizer.decode(completion.ids)


def _reward_row(prompt: Sequence[int], completion: Completion, tokenizer: Tokenizer) -> list[int]:
    """Returns prompt and completion as the reward model was trained on them: with the end of turn."""
    # A completion that was cut has not ended its turn.
    end = [tokenizer.end_id] if completion.finished else []
    return [*prompt, *completion.ids, *end]


def converse(
    stage_dir: str,
    sampling: SamplingConfig,
    seed: int,
    system: str = "",
    user: TextIO | None = sys.stdin,
    shorten: bool = False,
) -> None:
    """Reads messages and streams the model's answers to standard output, until /quit or end of input.

    Args:
        stage_dir: directory of the stage whose model answers.
        sampling: how tokens are sampled.
        seed: random seed of the first turn; later turns use the next ones.
        system: system message; empty: none.
        user: where messages are read from; None if standard input is closed.
        shorten: limit answers to half of the context.

    Raises:
        InputError: if the model cannot chat, or no message would fit next to an answer.
    """
    params, model, tokenizer, mesh = load(stage_dir)
    if tokenizer.chat_refusal:
        raise InputError(tokenizer.chat_refusal)
    if shorten:
        longest = min(sampling.max_new_tokens, model.max_length // 2)
        sampling = dataclasses.replace(sampling, max_new_tokens=longest)
    room = _room_for_messages(model, sampling)
    opening = [{"role": "system", "content": system}] if system else []
    # A template may refuse the system message: find out before the user has typed anything.
    tokenizer.encode_chat([*opening, {"role": "user", "content": "?"}], reply=True)
    # One for the whole conversation: it keeps what has been said, and reads only the newest message.
    engine = stream_engine(params, model, mesh)
    _note("Chat with the model. /reset starts a new conversation, /quit or end of input ends.")
    messages = list(opening)
    with jax.set_mesh(mesh):
        # Counts every message, also those that are refused, so that turns never share a seed.
        for turn in itertools.count():
            text = _ask(user)
            if text is None or text == "/quit":
                return
            if text == "/reset":
                messages = list(opening)  # the system message stays
                continue
            asked = [*messages, {"role": "user", "content": text}]
            try:
                messages, ids = _fit(asked, len(opening), tokenizer, room)
            except InputError as error:  # only this message is lost, not the conversation
                _note(f"({error}; send it again)")
                continue
            answer = _answer(engine, tokenizer, ids, sampling, seed + turn)
            messages.append({"role": "assistant", "content": answer})


def _room_for_messages(model: ModelConfig, sampling: SamplingConfig) -> int:
    """Returns the tokens that an answer leaves for the conversation before it, at least one."""
    room = model.max_length - sampling.max_new_tokens
    if room < 1:
        raise InputError(
            f"--max-new-tokens: {sampling.max_new_tokens} leaves no room for a message "
            f"in the context of {model.max_length} tokens; lower it"
        )
    return room


def _answer(
    engine: Engine, tokenizer: Tokenizer, ids: Sequence[int], sampling: SamplingConfig, seed: int
) -> str:
    """Samples the answer to a conversation, prints it token by token, and returns it."""
    tokens = stream(
        engine,
        ids,
        seed=seed % 2**32,  # random number keys are made of 32 bits
        sampling=sampling,
        stop_ids=tokenizer.stop_ids,
    )
    # Holds back the bytes of a character until all of its tokens are there.
    decoder = StreamDecoder(tokenizer)
    answer = ""
    for token in tokens:
        text = decoder.add(token)
        print(text, end="", flush=True)
        answer += text
    text = decoder.flush()
    print(text, flush=True)
    return answer + text


def _fit(
    messages: list[Message], keep: int, tokenizer: Tokenizer, limit: int
) -> tuple[list[Message], list[int]]:
    """Drops the oldest turns until the conversation fits the context.

    Args:
        messages: the conversation; the last one is the user's newest.
        keep: number of messages at the start that are never dropped: the system's.
        tokenizer: of the model.
        limit: tokens that are left for the conversation.

    Returns:
        The messages that are left, and their token ids.

    Raises:
        InputError: if the newest message alone does not fit, or the template refuses it.
    """
    # Checked before any turn is dropped: otherwise one long message would erase the conversation.
    alone, _ = tokenizer.encode_chat([*messages[:keep], messages[-1]], reply=True)
    if len(alone) > limit:
        raise InputError(
            f"this message takes {len(alone)} tokens, and {limit} fit next to the answer; shorten it"
        )
    while True:
        ids, _ = tokenizer.encode_chat(messages, reply=True)
        if len(ids) <= limit:
            return messages, ids
        # A turn is two messages:   system | user assistant | user assistant | user
        #                                  |   dropped      |
        messages = [*messages[:keep], *messages[keep + 2 :]]
        _note("(the oldest turn no longer fits the context and is forgotten)")


def _ask(user: TextIO | None) -> str | None:
    """Returns the next message that is not blank, or None at the end of input or if it is closed."""
    while user:
        if user.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        # Bytes where possible: decoding here lets one bad line be sent again.
        raw = getattr(user, "buffer", user).readline()
        try:
            line = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
            line.encode()  # surrogates, from bytes that Python could not decode, are refused here
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            where = f"{error.reason} at byte {error.start}"
            _note(f"(this line is not valid UTF-8, {where}; send it again)")
            continue
        if not line:
            return None
        if line.strip():
            return line.strip()
    return None


def _note(text: str) -> None:
    """Prints to standard error: standard output is for the answers."""
    print(text, file=sys.stderr, flush=True)
