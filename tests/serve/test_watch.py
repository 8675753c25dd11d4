"""What the Watch page shows of runs: all that they wrote, as soon as it is written, and nothing of other files."""

import contextlib
import itertools
import json
import math
import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.testclient import TestClient

from jaxllm.serve import watch
from jaxllm.serve.watch import MOST_POINTS, MOST_RESPONSES, read_curves, thinned
from jaxllm.web import pages, server
from jaxllm.web.errors import ApiError
from jaxllm.web.guard import Guard, Rules
from tests.web.browser import browser_page, open_browser


def answer(_, error):
    return error.response()


def app_of(runs, api_key=""):
    app = Starlette(
        routes=[*watch.routes(runs), *pages.routes("watch")],
        exception_handlers={ApiError: answer},
    )
    return Guard(app, Rules("127.0.0.1", api_key))


def client_of(runs):
    return TestClient(app_of(runs), base_url="http://localhost")


def metrics_text(values, first=10):
    """Lines of a metrics.jsonl: a loss each 10 steps."""
    lines = [
        {"step": first + 10 * i, "time": 1.5e9 + i, "train/loss": value}
        for i, value in enumerate(values)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_run(folder, values=(3.0, 2.5, 2.25), stage="sft"):
    """A run that is in a stage."""
    (folder / stage).mkdir(parents=True)
    (folder / stage / "metrics.jsonl").write_text(metrics_text(values))
    line = {"attempt": 1, "time": 1.0, "stage": stage, "step": 30, "num_steps": 60}
    line["seconds"] = {"step": 4.0}
    (folder / "goodput.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def write_rollouts(folder, texts, stage="ppo"):
    """Two responses of each update."""
    (folder / stage).mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": 1 + i // 2, "prompt": f"prompt {i}", "response": text, "score": i / 2}
        for i, text in enumerate(texts)
    ]
    (folder / stage / "rollouts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


# --- Curves.


def test_the_status_of_each_run_and_why_there_is_none(tmp_path):
    runs = {"a": write_run(tmp_path / "a"), "new": tmp_path / "new"}
    with (tmp_path / "a" / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "eval/loss": NaN}\n')  # JSON of other programs has no NaN
    a, new = client_of(runs).get("/api/runs").json()["runs"]
    assert (a["name"], a["stage"], a["step"], a["num_steps"]) == ("a", "sft", 30, 60)
    assert a["metrics"] == {"train/loss": 2.25, "eval/loss": None}
    assert new["name"] == "new" and "nothing has run there yet" in new["error"]


def test_curves_of_a_stage_are_its_numbers_with_gaps(tmp_path):
    write_run(tmp_path, (3.0, math.nan, math.inf, 2))
    path = tmp_path / "sft" / "metrics.jsonl"
    write_run(tmp_path / "other", stage="pretrain")
    (tmp_path / "other" / "pretrain").rename(tmp_path / "pretrain")
    client = client_of({"a": tmp_path})
    answer = client.get("/api/runs/a/curves").json()
    assert answer["stages"] == ["pretrain", "sft"]  # in the order of a life
    assert answer["stage"] == "sft"
    assert answer["points"] == {"train/loss": [[10, 3.0], [20, None], [30, None], [40, 2]]}
    assert (answer["next"], answer["reset"]) == (path.stat().st_size, False)
    first = client.get("/api/runs/a/curves?stage=pretrain").json()
    assert first["points"] == {"train/loss": [[10, 3.0], [20, 2.5], [30, 2.25]]}
    assert client.get("/api/runs/a/curves?stage=ppo").json()["points"] == {}


def test_what_is_not_a_number_is_no_point(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "time": 5.0, "a": true, "b": "text", "c": [1], "d": 1.5}',
        "\x00\x00",
        "[" * 10000,
        "7",
        '{"step": "2", "d": 2.5}',
        '{"d": 3.5}',
    ]
    path.write_text("\n".join(lines) + "\n")
    assert read_curves(path)["points"] == {"d": [(1, 1.5)]}


def test_a_run_without_numbers_has_no_stage(tmp_path):
    answer = client_of({"a": tmp_path}).get("/api/runs/a/curves").json()
    assert (answer["stages"], answer["stage"], answer["points"]) == ([], None, {})


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_reading_as_it_grows_is_reading_at_once(tmp_path_factory, data):
    values = data.draw(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=12))
    content = metrics_text(math.nan if value is None else value for value in values).encode()
    cuts = data.draw(st.lists(st.integers(0, len(content)), max_size=6).map(sorted))
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    read, since, mark = [], 0, ""
    for cut in [*cuts, len(content)]:
        path.write_bytes(content[:cut])  # the last line may be half-written
        answer = read_curves(path, since, mark)
        assert not answer["reset"]
        since, mark = answer["next"], answer["mark"]
        assert content[:since].endswith(b"\n") or since == 0
        read += answer["points"].get("train/loss", [])
    assert read == read_curves(path)["points"].get("train/loss", [])
    assert len(read) == len(values)


