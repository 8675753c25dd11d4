"""Settings of sampling, and of the engine that samples."""

import dataclasses

from jaxllm.config.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    PositiveProportion,
    Proportion,
)


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
