"""Tokenizers of published models, as their files are: tokenizer.json, SentencePiece models, tiktoken ranks.

Their ids are those of the libraries that define the formats, their chat template is their own. Text never encodes to a
control token unless it is asked for: what is *control* is what the files call special, and what the chat template
writes around messages (in some files that is not called special).
"""

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tiktoken
import tokenizers

from jaxllm.config import InputError
from jaxllm.tokenizers import files as tokenizer_files
from jaxllm.tokenizers.chat_template import SECRET, ChatTemplate, Span
from jaxllm.tokenizers.files import json_object, read_files, spelling
from jaxllm.tokenizers.trained import Tokenizer, check_unicode, piece_bytes

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ANY, _REST = r"[^\r\n\p{L}\p{N}]?", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def split_pattern(digits: int) -> str:
    """How cl100k, Llama 3 (3 digits at most) and Qwen 2 (1) split a text into words."""
    number = rf"\p{{N}}{{1,{digits}}}" if digits > 1 else r"\p{N}"
    return rf"{_ENDINGS}|{_ANY}\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"


_CL100K = split_pattern(3)
_O200K = rf"{_ANY}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_ANY}{_UPPER}+{_LOWER}*{_ENDINGS}?"
_O200K += rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
_LLAMA3 = "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id step_id "
_LLAMA3 += "start_header_id end_header_id eom_id eot_id python_tag image"
_LLAMA3_NAMES = [*_LLAMA3.split(), *(f"reserved_special_token_{i}" for i in range(2, 246))]
_MORE = {
    "fim_prefix": 100_258,
    "fim_middle": 100_259,
    "fim_suffix": 100_260,
    "endofprompt": 100_276,
}

# A rank file says neither how it splits text nor its special tokens: name -> (pattern, ranks, special tokens).
_RANKS: dict[str, tuple[str, int, dict[str, int]]] = {
    "gpt2": (_GPT2, 50_256, {"endoftext": 50_256}),
    "cl100k_base": (_CL100K, 100_256, {"endoftext": 100_257, **_MORE}),
    "o200k_base": (_O200K, 199_998, {"endoftext": 199_999, "endofprompt": 200_018}),
    "llama3": (_CL100K, 128_000, {name: 128_000 + i for i, name in enumerate(_LLAMA3_NAMES)}),
}
_ROLES = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "pad_token": "<|finetune_right_pad_id|>",
}
_VOCABULARIES = ("tokenizer.json", *(f"{kind}.tiktoken" for kind in _RANKS), "tokenizer.model")


def load_tokenizer(directory: Any) -> Tokenizer:
    """The tokenizer in a directory: one trained here, or a published model's; InputError: none, damaged, unknown."""
    folder = Path(directory)
    files = read_files(folder, _VOCABULARIES)
    ours = b'"type": "sentencepiece"' in files.get("tokenizer.json", b"")[:100]
    if ours or not any(name in files for name in _VOCABULARIES):
        return Tokenizer.load(folder)
    tokenizer = PretrainedTokenizer(files, str(folder))
    if (record := folder / PretrainedTokenizer.record).exists():
        recorded = json_object({record.name: record.read_bytes()}, record.name, str(folder))
        if tokenizer.fingerprint != recorded.get("sha256"):
            raise InputError(
                f"{folder}: are not the files that were saved (sha256 differs); import the model again"
            )
    return tokenizer


def restore(model: Any) -> Tokenizer:
    """The tokenizer whose `model` this is."""
    return Tokenizer(model) if isinstance(model, bytes) else PretrainedTokenizer(dict(model))


