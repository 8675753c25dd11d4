"""Tokenizers of published models, as their files are: tokenizer.json, SentencePiece models, tiktoken ranks.

They keep the protocol of `Tokenizer`, their ids are those of the libraries that define the formats, and their chat
template is their own. Text never encodes to a control token unless it is asked for: what is *control* is what the files
call special, and what the chat template writes around messages (in some files that is not called special).
"""

import base64
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tiktoken
import tokenizers

from jaxllm.chat_template import SECRET, ChatTemplate, Span
from jaxllm.config import InputError
from jaxllm.tokenizer import Tokenizer, piece_bytes, write_files

_RECORD = "jaxllm.json"  # ours, beside the model's own files
_FILES = ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json")
_FILES = (*_FILES, "tokenizer_config.json", "special_tokens_map.json")
_ATTRIBUTES = ("single_word", "lstrip", "rstrip", "normalized")  # of added tokens in tokenizer.json

Part = tuple[str, int | None]  # text, and its id where it is a control token


def load_tokenizer(directory: Any) -> Tokenizer:
    """The tokenizer in a directory: one trained here, or a published model's.

    Raises InputError where there is none, where it is damaged, or where it is of a kind that is not known.
    """
    folder = Path(directory)
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if _matters(path)}
    ours = "tokenizer.json" in files and b'"type": "sentencepiece"' in files["tokenizer.json"][:100]
    if ours or not any(_is_vocabulary(name) for name in files):
        return Tokenizer.load(folder)
    try:
        tokenizer = PretrainedTokenizer(files, str(folder))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: the tokenizer's files are damaged ({error!r:.120}); copy them again") from None
    if (record := folder / _RECORD).exists():
        recorded = _json({_RECORD: record.read_bytes()}, _RECORD, str(folder)).get("sha256")
        if tokenizer.fingerprint != recorded:
            raise InputError(f"{folder}: are not the files that were saved (sha256 differs); import the model again")
    return tokenizer


def restore(model: Any) -> Tokenizer:
    """The tokenizer whose `model` this is."""
    return Tokenizer(model) if isinstance(model, bytes) else PretrainedTokenizer(dict(model))


