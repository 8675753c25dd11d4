"""A sweep runs every point once, goes on with what is left, and gathers; a law is recovered from its own points."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxllm.config import InputError
from jaxllm.runtime.store.objects import Store
from tests.conftest import ROOT
from tests.emulators import SERVERS, in_environment

sys.path.insert(0, str(ROOT / "launch"))
import sweep
import sweep_plot

# jaxllm for the sweep: its loss is a law of the layers, and three layers fail until there is a file `mended`.
STUB = """#!/usr/bin/env python3
import json, os, pathlib, sys
words = dict(word.lstrip("-").split("=") for word in sys.argv if "=" in word and word.startswith("--"))
out, layers = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1]), int(words["model.num-layers"])
with open(out.parent / "ran", "a") as file:
    print(out.name, file=file)
if layers == 3 and not (out.parent / "mended").exists():
    sys.exit("out of memory")
(out / "pretrain").mkdir(parents=True)
loss = 2 + 3 * layers ** -0.5 + float(words["pretrain.optim.learning-rate"])
result = {"parameters": layers * 1000, "loss": loss, "name": "x", "nested": {"a": 1}}
(out / "pretrain" / "result.json").write_text(json.dumps(result))
"""
GRID = ["--grid", "pretrain.optim.learning-rate=1e-3,3e-3", "--grid", "model.num-layers=1,2,3,4"]


def run(tmp_path, *more):
    arguments = [
        str(ROOT / "configs/tiny.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--jobs",
        "3",
        "--options=--seed 3",
        *GRID,
        *more,
    ]
    return sweep.main(arguments)


def test_a_failed_point_is_named_and_the_next_start_runs_only_what_is_left(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert run(tmp_path) == 1
    out, err = capsys.readouterr()
    assert (
        err.count("failed with status 1: ") == 2
        and "out of memory" in next(tmp_path.glob("out/*=3.log")).read_text()
    )
    assert "L = 2.0" in out and "3 sizes: nothing is left to check it with" in out

    (tmp_path / "out" / "mended").touch()
    assert run(tmp_path) == 0
    out, _ = capsys.readouterr()
    assert (
        "8 points, 6 of them finished" in out
        and "L = 2.001 + " in out
        and "/ N^0.5 (4 sizes, off by " in out
    )
    ran = (tmp_path / "out" / "ran").read_text().splitlines()
    assert (
        len(ran) == 10
        and len({*ran}) == 8
        and (tmp_path / "out" / "plot.png").stat().st_size > 10_000
    )
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [row["parameters"] for row in rows[:4]] == ["1000", "2000", "3000", "4000"]
    assert (tmp_path / "out" / "table.md").read_text().count("| finished |") == 8
    with pytest.raises(InputError, match="--metric acuracy: pretrain gives parameters, loss"):
        run(tmp_path, "--metric", "acuracy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "pretrain.optim.learning-rate"], "must be FIELD=VALUE,VALUE"),
        (
            ["--grid", "model.num-layer=1,2"],
            "sweep: model.num_layer: unknown key; did you mean num_layers?",
        ),
        (["--grid", "model.num-layers=1,two"], "two"),
        (["--grid", "model.num-layers=2,0"], "num_layers"),
        (["--grid", "seed=1,2", "--stages", "pretrian"], "pretrian"),
        (["--grid", "seed=1,2", "--grid", "seed=3"], "--grid seed: is given twice"),
        (["--grid", "seed+name=1+a,2"], "2 has 1 values for 2 fields"),
        (["--grid", "seed+name=1+a,1+a"], "must be FIELD=VALUE,VALUE"),
        (["--grid", "seed=1,2", "--jobs", "0"], "--jobs: must be at least 1"),
        (
            ["--grid", "seed=1,2", "--out", "gs://b/x"],
            "--out: tables and logs go to a local folder",
        ),
        ([], "grid"),
    ],
)
def test_what_the_config_would_refuse_is_refused_before_anything_runs(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        sweep.main([str(ROOT / "configs/tiny.yaml"), "--out", str(tmp_path), *arguments])
    assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]


def test_fields_that_are_set_together_are_one_axis(tmp_path):
    """Against a list by hand; 1e+3 is one number."""
    texts = ("model.embed-dim+model.mlp-dim=64+192,128+384", "pretrain.optim.weight-decay=0,1e+0")
    grid = [sweep.read_axis(text) for text in texts]
    asked = sweep.Sweep(str(ROOT / "configs/tiny.yaml"))
    sweep.check(asked, grid)
    points = sweep.make_points(asked, grid, tmp_path)
    wanted = [
        ("64", "192", "0"),
        ("64", "192", "1e+0"),
        ("128", "384", "0"),
        ("128", "384", "1e+0"),
    ]
    fields = ("model.embed-dim", "model.mlp-dim", "pretrain.optim.weight-decay")
    assert [point.values for point in points] == [
        dict(zip(fields, each, strict=True)) for each in wanted
    ]
    assert "--model.mlp-dim=384" in points[2].command
    assert points[2].directory.endswith(
        "model.embed-dim=128,model.mlp-dim=384,pretrain.optim.weight-decay=0"
    )


@pytest.mark.parametrize("jobs", [1, 2, 3, 5, 8])
def test_jobs_share_no_core_as_long_as_there_are_enough(jobs, monkeypatch):
    cores = {0, 2, 3, 7, 8}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    shares = sweep.shares_of_cores(jobs)
    assert len(shares) == jobs and all(shares) and set().union(*shares) == cores
    sizes = [len(share) for share in shares]
    if jobs <= len(cores):
        assert sum(sizes) == len(cores) and max(sizes) - min(sizes) <= 1
    else:
        assert sizes == [1] * jobs


def test_a_run_is_bound_to_its_cores_and_the_sweep_is_not(tmp_path, monkeypatch):
    (tmp_path / "python").write_text(
        f"#!{sys.executable}\nimport os\nprint(os.sched_getaffinity(0))\n"
    )
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    cores = os.sched_getaffinity(0)
    first = {min(cores)}
    point = sweep.Point({}, str(tmp_path / "run"), tmp_path / "run.log", [])
    assert sweep.start(point, first).wait() == 0
    assert point.log.read_text() == f"{first}\n" and os.sched_getaffinity(0) == cores


def test_runs_in_a_store_are_found_and_not_run_again(tmp_path, monkeypatch, capsys):
    with SERVERS["s3"](tmp_path) as emulator, in_environment(emulator):
        url = f"{emulator.url}/sweep"
        for layers in (1, 2):
            result = {"parameters": 1000 * layers, "loss": 3.0 / layers}
            name = f"model.num-layers={layers}/pretrain/result.json"
            Store(url).write(name, json.dumps(result).encode())
        monkeypatch.setattr(subprocess, "Popen", None)
        arguments = [str(ROOT / "configs/tiny.yaml"), "--out", str(tmp_path / "out"), "--runs", url]
        assert sweep.main([*arguments, "--grid", "model.num-layers=1,2"]) == 0
    assert f"2 points, 2 of them finished, in {url}" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [row["loss"] for row in rows] == ["3.0", "1.5"]


def test_a_law_is_recovered():
    sizes = np.array([1e6, 3e6, 1e7, 1e8])
    assert np.allclose(sweep_plot.fit(sizes, 1.7 + 400 * sizes**-0.34), (1.7, 400, 0.34), rtol=0.02)
    floor, _, _ = sweep_plot.fit(sizes, 400 * sizes**-0.34)
    assert 0 <= floor < 0.02


@pytest.mark.slow
def test_a_real_sweep_of_six_points(tmp_path):
    """Two minutes: python -m pytest tests/launch/test_sweep.py -m slow -n 0 -s"""
    command = [
        sys.executable,
        "launch/sweep.py",
        "tests/faults/life.yaml",
        "--out",
        str(tmp_path / "out"),
    ]
    command += [
        "--grid",
        "pretrain.optim.learning-rate=3e-3,1e-2",
        "--grid",
        "model.embed-dim=16,32,64",
    ]
    command += ["--jobs", "2"]
    cut = subprocess.Popen(command, cwd=ROOT)
    while not any("pretrain 5/60" in log.read_text() for log in tmp_path.glob("out/*.log")):
        time.sleep(0.2)
    cut.send_signal(signal.SIGTERM)
    assert cut.wait(timeout=60) == 130 and any(
        "SIGTERM: pretrain" in p.read_text() for p in tmp_path.glob("out/*.log")
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and "L = " in done.stdout
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "6 points, 6 of them finished" in again.stdout
