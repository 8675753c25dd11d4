"""Adapters: nothing changes at first, only they learn, merged equals unmerged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import InputError, build
from jaxllm.models import decode, lora, scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.parts_config import LoRAConfig
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import param_shardings

MODEL = ModelConfig(
    vocab_size=24,
    max_length=16,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=48,
    dtype="float32",
)
AXES = transformer.axes(MODEL)
LORA = LoRAConfig(rank=4, alpha=8.0)
TOKENS = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)


def parts(config=LORA):
    params = transformer.init(MODEL, jax.random.key(0))
    return params, lora.frozen(config, params), lora.init(config, params, jax.random.key(1), AXES)


def trained():
    """Adapters whose second factor is no longer zero."""
    params, base, own = parts()
    return (
        params,
        base,
        jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), own),
    )


def test_at_first_nothing_changes():
    params, base, own = parts()
    want = transformer.apply(params, MODEL, TOKENS)
    np.testing.assert_array_equal(transformer.apply(lora.join(base, own), MODEL, TOKENS), want)


def test_merged_equals_unmerged_and_cached():
    params, base, own = trained()
    whole = lora.join(base, own)
    merged = lora.merge(whole)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    got, want = transformer.apply(whole, MODEL, TOKENS), transformer.apply(merged, MODEL, TOKENS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(want - transformer.apply(params, MODEL, TOKENS))).max() > 1e-2
    for a, b in zip(
        *(jax.tree.leaves(decode.unstack(p, MODEL)) for p in (whole, merged)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_the_product_is_scaled_by_alpha_over_rank():
    params, base, own = trained()
    q, adapter = params["layers"]["attention"]["q"], own["lora"]["layers"]["attention"]["q"]
    want = q + 2.0 * jnp.einsum("ldr,lrnh->ldnh", adapter["a"], adapter["b"])
    got = lora.merge(lora.join(base, own))["layers"]["attention"]["q"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    out, adapter = params["layers"]["attention"]["out"], own["lora"]["layers"]["attention"]["out"]
    want = out + 2.0 * jnp.einsum("lnhr,lrd->lnhd", adapter["a"], adapter["b"])
    np.testing.assert_allclose(
        lora.merge(lora.join(base, own))["layers"]["attention"]["out"], want, atol=1e-5
    )


def test_rank_zero_trains_everything():
    params = transformer.init(MODEL, jax.random.key(0))
    assert (
        lora.frozen(LoRAConfig(), params) == {}
        and lora.init(LoRAConfig(), params, jax.random.key(0), AXES) is params
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, lora.join({}, params), params))


def test_a_decoder_with_a_head_trains_its_head_too():
    whole = scalar.init(transformer.init(MODEL, jax.random.key(0)), MODEL, jax.random.key(1))
    base, own = (
        lora.frozen(LORA, whole),
        lora.init(LORA, whole, jax.random.key(2), scalar.axes(MODEL)),
    )
    assert set(own) == {"trunk", "head"} and set(own["trunk"]) == {"lora"} and "head" not in base
    segments = jnp.ones_like(TOKENS)
    want = scalar.apply(whole, MODEL, TOKENS, segments)
    np.testing.assert_array_equal(scalar.apply(lora.join(base, own), MODEL, TOKENS, segments), want)


def test_only_the_targets_have_adapters_and_they_shard_as_their_matrix():
    config = LoRAConfig(rank=2, targets=("q", "down"))
    shapes, axes = lora.trained(config, transformer.abstract(MODEL), transformer.axes(MODEL))
    layers = shapes["lora"]["layers"]
    assert (
        set(layers) == {"attention", "mlp"}
        and set(layers["attention"]) == {"q"}
        and set(layers["mlp"]) == {"down"}
    )
    shardings = param_shardings(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)), shapes, axes)
    spec = lambda x: tuple(x.spec)
    assert spec(shardings["lora"]["layers"]["attention"]["q"]["a"])[1] == ("fsdp", "expert")
    assert "tensor" in spec(shardings["lora"]["layers"]["attention"]["q"]["b"])


def test_an_unknown_target_is_one_clear_line():
    with pytest.raises(InputError, match="targets: 'query' has no adapter"):
        build(LoRAConfig, {"rank": 2, "targets": ["query"]})