class PretrainedTokenizer(Tokenizer):
    """A published model's tokenizer, made from its files {name: content}.

    bos_id is None where documents do not begin with a token; pad_id is eos_id where the files name no padding. Raises
    InputError on damaged files, and where no token ends a text.
    """

    def __init__(self, files: Mapping[str, bytes], origin: str = "tokenizer"):
        self.model, self._origin = tuple(sorted(files.items())), origin  # type: ignore[assignment]
        hashes = [f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in self.model]
        self.fingerprint = hashlib.sha256("".join(hashes).encode()).hexdigest()
        config = {**_json(files, "special_tokens_map.json", origin), **_json(files, "tokenizer_config.json", origin)}
        self._backend = _backend(files, config, origin)
        given = {name: _spelling(value) for name, value in config.items() if name.endswith("_token")}
        named = self._backend.named | {name: text for name, text in given.items() if text}
        self._template = _template(files, config, named, origin)
        scaffold = "".join(_written(self._template, ("user", "assistant", "user")))
        self._backend.start(list(dict.fromkeys([*named.values(), *_listed(config)])), scaffold)
        self.controls, self._bytes = self._backend.controls, self._backend.bytes
        self.vocab_size, self.dummy_prefix = len(self._bytes), self._backend.dummy_prefix
        self._spellings = _any_of(self.controls)
        self._prefixes = {text[:i] for text in self.controls for i in range(1, len(text))}
        self._longest = max(map(len, self.controls), default=0)
        self._choose_ids(named, config, _json(files, "generation_config.json", origin).get("eos_token_id"))
        self._check_out_of_reach()

    def _choose_ids(self, named: Mapping[str, str], config: Mapping[str, Any], ends: int | list[int] | None) -> None:
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        find = lambda name: self.controls.get(named.get(name, ""))
        eos = find("eos_token") if find("eos_token") is not None else next(iter(ends), None)
        if eos is None:
            mend = 'name one of its special tokens as "eos_token" in tokenizer_config.json'
            raise InputError(f"{self._origin}: the tokenizer's files name no end-of-text token; {mend}")
        self.eos_id, pad = eos, find("pad_token")
        self.pad_id = self.eos_id if pad is None else pad
        self.bos_id = None if config.get("add_bos_token") is False else find("bos_token")  # type: ignore[assignment]
        self.end_id = self._end_of_turn()
        self.stop_ids = tuple(dict.fromkeys((self.end_id, self.eos_id, *ends)))

    def _end_of_turn(self) -> int:
        """The first control token behind the assistant's text; the end of text where there is no template or none."""
        behind = _written(self._template, ("user", "assistant"))[-1:]
        found = self._spellings.search(behind[0]) if behind else None
        return self.controls[found[0]] if found else self.eos_id

    def _check_out_of_reach(self) -> None:
        controls = set(self.controls.values()) - {self._backend.unk_id}
        for text, ids in zip(self.controls, self.encode_batch(list(self.controls)), strict=True):
            if not controls.isdisjoint(ids):
                raise InputError(
                    f"{self._origin}: text that spells {text} would become that control token; "
                    "only BPE and SentencePiece vocabularies are supported"
                )

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of a text; control tokens that it spells are text unless parse_special.

        Raises InputError on a lone surrogate.
        """
        if not parse_special:
            return self.encode_batch([text])[0]
        _check_unicode([text])
        return self._backend.spans(self._parts(text))[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        _check_unicode(texts)
        return self._backend.batch(texts, num_threads)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        reply: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        parse_special: bool = False,
        **variables: Any,
    ) -> tuple[list[int], list[bool]]:
        """Token ids [T] of a conversation in the model's own template, and where the assistant speaks [T].

        reply=True opens the assistant's next turn; tools, documents and other variables go to the template. The mask
        is that of the template's {% generation %} blocks, else what the assistant has to write from the header of its
        turn on; the end of turn is part of it. Raises InputError: no template, a conversation that it refuses, or
        assistant messages whose place cannot be told.
        """
        if self._template is None:
            raise InputError(
                f"{self._origin}: no chat template; give a chat_template.jinja beside the tokenizer's files"
            )
        inputs = {"messages": list(messages), "tools": tools, **variables}
        safe = inputs if parse_special else self._veiled(inputs)
        text, spans = self._template.render(**safe, reply=reply)
        if safe != inputs and self._unveiled(text) != self._template.render(**inputs, reply=reply)[0]:
            raise InputError(f"{self._origin}: the chat template reads control tokens inside of messages; remove them")
        ends = [m.span() for m in self._spellings.finditer(text) if self.controls[m[0]] in self.stop_ids]
        if spans:
            spans = [(start, max([end, *(e for b, e in ends if b == end)])) for start, end in spans]
        else:
            spans = self._template.assistant_spans(text, ends, **safe, reply=reply)
        return self._encode_marked(text, spans, any(m["role"] == "assistant" for m in messages))

    def _encode_marked(self, text: str, spans: Sequence[Span], spoken: bool) -> tuple[list[int], list[bool]]:
        parts = [(self._unveiled(part), token) for part, token in self._parts(text)]
        _check_unicode([part for part, _ in parts])
        ids, offsets = self._backend.spans(parts)
        mask = np.zeros(len(ids), bool)
        for span in spans:
            start, end = (len(self._unveiled(text[:place])) for place in span)
            mask |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        if spoken and not mask.any():
            raise InputError(f"{self._origin}: the chat template shows nothing that the assistant says; mend it")
        return ids, mask.tolist()

    def _parts(self, text: str) -> list[Part]:
        """The text cut at the control tokens it spells."""
        pieces = self._spellings.split(text)
        return [(p, self.controls[p] if i % 2 else None) for i, p in enumerate(pieces) if p]

    def _veiled(self, value: Any) -> Any:
        """The same JSON value without a string that spells a control token, or ends in the beginning of one."""
        if isinstance(value, Mapping):
            return {self._veiled(k): self._veiled(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._veiled(v) for v in value]
        if not isinstance(value, str):
            return value
        body = value.rstrip()  # as templates trim what they join
        longest = range(min(self._longest, len(body)), 0, -1)
        at = len(body) - next((n for n in longest if body[-n:] in self._prefixes), 0)
        return self._spellings.sub(lambda m: _veil(m[0]), body[:at]) + _veil(body[at:]) + value[len(body) :]

    def _unveiled(self, text: str) -> str:
        return _VEILED.sub(lambda m: bytes.fromhex(m[1]).decode(), text) if SECRET in text else text

    def save(self, directory: Any, settings: Mapping[str, Any] | None = None) -> None:
        """Write the files as they came, and a record of them, into a new directory, all at once."""
        record = {"type": "pretrained", "vocab_size": self.vocab_size, "sha256": self.fingerprint, **(settings or {})}
        write_files(directory, {**dict(self.model), _RECORD: json.dumps(record, indent=1).encode() + b"\n"})


_VEILED = re.compile(f"{SECRET}v([0-9a-f]*)z")


def _veil(text: str) -> str:
    return f"{SECRET}v{text.encode().hex()}z" if text else ""


class _Backend:
    """What the three kinds of files have in common.

    named: {"bos_token": ...} as the vocabulary says; after `start` also controls {spelling: id}, bytes [vocabulary]
    (what each token decodes to, nothing for control tokens), and dummy_prefix (whether a text begins with a space).
    """

    dummy_prefix = False
    unk_id = -1

    def __init__(self, named: Mapping[str, str]):
        self.named: dict[str, str] = dict(named)
        self.controls: dict[str, int] = {}
        self.bytes: list[bytes] = []

    def start(self, special: Sequence[str], scaffold: str) -> None:
        """special: what the configuration calls special; scaffold: what the chat template writes around messages."""

    def batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        raise NotImplementedError

    def spans(self, parts: Sequence[Part]) -> tuple[list[int], np.ndarray]:
        """(ids [T], where in the joined text each begins and ends [T, 2]) of text and control tokens."""
        ids, offsets, place = [], [], 0
        for text, control in parts:
            some, where = self.part(text) if control is None else ([control], [(0, len(text))])
            ids += some
            offsets += [(place + start, place + end) for start, end in where]
            place += len(text)
        return ids, np.array(offsets, int).reshape(-1, 2)

    def part(self, text: str) -> tuple[list[int], Sequence[Span]]:
        raise NotImplementedError

    def declare(self, config: Mapping[str, Any]) -> None:
        """Further special tokens of the configuration, beyond the vocabulary."""
        for token, record in config.get("added_tokens_decoder", {}).items():
            self.bytes += [b""] * (int(token) + 1 - len(self.bytes))
            if not self.bytes[int(token)]:
                self.controls[_spelling(record)] = int(token)


class _JsonBackend(_Backend):
    """tokenizer.json, through the library that defines it."""

    def __init__(self, spec: dict[str, Any], config: Mapping[str, Any], origin: str):
        super().__init__({})
        self._spec, self._origin = spec, origin
        self._added: list[dict[str, Any]] = spec.get("added_tokens") or []
        known = {token["content"] for token in self._added}
        for token, record in config.get("added_tokens_decoder", {}).items():
            if _spelling(record) not in known:
                self._added.append({**dict.fromkeys((*_ATTRIBUTES, "special"), False), **record, "id": int(token)})

    def start(self, special: Sequence[str], scaffold: str) -> None:
        for token in self._added:
            text = token["content"]
            token["special"] |= text in special or bool(text.strip() and text in scaffold)
        self._tokenizer = self._made({**self._spec, "added_tokens": self._added})
        known = {token["content"] for token in self._added}
        for text in [text for text in special if text not in known]:
            self._tokenizer.add_special_tokens([text])
            flags = dict.fromkeys(_ATTRIBUTES, False)
            self._added.append({**flags, "content": text, "id": self._tokenizer.token_to_id(text), "special": True})
        self.controls = {token["content"]: token["id"] for token in self._added if token["special"]}
        self.unk_id = self.controls.get(self._spec["model"].get("unk_token"), -1)
        self._find_bytes()
        self._add_marks()

    def _made(self, spec: Mapping[str, Any]) -> tokenizers.Tokenizer:
        try:
            made = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:
            if type(error) is not Exception:  # the library raises no subclass
                raise
            reason = f"{error}".replace("\n", " ")[:120]
            raise InputError(f"{self._origin}/tokenizer.json: no tokenizer ({reason}); copy the file again") from None
        made.no_truncation()
        made.no_padding()
        made.encode_special_tokens = True  # that is, as the text they are
        return made

    def _find_bytes(self) -> None:
        parts = list(_components(self._spec.get("decoder")))
        kinds = {part["type"] for part in parts}
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            mend = "only byte-level and SentencePiece-like ones are known"
            raise InputError(f"{self._origin}/tokenizer.json: a decoder of {sorted(kinds)} is not known; {mend}")
        # What takes a space away at the beginning: Strip with a start, Metaspace unless it never puts one there.
        self.dummy_prefix = any(p.get("start") or p.get("prepend_scheme", "never") != "never" for p in parts)
        vocabulary, byte_level = self._tokenizer.get_vocab(with_added_tokens=True), "ByteLevel" in kinds
        added, controls = {token["content"] for token in self._added}, set(self.controls.values())
        self.bytes = [b""] * (1 + max(vocabulary.values(), default=-1))
        for text, token in vocabulary.items():
            if token not in controls:
                self.bytes[token] = text.encode() if byte_level and text in added else _token_bytes(text, byte_level)

    def _add_marks(self) -> None:
        """Tokens that only `spans` can spell, one for each way in which control tokens treat the text around them.

        Put where the template has a control token, one call encodes the whole text as the reference does.
        """
        shapes = {t["content"]: tuple(bool(t[name]) for name in _ATTRIBUTES) for t in self._added if t["special"]}
        spelled = {shape: f"{SECRET}m{i}z" for i, shape in enumerate(dict.fromkeys(shapes.values()))}
        for shape, mark in spelled.items():
            flags = dict(zip(_ATTRIBUTES, shape, strict=True))
            self._tokenizer.add_tokens([tokenizers.AddedToken(mark, special=False, **flags)])
        self._marks = {text: spelled[shape] for text, shape in shapes.items()}
        self._mark_ids = {self._tokenizer.token_to_id(mark) for mark in spelled.values()}

    def batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        size = 1 if num_threads == 1 else max(1, len(texts))  # the library uses all cores for what it gets at once
        some = (texts[i : i + size] for i in range(0, len(texts), size))
        return [e.ids for t in some for e in self._tokenizer.encode_batch_fast(list(t), add_special_tokens=False)]

    def spans(self, parts: Sequence[Part]) -> tuple[list[int], np.ndarray]:
        marked = [text if control is None else self._marks[text] for text, control in parts]
        encoding = self._tokenizer.encode("".join(marked), add_special_tokens=False)
        controls = iter([control for _, control in parts if control is not None])
        ids = [next(controls) if token in self._mark_ids else token for token in encoding.ids]
        there, here = (np.cumsum([0, *map(len, texts)]) for texts in (marked, [text for text, _ in parts]))
        offsets = np.interp(np.array(encoding.offsets, int).reshape(-1, 2), there, here)
        return ids, offsets.round().astype(int)


class _PieceBackend(_Backend):
    """A SentencePiece model; its control pieces are out of any text's reach."""

    def __init__(self, model: bytes, config: Mapping[str, Any], origin: str):
        try:
            self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise InputError(f"{origin}/tokenizer.model: not a SentencePiece model; copy the file again") from None
        ids = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "pad_token": sp.pad_id(), "unk_token": sp.unk_id()}
        super().__init__({name: sp.id_to_piece(token) for name, token in ids.items() if token >= 0})
        self.unk_id = sp.unk_id()
        every = range(sp.vocab_size())
        self.controls = {sp.id_to_piece(i): i for i in every if sp.is_control(i) or sp.is_unknown(i)}
        self.bytes = [piece_bytes(sp, i) for i in every]
        self.dummy_prefix = "".join(sp.id_to_piece(sp.encode("a")))[:1] == "\u2581"
        self.declare(config)

    def batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        return self._sp.encode(list(texts), num_threads=num_threads)

    def part(self, text: str) -> tuple[list[int], Sequence[Span]]:
        found = self._sp.encode_as_offset_mapping(text)
        offsets = list(found["offsets"])
        for i in range(len(offsets) - 2, -1, -1):  # all but the last byte token of a character come without a width
            if offsets[i][0] == offsets[i][1] == offsets[i + 1][0]:
                offsets[i] = offsets[i + 1]
        return list(found["ids"]), offsets


