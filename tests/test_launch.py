"""The restart loop: it goes on after failures, and gives up where there is no progress."""

import os
import signal
import subprocess
import time

from tests.conftest import ROOT


def restart(tmp_path, script, **kwargs):
    command = ["bash", str(ROOT / "launch" / "restart.sh"), str(tmp_path), "bash", "-c", script]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "MAX_STUCK": "2"}, **kwargs)


def test_it_restarts_until_it_is_done(tmp_path):
    process = restart(
        tmp_path, f"cd {tmp_path}; d=$(ls | wc -l); mkdir $d; touch $d/result.json; [ $(ls | wc -l) = 4 ] || kill -9 $$"
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
        tmp_path, f"trap 'touch {tmp_path}/told; exit 3' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    )
    end = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 3 and (tmp_path / "told").exists()
