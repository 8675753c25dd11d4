"""People rank in a browser: each order on the page is the one in rankings.jsonl, once, whatever happens on the way."""

import contextlib
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest
from starlette.testclient import TestClient

from jaxllm.commands import read_config
from jaxllm.config import InputError, build
from jaxllm.ranking.answers import Answers
from jaxllm.ranking.orders import LABELS, parse_order, shown_order, unshuffle
from jaxllm.ranking.records import read_rankings
from jaxllm.runtime.store.lease import LeaseLost
from jaxllm.stages.config import RankConfig
from jaxllm.web import rank as web_rank
from jaxllm.web.guard import Rules
from jaxllm.web.rank import Ranking, make_app, rank_in_browser
from jaxllm.web.server import bind, serve
from tests.conftest import ROOT
from tests.ranking.workspaces import make_workspace, rankings, run_rank
from tests.web.browser import browser_page, open_browser, watch

SEED = 7


def sample(text, responses):
    return {
        "messages": [{"role": "user", "content": text}],
        "responses": responses,
        "split": "train",
    }


SAMPLES = [sample(f"question {i}", [f"answer {i}.{k}" for k in range(4)]) for i in range(10)]


@pytest.fixture
def answers(tmp_path):
    return Answers(tmp_path, SAMPLES, seed=SEED)


def stored(index, text, samples=SAMPLES):
    """The ranks in rankings.jsonl of an order of the letters on the page."""
    num_responses = len(samples[index]["responses"])
    return unshuffle(parse_order(text, num_responses), shown_order(SEED, index, num_responses))


def written(folder):
    """(question, annotator, ranks) of each line of rankings.jsonl."""
    return [
        (line["messages"][0]["content"], line["annotator"], line["ranks"])
        for line in read_rankings(folder / "rankings.jsonl")
    ]


# --- HTTP.


def client(answers, rules=None, **options):
    app = make_app(Ranking(answers, SEED, **options), rules or Rules("127.0.0.1"))
    return TestClient(app, base_url="http://localhost")


def post(to, index, name="Lee", path="/api/rank", **fields):
    return to.post(path, json={"annotator": name, "index": index, **fields})


def message(response, status):
    assert response.status_code == status, response.text
    text = response.json()["error"]["message"]
    assert "\n" not in text
    return text


def test_a_sample_is_shown_shuffled_without_its_source_and_the_answer_is_stored_unshuffled(
    answers, tmp_path
):
    now = 0.0
    with client(answers, guidelines="be\nkind", clock=lambda: now) as to:
        state = to.get("/api/rank", params={"annotator": "Lee"}).json()
        order = shown_order(SEED, 0, 4)
        assert state == {
            "index": 0,
            "messages": [{"role": "user", "text": "question 0"}],
            "responses": [SAMPLES[0]["responses"][i] for i in order],
            "answered": 0,
            "remaining": 10,
            "total": 10,
            "can_undo": False,
            "newest": None,
            "guidelines": "be\nkind",
            "seconds_per_answer": None,
            "done": False,
            "agreement": None,
        }
        now = 12.0
        state = post(to, 0, ranks=[2, 1, 3, 2], note=" so so ").json()
        assert (state["index"], state["answered"], state["remaining"]) == (1, 1, 9)
        assert (state["newest"], state["seconds_per_answer"]) == (0, 12.0)
    (line,) = read_rankings(tmp_path / "rankings.jsonl")
    assert line["ranks"] == stored(0, "B>A=D>C")
    assert line["note"] == "so so"
    assert line["simulated"] is False


def test_a_request_that_is_sent_again_is_recorded_once(answers, tmp_path):
    with client(answers) as to:
        for _ in range(3):
            state = post(to, 0, ranks=[1, 2, 3, 4]).json()
            assert (state["index"], state["answered"]) == (1, 1)
        for _ in range(2):
            assert post(to, 1, skip=True).json()["index"] == 2
        for _ in range(2):
            assert post(to, 1, path="/api/rank/undo").json()["index"] == 1
    assert written(tmp_path) == [("question 0", "Lee", stored(0, "A>B>C>D"))]
    assert not (tmp_path / "skipped.jsonl").read_bytes()


