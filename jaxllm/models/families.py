"""Model families as published: their config.json and tensor names, to and from ours.

A family of known parts is an entry of FAMILIES and what is special about it in `from_hf`. Names depend on the parts
a model has, so that `tensors` serves all families but GPT-2, whose matrices are fused and stored the other way round.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import InputError
from jaxllm.models.config import MLAConfig, ModelConfig
from jaxllm.models.moe import MoEConfig
from jaxllm.models.rope import RopeScaling
from jaxllm.models.transformer import stacks

# model_type -> class in `transformers`, without ForCausalLM
FAMILIES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


class Part(NamedTuple):
    """A leaf of ours, or one layer's (and expert's) slice of it."""

    path: tuple[str, ...]
    index: tuple[int, ...] = ()
    linear: bool = False  # stored [out, in]; ours is [in ..., out ...]
    interleaved: int = 0  # so many rotary dimensions at the end, whose pairs lie side by side


class Tensor(NamedTuple):
    """A tensor of a file, and the parts of ours it holds, side by side along its last axis."""

    name: str
    parts: tuple[Part, ...]


def to_ours(part: Part, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The part's slice of our leaf, of this shape, from what the file holds of it."""
    value = (value.T if part.linear else value).reshape(shape)
    if part.interleaved:
        rest, turned = value[..., : -part.interleaved], value[..., -part.interleaved :]
        value = np.concatenate([rest, turned[..., 0::2], turned[..., 1::2]], -1)
    return value


