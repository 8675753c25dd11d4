"""What launch/ does around a run: restarting it, in many processes, and as a job of several kinds of clusters."""

import os
import runpy
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.faults.harness import CONFIG, STAGES


def wait_until(holds, seconds=30):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def read_lines(path):
    return path.read_text().splitlines() if path.exists() else []


def restart(tmp_path, script, run_dir=None):
    place = str(run_dir or tmp_path)
    command = ["bash", str(ROOT / "launch" / "restart.sh"), place, "bash", "-c", script]
    environment = {**os.environ, "MAX_STUCK": "2", "JAXLLM_SCRATCH": str(tmp_path)}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("run_dir", [None, "gs://bucket/run"])
def test_it_restarts_until_it_is_done(tmp_path, run_dir):
    """Also with a run directory in a store, of which this machine has a part."""
    process = restart(
        tmp_path,
        f"cd {tmp_path}; d=$(ls | wc -l); mkdir $d; touch $d/result.json; [ $(ls | wc -l) = 4 ] || kill -9 $$",
        run_dir,
    )
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0 and log.count("ended with status 137; again in 1 s") == 3


def test_it_gives_up_without_progress_and_at_once_on_bad_input(tmp_path):
    process = restart(tmp_path, "exit 7")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 7 and "gave up after 2 failures without progress" in log
    process = restart(tmp_path, "exit 2")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 2 and "again" not in log


def test_a_signal_reaches_the_command_and_ends_the_loop(tmp_path):
    process = restart(
        tmp_path,
        f"trap 'touch {tmp_path}/told; exit 3' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done",
    )
    wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 3 and (tmp_path / "told").exists()


def test_local_starts_n_processes_and_stops_all_of_them(tmp_path):
    stub = (
        tmp_path / "python"
    )  # for a process that waits: it ends as jaxllm does, some seconds after the signal
    stub.write_text(
        f'#!/bin/bash\n[ "$1" = -c ] && exec {sys.executable} "$@"\ntrap "echo told >> {tmp_path}/told; exit 0" TERM\n'
        f'echo "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES $*" >> {tmp_path}/started\nwhile :; do sleep 0.05; done\n'
    )
    stub.chmod(0o755)
    command = ["bash", str(ROOT / "launch" / "local.sh"), "2", "CONFIG", "--seed", "1"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHON": str(stub)})
    wait_until(lambda: len(read_lines(tmp_path / "started")) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0 and read_lines(tmp_path / "told") == ["told"] * 2
    arguments = "-m jaxllm run CONFIG --seed 1 --distributed"
    assert sorted(read_lines(tmp_path / "started")) == [f"0/2 {arguments}", f"1/2 {arguments}"]
    assert subprocess.run([*command[:2], "two", "CONFIG"], capture_output=True).returncode == 2


@pytest.mark.slow
def test_local_runs_two_real_processes_that_stop_and_go_on(tmp_path):
    """Half a minute: python -m pytest tests/launch/test_launch.py -m slow -n 0"""
    arguments = [
        CONFIG,
        "--run-dir",
        str(tmp_path / "run"),
        "--cpu-devices",
        "1",
        "--stages",
        *STAGES[:2],
    ]
    command = ["bash", str(ROOT / "launch" / "local.sh"), "2", *arguments]
    env = {**os.environ, "PYTHON": sys.executable}
    process = subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "pretrain 15/60" in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0 and not (tmp_path / "run/pretrain/result.json").exists()
    assert subprocess.run(command, env=env, cwd=ROOT, timeout=120).returncode == 0
    assert (tmp_path / "run/pretrain/result.json").exists()


@pytest.mark.parametrize(("ends", "status"), [("", 0), ("sys.exit(0)", 75), ("sys.exit(2)", 2)])
def test_a_worker_tells_stopped_from_finished(monkeypatch, ends, status):
    monkeypatch.setattr("jaxllm.__main__.main", lambda: exec(ends))
    code = 0
    try:
        runpy.run_path(str(ROOT / "launch" / "worker.py"), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    assert code == status


def slurm_job(tmp_path, srun, **stand_ins):
    """Run slurm.sbatch with stand-ins for Slurm's commands; what they were told. The real ones: test_launch_slurm.py."""
    for name in ("scontrol", "scancel"):
        stand_ins[name] = f'echo "{name} $*" >> {tmp_path}/told'
    for name, line in {"srun": srun, "sleep": "exit 0", **stand_ins}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "worker.py").touch()
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
    }
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "CONFIG"]
    done = subprocess.run(
        command, env={**env, "SLURM_JOB_NODELIST": "n[1-2]"}, capture_output=True, timeout=30
    )
    return done.returncode, read_lines(tmp_path / "told")


@pytest.mark.parametrize(
    ("status", "earlier", "ends", "requeued"),
    [
        (0, 0, 0, False),
        (2, 0, 2, False),
        (75, 0, 0, True),
        (1, 0, 0, True),
        (1, 5, 1, False),
        (75, 9, 0, True),
    ],
)
def test_a_slurm_job_goes_back_into_the_queue_where_that_helps(
    tmp_path, status, earlier, ends, requeued
):
    if earlier:
        (tmp_path / "slurm-7.failures").write_text("1\n" * earlier)
    code, told = slurm_job(tmp_path, f"exit {status}")
    assert code == ends and told == ["scontrol requeue 7"] * requeued


def test_near_its_time_limit_a_slurm_job_goes_back_into_the_queue_even_where_nothing_stops(
    tmp_path,
):
    srun = "kill -USR1 $PPID; for i in {1..10}; do read -t 0.05 <> <(:) || true; done; exit 0"
    code, told = slurm_job(tmp_path, srun)
    assert code == 0 and told == ["scancel --signal=TERM 7", "scontrol requeue 7"]
