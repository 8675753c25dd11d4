"""Every second has one kind; repeated work is lost, and the time between attempts is down."""

import os
import time

import pytest

from jaxllm.runtime import began, goodput
from jaxllm.runtime.goodput import Ledger, read, summary, totals


def line(attempt, at, stage, step, seconds, **more):
    return {
        "attempt": attempt,
        "time": at,
        "stage": stage,
        "step": step,
        "seconds": seconds,
        **more,
    }


def test_a_ledger_partitions_the_wall_time(tmp_path):
    ledger = Ledger(tmp_path / "goodput.jsonl", began=time.time() - 5.0)
    began = time.monotonic() - 5.0
    ledger.mark("start")
    for _ in range(3):
        time.sleep(0.02)
        ledger.mark("step")
        ledger.mark("save")
    ledger.write("pretrain", 3)
    seconds = totals(read(ledger.path))
    assert sum(seconds.values()) == pytest.approx(time.monotonic() - began, abs=0.05)
    assert seconds["start"] == pytest.approx(5.0, abs=0.05) and seconds["step"] >= 0.06


def test_what_is_known_of_the_start_is_not_counted_twice(tmp_path):
    ledger = Ledger(tmp_path / "goodput.jsonl", time.time() - 5.0, {"import": 3.0, "join": 1.5})
    ledger.mark("start")
    ledger.write("pretrain")
    seconds = totals(read(ledger.path))
    assert (seconds["import"], seconds["join"]) == (3.0, 1.5)
    assert seconds["start"] == pytest.approx(0.5, abs=0.05)


def test_what_a_killed_attempt_did_past_the_checkpoint_is_lost():
    lines = [
        line(1, 10.0, "pretrain", 0, {"start": 4.0, "restore": 1.0}, restored=0),
        line(1, 20.0, "pretrain", 10, {"compile": 2.0, "step": 8.0}),
        line(
            1, 30.0, "pretrain", 20, {"step": 10.0}
        ),  # killed some time after this; step 12 had been saved
        line(2, 50.0, "pretrain", 12, {"start": 5.0, "restore": 2.0}, restored=12),
        line(2, 58.0, "pretrain", 20, {"compile": 1.0, "step": 7.0}),
    ]
    seconds = totals(lines)
    assert seconds["lost"] == 10.0 and seconds["step"] == 15.0 and seconds["compile"] == 3.0
    assert seconds["down"] == 50.0 - 7.0 - 30.0 and seconds["start"] == 9.0
    assert (
        sum(seconds.values()) == 58.0 - 10.0 + 5.0
    )  # from the first process's start to the last line
    text = summary(lines)
    assert text.startswith(
        f"goodput: {15 / 53:.1%} of 53 s productive in 2 attempts; down 24.5%, lost 18.9%"
    )


def test_a_line_cut_by_a_kill_is_left_out_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "goodput.jsonl"
    first = Ledger(path)
    first.mark("step")
    first.write("sft", 5)
    with path.open("a") as file:
        file.write('{"attempt": 1, "ti')
    second = Ledger(path)
    assert second.attempt == 2
    second.mark("step")
    second.write("sft", 9)
    assert [(x["attempt"], x["step"]) for x in read(path)] == [(1, 5), (2, 9)]
    assert {*goodput.PRODUCTIVE} < {*goodput.KINDS}


def test_a_process_begins_when_it_noted_it_and_not_its_parent(monkeypatch):
    monkeypatch.setenv("JAXLLM_BEGAN", f"{os.getpid() + 1} 5.0")
    system = began.process_began()
    assert 0 < time.time() - system < 24 * 3600
    began.note()
    noted = began.process_began()
    assert abs(time.time() - noted) < 1.0
    began.note()  # after a restart for huge pages
    assert began.process_began() == noted