def test_conflicts_are_one_clear_line_and_change_nothing(answers, tmp_path):
    with client(answers) as to:
        post(to, 0, ranks=[1, 2, 3, 4])
        post(to, 1, skip=True)
        assert "already" in message(post(to, 0, ranks=[4, 3, 2, 1]), 409)
        assert "already" in message(post(to, 0, skip=True), 409)
        assert "already" in message(post(to, 1, ranks=[1, 2, 3, 4]), 409)
        assert "others" in message(post(to, 0, "Kim", ranks=[1, 2, 3, 4]), 409)
        assert "since" in message(post(to, 0, path="/api/rank/undo"), 409)
        for path in ("/api/rank", "/api/rank/undo"):
            for index in (-1, 10, 10**400):
                assert "no such prompt" in message(post(to, index, path=path, skip=True), 404)
    assert len(written(tmp_path)) == 1


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"annotator": None}, "annotator"),
        ({"annotator": ""}, "annotator"),
        ({"annotator": "a" * 41}, "annotator"),
        ({"annotator": "a\u202eb"}, "annotator"),
        ({"index": None}, "index"),
        ({"index": True}, "index"),
        ({"index": "0"}, "index"),
        ({"ranks": None}, "ranks"),
        ({"ranks": [1, 2, 3]}, "ranks"),
        ({"ranks": [1, 2, 3, True]}, "ranks"),
        ({"ranks": [1, 2, 4, 4]}, "ranks"),
        ({"ranks": [1, 2, 3, 10**1000]}, "ranks"),
        ({"ranks": "ABCD"}, "ranks"),
        ({"skip": "yes"}, "skip"),
        ({"skip": True}, "skip"),
        ({"note": 3}, "note"),
        ({"note": "a" * 5000}, "note"),
    ],
)
def test_a_malformed_field_is_named(answers, tmp_path, fields, name):
    with client(answers) as to:
        body = {"annotator": "Lee", "index": 0, "ranks": [1, 2, 3, 4], **fields}
        response = to.post("/api/rank", json=body)
        assert message(response, 400).startswith(f"{name}: ")
        assert response.json()["error"]["param"] == name
    assert not written(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b"1" * 5000, b'{"index": 1e999}']
)
def test_a_malformed_body_is_refused(answers, tmp_path, content):
    with client(answers) as to:
        for path in ("/api/rank", "/api/rank/undo"):
            assert message(to.post(path, content=content), 400)
    assert message(to.get("/api/rank"), 400).startswith("annotator: ")
    assert not written(tmp_path)


def test_a_lone_surrogate_in_a_note_is_the_same_answer_after_a_restart(tmp_path):
    body = b'{"annotator": "Lee", "index": 0, "ranks": [1, 2, 3, 4], "note": "half \\ud800"}'
    for _ in range(2):
        with client(Answers(tmp_path, SAMPLES, seed=SEED)) as to:
            assert to.post("/api/rank", content=body).status_code == 200
    assert len(written(tmp_path)) == 1


def test_other_hosts_origins_and_people_without_the_key_are_refused(answers, tmp_path):
    body = {"annotator": "Lee", "index": 0, "skip": True}
    with client(answers) as to:
        assert to.post("/api/rank", json=body, headers={"Host": "evil.com"}).status_code == 403
        assert (
            to.post("/api/rank", json=body, headers={"Origin": "http://evil.com"}).status_code
            == 403
        )
    with client(answers, Rules("0.0.0.0", api_key="secret")) as to:
        assert to.post("/api/rank", json=body).status_code == 401
        assert to.get("/rank").status_code == 200
        key = {"Authorization": "Bearer secret"}
        assert to.post("/api/rank", json=body, headers=key).status_code == 200
    assert answers.count("Lee") == 1


def test_a_lost_store_ends_the_ranking(answers, monkeypatch):
    def lost(_):
        raise LeaseLost("another run works there")

    monkeypatch.setattr("jaxllm.ranking.answers.make_durable", lost)
    ranking = Ranking(answers, SEED)
    with TestClient(make_app(ranking, Rules("127.0.0.1")), base_url="http://localhost") as to:
        assert "another run" in message(post(to, 0, skip=True), 503)
    assert isinstance(ranking.failure, LeaseLost)


# --- The stage.


def test_the_stage_serves_until_all_is_answered(tmp_path, monkeypatch):
    workspace = make_workspace(tmp_path / "run", count=2)
    monkeypatch.setattr(web_rank, "_LINGER_SECONDS", 0.0)
    printed = []
    monkeypatch.setattr(web_rank.console, "print", lambda text, **_: printed.append(text))
    opened = queue.Queue()
    monkeypatch.setattr("webbrowser.open", opened.put)
    config = RankConfig(annotator="browser", port=0, open_browser=True)
    results = []
    work = lambda: results.append(run_rank(workspace, config))
    stage = threading.Thread(target=work, daemon=True)
    stage.start()
    link = opened.get(timeout=20)
    for index in range(2):
        send(link, f'{{"annotator": "Lee", "index": {index}, "ranks": [1, 2, 3, 4]}}')
    stage.join(20)
    assert (results[0]["prompts"], results[0]["annotator"]) == (2, "Lee")
    assert link in printed[0]
    assert printed[-1] == "rank: 2 of 2 answers, annotators: 1"