def to_file(part: Part, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_ours`: what the file holds of a slice of ours, in this shape."""
    if half := part.interleaved // 2:
        turned = np.stack([value[..., -2 * half : -half], value[..., -half:]], -1)
        value = np.concatenate([value[..., : -2 * half], turned.reshape(*value.shape[:-1], 2 * half)], -1)
    return value.reshape(shape[::-1]).T if part.linear else value.reshape(shape)


def pick(tree: Any, path: tuple[str, ...]) -> Any:
    """What is at this path of nested mappings."""
    return functools.reduce(lambda inner, key: inner[key], path, tree)


def file_value(tensor: Tensor, shape: tuple[int, ...], leaf: Callable[[tuple[str, ...]], np.ndarray]) -> np.ndarray:
    """The tensor as a file holds it, in this shape, from our leaves: path -> array."""
    part_shape = (*shape[:-1], shape[-1] // len(tensor.parts))
    return np.concatenate([to_file(p, leaf(p.path)[p.index], part_shape) for p in tensor.parts], -1)


def tensors(model: ModelConfig, family: str) -> Iterator[Tensor]:
    """Every tensor of a model of this family, in the order of its layers."""
    gpt2 = family == "gpt2"
    trunk = "transformer." if gpt2 else "model."
    one = lambda name, path, **how: Tensor(name, (Part(path, **how),))
    yield one(f"{trunk}{'wte' if gpt2 else 'embed_tokens'}.weight", ("embed", "tokens"))
    if model.position == "learned":
        yield one(f"{trunk}wpe.weight", ("embed", "positions"))
    number = 0
    for stack, block, numbers in stacks(model):
        for i in range(len(numbers)):
            prefix = f"{trunk}{'h' if gpt2 else 'layers'}.{number}."
            for name, parts in _gpt2_block() if gpt2 else _block(block, family):
                yield Tensor(
                    prefix + name, tuple(p._replace(path=(stack, *p.path), index=(i, *p.index)) for p in parts)
                )
            number += 1
    for k in range(model.mtp_modules):  # with copies of the embedding and the head
        prefix = f"{trunk}layers.{number + k}."
        for name, parts in _ahead(model, family):
            yield Tensor(prefix + name, tuple(p._replace(path=("mtp", *p.path), index=(k, *p.index)) for p in parts))
        yield one(f"{prefix}embed_tokens.weight", ("embed", "tokens"))
        yield one(f"{prefix}shared_head.head.weight", ("embed" if model.tie_embeddings else "head", "tokens"))
    yield one(f"{trunk}{'ln_f' if gpt2 else 'norm'}.weight", ("norm", "norm", "scale"))
    if model.norm == "layernorm":
        yield one(f"{trunk}{'ln_f' if gpt2 else 'norm'}.bias", ("norm", "norm", "bias"))
    if not model.tie_embeddings:
        yield one("lm_head.weight", ("head", "tokens"))


def _gpt2_block() -> Iterator[tuple[str, list[Part]]]:
    for where, ours in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
        yield f"{where}.weight", [Part((ours, "scale"))]
        yield f"{where}.bias", [Part((ours, "bias"))]
    yield "attn.c_attn.weight", [Part(("attention", x)) for x in "qkv"]
    yield "attn.c_attn.bias", [Part(("attention", f"{x}_bias")) for x in "qkv"]
    for name, module, ours in (
        ("attn.c_proj", "attention", "out"),
        ("mlp.c_fc", "mlp", "up"),
        ("mlp.c_proj", "mlp", "down"),
    ):
        yield f"{name}.weight", [Part((module, ours))]
        yield f"{name}.bias", [Part((module, f"{ours}_bias"))]


def _block(block: ModelConfig, family: str) -> Iterator[tuple[str, list[Part]]]:
    before, after = _norm_names(block)
    for ours, name in {**before, **after}.items():
        yield f"{name}.weight", [Part((ours, "scale"))]
    yield from _latent(block) if block.mla.kv_rank else _attention(block)
    if block.moe.num_experts:
        yield from _experts(block, family)
    else:
        yield from _mlp("mlp", ("mlp",), block.bias)


def _ahead(model: ModelConfig, family: str) -> Iterator[tuple[str, list[Part]]]:
    for name, ours in (("enorm", "embed_norm"), ("hnorm", "hidden_norm"), ("shared_head.norm", "norm")):
        yield f"{name}.weight", [Part((ours, "scale"))]
    yield "eh_proj.weight", [Part(("project",), linear=True)]
    for name, parts in _block(model, family):
        yield name, [part._replace(path=("block", *part.path)) for part in parts]


def _norm_names(block: ModelConfig) -> tuple[dict[str, str], dict[str, str]]:
    if block.norm_place == "before":
        return {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}, {}
    after = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
    before = {"attention_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
    return (before if block.norm_place == "both" else {}), after


def _attention(block: ModelConfig) -> Iterator[tuple[str, list[Part]]]:
    for name, ours in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "out")):
        yield f"self_attn.{name}.weight", [Part(("attention", ours), linear=True)]
        if block.bias or (block.qkv_bias and ours != "out"):
            yield f"self_attn.{name}.bias", [Part(("attention", f"{ours}_bias"))]
    for ours in ("q_norm", "k_norm") if block.qk_norm != "none" else ():
        yield f"self_attn.{ours}.weight", [Part(("attention", ours, "scale"))]


def _latent(block: ModelConfig) -> Iterator[tuple[str, list[Part]]]:
    turned, at = block.mla.rope_dim, "self_attn."
    if block.mla.q_rank:
        yield f"{at}q_a_proj.weight", [Part(("attention", "q_a"), linear=True)]
        yield f"{at}q_a_layernorm.weight", [Part(("attention", "q_a_norm", "scale"))]
        yield f"{at}q_b_proj.weight", [Part(("attention", "q_b"), linear=True, interleaved=turned)]
    else:
        yield f"{at}q_proj.weight", [Part(("attention", "q"), linear=True, interleaved=turned)]
    yield f"{at}kv_a_proj_with_mqa.weight", [Part(("attention", "kv_a"), linear=True, interleaved=turned)]
    yield f"{at}kv_a_layernorm.weight", [Part(("attention", "kv_a_norm", "scale"))]
    yield f"{at}kv_b_proj.weight", [Part(("attention", "kv_b"), linear=True)]
    yield f"{at}o_proj.weight", [Part(("attention", "out"), linear=True)]


def _mlp(
    name: str,
    path: tuple[str, ...],
    bias: bool,
    index: tuple[int, ...] = (),
    names=("gate_proj", "up_proj", "down_proj"),
):
    for theirs, ours in zip(names, ("gate", "up", "down"), strict=True):
        yield f"{name}.{theirs}.weight", [Part((*path, ours), index, linear=True)]
        if bias:
            yield f"{name}.{theirs}.bias", [Part((*path, f"{ours}_bias"), index)]


def _experts(block: ModelConfig, family: str) -> Iterator[tuple[str, list[Part]]]:
    at, names = "mlp", ("gate_proj", "up_proj", "down_proj")
    if family == "mixtral":
        at, names = "block_sparse_moe", ("w1", "w3", "w2")
    yield f"{at}.gate.weight", [Part(("mlp", "router"), linear=True)]
    if block.moe.router == "sigmoid":
        yield f"{at}.gate.e_score_correction_bias", [Part(("mlp", "router_bias"))]
    for e in range(block.moe.num_experts):
        yield from _mlp(f"{at}.experts.{e}", ("mlp", "experts"), False, (e,), names)
    if block.moe.num_shared:
        yield from _mlp(f"{at}.shared_experts", ("mlp", "shared"), False)


def from_hf(config: Mapping[str, Any], where: str) -> tuple[ModelConfig, str]:
    """(our config, family) of a config.json. Raises InputError, naming the file, on what is not known."""
    family = config.get("model_type", "")
    if family not in FAMILIES:
        raise InputError(f"{where}: model_type {family!r} is not known; known: {', '.join(FAMILIES)}")
    try:
        fields = _gpt2(config) if family == "gpt2" else _common(config, family) | _special(config, family)
        model = ModelConfig(**fields)
    except KeyError as error:
        raise InputError(f"{where}: has no {error.args[0]!r}, which a {family} model needs") from None
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    for i, kind in enumerate(config.get("layer_types") or ()):
        if (kind == "sliding_attention") != model.windowed(i):
            raise InputError(f"{where}: layer_types mixes windows in a way that is not known (layer {i} is {kind})")
    return model, family


def present(model: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """The model less the modules that no file has: a tuned model's config may still name them."""
    found = any(name.endswith("eh_proj.weight") for name in names)
    return model if found else dataclasses.replace(model, mtp_modules=0)


def _gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    _expect(config, "activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    _expect(config, "scale_attn_by_inverse_layer_idx", (False,), False)
    _expect(config, "scale_attn_weights", (True,), True)
    width = config["n_embd"]
    return {
        **{"vocab_size": config["vocab_size"], "max_length": config["n_positions"], "num_layers": config["n_layer"]},
        **{"embed_dim": width, "num_heads": config["n_head"], "mlp_dim": config.get("n_inner") or 4 * width},
        **{"norm": "layernorm", "norm_eps": config.get("layer_norm_epsilon", 1e-5), "position": "learned"},
        **{"mlp": "gelu", "bias": True, "tie_embeddings": config.get("tie_word_embeddings", True)},
        "dtype": _compute(config),
    }


def _compute(config: Mapping[str, Any]) -> str:
    stored = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return "float32" if stored == "float32" else "bfloat16"


def _expect(config: Mapping[str, Any], name: str, known: tuple[Any, ...], default: Any) -> Any:
    if (value := config.get(name, default)) not in known:
        raise ValueError(f"{name} {value!r} is not known; known: {', '.join(map(str, known))}")
    return value


def _common(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    gemma = family.startswith("gemma")
    heads = config["num_attention_heads"]
    act = (
        config.get("hidden_activation") or config.get("hidden_act") or "silu"
        if gemma
        else config.get("hidden_act", "silu")
    )
    if act not in (known := ("gelu_pytorch_tanh",) if gemma else ("silu",)):
        raise ValueError(f"activation {act!r} is not known in a {family} model; known: {known[0]}")
    biases = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if biases[0] != biases[1]:
        raise ValueError("attention_bias and mlp_bias differ, which is not known")
    theta, scaling = _rope(config, "full_attention")
    return {
        **{"vocab_size": config["vocab_size"], "max_length": config["max_position_embeddings"]},
        **{"num_layers": config["num_hidden_layers"], "embed_dim": config["hidden_size"], "num_heads": heads},
        **{"num_kv_heads": config.get("num_key_value_heads") or heads, "head_dim": config.get("head_dim") or 0},
        **{"mlp_dim": config["intermediate_size"], "norm_eps": config.get("rms_norm_eps", 1e-6), "bias": biases[0]},
        **{"rope_theta": theta, "rope_scaling": scaling, "init_std": config.get("initializer_range", 0.02)},
        **{"tie_embeddings": config.get("tie_word_embeddings", gemma), "dtype": _compute(config)},
    }


def _rope(config: Mapping[str, Any], kind: str) -> tuple[float, RopeScaling]:
    """Base and stretching of layers of this kind, in the spelling of `transformers` 4 or 5."""
    given = config.get("rope_parameters") or {}
    given = {**(config.get("rope_scaling") or {}), **given.get(kind, given)}
    theta = given.get("rope_theta", config.get("rope_theta", 10_000.0))
    name = given.get("rope_type") or given.get("type") or "default"
    if name == "default":
        return theta, RopeScaling()
    if name not in ("linear", "llama3", "yarn"):
        raise ValueError(f"rope type {name!r} is not known; known: default, linear, llama3, yarn")
    if given.get("attention_factor") or not given.get("truncate", True):
        raise ValueError("rope: attention_factor and truncate are not known")
    names = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    fields = {k: float(given[k]) for k in names if given.get(k) is not None}
    length = given.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    needs = {} if name == "linear" else {"original_length": length or config["max_position_embeddings"]}
    return theta, RopeScaling(kind=name, **fields, **needs)


def _special(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    window = config.get("sliding_window") or 0
    if family in ("mistral", "mixtral"):
        fields: dict[str, Any] = {"window": window}
    elif family in ("qwen2", "qwen3", "qwen3_moe"):
        first = config.get("max_window_layers", 0)
        if config.get("use_sliding_window") and 0 < first < config["num_hidden_layers"]:
            raise ValueError("max_window_layers: windows in some of the layers are not known")
        on = config.get("use_sliding_window") and not first
        fields = {"window": window if on else 0}
        fields |= {"qkv_bias": True} if family == "qwen2" else {"qk_norm": "head"}
    elif family == "olmo2":
        fields = {"norm_place": "after", "qk_norm": "all"}
    elif family.startswith("gemma"):
        fields = _gemma(config, family, window)
    else:
        fields = {}
    experts = {"mixtral": _mixtral, "qwen3_moe": _qwen3_moe, "deepseek_v2": _deepseek, "deepseek_v3": _deepseek}
    return fields | experts.get(family, lambda *_: {})(config, family)


def _gemma(config: Mapping[str, Any], family: str, window: int) -> dict[str, Any]:
    third = family == "gemma3_text"
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    fields = {
        **{"norm_place": "both", "norm_offset": True, "mlp": "geglu", "scale_embeddings": True, "window": window},
        **{"global_every": every if third else 2, "attention_scale": config["query_pre_attn_scalar"] ** -0.5},
        **{"head_dim": config.get("head_dim", 256), "attention_softcap": config.get("attn_logit_softcapping") or 0.0},
        "logit_softcap": config.get("final_logit_softcapping") or 0.0,
    }
    if third:
        local = config.get("rope_local_base_freq", 10_000.0)
        local = _rope(config, "sliding_attention")[0] if config.get("rope_parameters") else local
        fields |= {"qk_norm": "head", "local_rope_theta": local}
    return fields


def _mixtral(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    del family
    coef = config.get("router_aux_loss_coef", 0.0) if config.get("output_router_logits") else 0.0
    return {"moe": MoEConfig(config["num_local_experts"], config["num_experts_per_tok"], aux_coef=coef)}


def _qwen3_moe(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise ValueError("mlp_only_layers: layers without experts between the others are not known")
    count = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
    moe = MoEConfig(count, config["num_experts_per_tok"], config["moe_intermediate_size"])
    return {"moe": dataclasses.replace(moe, normalise=bool(config.get("norm_topk_prob", False)))}


def _deepseek(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    third, heads = family == "deepseek_v3", config["num_attention_heads"]
    _expect(config, "moe_layer_freq", (1,), 1)
    _expect(config, "rope_interleave", (True,), True)
    grouped = third or config.get("topk_method") == "group_limited_greedy"
    moe = MoEConfig(
        num_experts=config["n_routed_experts"],
        per_token=config["num_experts_per_tok"],
        mlp_dim=config["moe_intermediate_size"],
        num_shared=config.get("n_shared_experts") or 0,
        router="sigmoid" if third else "softmax",
        normalise=bool(config.get("norm_topk_prob", third)) and third,
        scale=float(config.get("routed_scaling_factor", 1.0)),
        num_groups=(config.get("n_group") or 1) if grouped else 1,
        groups_per_token=(config.get("topk_group") or 1) if grouped else 1,
        first_dense=config.get("first_k_dense_replace", 0),
        bias_rate=0.001 if third else 0.0,
    )
    mla = MLAConfig(
        config["kv_lora_rank"],
        config.get("q_lora_rank") or 0,
        config["qk_nope_head_dim"],
        config["qk_rope_head_dim"],
        config["v_head_dim"],
    )
    ahead = (config.get("num_nextn_predict_layers") or 0) if third else 0
    head_dim = mla.nope_dim + mla.rope_dim
    return {"moe": moe, "mla": mla, "num_kv_heads": heads, "head_dim": head_dim, "mtp_modules": ahead}


class Place(NamedTuple):
    """Where a slice of a leaf of ours is in a file: part `number` of `count` along the tensor's last axis."""

    tensor: str
    part: Part
    number: int
    count: int

    def ours(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The slice, of this shape, from the whole tensor of the file."""
        return to_ours(self.part, np.split(value, self.count, -1)[self.number], shape)


def places(model: ModelConfig, family: str) -> dict[tuple[str, ...], dict[tuple[int, ...], Place]]:
    """{path of a leaf: {index of its slice (layer, expert): place}}: every leaf of ours, once."""
    found: dict[tuple[str, ...], dict[tuple[int, ...], Place]] = {}
    for tensor in tensors(model, family):
        for number, part in enumerate(tensor.parts):
            place = Place(tensor.name, part, number, len(tensor.parts))
            found.setdefault(part.path, {}).setdefault(part.index, place)  # others are copies of the first
    return found


def file_shapes(model: ModelConfig, family: str, shapes: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a file; shapes: `transformer.abstract(model)`."""
    sizes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors(model, family):
        ours = [pick(shapes, part.path).shape[len(part.index) :] for part in tensor.parts]
        part = tensor.parts[0]
        stored = [_stored(part, shape, family) for shape in ours]
        sizes[tensor.name] = (*stored[0][:-1], sum(shape[-1] for shape in stored))
    return sizes


def _stored(part: Part, shape: tuple[int, ...], family: str) -> tuple[int, ...]:
    """The shape in a file of a leaf of this shape: vectors flat, matrices two-dimensional."""
    inputs = 2 if part.path[-1] == "out" else 1
    if part.linear:
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    if family == "gpt2" and part.path[-1] in ("q", "k", "v", "out", "up", "down"):
        return math.prod(shape[:inputs]), math.prod(shape[inputs:])
    return shape if part.path[0] in ("embed", "head") else (math.prod(shape),)


def to_hf(model: ModelConfig) -> tuple[dict[str, Any], str]:
    """(config.json, family) of a model. Raises InputError where no known family has its parts together."""
    family = family_of(model)
    if family == "gpt2":
        config: dict[str, Any] = {
            **{"n_positions": model.max_length, "n_embd": model.embed_dim, "n_layer": model.num_layers},
            **{"n_head": model.num_heads, "n_inner": model.mlp_dim, "layer_norm_epsilon": model.norm_eps},
            "activation_function": "gelu_new",
        }
    else:
        config = _config_of(model) | _experts_config(model, family)
    config |= {"vocab_size": model.vocab_size, "tie_word_embeddings": model.tie_embeddings}
    config |= {"model_type": family, "architectures": [FAMILIES[family]], "initializer_range": model.init_std}
    again = from_hf(config, "export")[0]
    alike = ("preset", "dtype", "remat", "scan_unroll", "init_std")
    same = dataclasses.replace(again, **{name: getattr(model, name) for name in alike})
    balance = {name: getattr(model.moe, name) for name in ("capacity_factor", "aux_coef", "bias_rate")}
    same = dataclasses.replace(same, moe=dataclasses.replace(same.moe, **balance))
    if same != model:
        differ = [f.name for f in dataclasses.fields(model) if getattr(same, f.name) != getattr(model, f.name)]
        raise InputError(f"export: a {family} model has no {', '.join(differ)} as this one has; no known family has")
    return config, family


def family_of(model: ModelConfig) -> str:
    """The family that has the parts of this model."""
    if model.position == "learned":
        return "gpt2"
    if model.mla.kv_rank:
        return "deepseek_v3" if model.moe.router == "sigmoid" else "deepseek_v2"
    if model.moe.num_experts:
        return "qwen3_moe" if model.qk_norm == "head" else "mixtral"
    if model.norm_place == "both":
        return "gemma3_text" if model.qk_norm == "head" else "gemma2"
    if model.norm_place == "after":
        return "olmo2"
    if model.qk_norm == "head":
        return "qwen3"
    return "qwen2" if model.qkv_bias else "mistral" if model.window else "llama"


def _config_of(model: ModelConfig) -> dict[str, Any]:
    c, gemma = model, model.mlp == "geglu"
    config: dict[str, Any] = {
        **{"max_position_embeddings": c.max_length, "num_hidden_layers": c.num_layers, "hidden_size": c.embed_dim},
        **{"num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim},
        **{"intermediate_size": c.mlp_dim, "rms_norm_eps": c.norm_eps, "attention_bias": c.bias, "mlp_bias": c.bias},
        "rope_theta": c.rope_theta,
    }
    config |= {"hidden_activation": "gelu_pytorch_tanh"} if gemma else {"hidden_act": "silu"}
    if (scaling := c.rope_scaling).kind != "none":
        names = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        yarn = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        rope = {name: getattr(scaling, name) for name in names.get(scaling.kind, yarn)}
        length = {"original_max_position_embeddings": scaling.original_length} if scaling.original_length else {}
        config["rope_scaling"] = {"rope_type": scaling.kind, **rope, **length}
    if c.window:
        config |= {"sliding_window": c.window, "use_sliding_window": True, "max_window_layers": 0}
        kinds = ["sliding_attention" if c.windowed(i) else "full_attention" for i in range(c.num_layers)]
        config |= {"layer_types": kinds} if c.global_every else {}
    if gemma:
        scalar = 1 / c.attention_scale**2 if c.attention_scale else c.head_dim
        whole = math.isclose(scalar, round(scalar))  # `transformers` takes nothing else
        config |= {"query_pre_attn_scalar": round(scalar) if whole else scalar}
        config |= {
            "attn_logit_softcapping": c.attention_softcap or None,
            "final_logit_softcapping": c.logit_softcap or None,
        }
        config |= {"sliding_window_pattern": c.global_every, "rope_local_base_freq": c.local_rope_theta}
    return config


def _experts_config(model: ModelConfig, family: str) -> dict[str, Any]:
    e, m = model.moe, model.mla
    if not e.num_experts:
        return {}
    config: dict[str, Any] = {"num_experts_per_tok": e.per_token}
    if family == "mixtral":
        return config | {"num_local_experts": e.num_experts}
    config |= {"moe_intermediate_size": e.mlp_dim or model.mlp_dim, "norm_topk_prob": e.normalise}
    if family == "qwen3_moe":
        return config | {"num_experts": e.num_experts}
    method = (
        {} if family == "deepseek_v3" else {"topk_method": "group_limited_greedy" if e.num_groups > 1 else "greedy"}
    )
    ahead = {"num_nextn_predict_layers": model.mtp_modules} if family == "deepseek_v3" else {}
    return {
        **config,
        **method,
        **ahead,
        **{"n_routed_experts": e.num_experts, "n_shared_experts": e.num_shared, "routed_scaling_factor": e.scale},
        **{"n_group": e.num_groups, "topk_group": e.groups_per_token, "first_k_dense_replace": e.first_dense},
        **{"kv_lora_rank": m.kv_rank, "q_lora_rank": m.q_rank or None, "qk_nope_head_dim": m.nope_dim},
        **{"qk_rope_head_dim": m.rope_dim, "v_head_dim": m.value_dim, "head_dim": m.rope_dim},
    }
