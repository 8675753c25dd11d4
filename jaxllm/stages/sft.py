"""Supervised fine-tuning: the step of pre-training; the loss falls on the assistant's tokens only, its end included."""

from jaxllm.checkpoint import compare
from jaxllm.metrics import LoggingConfig
from jaxllm.models import lora, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.stages.language_model import LanguageModelConfig, train_language_model
from jaxllm.workspace import Workspace, load_model


def run(
    workspace: Workspace, config: LanguageModelConfig, model: ModelConfig, logging: LoggingConfig
) -> dict[str, float]:
    """Fine-tune the pre-trained model (or `init_from`) on packed conversations."""
    start = config.init_from or str(workspace.stage_dir("pretrain"))
    if not config.init_from:
        workspace.require("pretrain", "sft")

    def init_params(shardings):
        del shardings  # load_model places them the same way
        params = lora.merge(load_model(start, workspace.mesh)[0])
        compare(params, transformer.abstract(model), start)
        return params

    return train_language_model(workspace, "sft", "chat", config, model, logging, start, init_params)