def test_an_address_that_others_reach_needs_a_key(answers, monkeypatch):
    with pytest.raises(InputError, match="JAXLLM_API_KEY"):
        rank_in_browser(answers, SEED, host="0.0.0.0", port=0)
    taken = bind("127.0.0.1", 0)
    taken.listen()
    with taken, pytest.raises(InputError, match=r"^--rank\.port: \d+ is in use"):
        rank_in_browser(answers, SEED, port=taken.getsockname()[1])


def test_without_the_extra_the_stage_says_what_to_install(tmp_path, monkeypatch):
    workspace = make_workspace(tmp_path / "run", count=2)
    monkeypatch.delitem(sys.modules, "jaxllm.web.rank")
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(InputError, match=r"needs starlette.*jaxllm\[web\]"):
        run_rank(workspace, RankConfig(annotator="browser"))


def test_the_alias_sets_both_fields_and_belongs_to_rank():
    section = read_config("rank", ["tiny", "--browser", "--rank.port", "0"]).rank
    assert (section.annotator, section.open_browser, section.port) == ("browser", True, 0)
    with pytest.raises(InputError, match="--browser"):
        read_config("sft", ["tiny", "--browser"])


def test_only_people_share_prompts():
    assert build(RankConfig, {"annotator": "browser", "overlap": 0.5}).overlap == 0.5
    with pytest.raises(InputError, match="overlap"):
        build(RankConfig, {"annotator": "a:b", "overlap": 0.5})


STAGE = """
import sys
from jaxllm.runtime.processes import Signals
from jaxllm.stages.rank import RankConfig
from jaxllm.workspace import StageCut
from tests.ranking.workspaces import open_workspace, run_rank
Signals().install()
try:
    run_rank(open_workspace(sys.argv[1]), RankConfig(annotator="browser", port=0))
except StageCut as cut:
    print(cut, file=sys.stderr)
    sys.exit(3)
"""


def send(link, body):
    url = link.replace("/rank", "/api/rank")
    with urllib.request.urlopen(urllib.request.Request(url, body.encode())) as response:
        assert response.status == 200


def test_an_interrupt_says_how_many_are_answered(tmp_path):
    workspace = make_workspace(tmp_path / "run", count=3)
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, str(workspace.run_dir)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stderr
    line = next(line for line in process.stderr if "http://" in line)
    link = re.search(r"http://\S+", line)
    assert link
    send(link[0], '{"annotator": "Lee", "index": 0, "ranks": [1, 2, 3, 4]}')
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(20) == 3
    assert "1 of 3" in rest and "Traceback" not in rest
    assert len(rankings(workspace)) == 1


# --- The page.


@pytest.fixture(scope="module")
def browser():
    with open_browser() as running:
        yield running


@contextlib.contextmanager
def serving(answers, guidelines=""):
    """The address of a server."""
    ended = threading.Event()
    bound = bind("127.0.0.1", 0)
    address = f"http://127.0.0.1:{bound.getsockname()[1]}"
    app = make_app(Ranking(answers, SEED, guidelines), Rules("127.0.0.1"))
    options = {"is_done": ended.is_set}
    thread = threading.Thread(target=serve, args=(app, bound), kwargs=options)
    thread.start()
    try:
        yield address
    finally:
        ended.set()
        thread.join(20)


@contextlib.contextmanager
def ranking_page(browser, address, name="Lee", **options):
    with browser_page(browser, **options) as page:
        page.goto(f"{address}/rank")
        page.fill("#name", name)
        page.keyboard.press("Enter")
        yield page


def wait_for(page, selector, text):
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector).textContent.includes(text)",
        arg=[selector, text],
    )


def answer(page, number, keys):
    """Types an order for a prompt and submits it; the first is number 1."""
    wait_for(page, "#heading", f"Prompt {number}")
    page.keyboard.type(keys)
    page.keyboard.press("Enter")


def random_order(rng, num_responses=4):
    """An order as it is typed, B=ADC, and as it is shown, B = A > D > C."""
    labels = rng.sample(LABELS[:num_responses], num_responses)
    signs = [rng.choice(["", "", "="]) for _ in labels[1:]]
    typed = labels[0] + "".join(s + label for s, label in zip(signs, labels[1:], strict=True))
    shown = labels[0] + "".join(
        f" {s or '>'} {label}" for s, label in zip(signs, labels[1:], strict=True)
    )
    return typed, shown


