"""Pre-training: next-token prediction on documents, from fresh parameters."""

import jax

from jaxllm.checkpoint import compare
from jaxllm.metrics import LoggingConfig
from jaxllm.models import lora, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.stages.language_model import LanguageModelConfig, train_language_model
from jaxllm.workspace import Workspace, load_model


def run(
    workspace: Workspace, config: LanguageModelConfig, model: ModelConfig, logging: LoggingConfig
) -> dict[str, float]:
    """Train a decoder on packed documents; the result has its held-out bits per byte."""
    workspace.require("tokenizer", "pretrain")

    def init_params(shardings):
        if config.init_from:
            params = lora.merge(load_model(config.init_from, workspace.mesh)[0])
            compare(params, transformer.abstract(model), config.init_from)
            return params
        return jax.jit(lambda key: transformer.init(model, key), out_shardings=shardings)(
            jax.random.key(workspace.seed)
        )

    return train_language_model(
        workspace, "pretrain", "document", config, model, logging, config.init_from, init_params
    )
