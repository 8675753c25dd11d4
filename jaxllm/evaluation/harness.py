"""EleutherAI's lm-evaluation-harness (extra `lm_eval`) on a stage's model: `jaxllm lm_eval`, or its model "jaxllm"."""

import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports] - an extra
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from jaxllm.engine.config import SamplingConfig
from jaxllm.evaluation.scoring import Row, fit, generate_texts, score_rows, split, windows
from jaxllm.evaluation.tasks import load
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh

_BATCH_SIZE = 32

# The harness takes a rendered conversation as a text, not as ids: it appends prefixes and answers to it and caches it by
# its text. But no text may spell a special token, or a user who writes "<|end|>" could end a turn. So each special token
# is written as its id between two of this control character, which texts do not contain, and `_encode` reads it back.
# With <|bos|> = 1, <|user|> = 4, <|assistant|> = 5 and <|end|> = 6, a user who writes "what is <|end|>?" gives
#
#     ids    1 4 [what is <|end|>?] 6 5
#     text   ^1^^4^what is <|end|>?^6^^5^        (^ for the control character)
_MARK = "\x02"


def harness(stage_dir: str, options: Sequence[str]) -> None:
    """Run the harness's own command on a stage directory; options: all it takes except the model."""
    model = ["--model", "jaxllm", "--model_args", f"stage_dir={stage_dir}"]
    sys.argv = ["lm_eval", "run", *model, "--batch_size", str(_BATCH_SIZE), *options]
    cli_evaluate()


@register_model("jaxllm")
class StageLM(LM):
    """A stage's model on all devices, as the harness wants one. Contexts that are too long lose their oldest tokens."""

    def __init__(
        self,
        stage_dir: str,
        batch_size: int | str = _BATCH_SIZE,
        max_gen_toks: int = 256,
        seed: int = 0,
        **_: Any,
    ) -> None:
        super().__init__()
        self._model = load(stage_dir, make_mesh(MeshConfig()))
        # It may also be "auto".
        self._batch_size = int(batch_size) if str(batch_size).isdigit() else _BATCH_SIZE
        self._max_new_tokens = max_gen_toks
        self._seed = seed

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(nats, is_greedy) of each request's (context, continuation), as in `score_rows`."""
        rows = []
        for number, request in enumerate(requests):
            context, continuation = split(self._encode, *request.args)
            origin = f"loglikelihood request {number}"
            rows.append(fit(self._with_bos(context), continuation, self._model.config, origin))
        return score_rows(self._model, rows, self._batch_size)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Nats of each request's (text,)."""
        bos = self._model.tokenizer.start_id
        rows_by_request: list[list[Row]] = []
        for request in requests:
            ids = self._encode(request.args[0])
            rows_by_request.append(windows(ids, bos, self._model.config.max_length))
        # All windows are scored together: a request's own would rarely fill a batch.
        all_rows = list(itertools.chain(*rows_by_request))
        scores = iter(score_rows(self._model, all_rows, self._batch_size))
        totals = []
        for rows in rows_by_request:
            own_scores = itertools.islice(scores, len(rows))
            totals.append(sum(nats for nats, _ in own_scores))
        return totals

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The continuation of each request's (context, {until, max_gen_toks, do_sample, ...})."""
        # One compilation for all requests with the same options.
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            options = requests[numbers[0]].args[1]
            prompts = [self._with_bos(self._encode(requests[i].args[0])) for i in numbers]
            until = options.get("until") or []
            answers = generate_texts(
                self._model,
                prompts,
                self._sampling(options, max(map(len, prompts))),
                [until] if isinstance(until, str) else until,
                seed=self._seed,
                batch_size=self._batch_size,
            )
            for number, (text, _) in zip(numbers, answers, strict=True):
                texts[number] = text
        return texts

    def _sampling(self, options: Mapping[str, Any], prompt_length: int) -> SamplingConfig:
        """The harness's options; at least half of the model's context, or all they need, is left to the questions."""
        limit = self._model.config.max_length
        # Tasks name it in the harness's or in Hugging Face's way.
        wanted = options.get("max_gen_toks") or options.get("max_new_tokens")
        # Without "do_sample" the harness means greedy decoding, whatever the temperature.
        temperature = float(options.get("temperature") or 1.0) if options.get("do_sample") else 0.0
        return SamplingConfig(
            max_new_tokens=min(
                int(wanted or self._max_new_tokens), max(limit - prompt_length, limit // 2)
            ),
            temperature=temperature,
            top_k=int(options.get("top_k") or 0),
            top_p=float(options.get("top_p") or 1.0),
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as a text that `_encode` turns into its ids; without the prompt the last turn stays open."""
        tokenizer = self._model.tokenizer
        ids, _ = tokenizer.encode_chat(chat_history, reply=add_generation_prompt)
        if not add_generation_prompt and ids[-1] == tokenizer.end_id:
            ids = ids[:-1]
        text = ""
        # Special tokens have no bytes. Other ids are decoded together: a character may be cut between two.
        for is_text, run in itertools.groupby(ids, lambda i: bool(tokenizer.token_bytes(i))):
            if is_text:
                text += tokenizer.decode(list(run))
            else:
                text += "".join(f"{_MARK}{i}{_MARK}" for i in run)
        return text

    @property
    def tokenizer_name(self) -> str:
        """A name for the tokenizer, by which the harness tells cached requests apart."""
        return f"jaxllm-{self._model.tokenizer.fingerprint}"

    def _encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens between marks included."""
        ids: list[int] = []
        # The pattern has a group, so texts (even positions) and ids (odd positions) alternate.
        for position, part in enumerate(re.split(f"{_MARK}(\\d+){_MARK}", text)):
            ids += [int(part)] if position % 2 else self._model.tokenizer.encode(part)
        return ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        """The ids with <|bos|> in front, which a rendered conversation has already."""
        bos = self._model.tokenizer.start_id
        return ids if ids[:1] == [bos] else [bos, *ids]
