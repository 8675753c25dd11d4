"""Random lines and conversations that tokenizers and chat templates are asked about (published_tokenizers.py)."""

# Contractions in both cases, accents, an apostrophe of its kind, and numbers.
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
# Characters that tokenizers normalize, drop or give a meaning.
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
# Spellings of control tokens, of whichever tokenizer.
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<start_of_turn>",
    "<bos>",
    "</s>",
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
# Added tokens that are not control tokens, and runs of spaces that are tokens.
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
    """A character, from the first blocks of Unicode more often; no surrogate."""
    while True:
        point = rng.choice((rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0x110000)))
        if not 0xD800 <= point < 0xE000:
            return chr(point)


def some(rng, choices, most):
    """One to `most` - 1 of the choices."""
    return [rng.choice(choices) for _ in range(rng.randrange(1, most))]


def fragment(rng, special):
    """A piece of text of one kind; special: it may spell a control token."""
    kind = rng.randrange(8 if special else 7)
    if kind == 0:
        return " ".join(some(rng, WORDS.split(), 12))
    if kind == 1:
        return "".join(some(rng, CHINESE, 25))
    if kind == 2:
        text = rng.choice(CODE)
        return text[rng.randrange(len(text)) :] if rng.random() < 0.3 else text
    if kind == 3:
        return "".join(some(rng, EMOJI, 5))
    if kind == 4:
        return "".join(code_point(rng) for _ in range(rng.randrange(1, 10)))
    if kind == 5:
        # Bytes that are mostly not UTF-8.
        broken = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 8)))
        return broken.decode("utf-8", "replace") + rng.choice(ODD)
    if kind == 6:
        return rng.choice(
            (" ", "  ", "\n", "\n\n", "\t", " \n ", rng.choice(TAGS), rng.choice(ODD))
        )
    return rng.choice(SPECIAL)


def line(rng, special=True):
    """One to six fragments, mostly without spaces between them."""
    between = rng.choice(("", "", " "))
    return between.join(fragment(rng, special) for _ in range(rng.randrange(1, 7)))


def conversation(rng, special):
    """(messages, tools or None): every third has tools and calls them, every fourth a system message."""

    def say():
        return line(rng, special) if rng.random() < 0.8 else f"  {rng.choice(WORDS.split())} \n"

    messages = [{"role": "system", "content": say()}] if rng.random() < 0.25 else []
    names = []
    if rng.random() < 0.33:
        names = rng.sample(("weather", "查询", "run_code"), rng.randrange(1, 4))
    tools = []
    for name in names:
        function = {"name": name, "description": say(), "parameters": {"type": "object"}}
        tools.append({"type": "function", "function": function})
    for _ in range(rng.randrange(1, 5)):
        messages.append({"role": "user", "content": say()})
        if tools and rng.random() < 0.5:
            messages += calling(rng, names, say)
        thought = f"<think>\n{say().strip()}\n</think>\n\n" if rng.random() < 0.2 else ""
        messages.append({"role": "assistant", "content": thought + say()})
    if rng.random() < 0.3:
        messages.pop()  # the last question is not answered
    return messages, tools or None


def calling(rng, names, say):
    """The assistant calls a tool, and the tool answers."""
    call = {"name": rng.choice(names), "arguments": {"q": say(), "n": rng.random()}}
    content = rng.choice((say(), ""))
    return [
        {"role": "assistant", "content": content, "tool_calls": [{"function": call}]},
        {"role": "tool", "name": call["name"], "content": say()},
    ]
