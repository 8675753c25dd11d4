"""GGUF files, read as if they were a downloaded folder: config.json, tensors, tokenizer. Needs `pip install jaxllm[gguf]`.

Tensors are dequantized: exactly, so what is not stored as float16 or bfloat16 becomes float32.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from jaxllm.config import InputError
from jaxllm.models.rope import RopeScaling, frequencies
from jaxllm.models.transformer import abstract
from jaxllm.pretrained.families import file_shapes, tensors
from jaxllm.pretrained.family_config import from_hf
from jaxllm.pretrained.safetensors_files import KINDS, Planned
from jaxllm.tokenizers.published import split_pattern

# general.architecture -> model_type
_ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "olmo2": "olmo2",
}
# tokenizer.ggml.pre -> (how text is split before byte-level BPE, its normaliser, whether whole words skip the merges)
_PRE = {
    **dict.fromkeys(("", "default", "gpt-2"), ("", None, False)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (split_pattern(3), None, True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (split_pattern(1), {"type": "NFC"}, False)),
    "smollm": ("digits", None, False),
}
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = (
    1,
    3,
    4,
    6,
)  # tokenizer.ggml.token_type, as in SentencePiece


class Metadata:
    """What a GGUF file says about itself, each value checked: ValueError names the key whose value is of no use."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def whole(self, key: str, default: int | None = None) -> int | None:
        """A whole number of at least 0, the default where there is no such key."""
        return self._checked(
            key, default, "a whole number", lambda value: type(value) is int and 0 <= value < 2**31
        )

    def number(self, key: str, default: float | None = None) -> float | None:
        """A finite number."""
        real = lambda value: isinstance(value, int | float) and math.isfinite(value)
        return self._checked(
            key, default, "a finite number", lambda v: real(v) and not isinstance(v, bool)
        )

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return self._checked(key, default, "true or false", lambda value: isinstance(value, bool))

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text."""
        return self._checked(key, default, "a text", lambda value: isinstance(value, str))

    def items(self, key: str, kind: type) -> list[Any]:
        """A list of values of this kind, empty where there is no such key."""
        alike = lambda value: isinstance(value, list) and all(type(item) is kind for item in value)
        return self._checked(key, [], f"a list of {kind.__name__}", alike)

    def _checked(self, key: str, default: Any, wanted: str, fits: Callable[[Any], bool]) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not fits(value):
            raise ValueError(f"{key} must be {wanted}, not {value!r:.60}; fetch the file again")
        return value


def read(path: Path) -> tuple[dict[str, Any], Iterator[Planned], dict[str, bytes]]:
    """(config.json, tensors with their names in a folder of safetensors, the tokenizer's files) of a GGUF file.

    A file that was split is read with its other parts, which lie beside it. Raises InputError: not such a file, a part
    missing, an architecture that is not known, metadata of a wrong type, tensors missing, unknown or misshapen.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise InputError(
            f"{path}: reading GGUF needs a package more; pip install 'jaxllm[gguf]'"
        ) from None
    readers = [_open(gguf, part) for part in _parts(path)]
    about = Metadata(_values(readers[0], path))
    held = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    try:
        _check_whole(about, len(readers))
        config = _config(about, held)
        return config, _tensors(gguf, held, config, about, str(path)), _tokenizer(about)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _parts(path: Path) -> list[Path]:
    """The file, or all parts of the one that it is a part of: NAME-00001-of-00003.gguf, ..."""
    if (found := re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.gguf", path.name)) is None:
        return [path]
    parts = [
        path.with_name(f"{found[1]}{number:05}-of-{found[3]}.gguf")
        for number in range(1, int(found[3]) + 1)
    ]
    if missing := [part for part in parts if not part.exists()]:
        raise InputError(
            f"{missing[0]}: is missing, one of the {len(parts)} parts of {path.name}; fetch it as well"
        )
    return parts


def _check_whole(about: Metadata, parts: int) -> None:
    count = about.whole("split.count", 1)
    if count not in (0, parts):
        raise ValueError(
            f"is one of {count} parts, which must lie beside it as NAME-00001-of-{count:05}.gguf, ..."
        )


def _open(gguf: Any, path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise InputError(f"{path}: not a whole GGUF file ({error}); fetch it again") from None


def _values(reader: Any, path: Path) -> dict[str, Any]:
    try:
        return {
            name: _plain(field.contents())
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
    except ValueError as error:  # a text that is not UTF-8
        raise InputError(f"{path}: damaged metadata ({error}); fetch it again") from None


def _plain(value: Any) -> Any:
    """A number as it was written: 1e-6, which a file holds as float32, and not 9.99999997e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _config(about: Metadata, held: Mapping[str, Any]) -> dict[str, Any]:
    arch = about.text("general.architecture") or ""
    if arch not in _ARCHITECTURES:
        raise ValueError(f"architecture {arch!r} is not known; known: {', '.join(_ARCHITECTURES)}")
    if "token_embd.weight" not in held:
        raise ValueError("has no token_embd.weight, which every model needs; fetch it again")
    whole = lambda name: about.whole(f"{arch}.{name}")
    config: dict[str, Any] = {ours: whole(theirs) for ours, theirs in _SIZES.items()}
    config["rms_norm_eps"] = about.number(f"{arch}.{_EPSILON}")
    if missing := [
        theirs for ours, theirs in {**_SIZES, "rms_norm_eps": _EPSILON}.items() if not config[ours]
    ]:
        raise ValueError(f"has no {arch}.{missing[0]}, which a {arch} model needs")
    heads = config["num_attention_heads"]
    head_dim = (
        whole("attention.key_length")
        or whole("rope.dimension_count")
        or config["hidden_size"] // heads
    )
    config |= {
        "model_type": _family(about, arch),
        "num_key_value_heads": whole("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "rope_theta": about.number(f"{arch}.rope.freq_base", 10_000.0),
        "vocab_size": int(held["token_embd.weight"].shape[-1]),
        "dtype": "float32",
        "tie_word_embeddings": "output.weight" not in held,
        "attention_bias": False,
    }
    if (
        arch != "gemma2" or f"{arch}.attention.sliding_window" in about.values
    ):  # else the family's own
        config["sliding_window"] = whole("attention.sliding_window") or None
    if whole("expert_count"):
        config |= _experts(about, arch)
    if arch.startswith("gemma"):
        config |= _gemma(about, arch, config)
    if scaling := _scaling(about, arch, held, config):
        config["rope_scaling"] = scaling
    return config


_EPSILON = "attention.layer_norm_rms_epsilon"
_SIZES = {
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}


def _family(about: Metadata, arch: str) -> str:
    """The model_type; Mistral's and Mixtral's files call themselves llama."""
    if arch == "llama" and about.whole("llama.expert_count"):
        return "mixtral"
    if arch == "llama" and about.whole("llama.attention.sliding_window"):
        return "mistral"
    return _ARCHITECTURES[arch]


def _experts(about: Metadata, arch: str) -> dict[str, Any]:
    if not (used := about.whole(f"{arch}.expert_used_count")):
        raise ValueError(f"has no {arch}.expert_used_count, which a model of experts needs")
    experts = {
        "num_local_experts": about.whole(f"{arch}.expert_count"),
        "num_experts_per_tok": used,
    }
    experts["norm_topk_prob"] = True
    if width := about.whole(f"{arch}.expert_feed_forward_length"):
        experts["moe_intermediate_size"] = width
    return experts


def _gemma(about: Metadata, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    # The largest of both do not scale scores by a head's size; the file does not say so.
    largest = (arch, config["num_hidden_layers"]) in (("gemma2", 46), ("gemma3", 62))
    scalar = (
        config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    )
    caps = {
        name: about.number(f"{arch}.{name}")
        for name in ("attn_logit_softcapping", "final_logit_softcapping")
    }
    return {
        "query_pre_attn_scalar": scalar,
        "hidden_activation": "gelu_pytorch_tanh",
        **{name: cap for name, cap in caps.items() if cap is not None},  # else the family's own
    }


def _scaling(about: Metadata, arch: str, held: Any, config: Any) -> dict[str, Any]:
    """How rotary frequencies are stretched. Llama 3's stretching is a tensor of factors: it must be one we know."""
    at = f"{arch}.rope.scaling"
    if (kind := about.text(f"{at}.type")) not in (None, "none"):
        length = about.whole(f"{at}.original_context_length")
        more = {"original_max_position_embeddings": length} if length else {}
        return {"rope_type": kind, "factor": about.number(f"{at}.factor"), **more}
    if "rope_freqs.weight" not in held:
        return {}
    given = np.asarray(held["rope_freqs.weight"].data)
    factor, size, theta = float(given.max()), config["head_dim"], config["rope_theta"]
    llama3 = RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_length=8192,
    )
    plain, stretched = frequencies(size, theta, RopeScaling()), frequencies(size, theta, llama3)
    if given.shape != plain.shape or not np.allclose(plain / given, stretched, rtol=1e-3):
        raise ValueError(
            f"its rope_freqs are not Llama 3's (factor {factor:g}), and others are not known"
        )
    names = ("factor", "low_freq_factor", "high_freq_factor")
    fields = {name: getattr(llama3, name) for name in names}
    return {"rope_type": "llama3", **fields, "original_max_position_embeddings": 8192}


def _tensors(
    gguf: Any, held: Mapping[str, Any], config: Any, about: Metadata, where: str
) -> Iterator[Planned]:
    model, family = from_hf(config, where)
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[
        about.values["general.architecture"]
    ]
    names = gguf.get_tensor_name_map(arch, model.num_layers)
    shapes = file_shapes(model, family, abstract(model))
    found = {t.name: _theirs(names, t.name) for t in tensors(model, family)}
    missing = [f"{theirs} ({name})" for name, (theirs, _) in found.items() if theirs not in held]
    unknown = held.keys() - {theirs for theirs, _ in found.values()} - {"rope_freqs.weight"}
    if missing or unknown:
        raise InputError(
            f"{where}: not the tensors of a {family} model; missing: {missing[:4]}, unknown: {unknown}"
        )

    def value(name: str, theirs: str, expert: int | None) -> np.ndarray:
        tensor = held[theirs]  # experts lie in one
        array = gguf.quants.dequantize(
            tensor.data if expert is None else tensor.data[expert], tensor.tensor_type
        )
        if arch == gguf.MODEL_ARCH.LLAMA and (".q_proj." in name or ".k_proj." in name):
            array = _halves(array, model.num_heads if ".q_proj." in name else model.num_kv_heads)
        return (
            array - np.float32(1) if model.norm_offset and name.endswith("norm.weight") else array
        )

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


def _tokenizer(about: Metadata) -> dict[str, bytes]:
    """The files of the tokenizer in the metadata; none where the file has none. ValueError where it is not known."""
    at = "tokenizer.ggml"
    tokens, kind, pre = (
        about.items(f"{at}.tokens", str),
        about.text(f"{at}.model"),
        about.text(f"{at}.pre") or "",
    )
    if not tokens:
        return {}
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"a tokenizer of kind {kind!r} is not known; known: gpt2, llama")
    types = _as_long(about, "token_type", int, tokens) or [_NORMAL] * len(tokens)
    ids = {
        name: token
        for name, token in _special_ids(about, kind, len(tokens)).items()
        if token is not None
    }
    begins = about.flag(f"{at}.add_bos_token", _adds_bos(kind, pre)) and "bos" in ids
    if kind == "gpt2":
        if pre not in _PRE:
            raise ValueError(
                f"the tokenizer splits text by {pre!r}; known: {', '.join(filter(None, _PRE))}"
            )
        spec = _byte_level(tokens, types, about.items(f"{at}.merges", str), pre)
        spec["post_processor"] = _beginning(tokens[ids["bos"]], ids["bos"]) if begins else None
        files = {"tokenizer.json": json.dumps(spec).encode()}
    else:
        scores = _as_long(about, "scores", float, tokens) or [0.0] * len(tokens)
        spaced = about.flag(f"{at}.add_space_prefix", True)
        files = {"tokenizer.model": _pieces(tokens, types, scores, ids, spaced)}
    config: dict[str, Any] = {
        f"{name}_token": tokens[ids[name]] for name in ("bos", "eos", "pad") if name in ids
    }
    config["add_bos_token"] = begins
    if template := about.values.get("tokenizer.chat_template"):
        config["chat_template"] = template
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False).encode()
    if ends := [ids[name] for name in _ENDS if name in ids]:
        files["generation_config.json"] = json.dumps({"eos_token_id": ends}).encode()
    return files


_ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message: llama.cpp stops at each
# Byte-level tokenizers before whose texts llama.cpp puts BOS where the file does not say (tokenizer.ggml.add_bos_token);
# it does so for every SentencePiece vocabulary and for no other byte-level one that is known here.
_BEGUN = ("llama-bpe", "llama3", "llama-v3")


def _adds_bos(kind: str, pre: str) -> bool:
    return kind == "llama" or pre in _BEGUN


def _special_ids(about: Metadata, kind: str, count: int) -> dict[str, int | None]:
    """Ids of the special tokens by role; llama.cpp has defaults for SentencePiece vocabularies."""
    defaults = {"bos": 1, "eos": 2, "unk": 0} if kind == "llama" else {}
    keys = {name: f"{name}_token_id" for name in ("bos", *_ENDS)}
    keys |= {"pad": "padding_token_id", "unk": "unknown_token_id"}
    found = {
        name: about.whole(f"tokenizer.ggml.{key}", defaults.get(name)) for name, key in keys.items()
    }
    for name, token in found.items():
        if token is not None and token >= count:
            raise ValueError(
                f"tokenizer.ggml.{keys[name]} is {token}, and there are {count} tokens; fetch it again"
            )
    return found


def _as_long(about: Metadata, name: str, kind: type, tokens: Sequence[str]) -> list[Any]:
    """A list with a value for each token, empty where there is none."""
    values = about.items(f"tokenizer.ggml.{name}", kind)
    if values and len(values) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.{name} has {len(values)} values for {len(tokens)} tokens; fetch it again"
        )
    return values