_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ANY, _REST = r"[^\r\n\p{L}\p{N}]?", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = rf"{_ENDINGS}|{_ANY}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_O200K = rf"{_ANY}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_ANY}{_UPPER}+{_LOWER}*{_ENDINGS}?"
_O200K += rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
_LLAMA3 = "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id step_id "
_LLAMA3 += "start_header_id end_header_id eom_id eot_id python_tag image"
_LLAMA3_NAMES = [*_LLAMA3.split(), *(f"reserved_special_token_{i}" for i in range(2, 246))]
_MORE = {"fim_prefix": 100_258, "fim_middle": 100_259, "fim_suffix": 100_260, "endofprompt": 100_276}

# A rank file says neither how it splits text nor its special tokens: name -> (pattern, ranks, special tokens).
_RANKS: dict[str, tuple[str, int, dict[str, int]]] = {
    "gpt2": (_GPT2, 50_256, {"endoftext": 50_256}),
    "cl100k_base": (_CL100K, 100_256, {"endoftext": 100_257, **_MORE}),
    "o200k_base": (_O200K, 199_998, {"endoftext": 199_999, "endofprompt": 200_018}),
    "llama3": (_CL100K, 128_000, {name: 128_000 + i for i, name in enumerate(_LLAMA3_NAMES)}),
}
_ROLES = {"bos_token": "begin_of_text", "eos_token": "end_of_text", "pad_token": "finetune_right_pad_id"}