def test_a_file_that_was_rewritten_is_read_from_its_beginning(tmp_path):
    path = write_run(tmp_path) / "sft" / "metrics.jsonl"
    client = client_of({"a": tmp_path})

    def read(**query):
        return client.get("/api/runs/a/curves", params={"stage": "sft", **query}).json()

    before = read()
    known = {"since": before["next"], "mark": before["mark"]}
    assert read(**known)["points"] == {} and not read(**known)["reset"]
    # A resumed run drops lines,
    path.write_text(metrics_text([3.0]))
    for query in (known, {"since": before["next"]}):
        after = read(**query)
        assert after["reset"] and after["points"] == {"train/loss": [[10, 3.0]]}
    # and may have grown past the old length before the next look.
    path.write_text(metrics_text([3.0, 1.5, 1.25, 1.125]))
    after = read(**known)
    assert after["reset"] and len(after["points"]["train/loss"]) == 4


def test_an_offset_that_is_none_is_refused(tmp_path):
    client = client_of({"a": write_run(tmp_path)})
    for since in ("-1", "x", "1.5", "9" * 30):
        answer = client.get("/api/runs/a/curves", params={"since": since})
        assert answer.status_code == 400 and "since" in answer.json()["error"]["message"]


numbers = st.none() | st.floats(-10, 10)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 4 * MOST_POINTS),
    st.dictionaries(st.integers(0, 4 * MOST_POINTS - 1), numbers, max_size=8),
    st.integers(1, 1000),
)
def test_thinning_keeps_the_newest_the_extremes_and_gaps(count, special, stride):
    points = [(stride * i, special.get(i, 0.5)) for i in range(count)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert set(kept) <= set(points)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert kept[-1] == points[-1]
    values = [value for _, value in points]
    present = [value for value in values if value is not None]
    if present:
        assert {min(present), max(present)} <= {value for _, value in kept}
    assert (None in values) == (None in [value for _, value in kept])
    if count <= MOST_POINTS:
        assert kept == points


def test_thinning_is_even_in_steps_and_keeps_each_spike():
    points = [(step, 100.0 if step % 1000 == 500 else 1.0) for step in range(20_000)]
    kept = thinned(points)
    spikes = {point for point in points if point[1] == 100}
    assert spikes <= set(kept) and len(spikes) == 20
    bucket = 20_000 / (MOST_POINTS / 4)
    assert max(b - a for (a, _), (b, _) in itertools.pairwise(kept)) <= 2 * bucket


# --- Names.


@pytest.mark.parametrize(
    "path",
    [
        "/api/runs/b/curves",
        "/api/runs/../secret/curves",
        "/api/runs/..%2Fsecret/curves",
        "/api/runs/a%2F..%2F..%2Fsecret/samples",
        "/api/runs/%2E%2E%2Fsecret/report",
        "/api/runs/%2Fetc/report",
        "/api/runs/a%00/curves",
        "/api/runs//curves",
    ],
)
def test_a_name_that_is_no_run_reads_nothing(tmp_path, path):
    runs = {"a": write_run(tmp_path / "runs" / "a"), "team/c": tmp_path}
    secret = write_run(tmp_path / "runs" / "secret")
    (secret / "report.html").write_text("secret")
    answer = client_of(runs).get(path)
    assert answer.status_code == 404
    assert "secret" not in answer.text or "is unknown" in answer.text
    if "unknown" in answer.text:
        assert "known: a, team/c" in answer.json()["error"]["message"]


@pytest.mark.parametrize("what", ["curves", "samples"])
@pytest.mark.parametrize("stage", ["..", "../b", "%2E%2E%2Fb", "/etc", "sft/../../b", "nothing"])
def test_a_stage_that_is_none_reads_nothing(tmp_path, what, stage):
    runs = {"a": write_run(tmp_path / "a")}
    write_run(tmp_path / "b")
    answer = client_of(runs).get(f"/api/runs/a/{what}?stage={stage}")
    assert answer.status_code == 404 and "known: tokenizer, pretrain" in answer.text


def test_a_name_may_have_any_characters(tmp_path):
    client = client_of({"team/跑 1?": write_run(tmp_path)})
    answer = client.get("/api/runs/team%2F%E8%B7%91%201%3F/curves")
    assert answer.json()["stage"] == "sft"


# --- Responses.


def test_responses_are_the_newest_first_and_not_too_many(tmp_path):
    write_rollouts(tmp_path, [f"text {i}" for i in range(60)])
    with (tmp_path / "ppo" / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 31, "prompt": "half-wri')
    answer = client_of({"a": tmp_path}).get("/api/runs/a/samples").json()
    found = answer["samples"]
    assert answer["stages"] == ["ppo"] and answer["stage"] == "ppo"
    assert len(found) == MOST_RESPONSES
    assert [line["step"] for line in found[:4]] == [30, 30, 29, 29]
    assert found[0] == {
        "step": 30,
        "prompt": "prompt 58",
        "response": "text 58",
        "score": 29.0,
        "model": None,
    }


def test_only_the_end_of_a_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_TAIL_BYTES", 200)
    write_rollouts(tmp_path, ["x" * 30 for _ in range(50)])
    found = client_of({"a": tmp_path}).get("/api/runs/a/samples").json()["samples"]
    # The first of the lines was cut and is left out.
    assert 0 < len(found) <= 3 and {line["response"] for line in found} == {"x" * 30}


def test_each_stage_with_responses_has_its_own(tmp_path):
    write_rollouts(tmp_path, ["of ppo"])
    (tmp_path / "sample").mkdir()
    line = {"messages": [{"role": "user", "content": "why"}], "responses": ["one", "two"]}
    (tmp_path / "sample" / "samples.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "evaluate").mkdir()
    result = {"samples": [{"prompt": "how", "answers": {"sft": "so", "ppo": "thus"}}]}
    (tmp_path / "evaluate" / "result.json").write_text(json.dumps(result))
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "result.json").write_text(json.dumps({"loss": 1.0}))
    client = client_of({"a": tmp_path})

    def read(stage):
        answer = client.get("/api/runs/a/samples", params={"stage": stage}).json()
        assert answer["stages"] == ["sample", "ppo", "evaluate"]
        return [(x["prompt"], x["response"], x["model"]) for x in answer["samples"]]

    assert read("sample") == [("why", "one", None), ("why", "two", None)]
    assert read("ppo") == [("prompt 0", "of ppo", None)]
    assert read("evaluate") == [("how", "so", "sft"), ("how", "thus", "ppo")]
    assert read("sft") == []


# --- The report.


def test_a_report_runs_nothing_and_other_answers_keep_their_policy(tmp_path):
    client = client_of({"a": write_run(tmp_path)})
    assert client.get("/api/runs/a/report").status_code == 404
    (tmp_path / "report.html").write_text("<style>b{}</style><b>report</b>")
    answer = client.get("/api/runs/a/report")
    policy = answer.headers["content-security-policy"]
    assert answer.text.startswith("<style>") and answer.headers["x-content-type-options"]
    assert "default-src 'none'" in policy and "script" not in policy and "sandbox" in policy
    assert "style-src 'unsafe-inline'" in policy and "img-src data:" in policy
    assert "unsafe-inline" not in client.get("/watch").headers["content-security-policy"]
    assert client.get("/api/runs").json()["runs"][0]["report"] is True


# --- The page.


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@contextlib.contextmanager
def served(runs, api_key=""):
    """The address of a server, until the block ends."""
    bound, done = server.bind("127.0.0.1", 0), threading.Event()
    address = server.address_of(bound)
    thread = threading.Thread(
        target=server.serve, args=(app_of(runs, api_key), bound), kwargs={"is_done": done.is_set}
    )
    thread.start()
    try:
        yield address
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def shown(browser, address, allowed=()):
    """The page, whose clock only goes on when it is told to."""
    with browser_page(browser, allowed) as page:
        page.clock.install()
        page.goto(address)
        page.wait_for_selector("figure.chart")
        yield page


def append(folder, line, stage="sft"):
    with (folder / stage / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


LOSS = "#charts figure[data-metric='train/loss'] "


def test_two_runs_are_drawn_over_one_another_and_followed(browser, tmp_path):
    a = write_run(tmp_path / "a", (3.0, math.nan, 2.0, 1.5))
    b = write_run(tmp_path / "b", (4.0, 3.5))
    append(b, {"step": 20, "eval/accuracy": 0.5})
    write_rollouts(a, ["<script>document.title = 'attacked'</script>", "\u202etfel"])
    runs = {"a": a, "b": b, "new": tmp_path / "new"}
    with served(runs) as address, shown(browser, f"{address}/watch") as page:
        line = page.locator(LOSS + "path.line")
        assert line.count() == 2
        # They differ without their colors, and a gap interrupts a line.
        dashes = [line.nth(i).get_attribute("stroke-dasharray") for i in (0, 1)]
        assert dashes[0] != dashes[1]
        assert line.nth(0).get_attribute("d").count("M") == 2
        assert page.locator("figure[data-metric='eval/accuracy'] path.line").count() == 1
        assert "nothing has run there yet" in page.locator("tr[data-run='new']").inner_text()
        assert "30 of 60" in page.locator("tr[data-run='a']").inner_text()

        response = page.locator("#samples article").first
        assert "<script>document.title" in response.inner_text()
        assert "⟨202E⟩tfel" in page.locator("#samples article").nth(1).inner_text()
        assert page.title() == "jaxllm · Watch"

        first = line.nth(0).element_handle()
        before = first.get_attribute("d")
        append(a, {"step": 50, "train/loss": 1.2345678901234567})
        page.clock.fast_forward(3000)
        page.wait_for_function("([path, d]) => path.getAttribute('d') !== d", arg=[first, before])

        page.locator("tr[data-run='a'] input").uncheck()
        page.wait_for_function(
            "selector => document.querySelectorAll(selector).length === 1",
            arg=LOSS + "path.line",
        )
        page.reload()  # what was chosen is in the address
        page.wait_for_selector("figure.chart")
        assert line.count() == 1 and line.get_attribute("data-run") == "b"


def test_a_chart_is_read_with_the_keyboard(browser, tmp_path):
    a = write_run(tmp_path / "a", (3.0, math.nan, 2.1234567890123))
    b = write_run(tmp_path / "b", (4.0, 3.5))
    with served({"a": a, "b": b}) as address, shown(browser, f"{address}/watch") as page:
        plot = page.locator(LOSS + ".plot")
        assert "train/loss; newest: a 2.12346; b 3.5" in plot.get_attribute("aria-label")
        plot.focus()
        page.keyboard.press("ArrowLeft")
        assert plot.get_attribute("aria-valuetext") == "step 30: a 2.12346; b 3.5 (step 20)"
        page.keyboard.press("ArrowLeft")
        assert plot.get_attribute("aria-valuetext") == "step 20: a not a number; b 3.5"
        assert "a not a number" in page.locator(LOSS + ".readout").inner_text()
        page.keyboard.press("Home")
        assert plot.get_attribute("aria-valuenow") == "10"
        # The cursor stays where it is when numbers come.
        append(a, {"step": 40, "train/loss": 1.0})
        page.clock.fast_forward(3000)
        page.wait_for_selector(LOSS + ".plot[aria-valuemax='40']")
        assert plot.get_attribute("aria-valuenow") == "10"
        page.keyboard.press("Enter")
        large = page.locator("#large .plot")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert large.get_attribute("aria-valuetext").startswith("step 30: a 2.1234567890123;")
        page.keyboard.press("Escape")
        assert not page.locator("#large").is_visible()
        assert plot.evaluate("plot => plot === document.activeElement")


def test_smoothing_and_a_logarithm_change_the_lines(browser, tmp_path):
    a = write_run(tmp_path / "a", (1.0, 10.0, 100.0, -1.0, 1000.0))
    address_of = "{}/watch?smoothing=0.5".format
    with served({"a": a}) as address, shown(browser, address_of(address)) as page:
        raw, line = page.locator(LOSS + "path.raw"), page.locator(LOSS + "path.line")
        assert raw.count() == line.count() == 1
        assert raw.get_attribute("d") != line.get_attribute("d")
        page.locator("#log").check()
        # Powers of ten are as far from one another, and there is no place for a negative number.
        d = raw.get_attribute("d")
        heights = [float(point.split()[1]) for point in re.split("[ML]", d)[1:4]]
        assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.15)
        assert d.count("M") == 2 and d.endswith("h0")
        page.locator("#filter").fill("nothing like it")
        assert not page.locator(LOSS).is_visible()
        assert page.locator("#nothing").inner_text() == "No name matches."


def test_a_server_that_is_away_and_a_page_that_is_hidden(browser, tmp_path):
    runs = {"a": write_run(tmp_path)}
    with served(runs) as address, shown(browser, f"{address}/watch", ("ERR_FAILED",)) as page:
        page.route("**/api/**", lambda route: route.abort())
        page.clock.fast_forward(3000)
        page.wait_for_selector("#notice:has-text('Trying again')")
        assert page.locator(LOSS).is_visible()
        page.unroute("**/api/**")
        page.clock.fast_forward(3000)
        page.wait_for_selector("#notice:empty", state="attached")

        hide = """isHidden => {
          Object.defineProperty(document, "hidden", { configurable: true, get: () => isHidden });
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
        asked, held = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.route("**/api/runs", lambda route: held.append(route))
        with page.expect_request("**/api/runs"):
            page.clock.fast_forward(3000)
        page.evaluate(hide, True)  # while a look is on its way
        held[0].continue_()
        page.unroute("**/api/runs")
        page.wait_for_load_state("networkidle")
        asked.clear()
        page.clock.fast_forward(30_000)
        page.wait_for_timeout(100)
        assert not asked
        with page.expect_request("**/api/runs/a/curves*"):
            page.evaluate(hide, False)


def test_a_server_with_a_key_gives_its_report_as_a_file(browser, tmp_path):
    (write_run(tmp_path) / "report.html").write_text("<b>report</b>")
    runs = {"team/a": tmp_path}
    with (
        served(runs, "secret") as address,
        shown(browser, f"{address}/watch#key=secret") as page,
        page.expect_download() as download,
    ):
        page.get_by_role("link", name="report").click()
    assert download.value.suggested_filename == "team-a-report.html"