def test_ten_prompts_by_keys(browser, answers, tmp_path):
    rng = random.Random(5)
    expected = []
    with (
        serving(answers, "Prefer <b>kind</b>\nanswers") as address,
        ranking_page(browser, address) as page,
    ):
        for index in range(10):
            typed, shown = random_order(rng)
            wait_for(page, "#heading", f"Prompt {index + 1}")
            # A letter too many, a wrong one and a second one do no harm.
            page.keyboard.type(typed[0].lower() + "Zz" + typed[0] + typed[1:])
            assert page.text_content("#order") == shown
            page.keyboard.press("Backspace")
            page.keyboard.press("Enter")  # refused: it is not complete
            assert "without a place" in page.text_content("#notice")
            page.keyboard.type("=" * (typed[-2] == "=") + typed[-1])
            page.keyboard.press("Enter")
            expected.append((f"question {index}", "Lee", stored(index, shown)))
        wait_for(page, "#heading", "All prompts are answered")
        assert page.text_content(".bar a[aria-current]") == "Rank"
        assert page.text_content("#guidelines") == "Prefer <b>kind</b>\nanswers"
    assert written(tmp_path) == expected


def test_by_moving_cards_on_a_phone_in_chinese(browser, answers, tmp_path):
    phone = {"viewport": {"width": 360, "height": 1400}, "locale": "zh-CN"}
    with serving(answers) as address, ranking_page(browser, address, "王", **phone) as page:
        wait_for(page, "#heading", "提示 1")
        page.drag_and_drop("#card-D .text", "#card-A")
        assert page.text_content("#order") == "D > A > B > C"
        page.drag_and_drop("#card-D .text", "#card-B")
        assert page.text_content("#order") == "A > B > D > C"
        page.click("#card-C button:text('↑')")
        page.click("#card-A button:text('↓')")
        page.click("#card-D button:text('=')")
        assert page.text_content("#order") == "B > A > C = D"
        page.drag_and_drop("#card-B .text", "#card-A")
        assert page.text_content("#order") == "A > B > C = D"
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.keyboard.press("Enter")
        wait_for(page, "#heading", "提示 2")
        # Touch: the letters on the cards. Then full-width letters, as an input method types them.
        page.click("#card-B button:text-is('B')")
        for key in ("＝", "Ｄ", "ａ", "Ｃ", "Enter"):
            page.evaluate(
                "key => document.body.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}))",
                key,
            )
        wait_for(page, "#heading", "提示 3")
        page.click("#skip")
        wait_for(page, "#heading", "提示 4")
    assert written(tmp_path) == [
        ("question 0", "王", stored(0, "A>B>C=D")),
        ("question 1", "王", stored(1, "B=D>A>C")),
    ]
    assert '"index": 2' in (tmp_path / "skipped.jsonl").read_text()


def test_undo_note_and_reload(browser, answers, tmp_path):
    with serving(answers) as address, ranking_page(browser, address) as page:
        answer(page, 1, "ABCD")
        answer(page, 2, "BACD")
        wait_for(page, "#heading", "Prompt 3")
        page.keyboard.press("s")
        wait_for(page, "#heading", "Prompt 4")
        for number in (3, 2):
            page.keyboard.press("Control+z")
            wait_for(page, "#heading", f"Prompt {number}")
        page.keyboard.type("CB")
        page.reload()
        wait_for(page, "#heading", "Prompt 2")
        assert page.text_content("#order") == "none yet"
        page.keyboard.type("n")
        page.keyboard.type("A, s and ? are letters here")
        page.keyboard.press("Escape")
        answer(page, 2, "DCBA")
        wait_for(page, "#heading", "Prompt 3")
        assert page.input_value("#note") == ""
        page.keyboard.press("?")
        assert page.is_visible("#help")
        page.keyboard.press("Escape")
    first, second = read_rankings(tmp_path / "rankings.jsonl")
    assert (first["ranks"], second["ranks"]) == (stored(0, "A>B>C>D"), stored(1, "D>C>B>A"))
    assert second["note"] == "A, s and ? are letters here"
    assert not (tmp_path / "skipped.jsonl").read_bytes()


