"""`jaxllm fit-scaling` on runs as they are on disk."""

import json

import pytest

from jaxllm.config import InputError
from jaxllm.runtime.store.objects import Store
from jaxllm.scaling.command import command
from jaxllm.scaling.config import FitScalingArgs
from jaxllm.scaling.law import Law
from jaxllm.scaling.runs import read_result
from tests.conftest import jaxllm
from tests.emulators import SERVERS, in_environment

TRUE = Law(E=1.2, A=90.0, B=300.0, alpha=0.3, beta=0.35)
EMBEDDINGS = 80_000  # parameters of them, in every run
SIZES = (100_000, 400_000, 1_600_000, 6_400_000)
TOKENS = (10**7, 10**8, 10**9)


def write_run(directory, parameters, tokens, loss=None, tokenizer="one"):
    stage = directory / "pretrain"
    (stage / "tokenizer").mkdir(parents=True)
    (stage / "tokenizer" / "tokenizer.model").write_text(tokenizer)
    loss = TRUE.loss(parameters, tokens) if loss is None else loss
    result = {"parameters": parameters, "tokens": tokens, "loss": loss, "bits_per_byte": loss / 3}
    (stage / "result.json").write_text(json.dumps({**result, "name": "x"}))
    model = {"vocab_size": EMBEDDINGS // 8, "embed_dim": 8, "num_heads": 1, "num_kv_heads": 1}
    (stage / "model.json").write_text(json.dumps({"kind": "policy", "model": model}))


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "sweep"
    for size in SIZES:
        for tokens in TOKENS:
            write_run(folder / f"{size},{tokens}", size, tokens)
    (folder / "table.csv").write_text("other files are no runs")
    return folder


def report_of(capsys, *runs, **options):
    command(FitScalingArgs(tuple(map(str, runs)), samples=10, json=True, **options))
    return json.loads(capsys.readouterr().out)


def test_the_largest_size_is_predicted_and_not_fitted(sweep, tmp_path, capsys):
    report = report_of(capsys, sweep)
    assert {run["parameters"] for run in report["runs"]} == set(SIZES[:-1])
    assert len(report["held_out"]) == 3
    for run in report["held_out"]:
        assert run["parameters"] == SIZES[-1] and abs(run["error"]) < 1e-4
    # Whatever the largest have reached, the law is the same.
    for tokens in TOKENS:
        path = sweep / f"{SIZES[-1]},{tokens}" / "pretrain" / "result.json"
        path.write_text(path.read_text().replace('"loss": ', '"loss": 1'))
    other = report_of(capsys, sweep)
    assert other["law"] == report["law"]
    assert all(run["error"] < -5 for run in other["held_out"])
    assert report_of(capsys, sweep, hold_out=0)["law"] != report["law"]


def test_runs_may_be_named_one_by_one_and_the_best_of_equals_counts(sweep, tmp_path, capsys):
    write_run(tmp_path / "worse", SIZES[0], TOKENS[0], loss=9.0)
    write_run(tmp_path / "better", SIZES[0], TOKENS[1], loss=1.25)
    runs = report_of(capsys, sweep, tmp_path / "worse", tmp_path / "better", sweep)["runs"]
    assert len(runs) == 9
    assert "worse" not in str(runs)
    [better] = [run for run in runs if run["directory"].endswith("better")]
    assert better["loss"] == 1.25


@pytest.mark.parametrize("kind", SERVERS)
def test_runs_in_a_store_say_what_they_say_on_a_disk(kind, sweep, tmp_path, capsys):
    on_disk = report_of(capsys, sweep)
    with SERVERS[kind](tmp_path) as emulator, in_environment(emulator):
        url = f"{emulator.url}/sweep"
        store = Store(url)
        for file in (path for path in sweep.rglob("*") if path.is_file()):
            store.upload(file, file.relative_to(sweep).as_posix())
        # A run below a folder of runs is none of them.
        store.write("deeper/1/pretrain/result.json", b"{}")
        in_store = report_of(capsys, url)
        assert json.dumps(in_store).replace(url, str(sweep)) == json.dumps(on_disk)
        one = f"{url}/{SIZES[0]},{TOKENS[0]}"
        assert read_result(one, "pretrain") == read_result(
            f"{sweep}/{one.rpartition('/')[2]}", "pretrain"
        )
        with pytest.raises(InputError, match="1 runs of 1 sizes"):
            report_of(capsys, one, hold_out=0)
        with pytest.raises(InputError, match=f"{url}/nothing: has no pretrain/result.json"):
            report_of(capsys, f"{url}/nothing")
        # Another tokenizer in one of them is found there, too.
        store.write(f"{SIZES[0]},{TOKENS[0]}/pretrain/tokenizer/tokenizer.model", b"two")
        with pytest.raises(InputError, match="have different tokenizers"):
            report_of(capsys, url)


def test_one_form_counts_no_embeddings(sweep, tmp_path, capsys):
    true = Law(E=0.0, A=3e5, B=2e6, alpha=0.6, beta=1.0, power=0.2)
    for size in SIZES:
        for tokens in TOKENS:
            path = sweep / f"{size},{tokens}" / "pretrain" / "result.json"
            loss = true.loss(size - EMBEDDINGS, tokens)
            path.write_text(json.dumps(json.loads(path.read_text()) | {"loss": loss}))
    plan = {
        "predicted_tokens_per_second": 1000.0, "parameters": 10**6, "embedding_parameters": 4 * 10**5, "devices": 4,
    }  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    options = {"form": "kaplan", "flops": (1e18,), "plan": str(tmp_path / "plan.json")}
    report = report_of(capsys, sweep, **options)
    assert [run["parameters"] for run in report["runs"][::3]] == [20_000, 320_000, 1_520_000]
    assert report["law"] == pytest.approx(true._asdict(), rel=0.02)
    assert all(abs(run["error"]) < 1e-4 for run in report["held_out"])
    assert report["form"] == "kaplan" and not report["counts_embeddings"]
    [split] = report["for_flops"]
    # 1000 tokens of 600,000 parameters a second on 4 devices: 0.9e9 FLOP/s each.
    assert split["device_hours"] == pytest.approx(1e18 / 0.9e9 / 3600)
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"embedding_parameters": None}))
    with pytest.raises(InputError, match="is not what `jaxllm plan --json` prints"):
        report_of(capsys, sweep, **options)
    (sweep / f"{SIZES[1]},{TOKENS[1]}" / "pretrain" / "model.json").unlink()
    with pytest.raises(InputError, match=r"model\.json: is missing.*use --form chinchilla"):
        report_of(capsys, sweep, form="kaplan")
    assert report_of(capsys, sweep)["runs"][0]["parameters"] == SIZES[0]


