"""The rollout engine: continuous batching of requests over a cache in blocks."""