def _beginning(token: str, number: int) -> dict[str, Any]:
    """A post-processor of tokenizer.json that puts a token before every text."""
    first: list[dict[str, Any]] = [{"SpecialToken": {"id": token, "type_id": 0}}]
    text = lambda name: {"Sequence": {"id": name, "type_id": 0}}
    special = {token: {"id": token, "ids": [number], "tokens": [token]}}
    pair = [*first, text("A"), *first, text("B")]
    return {
        "type": "TemplateProcessing",
        "single": [*first, text("A")],
        "pair": pair,
        "special_tokens": special,
    }


def _byte_level(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str
) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE."""
    pattern, normalizer, ignore_merges = _PRE[pre]
    whole = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": not pattern,
    }
    first: dict[str, Any] = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
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
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [first, whole]}
        if pattern
        else whole,
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            **settings,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _pieces(
    tokens: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
    ids: Mapping[str, int],
    spaced: bool,
) -> bytes:
    """A SentencePiece model of these pieces; spaced: a space is put before a text."""
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    for token, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size = spec.BPE, len(tokens)
    spec.byte_fallback = types.count(_BYTE) == 256
    for name in ("unk", "bos", "eos"):
        if name in ids:
            setattr(spec, f"{name}_id", ids[name])
            setattr(spec, f"{name}_piece", tokens[ids[name]])
    spec.pad_id = -1
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    normalizer.add_dummy_prefix = spaced
    return model.SerializeToString()
