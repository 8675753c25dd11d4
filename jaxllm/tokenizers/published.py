"""Tokenizers of published models: tokenizer.json, SentencePiece models, tiktoken ranks.

Their ids are those of the libraries that define the formats, and their chat template is their own. Text
never encodes to a control token unless the caller asks for it. Control tokens are those that the files
call special and those that the chat template writes around messages (not all files call them special).
"""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import InputError
from jaxllm.runtime.files import read_json
from jaxllm.tokenizers import files as tokenizer_files
from jaxllm.tokenizers.chat_template import ChatTemplate, Span
from jaxllm.tokenizers.files import json_object, read_files
from jaxllm.tokenizers.json_backend import JsonBackend
from jaxllm.tokenizers.marks import SECRET, mark, unveil, veil
from jaxllm.tokenizers.plain_backend import PlainBackend
from jaxllm.tokenizers.sentencepiece_backend import read_pieces
from jaxllm.tokenizers.tiktoken_backend import RANK_FILES, read_ranks
from jaxllm.tokenizers.trained import Tokenizer, check_unicode

# Of several, the first one is read.
_VOCABULARIES = ("tokenizer.json", *RANK_FILES, "tokenizer.model")


def load_tokenizer(directory: Any) -> Tokenizer:
    """The tokenizer in a directory: one trained here, or a published model's.

    Raises:
        InputError: no tokenizer, damaged or unknown files, or not those that were saved.
    """
    folder = Path(directory)
    files = read_files(folder, _VOCABULARIES)
    # tokenizer.json is the record of a tokenizer trained here, and the vocabulary of others.
    is_ours = b'"type": "sentencepiece"' in files.get("tokenizer.json", b"")[:100]
    is_exported = (folder / Tokenizer.exported_record).exists()
    if is_ours or is_exported or not any(name in files for name in _VOCABULARIES):
        return Tokenizer.load(folder)
    tokenizer = PretrainedTokenizer(files, str(folder))
    fix = "import the model again"
    record = read_json(folder / PretrainedTokenizer.record, fix)
    if record is not None and tokenizer.fingerprint != record.get("sha256"):
        raise InputError(f"{folder}: are not the files that were saved (sha256 differs); {fix}")
    return tokenizer


def restore(model: Any) -> Tokenizer:
    """The tokenizer whose `model` this is."""
    return Tokenizer(model) if isinstance(model, bytes) else PretrainedTokenizer(dict(model))


