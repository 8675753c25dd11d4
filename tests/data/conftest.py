"""The tokenizer of the tests of a store and its rows."""

import pytest

from jaxllm.tokenizers.trained import train


@pytest.fixture(scope="session")
def tokenizer():
    corpus = [f"line number {i} of some text 文字" for i in range(200)]
    return train(
        iter(corpus), vocab_size=320, model_type="bpe", character_coverage=1.0, num_threads=1
    )
