"""Settings of sampling, and of the engine that samples."""

import dataclasses
from typing import Annotated

from annotated_types import Ge, Le

from jaxllm.config.ranges import (
    FINITE,
    NOT_BOOL,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveProportion,
    Proportion,
)

Penalty = Annotated[float, NOT_BOOL, FINITE, Ge(-2), Le(2)]


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
    min_p: Proportion = 0.0
    """Sample from the tokens with at least this share of the likeliest token's probability; 0: from all."""
    repetition_penalty: PositiveFloat = 1.0
    """Divides the logits of tokens of the prompt and the response, multiplies them if negative; 1: none."""
    presence_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens that the response has."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens for each time that the response has them."""

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens so far."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)

    @property
    def filters(self) -> bool:
        """Whether some tokens are left out."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken: below this temperature float32 cannot tell the two apart."""
        return self.temperature < 1e-5

    @property
    def divisor(self) -> float:
        """Divisor of the logits; log-probabilities of greedy decoding are those at temperature 1."""
        return 1.0 if self.greedy else self.temperature


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How many requests are decoded together, and how much memory their cache takes."""

    slots: PositiveInt = 64
    """Responses that are decoded at the same time on each shard of a batch (data x fsdp x expert)."""
    block: PositiveInt = 32
    """Positions of a block of the cache. A prompt is prefilled block by block, and shared by whole blocks."""
    cache_gib: NonNegativeFloat = 0.0
    """Memory for keys and values over all devices, in GiB; 0: enough for all slots at full length."""
    prefill_blocks: PositiveInt = 16
    """Blocks of prompts that are prefilled together, between two decoding steps, on each shard of a batch."""
    steps: PositiveInt = 8
    """Tokens that are decoded before requests come and go again."""

    def for_rows(self, count: int, num_shards: int) -> "EngineConfig":
        """The same with no more slots than `count` responses need on this many shards."""
        needed = max(-(-count // num_shards), 1)
        return dataclasses.replace(self, slots=min(self.slots, needed))
