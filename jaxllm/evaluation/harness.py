"""EleutherAI's lm-evaluation-harness (extra `lm_eval`) on a stage's model: `jaxllm lm_eval`, or its model "jaxllm"."""

import itertools
import re
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports] - an extra
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from jaxllm.evaluation.scoring import fit, generate_texts, score_rows, split, windows
from jaxllm.evaluation.tasks import load
from jaxllm.generate import SamplingConfig
from jaxllm.runtime.mesh import MeshConfig, make_mesh

_MARK = "\x02"  # a special token's id stands between two in a rendered conversation, so that no text is taken for one


def harness(stage_dir: str, options: Sequence[str]) -> None:
    """The harness's own command on a stage directory; options: all it takes but the model."""
    sys.argv = [
        "lm_eval",
        "run",
        "--model",
        "jaxllm",
        "--model_args",
        f"stage_dir={stage_dir}",
        "--batch_size",
        "32",
    ]
    sys.argv += options
    cli_evaluate()


@register_model("jaxllm")
class StageLM(LM):
    """A stage's model on all devices. Contexts that are too long lose their oldest tokens."""

    def __init__(
        self,
        stage_dir: str,
        batch_size: int | str = 32,
        max_gen_toks: int = 256,
        seed: int = 0,
        **_: Any,
    ):
        super().__init__()
        self._model = load(stage_dir, make_mesh(MeshConfig()))
        self._batch_size = int(batch_size) if str(batch_size).isdigit() else 32  # "auto"
        self._max_new, self._seed = max_gen_toks, seed

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding gives it) of each request's (context, continuation)."""
        rows = []
        for number, request in enumerate(requests):
            before, after = split(self._encode, *request.args)
            rows.append(
                fit(
                    self._begun(before),
                    after,
                    self._model.config,
                    f"loglikelihood request {number}",
                )
            )
        return score_rows(self._model, rows, self._batch_size)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Nats of each request's (text,)."""
        bos, length = self._model.tokenizer.start_id, self._model.config.max_length
        cut = [windows(self._encode(request.args[0]), bos, length) for request in requests]
        scores = iter(score_rows(self._model, [*itertools.chain(*cut)], self._batch_size))
        return [sum(next(scores)[0] for _ in rows) for rows in cut]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """What follows each request's (context, {until, max_gen_toks, do_sample, ...}); half of the model's context,
        if not more, is left to the question."""
        texts: dict[int, str] = {}
        limit, options_of = self._model.config.max_length, lambda i: requests[i].args[1]
        by_options = lambda i: repr(options_of(i))
        for _, group in itertools.groupby(
            sorted(range(len(requests)), key=by_options), key=by_options
        ):
            numbers = [*group]
            options, until = options_of(numbers[0]), options_of(numbers[0]).get("until") or []
            prompts = [self._begun(self._encode(requests[i].args[0])) for i in numbers]
            most = int(
                options.get("max_gen_toks") or options.get("max_new_tokens") or self._max_new
            )
            most = min(most, max(limit - max(map(len, prompts)), limit // 2))
            heat = float(options.get("temperature") or 1.0) if options.get("do_sample") else 0.0
            sampling = SamplingConfig(
                most, heat, int(options.get("top_k") or 0), float(options.get("top_p") or 1.0)
            )
            settings = {"seed": self._seed, "batch_size": self._batch_size}
            stops = [until] if isinstance(until, str) else until
            given = generate_texts(self._model, prompts, sampling, stops, **settings)
            texts |= zip(numbers, (text for text, _ in given), strict=True)
        return [texts[i] for i in range(len(requests))]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as a text that `_encode` makes its token ids of; without the prompt the last turn is open."""
        tokenizer = self._model.tokenizer
        ids, _ = tokenizer.encode_chat(chat_history, reply=add_generation_prompt)
        ids = ids if add_generation_prompt or ids[-1] != tokenizer.end_id else ids[:-1]
        parts = itertools.groupby(ids, lambda i: not tokenizer.token_bytes(i))
        mark = lambda special: "".join(f"{_MARK}{i}{_MARK}" for i in special)
        return "".join(mark(part) if special else tokenizer.decode(part) for special, part in parts)

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells cached requests apart by."""
        return f"jaxllm-{self._model.tokenizer.fingerprint}"

    def _encode(self, text: str) -> list[int]:
        parts = re.split(f"{_MARK}(\\d+){_MARK}", text)
        return [
            i
            for n, p in enumerate(parts)
            for i in ([int(p)] if n % 2 else self._model.tokenizer.encode(p))
        ]

    def _begun(self, ids: list[int]) -> list[int]:
        bos = self._model.tokenizer.start_id
        return ids if ids[:1] == [bos] else [bos, *ids]
