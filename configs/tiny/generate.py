"""Write the text of configs/tiny.yaml: short reviews, English and Chinese, good and bad, and some plain prose.

    python configs/tiny/generate.py

All of it is made from the small grammar below, in an order fixed by a seed; the files are checked in.
"""

import itertools
import random
from pathlib import Path

ENGLISH = {
    "thing": [
        "soup",
        "tea",
        "room",
        "bed",
        "phone",
        "camera",
        "book",
        "story",
        "shirt",
        "bag",
        "hotel",
        "waiter",
        "garden",
        "train",
        "film",
        "song",
        "cake",
        "lamp",
    ],
    "good": [
        "is good",
        "tastes great",
        "works very well",
        "looks beautiful",
        "is excellent",
        "made me happy",
        "is clean and nice",
    ],
    "bad": [
        "is bad",
        "tastes terrible",
        "stopped working",
        "looks ugly",
        "is awful",
        "made me angry",
        "is dirty and broken",
    ],
    "why+": [
        "I love it.",
        "We will come back.",
        "It was worth the money.",
        "Everyone was friendly.",
        "I recommend it.",
    ],
    "why-": [
        "I hate it.",
        "We will not come back.",
        "It was a waste of money.",
        "Everyone was rude.",
        "I want a refund.",
    ],
    "when": ["", " this week", " in the morning", " after a month", " as always"],
}
CHINESE = {
    "thing": [
        "这家酒店",
        "这本书",
        "这个手机",
        "房间",
        "早餐",
        "服务员",
        "快递",
        "衣服",
        "这部电影",
        "蛋糕",
        "电脑",
        "屏幕",
        "位置",
        "这杯茶",
        "包装",
        "价格",
    ],
    "good": ["很好", "非常棒", "很漂亮", "让人满意", "很干净", "质量不错", "我很喜欢"],
    "bad": ["很差", "非常糟糕", "很难看", "让人失望", "很脏", "质量太差", "我很讨厌"],
    "why+": ["下次还会来。", "值得推荐。", "物有所值。", "家人都喜欢。", "谢谢老板。"],
    "why-": ["再也不来了。", "不推荐购买。", "浪费钱。", "家人都不喜欢。", "要求退货。"],
    "when": ["", "今天", "一直", "用了一个月", "这次"],
}
PLACES = [
    "the river",
    "the old town",
    "the harbour",
    "the market",
    "the school",
    "the mountain",
    "the library",
    "the station",
]
PEOPLE = [
    "a teacher",
    "two farmers",
    "a young painter",
    "the baker",
    "some children",
    "an engineer",
    "the captain",
    "a doctor",
]
DEEDS = [
    "opened a small shop",
    "planted a row of trees",
    "wrote a long letter",
    "repaired the bridge",
    "counted the boats",
]
TIMES = ["In spring", "At noon", "Before the rain", "On Monday", "Every winter", "Long ago", "Last year", "At night"]
PLACES_ZH = ["河边", "老城", "港口", "市场", "学校", "山上", "图书馆", "车站"]
PEOPLE_ZH = ["一位老师", "两个农民", "年轻的画家", "面包师", "几个孩子", "一名工程师", "船长", "医生"]
DEEDS_ZH = ["开了一家小店", "种了一排树", "写了一封长信", "修好了桥", "数了数船只"]
TIMES_ZH = ["春天", "中午", "下雨之前", "星期一", "每年冬天", "很久以前", "去年", "夜里"]


def reviews(kind: str) -> list[str]:
    """All reviews of one kind ("+" or "-"), both languages."""
    word = {"+": "good", "-": "bad"}[kind]
    keys = ("thing", "when", word, f"why{kind}")
    english = (f"The {a} {b}{w}. {c}" for a, w, b, c in itertools.product(*(ENGLISH[k] for k in keys)))
    chinese = (f"{a}{w}{b}，{c}" for a, w, b, c in itertools.product(*(CHINESE[k] for k in keys)))
    return [*english, *chinese]


def prose(rng: random.Random) -> list[str]:
    english = [f"{t} {p} by {w} {d}." for t, p, w, d in itertools.product(TIMES, PEOPLE, PLACES, DEEDS)]
    chinese = [f"{t}，{w}的{p}{d}。" for t, p, w, d in itertools.product(TIMES_ZH, PEOPLE_ZH, PLACES_ZH, DEEDS_ZH)]
    sentences = rng.sample(english, 900) + rng.sample(chinese, 900)
    rng.shuffle(sentences)
    return [" ".join(sentences[i : i + 3]) for i in range(0, len(sentences), 3)]


def main() -> None:
    rng, here = random.Random(0), Path(__file__).parent
    for name, kind in (("positive", "+"), ("negative", "-")):
        (here / f"{name}.txt").write_text("\n".join(rng.sample(reviews(kind), 1500)) + "\n", encoding="utf-8")
    (here / "prose.txt").write_text("\n".join(prose(rng)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
