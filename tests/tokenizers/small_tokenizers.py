"""Small tokenizers in the formats and styles of published ones."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxllm.tokenizers.trained import train
from tests.tokenizers.chat_templates import CHATML, DEEPSEEK, GEMMA, LLAMA2, LLAMA3
from tests.tokenizers.test_trained import CORPUS

SPECIALS = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
    "deepseek": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
}
CONFIGS = {
    "chatml": {
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>"},
        "bos_token": None,
    },
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "deepseek": {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    "llama2": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "deepseek": DEEPSEEK,
    "gemma": GEMMA,
    "llama2": LLAMA2,
}
PLAIN_ADDED = {
    "chatml": ["<think>", "</think>", "<tool_call>"],
    "llama3": ["<|eom_id|>"],
    "deepseek": ["<｜User｜>", "<｜Assistant｜>"],
}


def byte_level(style):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS[style],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(
        [tokenizers.AddedToken(t, normalized=style == "deepseek") for t in PLAIN_ADDED[style]]
    )
    return tokenizer


def byte_fallback(style):
    """Gemma: a normaliser writes spaces as U+2581; Llama 2: Metaspace with a space before the text."""
    special = ["<pad>", "<eos>", "<bos>"] if style == "gemma" else ["<unk>", "<s>", "</s>"]
    turns = ["<start_of_turn>", "<end_of_turn>"] if style == "gemma" else []
    letters = sorted(set("".join(CORPUS).replace(" ", "")) | {"▁"})
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("▁", "q"),
        ("▁", "h"),
        ("e", "l"),
        ("▁h", "el"),
        ("狐", "狸"),
    ]
    pieces = [
        *special,
        *turns,
        *(f"<0x{b:02X}>" for b in range(256)),
        *letters,
        *("".join(m) for m in merges),
    ]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab, merges=merges, unk_token=special[0], fuse_unk=True, byte_fallback=True
        )
    )
    strip = []
    if style == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        strip = [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in special])
    tokenizer.add_tokens(
        [tokenizers.AddedToken(t, normalized=False) for t in turns]
    )  # not special, as in Gemma 2
    return tokenizer


def write(folder, style, template=None, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    reference = (byte_level if style in SPECIALS else byte_fallback)(style)
    reference.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(CONFIGS[style] if config is None else config)
    )
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return reference


def whole(tokenizer, ids):
    """The text of ids, control tokens spelled out."""
    names = {i: text for text, i in tokenizer.controls.items()}
    data = b"".join(names[i].encode() if i in names else tokenizer.token_bytes(i) for i in ids)
    return data.decode("utf-8", "replace")


def messages_of(chat):
    return [{"role": role, "content": content} for role, content in chat]


def tokenizer_of_ours():
    return train(
        iter(CORPUS), vocab_size=400, model_type="bpe", character_coverage=1.0, num_threads=1
    )
