"""Supervised fine-tuning: the step of pre-training; the loss falls on the assistant's tokens only, its end included."""

from jaxllm.metrics import LoggingConfig
from jaxllm.models.config import ModelConfig
from jaxllm.stages.language_model import LanguageModelConfig, train_language_model
from jaxllm.workspace import Workspace


def run(
    workspace: Workspace, config: LanguageModelConfig, model: ModelConfig, logging: LoggingConfig
) -> dict[str, float]:
    """Fine-tune the pre-trained model (or `init_from`) on packed conversations."""
    start = workspace.source(config.init_from, "pretrain", "sft")
    return train_language_model(workspace, "sft", "chat", config, model, logging, start)
