"""Sums over an interval are divided once; a resumed log has no line twice; a loss that is not finite stops the run."""

import contextlib
import json

import jax.numpy as jnp
import pytest

from jaxllm import metrics as m
from jaxllm.config import InputError
from jaxllm.runtime.files import read_jsonl


def make(directory, start=0, num_steps=10, **more):
    settings = {
        "log_every": 4,
        "save_every": 5,
        "work": m.Work(tokens=8),
        "config": m.LoggingConfig(tensorboard=False),
    }
    return m.MetricLog(directory, "test", num_steps, start=start, **{**settings, **more})


def pair(total, weight):
    return (jnp.float32(total), jnp.float32(weight))


def drive(log, steps):
    for step in steps:
        log(step, None, {"loss": pair(step * step, step), "never": pair(0, 0)})
    log.close()


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_an_interval_is_the_sum_over_the_weight_not_a_mean_of_means(tmp_path):
    drive(make(tmp_path), range(1, 11))
    found = {line["step"]: line["train/loss"] for line in lines(tmp_path)}
    assert found.keys() == {4, 5, 8, 10}  # log_every, save_every and the end
    assert found[4] == pytest.approx((1 + 4 + 9 + 16) / (1 + 2 + 3 + 4))
    assert found[5] == pytest.approx(5.0)
    assert all("train/never" not in line for line in lines(tmp_path))


def test_a_resumed_log_is_that_of_an_uninterrupted_run(tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    drive(make(tmp_path / "whole"), range(1, 11))
    drive(
        make(tmp_path / "cut"), range(1, 9)
    )  # killed after step 8, the newest checkpoint is of step 5
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "tra')
    drive(make(tmp_path / "cut", start=5), range(6, 11))
    series = [
        [(x["step"], x["train/loss"]) for x in lines(tmp_path / name)] for name in ("whole", "cut")
    ]
    assert series[0] == series[1]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    log = make(tmp_path, num_steps=4)
    for step in range(1, 4):
        log(step, None, {"loss": pair(1, 1)})
    with pytest.raises(m.TrainingDiverged, match="loss is nan at step 4"):
        log(4, None, {"loss": pair(float("nan"), 1)})


def test_values_outside_intervals_are_written_and_shown(tmp_path):
    log = make(tmp_path, shown=("loss", "eval/loss"))
    drive(log, range(1, 5))
    log = make(tmp_path, start=4)
    log.write(5, {"eval/loss": 2.5})
    log.close()
    assert lines(tmp_path)[-1]["eval/loss"] == 2.5


def test_tensorboard_gets_the_same_numbers(tmp_path):
    log = make(tmp_path, config=m.LoggingConfig(tensorboard=True))
    drive(log, range(1, 5))
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_the_peak_of_a_cpu_is_measured():
    from jaxllm.runtime.config import MeshConfig
    from jaxllm.runtime.mesh import make_mesh

    assert m.peak_flops(make_mesh(MeshConfig())) > 1e9


@pytest.mark.parametrize("damage", [b"\0\0\0\0", b"[1]", b"{", b"\xff", b"null", b'"text"'])
def test_a_damaged_line_is_named_and_costs_no_other(tmp_path, capsys, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n{"no": 3}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: not a JSON object; remove that line"):
        read_jsonl(path)
    assert read_jsonl(path, "stop") == [{"step": 1}]
    assert read_jsonl(path, "skip") == [{"step": 1}, {"step": 2}, {"no": 3}]
    assert "metrics.jsonl:2: not a JSON object" in capsys.readouterr().err
    log = make(tmp_path, start=2)
    log.close()
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}]


def test_a_held_out_number_that_is_not_finite_ends_the_stage_as_diverged(tmp_path):
    log = make(tmp_path)
    with pytest.raises(
        m.TrainingDiverged, match="eval/loss is nan at step 5; lower the learning rate"
    ):
        log.write(5, {"eval/loss": float("nan")})
    log.close()
    assert "eval/loss" in lines(tmp_path)[-1]


@pytest.mark.parametrize(("skipped", "diverged"), [(1, False), (15, False), (16, True)])
def test_a_short_ppo_has_diverged_only_where_every_minibatch_was_skipped(
    tmp_path, skipped, diverged
):
    log = make(tmp_path, num_steps=1)
    step = {"ppo/skipped": pair(skipped, 16), "ppo/skip_streak": pair(skipped, 1)}
    with pytest.raises(m.TrainingDiverged) if diverged else contextlib.nullcontext():
        log(1, None, step)
    log.close()


@pytest.mark.parametrize(("num_steps", "streak"), [(8, 8), (100, 20)])
def test_a_stage_that_ends_in_skipped_updates_has_diverged(tmp_path, num_steps, streak):
    def end(skipped):
        log = make(tmp_path, num_steps=num_steps)
        for step in range(1, num_steps + 1):
            log(
                step,
                None,
                {"loss": pair(1, 1), "skip_streak": pair(max(0, step - (num_steps - skipped)), 1)},
            )
        log.close()

    end(streak - 1)
    with pytest.raises(m.TrainingDiverged, match=f"the last {streak} updates were skipped"):
        end(streak)
