"""A model's shape from one number, its depth: the dial. `stages.dial` sets how it is pre-trained.

The base model, for which learning rate and initial scales were chosen, is the same at any position of the dial.
"""

from collections.abc import Mapping
from typing import Any

# Width per layer, and the size of a head, which is the same in all models: so attention needs no rule. Models whose width
# grows with their depth lie near the optimum over a wide range of ratios (Kaplan et al. 2020, section 3.1 and figure 5);
# 64 makes 12 layers GPT-3's 125M, and 24 layers its 760M (Brown et al. 2020, table 2.1).
_WIDTH_PER_LAYER = 64
_HEAD_DIM = 64
# Hidden units per width. A gated MLP has three matrices instead of two (Shazeer 2020), as Qwen3 has it.
_MLP_RATIO = {"gelu": 4}
_GATED_MLP_RATIO = 3
_BASE_DEPTH = 4
# Of the base: 1 / sqrt(width). A narrower base that starts at 0.02 stays worse at every width and learning rate
# (tests/RESULTS.md, "One learning rate at any size").
_INIT_STD = (_WIDTH_PER_LAYER * _BASE_DEPTH) ** -0.5


def shape(dial: int, mlp: str) -> Mapping[str, Any]:
    """Fields of `ModelConfig` for a position of the dial; mlp: the kind of MLP."""
    width = _WIDTH_PER_LAYER * dial
    return {
        "num_layers": dial,
        "embed_dim": width,
        "num_heads": width // _HEAD_DIM,
        "num_kv_heads": width // _HEAD_DIM,
        "head_dim": _HEAD_DIM,
        "mlp_dim": _MLP_RATIO.get(mlp, _GATED_MLP_RATIO) * width,
        "init_std": _INIT_STD,
        "scaling": {"base_width": _WIDTH_PER_LAYER * _BASE_DEPTH, "base_depth": _BASE_DEPTH},
    }