def test_budgets_in_device_hours(sweep, tmp_path, capsys):
    plan = {"predicted_tokens_per_second": 1000.0, "parameters": 10**6, "devices": 4}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    options = {"flops": (1e18,), "target": (1.5,), "plan": str(tmp_path / "plan.json")}
    report = report_of(capsys, sweep, **options)
    [split], [target] = report["for_flops"], report["for_target"]
    assert split["loss"] == pytest.approx(TRUE.best_for_flops(1e18).loss, rel=1e-3)
    assert target["flops"] == pytest.approx(TRUE.best_for_loss(1.5).flops, rel=0.05)
    # 1000 tokens of a million parameters a second on 4 devices: 1.5e9 FLOP/s each.
    assert split["device_hours"] == pytest.approx(1e18 / 1.5e9 / 3600)
    low, high = split["intervals"]["parameters"]
    assert low <= split["parameters"] <= high


def test_tables_and_files_for_people(sweep, tmp_path):
    out = tmp_path / "out"
    process = jaxllm(
        "fit-scaling", str(sweep), "--samples", "5", "--target", "1.5", "--out", str(out)
    )
    text, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    for words in ("from 9 runs of 3 sizes, 100k to 1.6M", "Held out", "Fewest FLOPs for a loss"):
        assert words in text
    assert (out / "law.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "law.json").read_text())["held_out"]
    process = jaxllm("fit-scaling", str(sweep), "--samples", "5", "--form", "kaplan")
    text, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert "20k to 1.52M parameters without embeddings" in text and " / D)^" in text
    assert "power" in text and "beta" not in text


@pytest.mark.parametrize(
    ("prepare", "options", "words"),
    [
        (None, {"runs": ("nowhere",)}, "nowhere: has no pretrain/result.json"),
        (None, {"hold_out": 2}, "of 2 sizes and 3 numbers of tokens do not tell .* held out"),
        (None, {"metric": "speed"}, "speed is None, not a positive number; it has parameters"),
        (None, {"target": (0.5,)}, "--target: a loss of 0.5 is not above E"),
        (None, {"plan": "nowhere.json"}, "--plan nowhere.json: is not what"),
        ({"tokenizer": "two"}, {}, "have different tokenizers.*--metric bits_per_byte"),
    ],
    ids=str,
)
def test_what_tells_no_law_is_refused_in_one_line(sweep, prepare, options, words):
    if prepare:
        write_run(sweep / "other", SIZES[0], 5 * 10**7, **prepare)
    args = {"runs": (str(sweep),), "samples": 3, "json": True, **options}
    with pytest.raises(InputError, match=words) as error:
        command(FitScalingArgs(**args))
    assert "\n" not in str(error.value)


def test_other_tokenizers_compare_by_the_byte(sweep, capsys):
    write_run(sweep / "other", SIZES[0], 5 * 10**7, tokenizer="two")
    assert len(report_of(capsys, sweep, metric="bits_per_byte")["runs"]) == 10
