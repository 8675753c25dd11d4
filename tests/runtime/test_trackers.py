"""Trackers get the metrics, continue their curves, and stop nothing.

The real ones write offline, in an environment of their own, and what they wrote is read back:

    python -m pytest tests/runtime/test_trackers.py -m slow -n 0
"""

import json
import os
import sqlite3
import subprocess
import sys
import types

import pytest

from jaxllm import metrics
from jaxllm.config import InputError
from jaxllm.runtime import trackers
from jaxllm.runtime.config import LoggingConfig
from jaxllm.runtime.trackers import open_trackers
from tests.conftest import ROOT


class FakeRun:
    def __init__(self, **about):
        self.about = about
        self.lines = []
        self.finished = False
        self.fails_at = None

    def log(self, values, step):
        if step == self.fails_at:
            raise RuntimeError("the network\nis away")
        self.lines.append((step, dict(values)))

    def finish(self):
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    """Modules that stand for trackers; {name: the run that was begun}."""
    runs = {}
    for name in ("wandb", "swanlab", "trackio"):

        def init(project, name=name, **about):
            runs[about.get("id", name)] = FakeRun(project=project, name=name, **about)
            return runs[about.get("id", name)]

        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))
    return runs


def test_a_stage_appears_under_its_run_and_its_own_name(fake, tmp_path):
    directory = tmp_path / "life" / "pretrain"
    directory.mkdir(parents=True)
    config = LoggingConfig(tensorboard=False, trackers=("swanlab",), project="mine")
    log = metrics.MetricLog(
        directory,
        "test",
        2,
        start=0,
        log_every=1,
        save_every=2,
        work=metrics.Work(tokens=8),
        config=config,
    )
    log.write(1, {"eval/loss": 2.5})
    log.close()
    (run,) = fake.values()
    assert run.about["project"] == "mine" and run.about["name"] == "life-pretrain"
    assert run.about["id"] == "life-pretrain" and run.about["resume"] == "allow"
    assert run.lines == [(1, {"eval/loss": 2.5})] and run.finished
    line = json.loads((directory / "metrics.jsonl").read_text())
    assert line["eval/loss"] == 2.5


def test_a_tracker_that_fails_is_said_once_and_left_alone(fake, tmp_path, capsys):
    (writer,) = open_trackers(["swanlab"], "p", "run", tmp_path)
    fake["run"].fails_at = 2
    for step in range(1, 5):
        writer.write(step, {"loss": 1.0})
    writer.close()
    assert fake["run"].lines == [(1, {"loss": 1.0})] and not fake["run"].finished
    printed = capsys.readouterr()
    text = " ".join((printed.out + printed.err).split())
    assert text.count("swanlab failed") == 1 and "RuntimeError: the network is away" in text


def test_a_tracker_that_cannot_begin_stops_nothing(monkeypatch, tmp_path, capsys):
    def init(**about):
        raise OSError("no such host")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    (writer,) = open_trackers(["wandb"], "p", "run", tmp_path)
    writer.write(1, {"loss": 1.0})
    writer.close()
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("wandb failed") == 1


@pytest.mark.parametrize("name", trackers._OPEN)
def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"needs {name}; pip install 'jaxllm\[{name}\]'"):
        open_trackers([name], "p", "run", tmp_path)


def test_what_is_not_finite_stays_in_our_own_log(fake, tmp_path):
    (writer,) = open_trackers(["swanlab"], "p", "run", tmp_path)
    writer.write(1, {"loss": float("nan"), "norm": 2.0})
    assert fake["run"].lines == [(1, {"norm": 2.0})]


# --- The real ones.

# Steps 1 to 3, then a process that resumes with 4 and 5.
WRITE = """
import sys
from pathlib import Path
from jaxllm.runtime.trackers import open_trackers
name, first, last, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
folder.mkdir(parents=True, exist_ok=True)
(writer,) = open_trackers([name], "project", "life-ppo", folder)
for step in range(first, last + 1):
    writer.write(step, {"train/loss": 10.0 * step, "nan": float("nan")})
writer.close()
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A Python with the three trackers, whose protobuf is older than ours."""
    folder = tmp_path_factory.mktemp("trackers") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    packages = ["swanlab>=0.10", "mlflow-skinny>=3", "trackio>=0.40", "tyro", "pydantic", "pyyaml"]
    subprocess.run([folder / "bin/pip", "install", "-q", *packages], check=True)
    return folder / "bin/python"


def written(python, name, tmp_path):
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SWANLAB_MODE": "offline",
        "MLFLOW_TRACKING_URI": (tmp_path / "mlflow").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HOME": str(tmp_path),
    }
    for span in (("1", "3"), ("4", "5")):
        command = [python, "-c", WRITE, name, *span, str(tmp_path / "stage")]
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0 and "failed" not in run.stdout + run.stderr, run.stderr[-2000:]


WANTED = [(step, 10.0 * step) for step in range(1, 6)]


@pytest.mark.slow
def test_mlflow_has_what_was_written(environment, tmp_path):
    written(environment, "mlflow", tmp_path)
    (file,) = (tmp_path / "mlflow").glob("*/*/metrics/train/loss")
    lines = [line.split() for line in file.read_text().splitlines()]
    assert [(int(line[2]), float(line[1])) for line in lines] == WANTED


@pytest.mark.slow
def test_trackio_has_what_was_written(environment, tmp_path):
    written(environment, "trackio", tmp_path)
    (file,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(file).execute("select step, metrics from metrics order by step")
    assert [(step, json.loads(text)["train/loss"]) for step, text in rows] == WANTED


@pytest.mark.slow
def test_swanlab_has_what_was_written(environment, tmp_path):
    """Its log is binary; names of metrics and the run's settings can be read."""
    written(environment, "swanlab", tmp_path)
    logs = [*(tmp_path / "stage" / "swanlab").rglob("*.swanlab")]
    assert logs and all(b"train/loss" in log.read_bytes() for log in logs)
