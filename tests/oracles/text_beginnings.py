"""What `transformers` puts before a text, recorded for tests/tokenizers/test_files.py.

    PYTHON tests/oracles/text_beginnings.py        PYTHON: an interpreter with transformers (no torch is needed)

Writes tests/oracles/text_beginnings.json: {"format, post-processor, add_bos_token": ids of "ab", of "" and of a chat}. The
tokenizer_class changes none of them, which is checked here.
"""

import io
import itertools
import json
import tempfile
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

HERE = Path(__file__).parent
SPECIAL = ["<s>", "</s>", "<x>", "<unk>"]
CHAT = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
CLASSES = [
    "PreTrainedTokenizerFast",
    "LlamaTokenizer",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "GemmaTokenizer",
]


def byte_level() -> tokenizers.Tokenizer:
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(vocabulary)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def byte_fallback() -> tokenizers.Tokenizer:
    vocabulary = [*SPECIAL, "\u2581", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(
        {text: i for i, text in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True
    )
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    made.decoder = decoders.Sequence(parts)
    return made


def template(*names: str) -> dict:
    """A post-processor that puts special tokens around the text, which is called A."""
    piece = lambda name: {"Sequence" if name == "A" else "SpecialToken": {"id": name, "type_id": 0}}
    single = [*map(piece, names)]
    special = [name for name in names if name != "A"]
    about = {name: {"id": name, "ids": [SPECIAL.index(name)], "tokens": [name]} for name in special}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": about}


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}
POST_PROCESSORS = {
    "none": None,
    "byte level": BYTES,
    "bos": template("<s>", "A"),
    "bos and eos": template("<s>", "A", "</s>"),
    "eos": template("A", "</s>"),
    "two": template("<x>", "<s>", "A"),
    "another": template("<x>", "A"),
    "sequence": {"type": "Sequence", "processors": [BYTES, template("<s>", "A")]},
    "roberta": {**ROBERTA, "trim_offsets": True, "add_prefix_space": False},
}
FLAGS = {"absent": {}, "true": {"add_bos_token": True}, "false": {"add_bos_token": False}}


def write(folder: Path, form: str, post: str, flag: str) -> None:
    """The files of a case's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT, **FLAGS[flag]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if form == "pieces":
        (folder / "tokenizer.model").write_bytes(pieces())
        return
    made = {"byte level": byte_level, "byte fallback": byte_fallback}[form]()
    made.add_special_tokens(SPECIAL[:3])
    spec = json.loads(made.to_str()) | {"post_processor": POST_PROCESSORS[post]}
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def pieces() -> bytes:
    """A SentencePiece model whose first pieces are <s>, </s> and <unk>."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab a b ba"]), model_writer=out, vocab_size=266, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, bos_id=0, eos_id=1, unk_id=2, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


CASES = [*itertools.product(("byte level", "byte fallback"), POST_PROCESSORS, FLAGS)]
CASES += [("pieces", "none", flag) for flag in FLAGS]


def read(folder: Path, tokenizer_class: str) -> list:
    from transformers import AutoTokenizer

    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "tokenizer_class": tokenizer_class})
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    made = AutoTokenizer.from_pretrained(str(folder))
    chat = made.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False)
    return [made("ab")["input_ids"], made("")["input_ids"], chat]


def main() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    found = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), *case)
            classes = CLASSES[:2] if case[0] == "pieces" else CLASSES
            answers = [read(Path(folder), name) for name in classes]
            assert len({str(answer[1]) for answer in answers}) == 1, case
            found[", ".join(case)] = answers[0]
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(ids)}" for name, ids in found.items())
    (HERE / "text_beginnings.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