class _RankBackend(_Backend):
    """A tiktoken rank file: base64 of a token's bytes and its rank, a line each."""

    def __init__(self, name: str, data: bytes, config: Mapping[str, Any], origin: str):
        kind = "llama3" if name == "tokenizer.model" else name.removesuffix(".tiktoken")
        if kind not in _RANKS:
            known = ", ".join(f"{known}.tiktoken" for known in _RANKS)
            raise InputError(f"{origin}/{name}: how these ranks split text is not known; known are {known}: rename it")
        pattern, count, names = _RANKS[kind]
        try:
            pairs = (line.split() for line in data.splitlines() if line)
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        except ValueError:
            ranks = {}
        if sorted(ranks.values()) != list(range(count)):
            raise InputError(f"{origin}/{name}: damaged, or not the {count:,} ranks of {kind}; copy the file again")
        roles = _ROLES if kind == "llama3" else {"eos_token": "endoftext"}
        super().__init__({role: f"<|{token}|>" for role, token in roles.items()})
        self.controls = {f"<|{token}|>": i for token, i in names.items()}
        self._encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.controls)
        self.bytes = [*sorted(ranks, key=ranks.__getitem__)] + [b""] * (1 + max(names.values()) - count)
        self.declare(config)

    def batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads if num_threads > 0 else 8)

    def part(self, text: str) -> tuple[list[int], Sequence[Span]]:
        ids = self._encoding.encode_ordinary(text)
        owner = [i for i, character in enumerate(text) for _ in character.encode()]  # of every byte
        edges = np.cumsum([0, *(len(self.bytes[token]) for token in ids)]).tolist()
        return ids, [(owner[a], owner[b - 1] + 1) for a, b in itertools.pairwise(edges)]


