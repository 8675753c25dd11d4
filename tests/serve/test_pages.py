"""The pages Chat and Tokens in a browser: what they show is what the server answers, and what is rated is stored."""

import contextlib
import json
import math
import re
import shlex
import shutil
import time
import urllib.request

import pytest
import yaml

from jaxllm import api
from jaxllm.config import build
from jaxllm.engine.config import SamplingConfig
from jaxllm.ranking.records import read_rankings
from tests.conftest import jaxllm
from tests.serve.small_server import make_tokenizer
from tests.web.browser import browser_page, open_browser

PROMPT = "Review 评论: The soup"
# Settings with which an answer does not end by itself: tokens that it has become likelier.
ENDLESS = {"temperature": 0, "presence_penalty": -2, "frequency_penalty": -2}
OFFLINE = ("ERR_INTERNET_DISCONNECTED", "ERR_FAILED")


def copy_stage(stage_dir, copy, **fields):
    """A copy whose model computes in float32: in bfloat16 two programs differ in the third digit."""
    shutil.copytree(stage_dir, copy)
    card = json.loads((copy / "model.json").read_text())
    card["model"] |= {"dtype": "float32", **fields}
    (copy / "model.json").write_text(json.dumps(card))


@pytest.fixture(scope="module")
def run_dir(tiny_run, tmp_path_factory):
    """A run with two models: `sft`, and `dpo`, which is the pretrained one with a long context."""
    folder = tmp_path_factory.mktemp("pages") / "run"
    copy_stage(tiny_run / "sft", folder / "sft")
    copy_stage(tiny_run / "pretrain", folder / "dpo", max_length=4096)
    return folder


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    """(its folder, the tokenizer): one with other tokens than the models'."""
    folder = tmp_path_factory.mktemp("tokenizers") / "other"
    tokenizer = make_tokenizer()
    tokenizer.save(folder)
    return folder, tokenizer


@pytest.fixture(scope="module")
def address(run_dir, other_tokenizer):
    log = run_dir.parent / "log.txt"
    options = ["--port", "0", "--tokenizers", str(other_tokenizer[0])]
    with log.open("w") as file:
        process = jaxllm("serve", str(run_dir), *options, stderr=file)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"pages at (http://[^/\s]+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield found[1]
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser():
    with open_browser() as running:
        yield running


def ask(address, path, **body):
    """The answer of the server to a program."""
    data = json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address + path, data), timeout=60) as answer:
        return json.load(answer)


