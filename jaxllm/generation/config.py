"""Settings of sampling."""

import dataclasses

from jaxllm.config.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, PositiveProportion


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled."""

    max_new_tokens: PositiveInt = 64
    """Longest response in tokens, its end-of-turn token included."""
    temperature: NonNegativeFloat = 1.0
    """Divisor of the logits; 0, or less than 1e-5, takes the most likely token."""
    top_k: NonNegativeInt = 0
    """Sample from the k most likely tokens only; 0: from all."""
    top_p: PositiveProportion = 1.0
    """Sample from the smallest set of tokens with at least this probability (nucleus sampling)."""

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken: below this temperature float32 cannot tell the two apart."""
        return self.temperature < 1e-5

    @property
    def divisor(self) -> float:
        """Divisor of the logits; log-probabilities of greedy decoding are those at temperature 1."""
        return 1.0 if self.greedy else self.temperature
