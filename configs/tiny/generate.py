"""Write the text of configs/tiny.yaml: short reviews, English and Chinese, good and bad, and some plain prose.

    python configs/tiny/generate.py

All of it is made from the small grammar below, in an order fixed by a seed; the files are checked in.
"""

import itertools
import random
from pathlib import Path

ENGLISH = {
    "thing": "soup|tea|room|bed|phone|camera|book|story|shirt|bag|hotel|waiter|garden|train|film|song|cake|lamp",
    "when": "| this week| in the morning| after a month| as always",
    "+": "is good|tastes great|works very well|looks beautiful|is excellent|made me happy|is clean and nice",
    "-": "is bad|tastes terrible|stopped working|looks ugly|is awful|made me angry|is dirty and broken",
    "why+": "I love it.|We will come back.|It was worth the money.|Everyone was friendly.|I recommend it.",
    "why-": "I hate it.|We will not come back.|It was a waste of money.|Everyone was rude.|I want a refund.",
}
CHINESE = {
    "thing": "这家酒店|这本书|这个手机|房间|早餐|服务员|快递|衣服|这部电影|蛋糕|电脑|屏幕|位置|这杯茶|包装|价格",
    "when": "|今天|一直|用了一个月|这次",
    "+": "很好|非常棒|很漂亮|让人满意|很干净|质量不错|我很喜欢",
    "-": "很差|非常糟糕|很难看|让人失望|很脏|质量太差|我很讨厌",
    "why+": "下次还会来。|值得推荐。|物有所值。|家人都喜欢。|谢谢老板。",
    "why-": "再也不来了。|不推荐购买。|浪费钱。|家人都不喜欢。|要求退货。",
}
PROSE = {
    "time": "In spring|At noon|Before the rain|On Monday|Every winter|Long ago|Last year|At night",
    "who": "a teacher|two farmers|a young painter|the baker|some children|an engineer|the captain|a doctor",
    "where": "the river|the old town|the harbour|the market|the school|the mountain|the library|the station",
    "deed": "opened a small shop|planted a row of trees|wrote a long letter|repaired the bridge|counted the boats",
}
PROSE_CHINESE = {
    "time": "春天|中午|下雨之前|星期一|每年冬天|很久以前|去年|夜里",
    "who": "一位老师|两个农民|年轻的画家|面包师|几个孩子|一名工程师|船长|医生",
    "where": "河边|老城|港口|市场|学校|山上|图书馆|车站",
    "deed": "开了一家小店|种了一排树|写了一封长信|修好了桥|数了数船只",
}


def choices(grammar: dict[str, str], *keys: str) -> itertools.product:
    """Every way to choose one phrase for each key."""
    return itertools.product(*(grammar[key].split("|") for key in keys))


def reviews(kind: str) -> list[str]:
    """All reviews of one kind ("+" or "-"), both languages."""
    keys = ("thing", "when", kind, f"why{kind}")
    english = [
        f"The {thing} {how}{when}. {why}" for thing, when, how, why in choices(ENGLISH, *keys)
    ]
    return english + [
        f"{thing}{when}{how}，{why}" for thing, when, how, why in choices(CHINESE, *keys)
    ]


def prose(rng: random.Random) -> list[str]:
    """Documents of three sentences, the languages mixed."""
    keys = ("time", "who", "where", "deed")
    english = [f"{t} {who} by {where} {deed}." for t, who, where, deed in choices(PROSE, *keys)]
    chinese = [
        f"{t}，{where}的{who}{deed}。" for t, who, where, deed in choices(PROSE_CHINESE, *keys)
    ]
    sentences = rng.sample(english, 900) + rng.sample(chinese, 900)
    rng.shuffle(sentences)
    return [" ".join(sentences[i : i + 3]) for i in range(0, len(sentences), 3)]


def main() -> None:
    rng, here = random.Random(0), Path(__file__).parent
    texts = {
        "positive": rng.sample(reviews("+"), 1500),
        "negative": rng.sample(reviews("-"), 1500),
        "prose": prose(rng),
    }
    for name, lines in texts.items():
        (here / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
