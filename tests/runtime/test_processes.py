"""Told to stop, stuck, or in the way of another one: what a process does then, in real processes."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from jaxllm.runtime import processes as module
from jaxllm.runtime.processes import Signals, Stopped
from tests.conftest import ROOT, jaxllm
from tests.faults.harness import CONFIG, STAGES, outcome

LOOP = """
import sys, time
from jaxllm.runtime.processes import Signals
signals = Signals(watchdog_seconds=int(sys.argv[1]))
signals.install()
with signals:
    signals.alive()
    print("ready", flush=True)
    for _ in range(200):
        time.sleep(0.05)
        if sys.argv[2] == "steps" and signals.stop_after():
            raise SystemExit(f"stopped by {signals.received}")
"""


def loop(watchdog, kind):
    command = [sys.executable, "-c", LOOP, str(watchdog), kind]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def test_a_loop_that_does_not_move_dumps_every_stack_and_ends():
    process = loop(1, "stuck")
    _, log = process.communicate(timeout=30)
    assert (
        process.returncode == 1
        and "Timeout (0:00:01)!" in log
        and 'File "<string>", line 10' in log
    )


def test_a_loop_that_moves_is_left_alone_and_stops_after_its_step():
    process = loop(1, "steps")
    time.sleep(2.5)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=30)
    assert "stopping after this step" in log and log.endswith("stopped by SIGTERM\n")


def test_a_second_interrupt_ends_it_at_once():
    process = loop(0, "stuck")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it waits for its step
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_outside_a_loop_a_signal_ends_it_at_once(monkeypatch):
    ends = []
    monkeypatch.setattr(module, "_end_soon", ends.append)
    signals = Signals()
    with pytest.raises(Stopped, match="stopped by SIGTERM; run the same command again"):
        signals._handle(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        Signals()._handle(signal.SIGINT, None)
    assert ends == [0, 130]


def test_it_ends_even_where_the_exception_is_swallowed():
    script = "import os, time; from jaxllm.runtime import processes; processes._end_soon(7, 0.2); time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=30).returncode == 7


def test_two_processes_do_not_work_in_one_directory(tiny_run, tmp_path):
    lock = f"import fcntl, time; f = open({str(tmp_path / '.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", lock], stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline()
    process = jaxllm("run", "configs/tiny.yaml", "--run-dir", str(tmp_path))
    _, log = process.communicate(timeout=60)
    holder.kill()
    holder.communicate()
    assert process.returncode == 2 and "another process works in it" in log


def run_life(directory, *more, wait=240):
    process = jaxllm("run", CONFIG, "--run-dir", str(directory), "--cpu-devices", "2", *more)
    _, log = process.communicate(timeout=wait)
    return process.returncode, log


@pytest.mark.parametrize(
    "stages", [STAGES[:2], pytest.param(STAGES, marks=pytest.mark.slow)], ids=["to pretrain", "all"]
)
def test_sigterm_in_a_stage_saves_and_exits_0_and_goes_on(tmp_path, stages):
    whole, cut, only = tmp_path / "whole", tmp_path / "cut", ("--stages", *stages)
    assert run_life(whole, *only)[0] == 0
    cuts = {"pretrain": "pretrain 15/60", "sample": "sample 12/32", "ppo": "ppo 3/10"}
    for stage, line in ((s, line) for s, line in cuts.items() if s in stages):
        where = (CONFIG, "--run-dir", str(cut), "--cpu-devices", "2", *only)
        process = jaxllm("run", *where, stdout=subprocess.DEVNULL)
        assert process.stderr is not None
        log = ""
        for text in process.stderr:
            log += text
            if line in text:
                os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log
        assert f"SIGTERM: {stage}: " in log and "s after the signal" in log, log
    code, log = run_life(cut, *only)
    attempts = f"{1 + len(cuts.keys() & {*stages})} attempts"
    assert code == 0 and "goodput: " in log and attempts in log, log
    ours, theirs = outcome(cut, stages), outcome(whole, stages)
    assert [name for name in theirs if ours[name] != theirs[name]] == []

    if stages != STAGES:
        return

    # A finished stage whose checkpoint is damaged is made again when a later stage needs it.
    shutil.rmtree(cut / stages[-1])
    newest = max((cut / "sft" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    file = max(newest.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, log = run_life(cut, *only)
    assert code == 0 and "sft makes it again" in " ".join(log.split()), log
    ours = outcome(cut, stages)
    assert [name for name in theirs if ours[name] != theirs[name]] == []

    # Another config is refused field by field, unless it is said that it may differ.
    changed = ("--pretrain.num-steps", "61", "--pretrain.log-every", "4")
    code, log = run_life(cut, *only, *changed)
    assert code == 2 and "pretrain.num_steps: 60 -> 61; pretrain.log_every: 5 -> 4" in log, log
    code, log = run_life(
        cut, *only, *changed, "--allow-change", "pretrain.num_steps", "pretrain.log_every"
    )
    assert code == 0 and "pretrain 61/61" in log, log