class PretrainedTokenizer(Tokenizer):
    """A published model's tokenizer, made from its files {name: content}.

    bos_id is None if the files name none; whether a text begins with it (begin_ids) is a separate
    question. pad_id is eos_id if the files name no padding. chat_refusal says why there are no chats,
    and is empty if there are.
    """

    kind = "pretrained"
    record = "jaxllm.json"

    def __init__(self, files: Mapping[str, bytes], origin: str = "tokenizer"):
        """origin: names the tokenizer in errors. Raises InputError on damaged files, and if no token ends a text."""
        # Plain values, so that the tokenizer goes to other processes (see `restore`).
        self.model = tuple(sorted(files.items()))  # type: ignore[assignment]
        self._files = files
        self._origin = origin
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
        named = tokenizer_files.named_tokens(config, special_map)
        backend: JsonBackend | PlainBackend
        if "tokenizer.json" in files:
            # The template first: the tokens that it writes become control tokens.
            self._read_template(files, config, named)
            scaffold = "".join(self._written("user", "assistant", "user"))
            spec = json_object(files, "tokenizer.json", self._origin)
            special = tokenizer_files.special_tokens(config, special_map)
            backend = JsonBackend(spec, special, scaffold, self._origin)
        else:
            backend = self._plain_backend(files)
            backend.add_tokens(config.get("added_tokens_decoder", {}))
            named = {**backend.named, **named}
            self._read_template(files, config, named)
        self._set_backend(backend)
        ends = tokenizer_files.end_spellings(config, special_map)
        self._read_ends([named.get("eos_token", ""), *ends], files)
        self._read_beginning(named, config.get("add_bos_token") is True)

    def _plain_backend(self, files: Mapping[str, bytes]) -> PlainBackend:
        name = next(name for name in _VOCABULARIES if name in files)
        content = files[name]
        # Llama 3's rank file has the name of a SentencePiece model: it is told by its first line.
        if name.endswith(".tiktoken") or re.match(rb"[A-Za-z0-9+/]+=* 0\r?\n", content):
            return read_ranks(name, content, self._origin)
        return read_pieces(content, self._origin)

    def _read_template(
        self, files: Mapping[str, bytes], config: Mapping[str, Any], named: Mapping[str, str]
    ) -> None:
        """Without a chat template, or with a broken one, everything but chats works."""
        self._template = None
        self.chat_refusal = ""
        try:
            source = tokenizer_files.template_source(files, config, self._origin)
            self._template = ChatTemplate(source, named, self._origin)
        except InputError as error:
            self.chat_refusal = str(error)

    def _set_backend(self, backend: JsonBackend | PlainBackend) -> None:
        self._backend = backend
        self._bytes = backend.token_bytes
        self.controls = backend.controls
        self.dummy_prefix = backend.dummy_prefix
        self.vocab_size = len(self._bytes)
        self._spellings = re.compile(f"({_any_of(self.controls)})")
        # A template may join or trim messages, so a message that ends in "<|im_" is a danger as well.
        beginnings = {text[:size] for text in self.controls for size in range(1, len(text))}
        self._dangers = re.compile(f"{_any_of(self.controls)}|(?:{_any_of(beginnings)})(?=\\s*\\Z)")

    def _read_ends(self, named: Sequence[str], files: Mapping[str, bytes]) -> None:
        """What ends a document, what ends a turn, and everything that ends a response."""
        # The first one ends documents; a response may end in any of them.
        ends = [self.controls[text] for text in named if text in self.controls]
        ends += tokenizer_files.end_ids(files, self._origin)
        eos = next((token for token in ends if token < self.vocab_size), None)
        if eos is None:
            raise InputError(
                f"{self._origin}: the tokenizer's files name no end-of-text token; name one of its "
                'special tokens as "eos_token" in tokenizer_config.json'
            )
        self.eos_id = eos
        # The end of turn is the first control token after the assistant's text.
        match = self._spellings.search("".join(self._written("user", "assistant")[-1:]))
        self.end_id = self.controls[match[0]] if match else eos
        self.stop_ids = tuple(dict.fromkeys((self.end_id, eos, *ends)))

    def _read_beginning(self, named: Mapping[str, str], add_bos: bool) -> None:
        """What begins a text: tokenizer.json decides, and add_bos_token for other formats.

        tokenizer_config.json of ...    a text begins with
        a tokenizer.json                what its post-processor adds; add_bos_token is not read
        tokenizer.model, *.tiktoken     BOS if add_bos_token is true
        """
        bos = self.controls.get(named.get("bos_token", ""))
        pad = self.controls.get(named.get("pad_token", ""))
        self.bos_id = bos  # type: ignore[assignment]
        self.pad_id = self.eos_id if pad is None else pad
        if self._backend.begin_ids is not None:
            self.begin_ids = self._backend.begin_ids
        else:
            self.begin_ids = (bos,) if add_bos and bos is not None else ()
        # The id becomes an index of the embedding.
        largest = max(self.begin_ids, default=0)
        if largest >= self.vocab_size:
            raise ValueError(f"the post-processor begins a text with {largest}, not a token's id")

    def _written(self, *roles: str) -> list[str]:
        """What the template writes before, between and after messages of these roles; nothing if it refuses."""
        if self._template is None:
            return []
        try:
            messages = [{"role": role, "content": SECRET} for role in roles]
            return self._template.render(messages)[0].split(SECRET)
        except InputError:
            return []

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            parse_special: control tokens that the text spells are encoded as such; if not, as text.

        Raises:
            InputError: not valid Unicode.
        """
        if not parse_special:
            return self.encode_batch([text])[0]
        check_unicode([text])
        return self._backend.spans(self._mark_controls(text))[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """`encode` of many texts, none of them to control tokens."""
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

        The mask covers the template's {% generation %} blocks. Without blocks it covers what the assistant
        has to write: from the end of its turn's header through its end of turn.

        Args:
            reply: open the assistant's next turn.
            parse_special: control tokens that messages spell are encoded as such.
            inputs: tools, documents and what else the template reads.

        Raises:
            InputError: no template, a conversation that it refuses, or assistant messages whose position
                in the text cannot be determined.
        """
        if self._template is None:
            raise InputError(self.chat_refusal)
        inputs = {"messages": list(messages), **inputs}
        safe = inputs if parse_special else self._veil_controls(inputs)
        text, spans = self._template.render(**safe, reply=reply)
        # A template that tests or cuts a message's text may decide otherwise on a veiled one.
        if safe != inputs and unveil(text) != self._template.render(**inputs, reply=reply)[0]:
            raise InputError(
                f"{self._origin}: the chat template reads control tokens inside of messages; remove them"
            )
        ends = self._ends_of_turn(text)
        if spans:
            spans = _through_end_of_turn(spans, ends)
        else:
            spans = self._template.assistant_spans(text, ends, reply=reply, **safe)
        # From here on text is what a message says, and control tokens are marks.
        marked = self._mark_controls(text)
        check_unicode([marked])
        ids, offsets = self._backend.spans(marked)
        if not ids:
            raise InputError(
                f"{self._origin}: the chat template writes nothing for this conversation; fix it"
            )
        mask = self._mask(text, spans, offsets)
        if not mask.any() and any(message["role"] == "assistant" for message in messages):
            raise InputError(
                f"{self._origin}: the chat template shows nothing that the assistant says; fix it"
            )
        return ids, mask.tolist()

    def _ends_of_turn(self, text: str) -> list[Span]:
        """Where a rendered text has tokens that end a response."""
        spans = []
        for match in self._spellings.finditer(text):
            if self.controls[match[0]] in self.stop_ids:
                spans.append(match.span())
        return spans

    def _mask(self, text: str, spans: Sequence[Span], offsets: np.ndarray) -> np.ndarray:
        """Whether a token overlaps one of the spans, bool[T]; offsets: (start, end) characters int[T, 2].

            tokens     <|user|>  hi  <|end|>  <|assistant|>  ok  <|end|>
            a span                                           [---------)
            mask          .      .      .           .        1      1

        Spans are in the rendered text, and offsets in the text with marks, which are longer.
        """
        # A token that is partly inside counts: a merge may take the space before a word.
        mask = np.zeros(len(offsets), bool)
        for span in spans:
            start = len(self._mark_controls(text[: span[0]]))
            end = len(self._mark_controls(text[: span[1]]))
            mask |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        return mask

    def _veil_controls(self, value: Any) -> Any:
        """The same JSON value with veils over control tokens that its strings spell, or begin at their end."""
        if isinstance(value, Mapping):
            pairs = value.items()
            return {self._veil_controls(key): self._veil_controls(item) for key, item in pairs}
        if isinstance(value, list | tuple):
            return [self._veil_controls(item) for item in value]
        if isinstance(value, str):
            return self._dangers.sub(lambda match: veil(match[0]), value)
        return value

    def _mark_controls(self, text: str) -> str:
        """The text with marks for the control tokens that it spells, and without veils."""
        return unveil(self._spellings.sub(lambda match: mark(match[0]), text))


def _through_end_of_turn(spans: Sequence[Span], ends: Sequence[Span]) -> list[Span]:
    """Extends spans by an end of turn that follows at once: some templates write it after the block."""
    end_of = dict(ends)
    return [(start, end_of.get(end, end)) for start, end in spans]


def _any_of(texts: Collection[str]) -> str:
    """A pattern that matches one of the texts, the longest first; nothing if there are none."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"