def _backend(files: Mapping[str, bytes], config: Mapping[str, Any], origin: str) -> _Backend:
    if "tokenizer.json" in files:
        return _JsonBackend(_json(files, "tokenizer.json", origin), config, origin)
    name = next(name for name in sorted(files) if _is_vocabulary(name))
    if name.endswith(".tiktoken") or re.match(rb"[A-Za-z0-9+/]+=* 0\r?\n", files[name]):
        return _RankBackend(name, files[name], config, origin)
    return _PieceBackend(files[name], config, origin)


def _is_vocabulary(name: str) -> bool:
    return name in ("tokenizer.json", "tokenizer.model") or name.endswith(".tiktoken")


def _matters(path: Path) -> bool:
    return path.is_file() and (path.name in _FILES or path.suffix == ".tiktoken")


def _json(files: Mapping[str, bytes], name: str, origin: str) -> dict[str, Any]:
    """The object in a file, empty where there is no file."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise InputError(f"{origin}/{name}: damaged ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"{origin}/{name}: must be a JSON object; copy the file again")
    return value


def _spelling(token: Any) -> str:
    """A token is a string or an object with "content"."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else ""


def _listed(config: Mapping[str, Any]) -> list[str]:
    """Every token of the configuration's lists of special tokens, which may have names."""
    lists = [config.get(name) or [] for name in ("additional_special_tokens", "extra_special_tokens")]
    every = [token for some in lists for token in (some.values() if isinstance(some, Mapping) else some)]
    return [text for text in map(_spelling, every) if text]


