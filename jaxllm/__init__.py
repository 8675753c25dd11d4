"""jaxllm: the whole life of a language model in JAX, from tokenizer to PPO."""

__version__ = "0.1.0"