def test_two_people_share_prompts(browser, tmp_path):
    answers = Answers(tmp_path, SAMPLES[:2], seed=SEED, overlap=1.0)
    with (
        serving(answers) as address,
        ranking_page(browser, address, "Lee") as lee,
        ranking_page(browser, address, "Kim") as kim,
    ):
        for number in (1, 2):
            answer(lee, number, "ABCD")
        # Lee has answered everything, and waits for Kim.
        wait_for(lee, "#heading", "Nothing to rank")
        answer(kim, 1, "ABCD")
        answer(kim, 2, "ABDC")
        wait_for(kim, "#heading", "All prompts are answered")
        wait_for(lee, "#heading", "All prompts are answered")
        assert "92% of 12 pairs" in kim.text_content("#counts")
    assert [(question, name) for question, name, _ in written(tmp_path)] == [
        ("question 0", "Lee"),
        ("question 1", "Lee"),
        ("question 0", "Kim"),
        ("question 1", "Kim"),
    ]


def test_two_tabs_of_one_person(browser, answers, tmp_path):
    conflict = ("status of 409",)
    with serving(answers) as address, ranking_page(browser, address) as page:
        wait_for(page, "#heading", "Prompt 1")
        other = page.context.new_page()
        errors = watch(other, conflict)
        other.goto(f"{address}/rank")
        wait_for(other, "#heading", "Prompt 1")
        answer(page, 1, "ABCD")
        wait_for(page, "#heading", "Prompt 2")
        answer(other, 1, "DCBA")
        wait_for(other, "#heading", "Prompt 2")
        wait_for(other, "#notice", "answered meanwhile")
        answer(other, 2, "DCBA")
        wait_for(other, "#heading", "Prompt 3")
        assert not errors
    assert written(tmp_path) == [
        ("question 0", "Lee", stored(0, "A>B>C>D")),
        ("question 1", "Lee", stored(1, "D>C>B>A")),
    ]


def test_text_of_a_model_is_harmless(browser, tmp_path):
    hostile = [
        "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">",
        "safe \u202etxt.exe\u202c \u200b\u0007",
        "x" * 1_000_000,
    ]
    samples = [sample("<b>bold</b>", hostile), sample("next", ["a", "b"])]
    answers = Answers(tmp_path, samples, seed=SEED)
    with serving(answers) as address, ranking_page(browser, address) as page:
        wait_for(page, "#heading", "Prompt 1")
        assert "<b>bold</b>" in page.inner_text("#messages")
        shown = page.inner_text("#cards")
        assert "<script>" in shown and "⟨202E⟩" in shown and "\u202e" not in shown
        assert page.title() == "jaxllm rank"
        assert len(shown) < 100_000
        page.click("text=Show all")
        page.keyboard.type("bca")
        page.keyboard.press("Control+z")  # nothing to undo
        page.click("#submit")
        wait_for(page, "#heading", "Prompt 2")
    assert written(tmp_path) == [("<b>bold</b>", "Lee", stored(0, "B>C>A", samples))]


def test_a_lost_connection_loses_and_doubles_nothing(browser, answers, tmp_path):
    offline = ("ERR_INTERNET_DISCONNECTED", "ERR_CONNECTION", "ERR_FAILED")
    with serving(answers) as address, ranking_page(browser, address, allowed=offline) as page:
        answer(page, 1, "ABCD")
        wait_for(page, "#heading", "Prompt 2")
        page.context.set_offline(True)
        answer(page, 2, "BACD")
        wait_for(page, "#notice", "Trying again")
        page.keyboard.type("DCBA")  # not taken while the answer is on its way
        page.keyboard.press("Enter")
        page.context.set_offline(False)
        wait_for(page, "#heading", "Prompt 3")

        # The answer arrives, and what the server says does not.
        def lose(route):
            route.fetch()
            route.abort()

        page.route("**/api/rank", lose, times=1)
        answer(page, 3, "CABD")
        wait_for(page, "#heading", "Prompt 4")
    assert written(tmp_path) == [
        ("question 0", "Lee", stored(0, "A>B>C>D")),
        ("question 1", "Lee", stored(1, "B>A>C>D")),
        ("question 2", "Lee", stored(2, "C>A>B>D")),
    ]


def test_a_letter_is_a_label_before_it_is_a_command(browser, tmp_path):
    samples = [sample(f"q {i}", [f"{i} {k}" for k in range(20)]) for i in range(2)]
    answers = Answers(tmp_path, samples, seed=SEED)
    with serving(answers) as address, ranking_page(browser, address) as page:
        wait_for(page, "#heading", "Prompt 1")
        page.keyboard.type("sn")
        assert page.text_content("#order") == "S > N"
        page.keyboard.press("Shift+S")
        answer(page, 2, LABELS[:20].lower())
        wait_for(page, "#heading", "All prompts are answered")
    assert written(tmp_path) == [("q 1", "Lee", stored(1, ">".join(LABELS[:20]), samples))]
