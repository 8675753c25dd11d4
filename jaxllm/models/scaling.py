"""How each kind of parameter follows the size of the model: muP for the width, CompleteP for the depth.

`model.scaling` names a base model. Where a parameter is made, it is told how many times as many inputs, outputs and layers
there are as in the base (`Scale`). The start of the parameter and its updates follow from that. With the base's own size all
factors are exactly 1.

Both papers multiply activations as well: the output of a residual branch by the base's depth over the depth, logits by the
base's width over the width. Here these factors are part of the last parameter before them. For an optimizer that does not see
the scale of gradients it is the same training (Yang et al. 2022, "Tensor Programs V": tables 3 and 8 are two such forms of
muP), and the model is an ordinary one, to decode and to export.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from jaxllm.models.config import ModelConfig

# Names of dimensions that grow with the width. The others stay as they are in the base: sizes of a head, of the vocabulary,
# of the context and of latent vectors, and the number of experts.
_GROWING = frozenset({"embed", "expert_embed", "heads", "kv_heads", "mlp", "norm"})

Place = Literal["inside", "last"]
"""Of a parameter in a residual branch: `last` makes what is added to the residual stream."""


class Scale(NamedTuple):
    """A parameter's relation to the same parameter of the base model."""

    inputs: float = 1.0
    """How many times as many inputs a product sums over; 1 for tables, norms and biases."""
    outputs: float = 1.0
    """How many times as many outputs there are."""
    depth: float = 1.0
    """How many times as many layers share the change of the residual stream; 1 outside of residual branches."""
    folded: float = 1.0
    """The factor of an activation that is part of this parameter."""

    @property
    def init(self) -> float:
        """Factor of the initial values.

        Of a matrix: 1 / sqrt(inputs); where the number of outputs is fixed (muP's output weights), 1 / inputs (Yang et
        al. 2022, tables 3 and 8).
        """
        power = 0.5 if self.inputs == self.outputs else 1.0
        return self.folded * self.inputs**-power

    @property
    def rate(self) -> float:
        """Factor of the learning rate where all elements of an update have about the same size, as Adam's."""
        # Such an update sums coherently over the inputs.
        return self.folded / self.inputs

    @property
    def gradient(self) -> float:
        """Size of the gradient. Adam's epsilon has to follow it (Dey et al. 2025, table 1)."""
        return 1.0 / (self.outputs * self.depth * self.folded)


LIKE_BASE = Scale()


def of_matrix(
    config: ModelConfig, inputs: Iterable[str], outputs: Iterable[str], place: Place
) -> Scale:
    """A matrix in a residual branch; inputs, outputs: names of its dimensions."""
    folded = _branch_factor(config) if place == "last" else 1.0
    return Scale(_growth(config, inputs), _growth(config, outputs), config.depth_growth, folded)


def of_vector(config: ModelConfig, names: Iterable[str], place: Place) -> Scale:
    """A norm or a bias in a residual branch; names: of its dimensions."""
    folded = _branch_factor(config) if place == "last" else 1.0
    return Scale(1.0, _growth(config, names), config.depth_growth, folded)


def of_table(config: ModelConfig) -> Scale:
    """A table of embeddings: its rows are looked up, so they do not grow with the width."""
    width = config.width_growth
    # The model multiplies them by the root of its width, the base by that of its own.
    folded = width**-0.5 if config.scale_embeddings else 1.0
    return Scale(outputs=width, folded=folded)


def of_head(config: ModelConfig) -> Scale:
    """The output matrix: it sums over the width, and the vocabulary is that of the base."""
    return Scale(inputs=config.width_growth)


def of_final_norm(config: ModelConfig) -> Scale:
    """The norm before the output matrix, and its bias."""
    return Scale(outputs=config.width_growth, folded=_output_factor(config))


def of_scalar_head(config: ModelConfig) -> Scale:
    """The vector that reads a score from a hidden state."""
    # Hidden states are as small as the final norm makes them.
    return Scale(inputs=config.width_growth, folded=1.0 / _output_factor(config))


def _growth(config: ModelConfig, names: Iterable[str]) -> float:
    return config.width_growth if _GROWING.intersection(names) else 1.0


def _branch_factor(config: ModelConfig) -> float:
    """The factor of a branch: 1 / depth (Dey et al. 2025, table 1, with alpha = 1)."""
    return 1.0 / config.depth_growth


def _output_factor(config: ModelConfig) -> float:
    """The part of the logits' factor 1 / width that is in the final norm."""
    # A head of its own starts and learns that much smaller. A table that is also the input cannot, so the norm does.
    return 1.0 / (config.width_growth * of_table(config).folded) if config.tie_embeddings else 1.0
