"""The report shows every number, escapes every text, loads nothing from elsewhere, and survives absent stages."""

import html.parser
import json
import math
import re

import pytest

from jaxllm.config import InputError
from jaxllm.report import report
from jaxllm.report.tables import SIMULATED
from jaxllm.run import Config

LIFE = Config().stages

EVIL = "<script>alert('x')</script> & \"q\" | `b`\n你好,世界"


def make_stage(run_dir, stage, result=None, lines=(), tail=""):
    directory = run_dir / stage
    directory.mkdir(parents=True)
    provenance = {"time": "2026-11-23T13:00:00+00:00", "devices": "8 x cpu", "code": "abc123"}
    (directory / "provenance.json").write_text(json.dumps(provenance))
    if result is not None:
        (directory / "result.json").write_text(
            json.dumps(result, ensure_ascii=False), encoding="utf-8"
        )
    if lines or tail:
        (directory / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines) + tail
        )


def make_run(run_dir, simulated=True):
    curve = [
        {"step": 10 * i, "time": 1.5 * i, "train/loss": 5.0 / i, "train/learning_rate": 1e-3 / i}
        for i in range(1, 40)
    ]
    points = [
        {"step": 100 * i, "time": i, "eval/loss": 4.5 / i, "eval/bits_per_byte": 2.5 / i}
        for i in range(1, 4)
    ]
    make_stage(
        run_dir,
        "tokenizer",
        {
            "vocab_size": 4096,
            "compression": {"bytes_per_token": 3.21, "none": None},
            "wall_seconds": 4.25,
        },
    )
    pretrain = {
        "bits_per_byte": 1.2345,
        "parameters": 12_345_678,
        "train_loss": math.nan,
        "wall_seconds": 3725,
    }
    make_stage(run_dir, "pretrain", pretrain, curve + points, '{"step": 400, "train/lo')
    make_stage(run_dir, "sft", None, curve)
    make_stage(
        run_dir,
        "rank",
        {
            "prompts": 64,
            "tie_fraction": 0.125,
            "simulated": simulated,
            "annotator": "m:f",
            "wall_seconds": 2,
        },
    )
    reward = [
        {
            "step": i,
            "time": i,
            "train/accuracy": 0.5 + i / 100,
            "eval/accuracy": 0.6,
            "train/loss": 0.7,
        }
        for i in range(1, 30)
    ]
    make_stage(run_dir, "reward", {"accuracy": 0.7654, "wall_seconds": 12}, reward)
    ppo = [
        {
            "step": i,
            "time": i,
            "ppo/score": i / 9,
            "ppo/kl": math.nan if i == 3 else i,
            "ppo/entropy": 2.0,
        }
        for i in range(1, 9)
    ]
    make_stage(run_dir, "ppo", {"score": 1.5, "wall_seconds": 70}, ppo)
    stages = {
        "pretrain": {"bits_per_byte": 1.2345},
        "sft": {"annotator_score": 0.4321},
        "ppo": {"annotator_score": 0.8765},
    }
    samples = [{"prompt": EVIL, "answers": {"pretrain": "pre " + EVIL, "sft": "", "ppo": "答案"}}]
    evaluate = {"stages": stages, "samples": samples, "win_rate": 0.625, "wall_seconds": 9}
    make_stage(
        run_dir, "evaluate", {**evaluate, **({"annotator_simulated": True} if simulated else {})}
    )


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.urls, self.text, self.open = [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.urls += [v for k, v in attrs if k in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""


def parse(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("report") / "tiny & co"
    make_run(run_dir)
    report.write_report(run_dir, LIFE)
    return run_dir


def test_json_holds_every_number_and_is_strict(run_dir):
    data = json.loads((run_dir / "report.json").read_text(), parse_constant=pytest.fail)
    assert data["stages"]["pretrain"]["result"]["parameters"] == 12_345_678
    assert data["stages"]["pretrain"]["result"]["train_loss"] is None
    assert data["stages"]["pretrain"]["series"]["eval/bits_per_byte"] == [
        [100, 2.5],
        [200, 1.25],
        [300, 2.5 / 3],
    ]
    assert (
        len(data["stages"]["pretrain"]["series"]["train/loss"]) == 39
    )  # the half line is left out
    assert data["stages"]["ppo"]["series"]["ppo/kl"][2] == [3, None]
    assert data["wall_seconds"] == 4.25 + 3725 + 2 + 12 + 70 + 9
    assert data["absent"] == ["sample"]


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_every_number_and_answer_is_shown(run_dir, name):
    text = (run_dir / name).read_text(encoding="utf-8")
    for word in (
        "12,345,678",
        "1.234",
        "0.7654",
        "0.125",
        "0.8765",
        "0.625",
        "3.21",
        "1 h 02 min",
        "4.2 s",
        "2026-11-23",
        "8 x cpu",
    ):
        assert word in text
    for word in ("答案", "你好,世界", "not run", "not finished", "tiny &amp; co"):
        assert word in text


def test_html_is_well_formed_escaped_and_self_contained(run_dir):
    page = parse(run_dir / "report.html")
    assert "script" not in page.tags
    assert EVIL in page.text
    assert page.urls
    assert all(url.startswith("data:image/png;base64,") for url in page.urls)
    source = (run_dir / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import", source)
    assert '<meta charset="utf-8">' in source[:200]


def test_a_picture_for_each_kind_of_metric(run_dir):
    source = (run_dir / "report.html").read_text()
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", source)
    assert captions[:3] == [
        "Loss",
        "Bits per byte",
        "Learning rate",
    ]  # train/loss and eval/loss share one picture
    assert {"Pairwise accuracy (simulated annotator)", "Score", "Entropy, nats per token"} <= set(
        captions
    )
    assert source.count("<img") == len(captions) == source.count("<source")


def test_markdown_tables_are_whole(run_dir):
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    widths = [
        len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")
    ]
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(blocks) > 5
    assert all(
        len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
        for block in blocks
    )
    assert min(widths) >= 3
    assert not [
        line for line in text.splitlines() if "<script" in line and not line.startswith("    ")
    ]


@pytest.mark.parametrize(("simulated", "expected"), [(True, True), (False, False)])
def test_simulated_annotator_stands_by_each_of_its_numbers(tmp_path, simulated, expected):
    make_run(tmp_path / "run", simulated)
    report.write_report(tmp_path / "run", LIFE)
    for name in ("report.html", "report.md"):
        text = (tmp_path / "run" / name).read_text(encoding="utf-8")
        assert (SIMULATED in text) is expected
        plain = re.sub(r"<[^>]*>", " ", text)
        for number, label in (
            ("0.125", "tie fraction"),
            ("0.7654", "accuracy"),
            ("0.625", "win rate"),
        ):
            assert (
                re.search(rf"{label} \({SIMULATED}\)\s+{re.escape(number)}", plain) is not None
            ) is expected
        assert (f"annotator score ({SIMULATED})" in text) is expected


def test_a_person_ranks_but_a_program_evaluates(tmp_path):
    make_stage(
        tmp_path / "run", "rank", {"tie_fraction": 0.5, "simulated": False, "annotator": "person"}
    )
    make_stage(tmp_path / "run", "evaluate", {"annotator_score": 0.25, "annotator_simulated": True})
    report.write_report(tmp_path / "run", LIFE)
    text = (tmp_path / "run" / "report.md").read_text()
    assert "tie fraction 0.5" in text
    assert "annotator score (simulated annotator) 0.25" in text


def test_no_stage_at_all_and_odd_values_do_not_crash(tmp_path):
    (tmp_path / "empty").mkdir()
    assert report.write_report(tmp_path / "empty", LIFE)["stages"] == {}
    parse(tmp_path / "empty" / "report.html")
    odd = {
        "a": [],
        "b": {},
        "c": [1, "x"],
        "d": {"e": {"f": 1}, "g": 2},
        "h": [{"i": 1}, {"j": None}],
        "samples": "none",
        "s": EVIL,
    }
    odd |= {
        "huge": 1e300,
        "tiny": 1e-12,
        "wall_seconds": None,
        "k": {"l": {"m": {"n": EVIL}}},
        "yes": True,
        "stages": {"sft": {}},
    }
    make_stage(
        tmp_path / "odd",
        "sft",
        odd,
        [
            {
                "step": 1,
                "time": 0,
                "$x_$/_y$^": 1.0,
                "名/字": 2,
                "flag": True,
                "word": "w",
                "nan": math.nan,
            }
        ],
    )
    make_stage(tmp_path / "odd", "ppo", None, [], "{")
    report.write_report(tmp_path / "odd", LIFE)
    assert EVIL in parse(tmp_path / "odd" / "report.html").text


def test_the_rollouts_of_the_last_update_are_shown_and_escaped(tmp_path):
    make_stage(tmp_path / "run", "ppo", {"score": 1.0})
    lines = [
        {"step": 1, "prompt": "an older one", "response": "x", "score": 0.5},
        {"step": 2, "prompt": EVIL, "response": "a | b", "score": 0.25},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "run" / "ppo" / "rollouts.jsonl").write_text(text)
    report.write_report(tmp_path / "run", LIFE)
    page = parse(tmp_path / "run" / "report.html")
    assert EVIL in page.text and "script" not in page.tags and "an older one" not in page.text
    markdown = (tmp_path / "run" / "report.md").read_text()
    assert (
        "| &lt;script&gt;alert('x')&lt;/script&gt; &amp; \"q\" \\| `b`<br>你好,世界 |" in markdown
    )
    assert "| a \\| b | 0.25 |" in markdown and "an older one" not in markdown


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("result.json", "{"),
        ("result.json", "[1]"),
        ("metrics.jsonl", "{\n"),
        ("metrics.jsonl", "{}\n[]\n"),
        ("metrics.jsonl", '{"step": 1}\n{"step": null}\n'),
        ("rollouts.jsonl", '{"prompt": "a"}\n'),
    ],
)
def test_damaged_files_are_named(tmp_path, file, text):
    make_stage(tmp_path / "run", "sft")
    (tmp_path / "run" / "sft" / file).write_text(text)
    with pytest.raises(InputError, match=file) as caught:
        report.write_report(tmp_path / "run", LIFE)
    assert "\n" not in str(caught.value)


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_behind(run_dir):
    names = ("report.json", "report.md", "report.html")
    before = [(run_dir / name).read_bytes() for name in names]
    report.write_report(run_dir, LIFE)
    assert [(run_dir / name).read_bytes() for name in names] == before
    assert not list(run_dir.glob(".*"))