def _template(files: Mapping[str, bytes], config: Mapping[str, Any], named: Mapping[str, str], origin: str):
    """The template in its own file, else that of the configuration: one, or a list of named ones."""
    given = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else config.get("chat_template")
    if not given:
        return None
    sources = {"default": given} if isinstance(given, str) else {each["name"]: each["template"] for each in given}
    if "default" not in sources:
        raise InputError(f"{origin}/tokenizer_config.json: no chat template is named default; rename one")
    return ChatTemplate(sources, named, origin)


def _written(template: ChatTemplate | None, roles: Iterable[str]) -> list[str]:
    """What a template writes before, between and behind messages of these roles; nothing where it refuses them."""
    try:
        text = template.render([{"role": role, "content": SECRET} for role in roles])[0] if template else ""
    except InputError:
        text = ""
    return text.split(SECRET) if text else []


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _check_unicode(texts: Iterable[str]) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"text: not valid Unicode ({error}); repair the source's encoding") from None


def _components(part: Any) -> Iterable[dict[str, Any]]:
    """A component of tokenizer.json and, where it is a sequence, those in it."""
    if isinstance(part, dict):
        yield part
        for inner in part.get("decoders", ()):
            yield from _components(inner)


def _token_bytes(text: str, byte_level: bool) -> bytes:
    if not byte_level:
        return bytes([int(text[3:5], 16)]) if _BYTE.fullmatch(text) else text.replace("\u2581", " ").encode()
    table = _byte_alphabet()
    return bytes(map(table.__getitem__, text)) if all(c in table for c in text) else text.encode()


_BYTE = re.compile("<0x[0-9A-F]{2}>")


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE spells a byte as a visible character: itself, else the next one from U+0100 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
