"""FLOPs of a traced program: its matrix products, with loops counted as often as they run."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

# Products of cuDNN's attention kernels, each of queries x keys x the size of a head: two forward, and backward the
# scores once more and four gradients.
_CUDNN_PRODUCTS = {
    "dot_product_attention_fwd_wrapper": 2,
    "dot_product_attention_bwd_wrapper": 5,
}


def count_flops(jaxpr: Any, experts: int = 1) -> float:
    """FLOPs of the matrix products of a program.

    A branch counts as its most expensive side. Grouped products count as with a balanced load over the experts.

    Args:
      jaxpr: the traced program.
      experts: shards that the experts are split over around this point of the program.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            total += _product_flops(eqn)
        elif name == "ragged_dot_general":
            total += _grouped_flops(eqn) / experts
        elif name == "pallas_call":
            # The only kernel is attention's. Half of its blocks are above the diagonal and skipped; with a window that
            # is too little for the forward pass and too much for the backward pass.
            blocks = math.prod(params["grid_mapping"].grid)
            total += blocks * count_flops(params["jaxpr"], experts) / 2
        elif name in _CUDNN_PRODUCTS:
            total += _cudnn_flops(eqn, _CUDNN_PRODUCTS[name])
        elif name == "cond":
            # Which side runs depends on data.
            total += max(count_flops(branch.jaxpr, experts) for branch in params["branches"])
        else:
            total += _nested_flops(name, params, experts)
    return total


def _product_flops(eqn: Any) -> float:
    """2 x the size of the result x the contracted dimensions."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _cudnn_flops(eqn: Any, products: int) -> float:
    """Half of a causal kernel's scores are skipped."""
    (B, T, N, H), (_, S, *_) = (operand.aval.shape for operand in eqn.invars[:2])
    skipped = 2 if "CAUSAL" in eqn.params["mask_type"].name else 1
    return 2.0 * products * B * N * T * S * H / skipped


def _grouped_flops(eqn: Any) -> float:
    """Every row meets the matrix of one group only.

    In the gradient with respect to the matrices the groups are in the result, [G, in, out], not in an operand.
    """
    (rows, *_, inner), matrix = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    out = eqn.outvars[0].aval.shape
    return 2.0 * rows * inner * (matrix[-1] if len(matrix) == 2 else out[-1])


def _nested_flops(name: str, params: Mapping[str, Any], experts: int) -> float:
    """FLOPs of the programs inside an operation, as often as it runs them."""
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":
        # The program inside is that of one device.
        times = params["mesh"].size
        experts = params["mesh"].shape.get("expert", 1)
    return times * sum(count_flops(inner, experts) for inner in _inner_programs(params))


def _inner_programs(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner
