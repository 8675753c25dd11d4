"""What `model.dial` sets in the section pretrain: tokens, batch, steps, learning rate, warm-up and decay.

With P parameters in the matrices of the layers and r = model.tokens_per_parameter:

    tokens         r P                                  20 P at the least loss for the compute (Hoffmann et al. 2022)
    batch_size     0.2920 C^0.3271 tokens, C = 6 P r P  DeepSeek LLM (Bi et al. 2024, section 3.1), to a power of two rows
    num_steps      tokens / batch
    learning_rate  2^-8                                 at the base: better than 2^-9 in 300 steps of the quickstart's text
    warmup_steps   a tenth of the steps
    schedule       linear, to 0                         Bergsma et al. 2025, "Straight to zero"
    weight_decay   5 / (learning rate x steps)          AdamW averages over a fixed share of the training, here a fifth
                                                        (Wang and Aitchison 2024)

The width and the depth do not change the learning rate: `models.scaling` does, parameter by parameter. Larger batches would
allow a larger one (Malladi et al. 2022), longer training asks for a smaller one (Bjorck et al. 2024); along the dial both
grow, and it leaves the learning rate as it is.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxllm.config import InputError, Tree, build, merge, require
from jaxllm.models.config import ModelConfig
from jaxllm.stages.config import LanguageModelConfig

_LEARNING_RATE = 2.0**-8
_WARMUP_SHARE = 0.1
_AVERAGED_SHARE = 0.2
# Kinds that one learning rate serves (optim/README.md).
_KINDS = ("adamw", "muon")


def fill(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config tree with the fields of pretrain that its model.dial sets, where the tree does not.

    Raises:
      ValueError: the tree sets what the dial cannot follow.
    """
    given = {} if tree.get("pretrain") is None else tree["pretrain"]
    try:
        model = build(ModelConfig, tree.get("model") or {})
        section = build(LanguageModelConfig, given)  # refuses what is no mapping
    except InputError:
        return tree  # the config's own checks say where it is wrong
    if not model.dial:
        return tree
    optim = given.get("optim") or {}
    _check(model, section, given, optim)
    return {**tree, "pretrain": merge(_fields(model, section, given, optim), given)}


def _check(
    model: ModelConfig, section: LanguageModelConfig, given: Mapping[str, Any], optim: Any
) -> None:
    require(
        "num_epochs" not in given or section.num_steps > 0,
        "pretrain.num_epochs: model.dial counts tokens; set model.tokens_per_parameter or pretrain.num_steps",
    )
    require(
        section.optim.kind in _KINDS or "learning_rate" in optim,
        f"pretrain.optim.kind: model.dial has no learning rate for {section.optim.kind}; set pretrain.optim.learning_rate",
    )
    require(
        not model.moe.num_experts and not model.mla.kv_rank,
        "model.dial: sets the sizes of dense models; set those of experts and latent vectors yourself, with model.scaling",
    )


def _fields(
    model: ModelConfig, section: LanguageModelConfig, given: Mapping[str, Any], optim: Any
) -> Tree:
    """The fields, given those that the config sets itself."""
    length = model.row_length(section.length, "pretrain.length")
    parameters = matrix_parameters(model)
    tokens = model.tokens_per_parameter * parameters
    batch = section.batch_size if "batch_size" in given else _rows(parameters, tokens, length)
    steps = section.num_steps or math.ceil(tokens / (batch * length))
    rate = section.optim.learning_rate if "learning_rate" in optim else _LEARNING_RATE
    decay = 1.0 / (_AVERAGED_SHARE * rate * steps) if rate else 0.0
    return {
        "batch_size": batch,
        "num_steps": steps,
        "optim": {
            "learning_rate": rate,
            "warmup_steps": int(_WARMUP_SHARE * steps),
            "schedule": "linear",
            "final_fraction": 0.0,
            "weight_decay": decay,
        },
    }


def _rows(parameters: int, tokens: float, length: int) -> int:
    """Rows of `length` tokens in a batch, a power of two, so that most meshes can share them."""
    flops = 6.0 * parameters * tokens
    wanted = 0.2920 * flops**0.3271 / length
    return 2 ** max(round(math.log2(wanted)), 0)


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters in the matrices of all layers of a dense model: without embeddings, head, norms and biases."""
    c = model
    heads = 2 * c.num_heads + 2 * c.num_kv_heads  # queries and the output, keys and values
    mlp = (2 if c.mlp == "gelu" else 3) * c.mlp_dim
    return c.num_layers * c.embed_dim * (heads * c.head_dim + mlp)
