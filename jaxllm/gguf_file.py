"""GGUF files, read as if they were a downloaded folder: config.json, tensors, tokenizer. Needs `pip install jaxllm[gguf]`.

Tensors are dequantised: exactly, so what is not stored as float16 or bfloat16 becomes float32.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from jaxllm.config import InputError
from jaxllm.models.families import file_shapes, from_hf, tensors
from jaxllm.models.files import KINDS, Planned
from jaxllm.models.rope import RopeScaling, frequencies
from jaxllm.models.transformer import abstract
from jaxllm.pretrained_tokenizer import split_pattern

# general.architecture -> model_type
_ARCHITECTURES = {
    **{"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"},
    **{"gemma2": "gemma2", "gemma3": "gemma3_text", "olmo2": "olmo2"},
}
# tokenizer.ggml.pre -> (how text is split before byte-level BPE, its normaliser, whether whole words skip the merges)
_PRE = {
    **dict.fromkeys(("", "default", "gpt-2"), ("", None, False)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (split_pattern(3), None, True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (split_pattern(1), {"type": "NFC"}, False)),
    "smollm": ("digits", None, False),
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type, as in SentencePiece


def read(path: Path) -> tuple[dict[str, Any], Iterator[Planned], dict[str, bytes]]:
    """(config.json, tensors with their names in a folder of safetensors, the tokenizer's files) of a GGUF file.

    Raises InputError: not such a file, an architecture that is not known, tensors missing, unknown or misshapen.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise InputError(f"{path}: reading GGUF needs a package more; pip install 'jaxllm[gguf]'") from None
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path}: not a whole GGUF file ({error}); fetch it again") from None
    about = {name: _plain(field.contents()) for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    held = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(about, held, str(path))
    return config, _tensors(gguf, held, config, about, str(path)), _tokenizer(about, str(path))


def _plain(value: Any) -> Any:
    """A number as it was written: 1e-6, which a file holds as float32, and not 9.99999997e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _config(about: Mapping[str, Any], held: Mapping[str, Any], where: str) -> dict[str, Any]:
    arch = about.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise InputError(f"{where}: architecture {arch!r} is not known; known: {', '.join(_ARCHITECTURES)}")
    of = lambda name, default=None: about.get(f"{arch}.{name}", default)
    family = _ARCHITECTURES[arch]
    if family == "llama" and (of("expert_count") or of("attention.sliding_window")):
        family = "mixtral" if of("expert_count") else "mistral"
    heads, width = of("attention.head_count"), of("embedding_length")
    names = {
        **{"max_position_embeddings": "context_length", "num_hidden_layers": "block_count"},
        **{"hidden_size": "embedding_length", "intermediate_size": "feed_forward_length"},
        **{"num_attention_heads": "attention.head_count", "rms_norm_eps": "attention.layer_norm_rms_epsilon"},
    }
    if missing := [f"{arch}.{name}" for name in names.values() if of(name) is None]:
        raise InputError(f"{where}: has no {missing[0]}, which a {arch} model needs")
    config = {ours: of(theirs) for ours, theirs in names.items()} | {"model_type": family}
    head_dim = of("attention.key_length") or of("rope.dimension_count") or width // heads
    config |= {"num_key_value_heads": of("attention.head_count_kv", heads), "head_dim": head_dim}
    config |= {"rope_theta": of("rope.freq_base", 10_000.0), "sliding_window": of("attention.sliding_window")}
    config |= {"vocab_size": int(held["token_embd.weight"].shape[-1]), "dtype": "float32"}
    config |= {"tie_word_embeddings": "output.weight" not in held, "attention_bias": False}
    if of("expert_count"):
        counted = {"num_local_experts": of("expert_count"), "num_experts_per_tok": of("expert_used_count")}
        config |= counted | {"moe_intermediate_size": of("expert_feed_forward_length"), "norm_topk_prob": True}
    if arch.startswith("gemma"):
        # The largest of both do not scale scores by a head's size; the file does not say so.
        scalar = width // heads if (arch, of("block_count")) in (("gemma2", 46), ("gemma3", 62)) else head_dim
        config |= {"query_pre_attn_scalar": scalar, "attn_logit_softcapping": of("attn_logit_softcapping")}
        config |= {"hidden_activation": "gelu_pytorch_tanh", "final_logit_softcapping": of("final_logit_softcapping")}
    if scaling := _scaling(about, arch, held, config, where):
        config["rope_scaling"] = scaling
    return config


def _scaling(about: Mapping[str, Any], arch: str, held: Any, config: Any, where: str) -> dict[str, Any]:
    """How rotary frequencies are stretched. Llama 3's stretching is a tensor of factors: it must be one we know."""
    of = lambda name: about.get(f"{arch}.rope.scaling.{name}")
    if of("type") not in (None, "none"):
        length = of("original_context_length")
        more = {"original_max_position_embeddings": length} if length else {}
        return {"rope_type": of("type"), "factor": of("factor"), **more}
    if "rope_freqs.weight" not in held:
        return {}
    given = np.asarray(held["rope_freqs.weight"].data)
    factor, size, theta = float(given.max()), config["head_dim"], config["rope_theta"]
    llama3 = RopeScaling(kind="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    if not np.allclose(frequencies(size, theta, RopeScaling()) / given, frequencies(size, theta, llama3), rtol=1e-3):
        raise InputError(f"{where}: its rope_freqs are not Llama 3's (factor {factor:g}), and others are not known")
    names = ("factor", "low_freq_factor", "high_freq_factor")
    fields = {name: getattr(llama3, name) for name in names}
    return {"rope_type": "llama3", **fields, "original_max_position_embeddings": 8192}


def _tensors(gguf: Any, held: Mapping[str, Any], config: Any, about: Any, where: str) -> Iterator[Planned]:
    model, family = from_hf(config, where)
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[about["general.architecture"]]
    names = gguf.get_tensor_name_map(arch, model.num_layers)
    shapes = file_shapes(model, family, abstract(model))
    found = {t.name: _theirs(names, t.name) for t in tensors(model, family)}
    missing = [f"{theirs} ({name})" for name, (theirs, _) in found.items() if theirs not in held]
    unknown = held.keys() - {theirs for theirs, _ in found.values()} - {"rope_freqs.weight"}
    if missing or unknown:
        raise InputError(f"{where}: not the tensors of a {family} model; missing: {missing[:4]}, unknown: {unknown}")

    def value(name: str, theirs: str, expert: int | None) -> np.ndarray:
        tensor = held[theirs]  # experts lie in one
        array = gguf.quants.dequantize(tensor.data if expert is None else tensor.data[expert], tensor.tensor_type)
        if arch == gguf.MODEL_ARCH.LLAMA and (".q_proj." in name or ".k_proj." in name):
            array = _halves(array, model.num_heads if ".q_proj." in name else model.num_kv_heads)
        return array - np.float32(1) if model.norm_offset and name.endswith("norm.weight") else array

    for name, (theirs, expert) in found.items():
        dtype = KINDS.get(held[theirs].tensor_type.name, np.dtype(np.float32))
        yield Planned(name, shapes[name], dtype, functools.partial(value, name, theirs, expert))


def _theirs(names: Any, name: str) -> tuple[str, int | None]:
    """(name of the tensor in GGUF, number of the expert in it)."""
    stem, kind = name.rsplit(".", 1)
    before, _, after = stem.partition(".experts.")
    number, _, matrix = after.partition(".")
    found = names.get_name(f"{before}.experts.{matrix}" if after else stem)
    return f"{found}.{kind}", int(number) if after else None


def _halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of pairs that are turned together, side by side in GGUF's llama files, as two halves of a head."""
    apart = array.reshape(heads, -1, 2, *array.shape[1:])
    return apart.swapaxes(1, 2).reshape(array.shape)


def _tokenizer(about: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """The files of the tokenizer in the metadata; none where it is not known, which is said."""
    of = lambda name, default=None: about.get(f"tokenizer.ggml.{name}", default)
    tokens, kind = of("tokens"), of("model")
    if not tokens:
        return {}
    types = of("token_type") or [_NORMAL] * len(tokens)
    if kind == "gpt2":
        if of("pre", "") not in _PRE:
            raise InputError(
                f"{where}: the tokenizer splits text by {of('pre')!r}; known: {', '.join(filter(None, _PRE))}"
            )
        files = {"tokenizer.json": json.dumps(_byte_level(tokens, types, of("merges"), of("pre", ""))).encode()}
    elif kind == "llama":
        files = {"tokenizer.model": _pieces(tokens, types, of("scores"), of)}
    else:
        raise InputError(f"{where}: a tokenizer of kind {kind!r} is not known; known: gpt2, llama")
    roles = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
    config = {role: tokens[of(name)] for role, name in roles.items() if of(name) is not None}
    config |= {"add_bos_token": bool(of("add_bos_token", kind == "llama"))}
    if template := about.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return files | {"tokenizer_config.json": json.dumps(config, ensure_ascii=False).encode()}


def _byte_level(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE."""
    pattern, normalizer, ignore_merges = _PRE[pre]
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not pattern}
    first: dict[str, Any] = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    if pattern == "digits":
        first, whole = {"type": "Digits", "individual_digits": True}, {**whole, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": tokens[i], **flags, "special": kind == _CONTROL}
        for i, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    settings = {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [first, whole]} if pattern else whole,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", **settings, "ignore_merges": ignore_merges, "vocab": vocabulary, "merges": merges},
    }


def _pieces(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], of: Any) -> bytes:
    """A SentencePiece model of these pieces."""
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    for token, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = spec.BPE, len(tokens), True
    for name, key in (("unk", "unknown_token_id"), ("bos", "bos_token_id"), ("eos", "eos_token_id")):
        if (token := of(key)) is not None:
            setattr(spec, f"{name}_id", token)
            setattr(spec, f"{name}_piece", tokens[token])
    spec.pad_id = -1
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    normalizer.add_dummy_prefix = bool(of("add_space_prefix", True))
    return model.SerializeToString()
