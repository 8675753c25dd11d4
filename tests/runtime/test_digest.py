"""A digest depends on the bits and their positions, and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.digest import differing, digests
from jaxllm.runtime.mesh import make_mesh

VALUES = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)


EVERYWHERE = P()


def placed(values, spec=EVERYWHERE):
    return {"x": jax.device_put(values, NamedSharding(make_mesh(MeshConfig(data=2, fsdp=4)), spec))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "uint8"])
@pytest.mark.parametrize(
    "spec", [P("data"), P(None, "fsdp"), P("fsdp", "data"), P(("data", "fsdp"))], ids=str
)
def test_it_does_not_depend_on_the_sharding(dtype, spec):
    values = (VALUES * 10).astype(jnp.dtype(dtype))
    alone = digests({"x": jnp.array(values)})
    assert digests(placed(values, spec)) == alone == digests(placed(values))


def test_every_changed_bit_and_every_exchange_changes_it():
    whole = digests({"x": jnp.array(VALUES)})
    words, rng = VALUES.view(np.uint32), np.random.default_rng(1)
    for _ in range(200):
        other = words.copy()
        other[rng.integers(16), rng.integers(24)] ^= np.uint32(1 << rng.integers(32))
        assert differing(whole, digests({"x": jnp.array(other.view(np.float32))})) == ["x"]
    swapped = VALUES.copy()
    swapped[[2, 5]] = swapped[[5, 2]]
    assert differing(whole, digests({"x": jnp.array(swapped)})) == ["x"]
    assert (
        digests({"x": jnp.array(VALUES.reshape(24, 16))}) == whole
    )  # a checkpoint compares shapes as well


def test_differing_names_what_is_on_one_side_only():
    assert differing({"a": [1, 2], "b": [3, 4]}, {"a": [1, 2], "c": [3, 4]}) == ["b", "c"]
