"""Mistakes that conversions are known for: the recordings of tests/oracles/families.py catch every one of them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxllm.models import self_attention, transformer
from jaxllm.models.parts_config import RopeScaling
from jaxllm.pretrained import families
from tests.pretrained.test_families import ARRAYS, RECORD, load, logits_of, relative, tokens


def config(**fields):
    return lambda model, params, patch: (dataclasses.replace(model, **fields), params)


def of_moe(**fields):
    return lambda model, params, patch: (
        dataclasses.replace(model, moe=dataclasses.replace(model.moe, **fields)),
        params,
    )


def leaves(change):
    """A mistake in the parameters of the layers: change(layers) -> the entries that differ."""
    return lambda model, params, patch: (
        model,
        {**params, "layers": {**params["layers"], **change(params["layers"])}},
    )


def interleaved_rotary(model, params, patch):
    """Pairs side by side instead of halves."""
    half_split = self_attention.rope

    def rope(x, **how):
        apart = jnp.concatenate([x[..., 0::2], x[..., 1::2]], -1)
        y = half_split(apart, **how)
        return jnp.stack([y[..., : y.shape[-1] // 2], y[..., y.shape[-1] // 2 :]], -1).reshape(
            x.shape
        )

    patch.setattr(self_attention, "rope", rope)
    return model, params


def off_by_one(model, params, patch):
    return dataclasses.replace(model, window=model.window + 1), params


def swapped_gate_up(stack):
    return {"mlp": {**stack["mlp"], "gate": stack["mlp"]["up"], "up": stack["mlp"]["gate"]}}


def swapped_experts(stack):
    e = stack["mlp"]["experts"]
    return {"mlp": {**stack["mlp"], "experts": {**e, "gate": e["up"], "up": e["gate"]}}}


def transposed_kv_heads(stack):
    """[K, H] of keys and values read as [H, K]."""
    turned = {
        name: stack["attention"][name].swapaxes(-1, -2).reshape(stack["attention"][name].shape)
        for name in ("k", "v")
    }
    return {"attention": {**stack["attention"], **turned}}


def tied_head(model, params, patch):
    """The embedding's table where the file has its own head."""
    return model, {name: value for name, value in params.items() if name != "head"}


def choose_then_softmax(model, params, patch):
    """Softmax over the chosen experts alone, instead of the share of all experts."""
    return of_moe(normalize=True)(model, params, patch)


def softmax_then_choose(model, params, patch):
    return of_moe(normalize=False)(model, params, patch)


def last_layer_everywhere(stack):
    return jax.tree.map(lambda w: jnp.broadcast_to(w[-1:], w.shape), stack)


NO_SCALING = RopeScaling()
MUTATIONS = {
    "interleaved rotary": ("llama3", interleaved_rotary),
    "interleaved rotary, in part of the head": ("deepseek_v3", interleaved_rotary),
    "norm epsilon": ("llama3", config(norm_eps=1e-4)),
    "no embedding scale": ("gemma2", config(scale_embeddings=False)),
    "norm scale without its offset": ("gemma3", config(norm_offset=False)),
    "gate and up swapped": ("llama3", leaves(swapped_gate_up)),
    "gate and up of the experts swapped": ("mixtral", leaves(swapped_experts)),
    "key and value heads transposed": ("llama3", leaves(transposed_kv_heads)),
    "tied head": ("llama3", tied_head),
    "window off by one": ("mistral", off_by_one),
    "window off by one in local layers": ("gemma3", off_by_one),
    "local and global layers swapped": ("gemma2", config(global_every=0)),
    "one rotary base for local and global layers": ("gemma3", config(local_rope_theta=0.0)),
    "weights of the chosen not normalized": ("qwen3_moe", softmax_then_choose),
    "softmax over all experts, then the choice": ("mixtral", softmax_then_choose),
    "choices normalized": ("deepseek_v2", choose_then_softmax),
    "experts not chosen by groups": ("deepseek_v3", of_moe(num_groups=1, groups_per_token=1)),
    "routed experts not scaled": ("deepseek_v3", of_moe(scale=1.0)),
    "context not stretched": ("llama3", config(rope_scaling=NO_SCALING)),
    "context not stretched (yarn)": ("deepseek_v3", config(rope_scaling=NO_SCALING)),
    "no cap of attention scores": ("gemma2", config(attention_softcap=0.0)),
    "no cap of logits": ("gemma2", config(logit_softcap=0.0)),
    "attention scale": ("gemma2", config(attention_scale=0.0)),
    "last layer everywhere": ("gpt2", leaves(last_layer_everywhere)),
}


# The default tier shows that the proof of the families sees mistakes: of positions, of masks, of weights.
QUICK = ("interleaved rotary", "window off by one", "gate and up of the experts swapped")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.life) for n in MUTATIONS]
)
def test_a_mistake_shows_in_the_logits(name, monkeypatch):
    case, mutate = MUTATIONS[name]
    model, _, params = load(case)
    mutated, wrong = mutate(model, params, monkeypatch)
    ids, want = jnp.array(tokens(0, 1)), ARRAYS[f"{case}/logits"]
    found = jax.jit(lambda p: logits_of(p, mutated, ids))(wrong)[0]
    assert relative(found, want) > 2 * 2e-4  # the proofs' limit is 2e-4


def test_an_untied_head_shows_in_the_names():
    model, family, _ = load("gemma2")
    untied = dataclasses.replace(model, tie_embeddings=False)
    names = families.file_shapes(untied, family, transformer.abstract(untied))
    assert set(names) - set(RECORD["gemma2"]["tensors"]) == {"lm_head.weight"}
