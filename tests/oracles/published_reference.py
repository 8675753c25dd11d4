"""The programs that define published tokenizers, asked by tests/oracles/published_tokenizers.py.

    PYTHON tests/oracles/published_reference.py --convert FOLDER      # make tokenizer.json of a SentencePiece model
    PYTHON tests/oracles/published_reference.py --reference FOLDER    # answer FOLDER/questions.json

PYTHON: an interpreter with transformers, tiktoken and sentencepiece. Nothing of jaxllm is imported here.
"""

import argparse
import functools
import importlib.metadata
import json
import sys
from pathlib import Path

# Also as transformers converts the SentencePiece model of Mistral: with a space before every piece of text
# (legacy), or before the first only.
CONVERTED = {"mistral-v1-always": True, "mistral-v1-first": False}
PACKAGES = ("transformers", "tokenizers", "tiktoken", "sentencepiece")


def reference(folder):
    """Write answers.json next to questions.json."""
    questions = json.loads((folder / "questions.json").read_text())
    answers = {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
    for name in questions["tokenizers"]:
        answers[name] = reference_ids(folder, name, questions["lines"])
    for name in questions["chats"]:
        answers[name] = [reference_chat(folder, name, *chat) for chat in questions["conversations"]]
    (folder / "answers.json").write_text(json.dumps(answers))


def reference_ids(folder, name, lines):
    """[ids with special tokens as text, ids with them parsed, decoded text or None] of every line."""
    if name in ("mistral-v1", "mistral-v3"):
        return pieces(folder / name / "tokenizer.model", lines)
    if (folder / name / "tokenizer.json").exists():
        return hugging_face_ids(folder / name, lines)
    encoding = rank_reference(folder, name)
    answers = []
    for text in lines:
        plain = encoding.encode_ordinary(text)
        parsed = encoding.encode(text, allowed_special="all")
        answers.append([plain, parsed, encoding.decode(plain)])
    return answers


def pieces(file, lines):
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
    return [[sp.encode(text), None, sp.decode(sp.encode(text))] for text in lines]


def hugging_face_ids(directory, lines):
    fast = hugging_face(directory)

    def encode(text, split):
        return fast(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]

    answers = []
    for text in lines:
        plain = encode(text, True)
        decoded = fast.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        answers.append([plain, encode(text, False), decoded])
    return answers


def rank_reference(folder, name):
    import tiktoken
    from tiktoken_ext import openai_public

    if name == "llama3":
        sys.path.insert(0, str(next((folder / "packages").glob("llama_models*"))))
        from llama_models.llama3.tokenizer import Tokenizer

        return Tokenizer.get_instance().model
    if name == "gpt2":
        # As the program that ships the file makes it, openai-whisper.
        from tiktoken.load import load_tiktoken_bpe

        ranks = load_tiktoken_bpe(str(folder / "gpt2" / "gpt2.tiktoken"))
        return tiktoken.Encoding(
            "gpt2",
            pat_str=openai_public.r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": 50256},
        )
    return tiktoken.get_encoding(f"{name}_base")


@functools.cache
def hugging_face(directory):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(directory))


@functools.cache
def llama3_renderer(directory):
    """A tokenizer without a vocabulary that renders: transformers does not read Llama 3's rank file."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<|begin_of_text|>"
    )
    fast.chat_template = (directory / "chat_template.jinja").read_text()
    return fast


def reference_chat(folder, name, messages, tools):
    """(rendering, ids, mask or None, rendering with the assistant's turn opened), or why there is none."""
    import jinja2

    directory = folder / name
    llama3 = name.startswith("llama3-")
    fast = llama3_renderer(directory) if llama3 else hugging_face(directory)

    def render(reply):
        return fast.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=reply
        )

    try:
        text = render(False)
        open_text = render(True)
    except (jinja2.TemplateError, TypeError) as error:
        return f"{error}"
    if llama3:
        ids = rank_reference(folder, "llama3").encode(text, allowed_special="all")
        return text, ids, None, open_text
    # Only templates with {% generation %} blocks have a mask; their folder's name ends in it.
    options = {"return_assistant_tokens_mask": True} if name.endswith("-True") else {}
    out = fast.apply_chat_template(messages, tools=tools, return_dict=True, **options)
    return text, out["input_ids"], out.get("assistant_masks"), open_text


def convert(folder):
    """Write tokenizer.json of a SentencePiece model, by transformers."""
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    model = str(folder / "mistral-v1" / "tokenizer.model")
    extracted = SentencePieceExtractor(model).extract(LlamaTokenizer.model)
    # Versions of transformers return a mapping, or a tuple that begins with the same two.
    if isinstance(extracted, dict):
        vocab = extracted["vocab"]
        merges = extracted["merges"]
    else:
        vocab, merges = extracted[:2]
    if not isinstance(vocab, dict):
        vocab = {token: number for number, (token, _) in enumerate(vocab)}
    for name, legacy in CONVERTED.items():
        tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy)
        tokenizer.save_pretrained(str(folder / name))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--convert", type=Path)
    parser.add_argument("--reference", type=Path)
    arguments = parser.parse_args()
    if arguments.convert:
        convert(arguments.convert)
    else:
        reference(arguments.reference)


if __name__ == "__main__":
    main()
