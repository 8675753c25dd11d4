"""Pre-training: next-token prediction on documents, from fresh parameters."""

from jaxllm.metrics import LoggingConfig
from jaxllm.models.config import ModelConfig
from jaxllm.stages.language_model import LanguageModelConfig, train_language_model
from jaxllm.workspace import Workspace


def run(
    workspace: Workspace, config: LanguageModelConfig, model: ModelConfig, logging: LoggingConfig
) -> dict[str, float]:
    """Train a decoder on packed documents; the result has its held-out bits per byte."""
    workspace.require("tokenizer", "pretrain")
    return train_language_model(workspace, "pretrain", "document", config, model, logging, config.init_from)
