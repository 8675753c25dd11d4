"""rollouts.jsonl: a few responses of each update, with their prompts and scores."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from jaxllm.data.loader import PromptExample
from jaxllm.data.messages import prompt_text
from jaxllm.engine import rollouts
from jaxllm.engine.rollouts import Rollout
from jaxllm.runtime.files import json_line, read_jsonl, write_whole
from jaxllm.runtime.transfer import fetch
from jaxllm.tokenizers.trained import Tokenizer


class RolloutLog:
    """Appends to the file, a line for each response.

    When a run resumes, lines of updates after its checkpoint are dropped first, so that the file ends as that of an
    uninterrupted run.
    """

    def __init__(self, path: epath.Path, num_logged: int, tokenizer: Tokenizer):
        self._path = path
        self._num_logged = num_logged
        self._tokenizer = tokenizer
        self._file: Any = None
        self._last_step = 0

    def __call__(
        self, step: int, rollout: Rollout, prompts: Sequence[PromptExample], scores: jax.Array
    ) -> None:
        """Writes the first responses of update `step`; scores float32[B]. All processes must call it together."""
        count = min(self._num_logged, len(prompts))
        if not count:
            return
        # Cut before fetching: a whole batch of responses need not leave the devices.
        first = fetch(jax.tree.map(lambda x: x[:count], rollout))
        scores = fetch(scores)
        if jax.process_index():
            return
        if self._file is None or step <= self._last_step:
            # The run resumed, or went back to an earlier checkpoint.
            self._file = self._reopened(step)
        self._last_step = step
        completions = rollouts.completions(first, self._tokenizer.stop_ids)
        lines = []
        for prompt, response, score in zip(prompts, completions, scores, strict=False):
            line = {
                "step": step,
                "prompt": prompt_text(prompt.messages),
                "response": self._tokenizer.decode(response.ids),
                "finished": response.finished,
                "score": round(float(score), 4),
            }
            lines.append(json_line(line))
        assert self._file
        self._file.write("".join(lines))
        self._file.flush()

    def _reopened(self, step: int) -> Any:
        """The file, open for appending, with the lines before update `step` only."""
        kept = []
        for line in read_jsonl(self._path, "skip"):
            if line.get("step", math.inf) < step:
                kept.append(json_line(line))
        # Atomically: a kill here must not lose the responses of earlier updates.
        write_whole(self._path, "".join(kept))
        return self._path.open("a", encoding="utf-8")
