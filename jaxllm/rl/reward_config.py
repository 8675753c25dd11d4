"""The terms of a response's score, by name."""

import dataclasses

from jaxllm.config import require
from jaxllm.config.functions import FunctionName
from jaxllm.config.ranges import AnyFloat

# Terms of a reward that are neither a pattern nor a function.
BUILT_IN_TERMS = ("model", "model_steps", "length")
REGEX = "regex:"
OVERLONG = "overlong:"
STEPS = "steps:"


@dataclasses.dataclass(frozen=True)
class RewardSource:
    """One term of a response's score."""

    source: FunctionName = "model"
    """model: the reward model's score; module:function of (prompt, response, answer); regex:PATTERN: 1 if the whole response matches; length: its tokens over max_new_tokens; overlong:N: from 0 to -1 over the last N of max_new_tokens. A reward for each step of a response: model_steps: the reward model's score at its end; steps:module:function of (prompt, steps, answer)."""
    weight: AnyFloat = 1.0
    """The score is the sum of weight x term; negative for a penalty."""

    def __post_init__(self) -> None:
        kind, _, rest = self.source.partition(":")
        known = self.source in BUILT_IN_TERMS or (kind and rest)
        require(
            bool(known),
            "source: give model, length, overlong:N, regex:PATTERN, module:function, model_steps or steps:module:function",
        )

    @property
    def pays_steps(self) -> bool:
        """Whether the term is a reward for each step, paid where the step ends."""
        return self.source == "model_steps" or self.source.startswith(STEPS)

    @property
    def reads_text(self) -> bool:
        """Whether the term is a number computed from texts, on the host."""
        return self.source not in BUILT_IN_TERMS and not self.source.startswith((OVERLONG, STEPS))

    @property
    def name(self) -> str:
        """The name of its mean in the metrics, unless another term has the same: see `metric_names`."""
        if self.source.startswith((REGEX, OVERLONG)):
            return self.source.partition(":")[0]
        return self.source.rsplit(":", 1)[-1]
