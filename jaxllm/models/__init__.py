"""Model definitions: Flax NNX blocks behind a functional boundary."""
