"""`jaxllm status`: what it says of a run directory here and in a store, while it runs and after."""

import fcntl
import json
import time
from pathlib import Path

import pytest

from jaxllm.__main__ import main
from jaxllm.config import InputError
from jaxllm.report.status import duration, read_status
from jaxllm.runtime.seal import _hash_json
from jaxllm.runtime.store.lease import Lease
from jaxllm.runtime.store.mirror import Mirror
from jaxllm.runtime.store.objects import Store
from tests import emulators


def lines(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def begun(folder, now):
    """A run that is at step 40 of 100 of its SFT, in its second attempt."""
    common = {"stage": "sft", "seconds": {"step": 4.0, "compile": 1.0}}
    lines(
        folder / "goodput.jsonl",
        [
            {"attempt": 1, "time": now - 100, "step": 9, **common},
            {
                "attempt": 2,
                "time": now - 30,
                "step": 10,
                "restored": 10,
                "num_steps": 100,
                **common,
            },
            {"attempt": 2, "time": now - 20, "step": 20, **common},
            {"attempt": 2, "time": now - 10, "step": 30, **common},
            {"attempt": 2, "time": now, "step": 40, **common},
        ],
    )
    lines(
        folder / "sft" / "metrics.jsonl",
        [
            {"step": 30, "time": now, "train/loss": 2.5, "train/skipped": 0.0},
            {"step": 30, "time": now, "eval/accuracy": 0.5},
            {"step": 40, "time": now, "train/loss": 2.25, "throughput/mfu": 0.125},
        ],
    )
    (folder / "sft" / "config.json").write_text(json.dumps({"stages": ["pretrain", "sft"]}))
    (folder / "pretrain").mkdir()
    (folder / "pretrain" / "result.json").write_text(json.dumps({"loss": 1.0}))
    seal = folder / "sft" / "checkpoints" / "30" / "seal.json"
    seal.parent.mkdir(parents=True)
    content = {"record": {}, "digests": {}, "files": {}, "time": now - 12}
    seal.write_text(json.dumps({**content, "sha256": _hash_json(content)}))


def test_where_a_run_is(tmp_path):
    now = time.time()
    begun(tmp_path, now)
    status = read_status(tmp_path)
    assert (status["stage"], status["step"], status["num_steps"]) == ("sft", 40, 100)
    assert status["steps_per_second"] == pytest.approx(1.0)
    assert status["seconds_left"] == pytest.approx(60.0)
    assert status["metrics"] == {"train/loss": 2.25, "throughput/mfu": 0.125, "eval/accuracy": 0.5}
    assert status["save"]["step"] == 30 and 12 <= status["save"]["age_seconds"] < 60
    assert (status["attempts"], status["stages"]) == (2, ["pretrain"])
    # 50 s of steps and compiling, of which the step of attempt 1 was not done again, in 110 s.
    assert 0 < status["goodput"] < 1
    assert (status["state"], status["alive"]) == ("stopped", False)


def test_whether_somebody_works_there(tmp_path):
    begun(tmp_path, time.time())
    lock = tmp_path / ".lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status = read_status(tmp_path)
        assert (status["state"], status["alive"]) == ("running", True)
        assert status["holder"].startswith("process ")
    assert read_status(tmp_path)["state"] == "stopped"


def test_a_finished_run(tmp_path, capsys):
    begun(tmp_path, time.time())
    (tmp_path / "sft" / "result.json").write_text(json.dumps({"loss": 1.0}))
    main(["status", str(tmp_path), "--json", "--watch"])  # ends by itself
    status = json.loads(capsys.readouterr().out)
    assert status["state"] == "finished" and status["seconds_left"] is None
    main(["status", str(tmp_path)])
    table = capsys.readouterr().out
    assert "step" in table and "40 of 100" in table and "pretrain, sft" in table


def test_what_is_no_run_directory_is_one_line(tmp_path, capsys):
    with pytest.raises(InputError, match="is not a run directory"):
        read_status(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["status", str(tmp_path / "nothing")])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_a_run_in_a_store_is_seen_from_a_laptop(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLLM_SCRATCH", str(tmp_path / "laptop"))
    here = tmp_path / "here"
    here.mkdir()
    with emulators.gcs(tmp_path) as server, emulators.in_environment(server):
        store = Store(f"{server.url}/runs/one")
        mirror = Mirror(store, here, Lease(store, 30.0))
        mirror.open()
        begun(here, time.time())
        mirror.push()
        status = read_status(store.url)
        assert (status["stage"], status["step"], status["state"]) == ("sft", 40, "running")
        assert status["save"]["step"] == 30 and "process" in status["holder"]
        before = set(store.list())
        mirror.close()
        assert read_status(store.url)["state"] == "stopped"
        assert set(store.list()) == before  # a look leaves nothing
    assert not [path for path in Path(tmp_path / "laptop").rglob("_METADATA")]