def metric(address, name):
    """A metric of the server, summed over its models."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
        values = re.findall(rf"{name}{{.*}} (\S+)", answer.read().decode())
    return sum(map(float, values))


def unfinished(address):
    return metric(address, "jaxllm_unfinished_responses")


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- Chat.


@contextlib.contextmanager
def chat_page(browser, address, models=("sft",), allowed=(), settings=None, **options):
    """The Chat page with these models chosen."""
    with browser_page(browser, allowed, **options) as page:
        page.goto(f"{address}/chat")
        page.wait_for_selector("#models input")
        for name in ("sft", "dpo"):
            page.set_checked(f"#models input[value={name}]", name in models)
        if settings:
            page.click("#settings summary")
            fill_settings(page, settings)
        yield page


def fill_settings(page, settings):
    for name, value in settings.items():
        field = page.locator(f"#set-{name}")
        if name == "n":
            field.select_option(str(value))
        else:
            field.fill(str(value))


def send(page, text=PROMPT):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def newest(page):
    """The answers to the newest message."""
    return page.locator(".turn").last.locator(".answer")


def wait_for_answers(page, number=1):
    """Waits until all answers to message `number` have ended."""
    page.locator(".turn").nth(number - 1).wait_for()
    # The first answer with penalties is compiled.
    page.wait_for_selector("#stop-all:disabled", timeout=60_000)


def texts(page):
    return [element.text_content() for element in newest(page).locator(".text").all()]


@pytest.mark.parametrize("mode", ["chat", "text"])
def test_an_answer_is_that_of_the_api(browser, address, mode):
    settings = {"seed": 3, "temperature": 0.9, "max_tokens": 20, "n": 2}
    with chat_page(browser, address, settings=settings) as page:
        page.check(f"[name=mode][value={mode}]")
        send(page)
        wait_for_answers(page)
        if mode == "chat":
            message = {"role": "user", "content": PROMPT}
            path = "/v1/chat/completions"
            choices = ask(address, path, model="sft", messages=[message], **settings)["choices"]
            expected = [choice["message"]["content"] for choice in choices]
        else:
            answer = ask(address, "/v1/completions", model="sft", prompt=PROMPT, **settings)
            expected = [choice["text"] for choice in answer["choices"]]
        assert texts(page) == expected
        ends = [element.text_content() for element in newest(page).locator(".finish").all()]
        assert all("(stop)" in end or "(length)" in end for end in ends)
        assert "tokens/s" in newest(page).first.locator(".numbers").inner_text()


def test_text_appears_while_it_is_written(browser, address):
    settings = {**ENDLESS, "max_tokens": 1000}
    with chat_page(browser, address, ["dpo"], settings=settings) as page:
        page.evaluate("""() => {
          window.seen = [];
          const look = () => seen.push([...document.querySelectorAll(".answer .text")].map((e) => e.textContent).join());
          new MutationObserver(look).observe(document.querySelector("#turns"), { subtree: true, childList: true });
          window.spoken = 0;
          new MutationObserver(() => spoken++).observe(document.querySelector("#finished"), { childList: true });
        }""")
        send(page)
        wait_for_answers(page)
        (whole,) = texts(page)
        seen = list(dict.fromkeys(page.evaluate("() => seen")))
        assert len(seen) > 4
        assert all(whole.startswith(part) for part in seen)
        assert "(length)" in newest(page).inner_text()
        # A screen reader is told once, at the end.
        assert page.evaluate("() => spoken") == 1


def test_two_models_side_by_side_are_rated_by_keys(browser, address, run_dir):
    settings = {"system": "be kind", "max_tokens": 10, "n": 2}
    with chat_page(browser, address, ["sft", "dpo"], settings=settings) as page:
        send(page)
        wait_for_answers(page)
        names = [element.inner_text() for element in newest(page).locator(".name").all()]
        assert names == ["sft", "sft", "dpo", "dpo"]
        left, right = newest(page).nth(1).bounding_box(), newest(page).nth(2).bounding_box()
        assert left["y"] == right["y"] and left["x"] < right["x"]
        responses = texts(page)
        page.locator("#turns").click()  # out of the box
        page.keyboard.type("ca＝")
        assert "B, D" in page.inner_text("#rate-notice")
        assert page.locator("#rate-submit").is_disabled()
        newest(page).nth(1).locator(".letter").click()
        page.keyboard.type(">d")
        page.keyboard.press("Enter")
        assert "name" in page.inner_text("#rate-notice")
        page.keyboard.type("Lee")
        page.keyboard.press("Enter")
        page.wait_for_selector("#rate-notice:has-text('rankings.jsonl')")
        assert not page.locator("#order").is_visible()
        assert newest(page).nth(2).locator(".name").inner_text() == "dpo · rank 1"
        # The conversation goes on from the better answer of each model.
        pressed = [e.get_attribute("aria-pressed") for e in page.locator("[aria-pressed]").all()]
        assert pressed == ["true", "false", "true", "false"]
    path = run_dir / "ratings" / "rankings.jsonl"
    line = read_rankings(path)[-1]
    assert line["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": PROMPT},
    ]
    assert (line["responses"], line["ranks"]) == (responses, [2, 2, 1, 3])
    assert (line["annotator"], line["simulated"]) == ("Lee", False)


def test_blind_answers_are_unmasked_by_their_rating(browser, address, run_dir):
    settings = {"max_tokens": 10, "n": 3}
    with chat_page(browser, address, ["sft", "dpo"], settings=settings) as page:
        page.evaluate("() => localStorage.setItem('annotator', 'Kim')")
        page.reload()
        # The order is drawn: here always the reverse.
        page.evaluate("""() => {
          let next = 1000;
          crypto.getRandomValues = (words) => words.fill(next--);
        }""")
        page.check("#blind")
        send(page)
        wait_for_answers(page)
        shown = page.inner_text("#turns")
        assert "sft" not in shown and "dpo" not in shown and "tokens/s" not in shown
        names = [element.inner_text() for element in newest(page).locator(".name").all()]
        assert names == [f"Answer {letter}" for letter in "ABCDEF"]
        assert not page.locator("[aria-pressed]:visible").count()
        responses = texts(page)
        page.fill("#order", "FEDCBA")
        page.press("#order", "Enter")
        page.wait_for_selector("#rate-notice:has-text('rankings.jsonl')")
        names = [element.inner_text() for element in newest(page).locator(".name").all()]
        assert [name.split()[0] for name in names] == ["dpo"] * 3 + ["sft"] * 3
        assert names[0].endswith("rank 6") and names[5].endswith("rank 1")
    line = read_rankings(run_dir / "ratings" / "rankings.jsonl")[-1]
    assert (line["responses"], line["ranks"]) == (responses, [6, 5, 4, 3, 2, 1])
    assert line["annotator"] == "Kim"


def test_a_stopped_answer_ends_on_the_server_too(browser, address):
    with chat_page(browser, address, ["dpo"], settings=ENDLESS) as page:
        before = metric(address, "jaxllm_generated_tokens_total")
        send(page)
        wait_until(lambda: unfinished(address) == 1)
        newest(page).get_by_role("button", name="Stop").click()
        wait_until(lambda: unfinished(address) == 0)
        assert (
            metric(address, "jaxllm_generated_tokens_total") - before < 4000
        )  # of a context of 4096
        assert "stopped by you" in newest(page).inner_text()

        fill_settings(page, {"n": 2})
        send(page, "again")
        wait_until(lambda: unfinished(address) == 2)
        newest(page).nth(1).get_by_role("button", name="Stop").click()
        running, stopped = texts(page)
        wait_until(lambda: len(texts(page)[0]) > len(running))
        assert texts(page)[1] == stopped
        page.keyboard.press("Escape")
        wait_until(lambda: unfinished(address) == 0)
        assert "stopped by you" in newest(page).first.inner_text()
        assert "none that was stopped" in page.inner_text("#rate-notice")


def test_each_model_sees_its_own_answers(browser, address):
    with chat_page(browser, address, ["sft", "dpo"], settings={"max_tokens": 4}) as page:
        bodies = {}
        page.on("request", lambda request: note_body(request, bodies))
        send(page, "one")
        wait_for_answers(page)
        first = dict(zip(["sft", "dpo"], texts(page), strict=True))
        page.keyboard.insert_text("two")
        page.keyboard.press("Shift+Enter")
        page.keyboard.press("Enter")
        wait_for_answers(page, 2)
        for model, answer in first.items():
            said = [message["content"] for message in bodies[model]["messages"]]
            assert said == ["one", answer, "two\n"]
        assert "different conversations" in page.inner_text("#rate-notice")
        page.reload()
        assert page.locator(".turn").count() == 2

        # The newest message is written anew.
        page.keyboard.press("ArrowUp")
        assert page.input_value("#prompt") == "two\n"
        send(page, "three")
        page.wait_for_selector(".question:has-text('three')")
        wait_for_answers(page, 2)
        assert [message["content"] for message in bodies["sft"]["messages"]] == [
            "one",
            first["sft"],
            "three",
        ]
        assert page.locator(".turn").count() == 2
        page.keyboard.type("a draft")
        page.keyboard.press("Alt+n")
        assert page.locator(".turn").count() == 0
        page.click("#back")
        assert page.locator(".turn").count() == 2
        assert page.input_value("#prompt") == "a draft"


def note_body(request, bodies):
    if "completions" in request.url:
        body = json.loads(request.post_data)
        bodies[body["model"]] = body


def test_what_is_typed_is_not_lost(browser, address):
    with chat_page(browser, address, settings={"max_tokens": 4}) as page:
        page.click("#prompt")
        page.keyboard.type("half a sen")
        page.reload()
        assert page.input_value("#prompt") == "half a sen"
        send(page, "one")
        wait_for_answers(page)
        page.keyboard.type("draft")
        newest_question = page.locator(".turn").last.locator(".question")
        newest_question.get_by_role("button", name="Edit").click()
        assert page.input_value("#prompt") == "one"
        page.keyboard.type("!")
        page.keyboard.press("Escape")
        assert page.input_value("#prompt") == "one!\ndraft"
        assert newest_question.locator(".text").inner_text() == "one"
        # Enter that chooses a character of an input method is not for us.
        page.evaluate("""() => document.querySelector("#prompt").dispatchEvent(
          new KeyboardEvent("keydown", { key: "Enter", isComposing: true, bubbles: true, cancelable: true }))""")
        assert page.locator(".turn").count() == 1


def test_settings_are_remembered_and_can_be_used_elsewhere(browser, address):
    settings = {
        "temperature": 0.0000001,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "max_tokens": 7,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
    }
    others = {"seed": 5, "n": 2, "stop": "END\n\\n\\n", "system": "it's"}
    with chat_page(browser, address, settings=settings | others) as page:
        page.reload()
        assert page.is_checked("#models input[value=sft]")
        assert not page.is_checked("#models input[value=dpo]")
        page.fill("#prompt", "what's new?")
        page.click("#settings summary")
        page.click("#copy-config")
        config = build(
            SamplingConfig, yaml.safe_load(page.input_value("#copied"))["sample"]["sampling"]
        )
        settings["max_new_tokens"] = settings.pop("max_tokens")
        assert config == SamplingConfig(**settings)
        page.click("#copy-curl")
        words = shlex.split(page.input_value("#copied"))
        assert words[:2] == ["curl", f"{address}/v1/chat/completions"]
        body = json.loads(words[-1])
        assert body["stop"] == ["END", "\n\n"]
        assert [message["content"] for message in body["messages"]] == ["it's", "what's new?"]
        assert len(ask(address, "/v1/chat/completions", **body)["choices"]) == 2

        page.fill("#set-top_k", "1.5")
        page.press("#prompt", "Enter")
        assert "Top k" in page.inner_text("#notice")
        assert page.input_value("#prompt") == "what's new?"
        page.click("#reset")
        page.reload()
        assert page.input_value("#set-top_p") == page.input_value("#set-system") == ""
        assert page.input_value("#set-n") == "1"


HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"> \u202etxt.exe"


def test_text_is_never_markup(browser, address):
    with chat_page(browser, address) as page:
        part = {"index": 0, "delta": {"content": HOSTILE}, "finish_reason": "stop"}
        body = f"data: {json.dumps({'choices': [part]})}\n\ndata: [DONE]\n\n"
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(body=body, content_type="text/event-stream"),
        )
        send(page, HOSTILE)
        wait_for_answers(page)
        shown = HOSTILE.replace("\u202e", "⟨202E⟩")
        assert texts(page) == [shown]
        assert page.locator(".question .text").text_content() == shown
        assert "\u202e" not in page.text_content("#finished")
        assert page.title() == "jaxllm chat"


def test_errors_are_shown_where_the_answer_would_be(browser, address):
    allowed = ("status of 400", *OFFLINE)
    with chat_page(browser, address, ["sft", "dpo"], allowed, {"max_tokens": 40}) as page:
        send(page, "The soup is good. " * 20)
        wait_for_answers(page)
        assert "exceed the context of 64" in newest(page).first.inner_text()
        assert "exceed" not in newest(page).nth(1).inner_text()
        page.uncheck("#models input[value=dpo]")
        page.context.set_offline(True)
        send(page)
        page.wait_for_selector(".bad:has-text('does not answer')")
        page.context.set_offline(False)
        newest(page).get_by_role("button", name="Try again").click()
        page.wait_for_selector(".turn:last-child .finish:has-text('(')")
        # What had failed is no part of the conversation.
        assert texts(page) != [""]

        # A connection that is lost on the way.
        part = {"index": 0, "delta": {"content": "half"}, "finish_reason": None}
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(body=f"data: {json.dumps({'choices': [part]})}\n\n"),
        )
        send(page, "more")
        page.wait_for_selector(".bad:has-text('connection was lost')")
        assert texts(page) == ["half"]


def test_a_model_without_a_chat_template_completes_text_only(browser, address):
    with chat_page(browser, address, ["sft", "dpo"], settings={"max_tokens": 4}) as page:

        def refuse(route):
            answer = route.fetch().json()
            answer["models"][0]["chat_refusal"] = "it has no template"
            route.fulfill(json=answer)

        page.route("**/api/models", refuse)
        page.reload()
        page.wait_for_selector("#refusals:has-text('sft: it has no template')")
        assert page.is_disabled("#models input[value=sft]")
        send(page)
        wait_for_answers(page)
        assert newest(page).count() == 1
        page.check("[name=mode][value=text]")
        assert page.is_checked("#models input[value=sft]")
        send(page)
        wait_for_answers(page, 2)
        assert newest(page).count() == 2
        assert "continued texts" in page.inner_text("#rate-notice")


# --- Tokens.


@contextlib.contextmanager
def tokens_page(browser, address, **options):
    with browser_page(browser, **options) as page:
        page.goto(f"{address}/tokens")
        page.wait_for_selector("#model option", state="attached")
        yield page


def look(page, text):
    page.fill("#text", text)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".token:focus")


def number(page, name, row=0):
    return float(page.locator(f"#numbers [data-name={name}]").nth(row).inner_text())


TEXT = "The soup is good.\n汤很好喝 𠮷"


def test_the_numbers_are_those_of_the_model(browser, address, run_dir):
    pieces, logprobs = api.load(str(run_dir / "sft")).logprobs(TEXT)
    with tokens_page(browser, address) as page:
        look(page, TEXT)
        joint = 0.0
        tokens = page.locator(".token")
        assert tokens.count() == len(pieces)
        for i, logprob in enumerate(logprobs.tolist()):
            joint += logprob
            assert page.locator("#detail tr.actual").count() == 1
            detail = page.inner_text("#detail")
            shown = [
                float(each) for each in re.findall(r"(?:log-probability|here) (-?[\d.]+)", detail)
            ]
            assert shown[0] == pytest.approx(logprob, abs=1e-4)
            assert float(re.findall(r"up to here (-?[\d.]+)", detail)[0]) == pytest.approx(
                joint, abs=2e-4
            )
            percent = float(tokens.nth(i).locator("small").inner_text().rstrip("%"))
            # At least one digit, of three where there is room.
            assert percent == pytest.approx(
                100 * math.exp(logprob), rel=0.01 if percent > 1e-3 else 0.5
            )
            page.keyboard.press("ArrowRight")
        assert number(page, "jointHead") == pytest.approx(joint, abs=1e-3)
        assert number(page, "perplexity") == pytest.approx(math.exp(-joint / len(pieces)), rel=1e-3)
        assert number(page, "bits") == pytest.approx(-joint / math.log(2) / len(pieces), rel=1e-3)
        assert number(page, "bytes") == pytest.approx(len(TEXT.encode()) / len(pieces), rel=1e-3)
        power = page.locator("#numbers [data-name=jointPower]").first.inner_text()
        assert float(power.removeprefix("10^")) == pytest.approx(joint / math.log(10), abs=0.051)
        # Nothing of the text is missing, and each byte of a character that is apart is shown.
        shown = "".join(token.text_content() for token in tokens.locator("b").all())
        unsigned = shown.replace("␣", " ").replace("⏎", "\n")
        data = re.sub(
            rb"<([0-9A-F]{2})>", lambda found: bytes.fromhex(found[1].decode()), unsigned.encode()
        )
        assert data.decode() == TEXT
        assert "<F0>" in shown


def test_another_tokenizer_counts_the_same_text(browser, address, other_tokenizer):
    _, tokenizer = other_tokenizer
    text = "The soup was served at once and the waiter was kind to all of us."
    with tokens_page(browser, address) as page:
        look(page, text)
        assert page.locator("#numbers th").nth(1).inner_text() == "other (tokenizer)"
        count = len(tokenizer.encode(text))
        assert number(page, "count", 1) == count != number(page, "count", 0)
        assert number(page, "english", 1) == pytest.approx(750 * count / 15, rel=1e-3)
        # It has no probabilities.
        assert page.locator("#numbers [data-name=perplexity]").nth(1).inner_text() == ""


def test_tokens_are_read_with_the_keyboard(browser, address):
    with tokens_page(browser, address) as page:
        look(page, "The soup is good, and the bread is good. " * 2)
        focused = lambda: int(page.locator(".token:focus").get_attribute("data-i"))
        last = page.locator(".token").count() - 1
        assert focused() == 0
        for key, expected in [("ArrowRight", 1), ("End", last), ("ArrowRight", last), ("Home", 0)]:
            page.keyboard.press(key)
            assert focused() == expected
        page.set_viewport_size({"width": 400, "height": 800})
        page.keyboard.press("ArrowDown")
        below = focused()
        top = lambda i: page.locator(".token").nth(i).bounding_box()["y"]
        assert top(below) > top(0)
        page.keyboard.press("ArrowUp")
        assert focused() == 0
        page.keyboard.press("ArrowRight")
        # One stop of Tab, with a name that says what is seen.
        assert page.locator(".token[tabindex='0']").count() == 1
        label = page.locator(".token:focus").get_attribute("aria-label")
        assert page.locator(".token:focus small").inner_text() in label
        rows = page.locator("#detail tbody tr")
        assert rows.count() in (10, 11)
        percents = [
            float(row.inner_text().rstrip("%")) for row in rows.locator("td:nth-child(2)").all()
        ]
        assert percents == sorted(percents, reverse=True)
        assert page.locator("#detail tr.actual").count() == 1
        assert "in the text" in page.locator("#detail tr.actual").inner_text()


def test_two_models_on_one_text(browser, address, run_dir):
    text = "The soup is good."
    with tokens_page(browser, address) as page:
        page.select_option("#model", "sft")
        page.select_option("#other", "dpo")
        look(page, text)
        sums = [api.load(str(run_dir / name)).logprobs(text)[1].sum() for name in ("sft", "dpo")]
        for row, expected in enumerate(sums):
            assert number(page, "jointHead", row) == pytest.approx(expected, abs=1e-3)
        said = page.inner_text("#difference")
        better = "sft" if sums[0] > sums[1] else "dpo"
        assert said.startswith(f"{better} finds")
        assert float(re.findall(r"by ([\d.]+) nats", said)[0]) == pytest.approx(
            abs(sums[0] - sums[1]), abs=1e-3
        )
        assert page.locator(".token").first.locator("small").count() == 2
        assert page.locator("#detail table").count() == 2

        # Of tokenizers that cut the text differently each has its tokens.
        def merge(route):
            answer = route.fetch().json()
            answer["tokens"][0]["bytes"] += answer["tokens"].pop(1)["bytes"]
            route.fulfill(json=answer)

        page.route("**/api/tokens", merge, times=1)
        page.click("#look")
        page.wait_for_selector("#difference:has-text('cut this text differently')")
        assert page.locator("[role=listbox]").count() == 2


def test_a_text_that_cannot_be_looked_at(browser, address):
    with tokens_page(browser, address, allowed=("status of 400", *OFFLINE)) as page:
        page.select_option("#model", "sft")
        page.click("#look")
        page.wait_for_selector("#notice:has-text('has 0 tokens')")
        page.fill("#text", "The soup is good. " * 50)
        page.click("#look")
        page.wait_for_selector("#notice:has-text('the context holds 1 to 64')")
        page.context.set_offline(True)
        page.click("#look")
        page.wait_for_selector("#notice:has-text('does not answer')")
        page.context.set_offline(False)
        page.reload()
        assert page.input_value("#text").startswith("The soup")
        look(page, HOSTILE[:30])
        assert page.title() == "jaxllm tokens"


def test_an_answer_that_comes_too_late_is_not_shown(browser, address):
    with tokens_page(browser, address) as page:
        held = []
        page.route("**/api/tokens", lambda route: held.append(route), times=1)
        page.fill("#text", "slow")
        page.click("#look")
        wait_until(lambda: page.wait_for_timeout(20) or held)
        look(page, "a")
        with page.expect_response("**/api/tokens"):
            held[0].continue_()
        page.wait_for_timeout(50)
        assert page.locator(".token").count() == 1


# --- Both.


def test_on_a_phone_in_chinese(browser, address):
    phone = {"viewport": {"width": 360, "height": 640}, "locale": "zh-CN", "has_touch": True}
    width = "() => document.documentElement.scrollWidth"
    with chat_page(browser, address, ["sft", "dpo"], (), {"max_tokens": 20}, **phone) as page:
        send(page, "The soup " * 6)
        wait_for_answers(page)
        assert "评分" in page.inner_text("#rate-notice")
        left, below = newest(page).first.bounding_box(), newest(page).nth(1).bounding_box()
        assert left["x"] == below["x"] and left["y"] < below["y"]
        assert page.evaluate(width) == 360
        page.goto(f"{address}/tokens")
        page.wait_for_selector("#model option", state="attached")
        look(page, TEXT)
        assert "对数概率" in page.inner_text("#detail")
        assert page.evaluate(width) == 360
        # No text has been forgotten in a language.
        page.goto(f"{address}/chat")
        for element in page.locator("[data-t]").all():
            assert element.text_content() != element.get_attribute("data-t"), element