class PretrainedTokenizer(Tokenizer):
    """A published model's tokenizer, made from its files {name: content}.

    bos_id is None where the files name none; whether a text begins with it (begin_ids) is another question. pad_id is
    eos_id where the files name no padding. chat_refusal says why there are no chats, and is empty where there are.
    Raises InputError on damaged files, and where no token ends a text.
    """

    kind, record = "pretrained", "jaxllm.json"

    def __init__(self, files: Mapping[str, bytes], origin: str = "tokenizer"):
        self.model, self._files, self._origin = tuple(sorted(files.items())), files, origin  # type: ignore[assignment]
        hashes = [f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in self.model]
        self.fingerprint = hashlib.sha256("".join(hashes).encode()).hexdigest()
        try:
            self._read(files)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{origin}: the tokenizer's files are damaged ({error!r:.120}); copy them again"
            ) from None

    def _read(self, files: Mapping[str, bytes]) -> None:
        config = json_object(files, "tokenizer_config.json", self._origin)
        special_map = json_object(files, "special_tokens_map.json", self._origin)
        backend = _backend(files, config, self._origin)
        named = (backend.named if backend else {}) | tokenizer_files.named_tokens(
            config, special_map
        )
        self._read_template(files, config, named)
        if backend is None:
            scaffold = "".join(self._written("user", "assistant", "user"))
            spec = json_object(files, "tokenizer.json", self._origin)
            special = tokenizer_files.special_tokens(config, special_map)
            backend = _JsonBackend(spec, special, scaffold, self._origin)
        self._read_controls(backend)
        ends = tokenizer_files.end_spellings(config, special_map)
        self._read_ends([named.get("eos_token", ""), *ends], files)
        self._read_beginning(named, config.get("add_bos_token") is True)

    def _read_template(
        self, files: Mapping[str, bytes], config: Mapping[str, Any], named: Mapping[str, str]
    ) -> None:
        """Without a chat template, or with a broken one, everything but chats works."""
        self._template, self.chat_refusal = None, ""
        try:
            source = tokenizer_files.template_source(files, config, self._origin)
            self._template = ChatTemplate(source, named, self._origin)
        except InputError as error:
            self.chat_refusal = str(error)

    def _read_controls(self, backend: "_JsonBackend | _Backend") -> None:
        self._backend = backend
        self.controls, self._bytes, self.dummy_prefix = (
            backend.controls,
            backend.bytes,
            backend.dummy_prefix,
        )
        self.vocab_size = len(self._bytes)
        begun = {text[:i] for text in self.controls for i in range(1, len(text))}
        self._spellings = re.compile(f"({_any_of(self.controls)})")
        # What templates join or trim could spell a control token from the end of one text on.
        self._dangers = re.compile(f"{_any_of(self.controls)}|(?:{_any_of(begun)})(?=\\s*\\Z)")

    def _read_ends(self, named: Sequence[str], files: Mapping[str, bytes]) -> None:
        """What ends a document, what ends a turn, and everything that ends a response."""
        ends = [self.controls[text] for text in named if text in self.controls]
        ends += tokenizer_files.end_ids(files, self._origin)
        if (eos := next((token for token in ends if token < self.vocab_size), None)) is None:
            mend = 'name one of its special tokens as "eos_token" in tokenizer_config.json'
            raise InputError(
                f"{self._origin}: the tokenizer's files name no end-of-text token; {mend}"
            )
        self.eos_id = eos
        # The end of turn is the first control token behind the assistant's text.
        found = self._spellings.search("".join(self._written("user", "assistant")[-1:]))
        self.end_id = self.controls[found[0]] if found else eos
        self.stop_ids = tuple(dict.fromkeys((self.end_id, eos, *ends)))

    def _read_beginning(self, named: Mapping[str, str], add_bos: bool) -> None:
        """What begins a text: tokenizer.json says it; without one add_bos_token, which is not read beside it."""
        bos, pad = (self.controls.get(named.get(name, "")) for name in ("bos_token", "pad_token"))
        self.bos_id = bos  # type: ignore[assignment]
        self.pad_id = self.eos_id if pad is None else pad
        self.begin_ids = (bos,) if add_bos and bos is not None else ()
        if isinstance(self._backend, _JsonBackend):
            self.begin_ids = self._backend.begin_ids
        if max(self.begin_ids, default=0) >= self.vocab_size:
            raise ValueError(
                f"the post-processor begins a text with {max(self.begin_ids)}, which is no token's id"
            )

    def _written(self, *roles: str) -> list[str]:
        """What the template writes before, between and behind messages of these roles; nothing where it refuses."""
        try:
            messages = [{"role": role, "content": SECRET} for role in roles]
            return self._template.render(messages)[0].split(SECRET) if self._template else []
        except InputError:
            return []

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of a text; control tokens that it spells are text unless parse_special. InputError: not Unicode."""
        if not parse_special:
            return self.encode_batch([text])[0]
        check_unicode([text])
        return self._backend.spans(self._marked(text))[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        check_unicode(texts)
        return self._backend.batch(texts, num_threads)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        reply: bool = False,
        parse_special: bool = False,
        **inputs: Any,
    ) -> tuple[list[int], list[bool]]:
        """Token ids [T] of a conversation in the model's own template, and where the assistant speaks [T].

        reply=True opens the assistant's next turn; inputs (tools, documents) go to the template. The mask
        is that of the template's {% generation %} blocks, else what the assistant has to write from the header of its
        turn on; the end of turn is part of it. Raises InputError: no template, a conversation that it refuses, or
        assistant messages whose place cannot be told.
        """
        if self._template is None:
            raise InputError(self.chat_refusal)
        inputs = {"messages": list(messages), **inputs}
        safe = inputs if parse_special else self._veiled(inputs)
        text, spans = self._template.render(**safe, reply=reply)
        if safe != inputs and _unveiled(text) != self._template.render(**inputs, reply=reply)[0]:
            raise InputError(
                f"{self._origin}: the chat template reads control tokens inside of messages; remove them"
            )
        ends = [
            m.span() for m in self._spellings.finditer(text) if self.controls[m[0]] in self.stop_ids
        ]
        if spans:
            spans = [(start, max([end, *(e for b, e in ends if b == end)])) for start, end in spans]
        else:
            spans = self._template.assistant_spans(text, ends, **safe, reply=reply)
        check_unicode([marked := self._marked(text)])
        ids, offsets = self._backend.spans(marked)
        if not ids:
            raise InputError(
                f"{self._origin}: the chat template writes nothing for this conversation; mend it"
            )
        mask = np.zeros(len(ids), bool)
        for span in spans:
            start, end = (len(self._marked(text[:place])) for place in span)
            mask |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        if not mask.any() and any(m["role"] == "assistant" for m in messages):
            raise InputError(
                f"{self._origin}: the chat template shows nothing that the assistant says; mend it"
            )
        return ids, mask.tolist()

    def _veiled(self, value: Any) -> Any:
        """The same JSON value without a string that spells a control token, or ends in the beginning of one."""
        if isinstance(value, Mapping):
            return {self._veiled(k): self._veiled(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._veiled(v) for v in value]
        return (
            self._dangers.sub(lambda m: _hidden("v", m[0]), value)
            if isinstance(value, str)
            else value
        )

    def _marked(self, text: str) -> str:
        """The text with marks for the control tokens that it spells, unveiled."""
        return _unveiled(self._spellings.sub(lambda m: _hidden("m", m[0]), text))


def _hidden(kind: str, text: str) -> str:
    """A veil ("v") over text of messages, or a mark ("m") for a control token."""
    return f"{SECRET}{kind}{text.encode().hex()}z"


def _unveiled(text: str) -> str:
    return re.sub(f"{SECRET}v([0-9a-f]*)z", lambda m: bytes.fromhex(m[1]).decode(), text)


class _JsonBackend:
    """tokenizer.json, through the library that defines it. special: what the configuration calls special; scaffold:
    what the chat template writes around messages."""

    def __init__(self, spec: dict[str, Any], special: Collection[str], scaffold: str, origin: str):
        model, added, marks = spec["model"], spec.get("added_tokens") or [], {}
        added += _promoted(model, added, special)
        spec["added_tokens"] = added
        for token in added:
            text = token["content"]
            if token["special"] or text in special or (text.strip() and text in scaffold):
                marks[text] = token["content"] = _hidden("m", text)
                token["single_word"] = False  # else a mark beside a letter were text
        # The library knows control tokens as their marks only: no text spells one, and a conversation is one text.
        if not isinstance(vocabulary := model.get("vocab", {}), dict):
            raise InputError(
                f"{origin}/tokenizer.json: only BPE and SentencePiece vocabularies are supported"
            )
        model["vocab"] = {marks.get(text, text): token for text, token in vocabulary.items()}
        spec |= {"truncation": None, "padding": None}
        model["unk_token"] = marks.get(model.get("unk_token"), model.get("unk_token"))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises no other
            reason = f"{error}".replace("\n", " ")[:120]
            raise InputError(
                f"{origin}/tokenizer.json: no tokenizer ({reason}); copy the file again"
            ) from None
        self.controls: dict[str, int] = {
            text: self._tokenizer.token_to_id(mark) for text, mark in marks.items()
        }  # type: ignore[assignment]
        self.begin_ids = _beginning(spec.get("post_processor"))
        self._find_bytes(
            spec.get("decoder") or {"type": None}, {token["content"] for token in added}, origin
        )

    def _find_bytes(self, decoder: Mapping[str, Any], added: Collection[str], origin: str) -> None:
        parts = decoder.get("decoders", [decoder])
        kinds = {part["type"] for part in parts}
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise InputError(
                f"{origin}/tokenizer.json: a decoder of {kinds}; byte-level and SentencePiece's are known"
            )
        # What takes a space away at the beginning: Strip with a start, Metaspace unless it never puts one there.
        self.dummy_prefix = any(
            p.get("start") or p.get("prepend_scheme", "never") != "never" for p in parts
        )
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.bytes = [b""] * (1 + max(vocabulary.values(), default=-1))
        for text, token in vocabulary.items():
            if text.startswith(SECRET):
                continue
            if "ByteLevel" in kinds:
                spelled = text not in added and all(c in _ALPHABET for c in text)
                self.bytes[token] = bytes(_ALPHABET[c] for c in text) if spelled else text.encode()
            else:
                byte = re.fullmatch("<0x([0-9A-F]{2})>", text)
                self.bytes[token] = (
                    bytes.fromhex(byte[1]) if byte else text.replace("\u2581", " ").encode()
                )

    def batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        size = (
            1 if num_threads == 1 else max(1, len(texts))
        )  # the library uses all cores for what it gets at once
        some = (texts[i : i + size] for i in range(0, len(texts), size))
        return [
            e.ids
            for t in some
            for e in self._tokenizer.encode_batch_fast(list(t), add_special_tokens=False)
        ]

    def spans(self, marked: str) -> tuple[list[int], np.ndarray]:
        encoding = self._tokenizer.encode(marked, add_special_tokens=False)
        return encoding.ids, np.array(encoding.offsets, int).reshape(-1, 2)


def _promoted(
    model: Mapping[str, Any], added: Sequence[Mapping[str, Any]], special: Collection[str]
) -> list[Any]:
    """Special tokens that are in the vocabulary only, as entries of added_tokens."""
    known, vocabulary = {token["content"] for token in added}, model.get("vocab", {})
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    found = [
        text
        for text in special
        if text not in known and isinstance(vocabulary, dict) and text in vocabulary
    ]
    return [{"id": vocabulary[text], "content": text, **flags, "special": True} for text in found]


def _beginning(post_processor: Any) -> tuple[int, ...]:
    """The ids that a post-processor of tokenizer.json puts before a text."""
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    one_word = tokenizers.Tokenizer.from_str(
        json.dumps({"model": model, "post_processor": post_processor})
    )
    encoding = one_word.encode("a")
    return tuple(encoding.ids[: encoding.special_tokens_mask.index(0)])


# Byte-level BPE spells a byte as a visible character: itself, else the next one from U+0100 on.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_SPELLED = [*_VISIBLE, *sorted({*range(256)} - {*_VISIBLE})]
_ALPHABET = dict(zip(map(chr, [*_VISIBLE, *range(256, 324)]), _SPELLED, strict=True))


class _Backend:
    """Another vocabulary: what it names {"bos_token": ...}, its control tokens {spelling: id}, out of any text's reach,
    what each token decodes to (nothing for control tokens), and `part`: (ids of a text, where each begins and ends)."""

    dummy_prefix = False

    def __init__(
        self,
        named: Mapping[str, str],
        controls: Mapping[str, int],
        tokens: Sequence[bytes],
        config: Any,
    ):
        self.named, self.controls, self.bytes = dict(named), dict(controls), list(tokens)
        for token, record in config.get(
            "added_tokens_decoder", {}
        ).items():  # further ones, beyond the vocabulary
            self.bytes += [b""] * (int(token) + 1 - len(self.bytes))
            if not self.bytes[int(token)]:
                self.controls[spelling(record)] = int(token)
        self.batch: Callable[[Sequence[str], int], list[list[int]]]
        self.part: Callable[[str], tuple[list[int], Sequence[Span]]]

    def spans(self, marked: str) -> tuple[list[int], np.ndarray]:
        """(ids [T], where each begins and ends [T, 2]) of a text with marks for control tokens."""
        ids, offsets, place = [], [], 0
        for piece in re.split(f"({SECRET}m[0-9a-f]*z)", marked):
            if piece.startswith(SECRET):
                control = bytes.fromhex(piece[len(SECRET) + 1 : -1]).decode()
                some, where = [self.controls[control]], [(0, len(piece))]
            else:
                some, where = self.part(piece)
            ids += some
            offsets += [(place + start, place + end) for start, end in where]
            place += len(piece)
        return ids, np.array(offsets, int).reshape(-1, 2)


def _backend(files: Mapping[str, bytes], config: Mapping[str, Any], origin: str) -> _Backend | None:
    """None for tokenizer.json, which needs the chat template first."""
    name = next(name for name in _VOCABULARIES if name in files)
    if name == "tokenizer.json":
        return None
    if name.endswith(".tiktoken") or re.match(rb"[A-Za-z0-9+/]+=* 0\r?\n", files[name]):
        return _of_ranks(name, files[name], config, origin)
    return _of_pieces(files[name], config, origin)


def _of_pieces(model: bytes, config: Mapping[str, Any], origin: str) -> _Backend:
    """A SentencePiece model."""
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise InputError(
            f"{origin}/tokenizer.model: not a SentencePiece model; copy the file again"
        ) from None
    ids = {
        "bos_token": sp.bos_id(),
        "eos_token": sp.eos_id(),
        "pad_token": sp.pad_id(),
        "unk_token": sp.unk_id(),
    }
    named = {name: sp.id_to_piece(token) for name, token in ids.items() if token >= 0}
    every = range(sp.vocab_size())
    controls = {sp.id_to_piece(i): i for i in every if sp.is_control(i) or sp.is_unknown(i)}

    def part(text: str) -> tuple[list[int], Sequence[Span]]:
        found = sp.encode_as_offset_mapping(text)
        offsets = list(found["offsets"])
        for i in range(
            len(offsets) - 2, -1, -1
        ):  # all but the last byte token of a character come without a width
            if offsets[i][0] == offsets[i][1] == offsets[i + 1][0]:
                offsets[i] = offsets[i + 1]
        return list(found["ids"]), offsets

    backend = _Backend(named, controls, [piece_bytes(sp, i) for i in every], config)
    backend.dummy_prefix = "".join(sp.id_to_piece(sp.encode("a")))[:1] == "\u2581"
    backend.batch, backend.part = (
        lambda texts, threads: sp.encode(list(texts), num_threads=threads),
        part,
    )
    return backend


def _of_ranks(name: str, data: bytes, config: Mapping[str, Any], origin: str) -> _Backend:
    """A tiktoken rank file: base64 of a token's bytes and its rank, a line each."""
    kind = "llama3" if name == "tokenizer.model" else name.removesuffix(".tiktoken")
    pattern, count, names = _RANKS[kind]
    try:
        pairs = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        ranks = {}
    if sorted(ranks.values()) != list(range(count)):
        raise InputError(
            f"{origin}/{name}: damaged, or not the {count:,} ranks of {kind}; copy the file again"
        )
    named = _ROLES if kind == "llama3" else {"eos_token": "<|endoftext|>"}
    special = {f"<|{token}|>": i for token, i in names.items()}
    encoding = tiktoken.Encoding(
        kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )
    tokens = [*sorted(ranks, key=ranks.__getitem__)] + [b""] * (1 + max(names.values()) - count)

    def part(text: str) -> tuple[list[int], Sequence[Span]]:
        ids = encoding.encode_ordinary(text)
        owner = [i for i, character in enumerate(text) for _ in character.encode()]  # of every byte
        edges = np.cumsum([0, *(len(tokens[token]) for token in ids)]).tolist()
        return ids, [(owner[a], owner[b - 1] + 1) for a, b in itertools.pairwise(edges)]

    backend = _Backend(named, special, tokens, config)
    encode = encoding.encode_ordinary_batch
    backend.batch = lambda texts, threads: encode(
        list(texts), num_threads=threads if threads > 0 else 8
    )
    backend.part = part
    return backend


def _any_of(texts: Collection[str]) -> str:
    """A pattern that matches the longest."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"
