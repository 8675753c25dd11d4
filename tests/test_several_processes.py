"""A run does not depend on the number of processes: batches, losses, texts, who writes, and resuming on other numbers.

The processes are real, on a CPU, joined by jax.distributed (gloo); each has its share of the devices.
"""

import functools
import itertools
import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SESSION
from tests.faults import harness, stores
from tests.faults.harness import STAGES, TRAINED, Life, outcome

TOPOLOGIES = [(1, 8), (2, 4), (4, 2)]  # processes, devices of each
# With seed 0, one token of a prompt has two experts whose probabilities differ by 3e-8: rounding decides between them,
# and samples differ from there.
EXPERTS = ("--model.moe.num-experts", "4", "--model.moe.aux-coef", "0.01", "--seed", "1")
# The first axis above 1 crosses two processes; of four processes, the second one crosses them too.
MESHES = {
    "data, fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "context, expert, tensor": {"data": 1, "context": 2, "expert": 2, "tensor": 2},
}
COMPARED = (" metrics", " result", " step", ".jsonl", "tokenizer")
LOSSES = ("train/loss", "train/z_loss", "train/mtp_loss", "eval/loss", "ppo/value_loss")


@pytest.fixture(autouse=True)
def compiled_soon(monkeypatch):
    """Nearly all the time would be compilation: leave out XLA's costly optimizations; the collectives are the same."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")


def life(directory, processes, devices, sizes, stages=STAGES):
    mesh = [word for axis, size in sizes.items() for word in (f"--mesh.{axis}", str(size))]
    more = (*mesh, *(EXPERTS if "expert" in sizes else ()))
    command = ("tests.watched", "run", "tests/processes.yaml")
    return Life(directory, processes, devices, stages=stages, command=command, more=more)


def live(*args, **kwargs):
    """The directory of a run that was not interrupted."""
    each = life(*args, **kwargs)
    each.start()
    assert each.wait(1800.0) and not any(each.clear()), each.log()[-3000:]
    return each.directory


@functools.cache
def whole(mesh, processes, devices):
    base = SESSION / "processes" / f"{mesh} {processes} x {devices}"
    base.parent.mkdir(exist_ok=True)
    return live(base, processes, devices, MESHES[mesh])


def batches(directory):
    """{(stage, step): digests}; a step that is repeated after an interruption must get the same batch."""
    found = {}
    for line in (directory.parent / f"{directory.name}.batches").read_text().splitlines():
        stage, number, words = json.loads(line)
        assert found.setdefault((stage, number), words) == words
    return found


def same_life(actual, expected, stages=STAGES, limit=1e-5):
    """The same batches and texts, and all numbers within the limit."""
    known = batches(expected)
    assert [step for step, words in batches(actual).items() if known[step] != words] == []
    actual_outcome, expected_outcome = (
        outcome(directory, stages) for directory in (actual, expected)
    )
    assert actual_outcome.keys() == expected_outcome.keys()
    for name in (
        n for n in actual_outcome if n.endswith(COMPARED)
    ):  # the others are digests of parameters, equal to the bit or not
        same(actual_outcome[name], expected_outcome[name], name, limit)


def same(actual, expected, name, limit=1e-5):
    """Equal, numbers within the limit; differences of larger numbers (a KL, the policy's loss) have an absolute error."""
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys(), name
        for key in actual:
            same(actual[key], expected[key], f"{name}: {key}", limit)
    elif isinstance(actual, list):
        for number, (a, b) in enumerate(itertools.zip_longest(actual, expected)):
            same(a, b, f"{name} {number}", limit)
    elif isinstance(actual, float):
        written = (
            1.1e-4 if name.endswith("score") and "jsonl" in name else 0
        )  # four places are written
        absolute = limit / 1000 if name.endswith(LOSSES) else max(limit / 10, written)
        if name.endswith("explained_variance"):  # a ratio, of variances that are next to nothing
            absolute = 10 * limit
        np.testing.assert_allclose(actual, expected, rtol=limit, atol=absolute, err_msg=name)
    else:
        assert actual == expected, name


def written_by_others(directory):
    """What processes other than 0 have written, told by its mode (see `Life.start`)."""
    paths = (
        path.relative_to(directory)
        for path in directory.rglob("*")
        if not path.stat().st_mode & 0o004
    )
    return {str(path) for path in paths}


def is_array(path):
    """Whether it is a file of a checkpoint with the shards of one process, or Orbax's metadata of them."""
    return "/checkpoints/" in path and (
        "/ocdbt.process_" in path or "/array_metadatas/process_" in path
    )


def check_writers(directory):
    """Processes other than 0 write the arrays they hold and their part of the tokenized data, and nothing else."""
    others = written_by_others(directory)
    assert any(map(is_array, others))
    assert {
        path for path in others if not is_array(path) and not path.startswith("cache/")
    } == set()


@pytest.mark.life
def test_two_processes_train_as_one(tmp_path):
    """The tensor axis crosses them: both have the same rows and half of each matrix."""
    several, single = (
        live(tmp_path / f"{n}", n, 2 // n, {"data": 1, "tensor": 2}, stages=STAGES[:2])
        for n in (2, 1)
    )
    same_life(several, single, STAGES[:2])
    assert len(batches(several)) == 12
    check_writers(several)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_life_is_the_same_on_any_number_of_processes(mesh, processes):
    several, single = (whole(mesh, n, 8 // n) for n in (processes, 1))
    same_life(several, single)
    check_writers(several)
    steps = [len([1 for stage, _ in batches(several) if stage == name]) for name in TRAINED]
    assert steps == [12, 8, 4, 3]
    lines = [
        json.loads(line) for line in (several / "ppo" / "rollouts.jsonl").read_text().splitlines()
    ]
    assert (
        sum(line["response"].endswith(("e", "。")) and line["finished"] for line in lines) > 5
    )  # stop strings


def steps_saved(directory, stage):
    return [
        int(path.name)
        for path in (directory / stage / "checkpoints").iterdir()
        if path.name.isdigit()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "ppo"])
def test_interrupted_on_two_processes_it_resumes_on_one_and_on_four(tmp_path, stage):
    """SIGTERM to one of 2 x 4; then 1 x 2 and 4 x 1, with other meshes."""
    uncut, cut = whole("data, fsdp, tensor", 2, 4), tmp_path / "cut"
    shutil.copytree(
        uncut, cut, ignore=shutil.ignore_patterns(*STAGES[STAGES.index(stage) :], "report*")
    )
    shutil.copy(f"{uncut}.batches", f"{cut}.batches")  # those that follow must be the same
    stages = STAGES[: STAGES.index(stage) + 2]
    interrupted = life(cut, 2, 4, MESHES["data, fsdp, tensor"], stages)
    interrupted.start()
    while f"{stage}: " not in interrupted.log() and all(
        p.poll() is None for p in interrupted.alive
    ):
        time.sleep(0.05)
    interrupted.alive[1].terminate()  # while it compiles: it stops after a step or two
    assert interrupted.wait(600.0) and not any(interrupted.clear()), interrupted.log()[-3000:]
    assert f"SIGTERM: {stage}: step" in " ".join(interrupted.log().split())
    assert 0 < max(steps_saved(cut, stage)) < max(steps_saved(uncut, stage))
    for processes, devices, sizes in (
        (1, 2, {"data": 1, "fsdp": 2}),
        (4, 1, {"data": 2, "tensor": 2}),
    ):
        on = tmp_path / f"on {processes}"
        shutil.copytree(cut, on)
        shutil.copy(f"{cut}.batches", f"{on}.batches")
        live(on, processes, devices, sizes, stages=stages)
        same_life(on, uncut, stages)


# --- Without a shared disk, on other numbers of hosts.

# 4, 2 and 3 divide every batch and every dimension that is sharded.
# Other numbers of hosts round differently, and a random number may lie between two tokens up to that: about once in
# 20,000 draws of an untrained model, and all that follows differs. At a low temperature few tokens share the probability.
DIVISIBLE = """
extends: {base}
model: {{embed_dim: 48, num_heads: 4, num_kv_heads: 4, mlp_dim: 96}}
mesh: {{data: 1, fsdp: -1}}
pretrain: {{batch_size: 12, num_steps: 48}}
sft: {{batch_size: 12}}
sample: {{num_prompts: 24, num_held_out: 12, batch_size: 12}}
reward: {{batch_size: 12}}
ppo: {{batch_size: 24, num_steps: 120, eval_every: 40, checkpoint: {{save_every: 4}}, eval_prompts: 12, num_logged: 24, meshes: [], stop_strings: [], sampling: {{max_new_tokens: 8, temperature: 0.2}}}}
evaluate: {{num_prompts: 12}}
"""


def reached(job, stage):
    """The last step that process 0 has printed, and of how many."""
    log = Path(f"{job.directory}.0.log").read_text(errors="replace")
    found = re.findall(rf"{stage} (\d+)/(\d+)", log)
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind, stage", [("gs", "pretrain"), ("s3", "ppo")])
def test_a_job_in_a_store_comes_back_with_other_numbers_of_hosts(tmp_path, kind, stage):
    """4 hosts, then 2, 3 and 4, each with a disk of its own: killed, told to stop, one of them lost."""
    config = tmp_path / "divisible.yaml"
    config.write_text(DIVISIBLE.format(base=harness.ROOT / "tests/processes.yaml"))
    stages = STAGES[: STAGES.index(stage) + 1]
    command = ("tests.watched", "run", str(config))
    uncut = Life(tmp_path / "uncut", 1, 1, stages=stages, command=command)
    uncut.start()
    assert uncut.wait(900.0) and not any(uncut.clear()), uncut.log()[-3000:]
    rng = random.Random(0)
    logs: list[str] = []
    ends = {4: harness.kill_all, 2: harness.terminate, 3: harness.kill_one}
    with stores.place(kind, tmp_path / "server", seed=0) as where:
        for processes, end in [*ends.items(), (4, None)]:
            job = stores.life_in(where, "job", tmp_path, processes)
            job.devices, job.stages, job.command = 1, stages, command
            job.environment |= {"WATCHED": str(tmp_path / "end.batches")}
            job.cache = os.environ.get("JAXLLM_CACHE", "")
            job.start()
            # A quarter of the stage each.
            while end:
                step, num_steps = reached(job, stage)
                is_far = step >= len(logs) * num_steps / 4 + num_steps / 6
                if is_far and stores.has_saved(where, job, stage):
                    break
                assert stores.is_running(job), job.log()[-3000:]
                time.sleep(0.05)
            assert not end or not end(job, rng)
            assert job.wait(600.0), job.log()[-3000:]
            codes = job.clear()
            logs.append(job.log())
            assert end in (harness.kill_all, harness.kill_one) or not any(codes), job.log()[-3000:]
        stores.content(where, job, tmp_path / "end")
    # What rounding differs by grows with the updates, most where critics have learned little.
    limit = 1e-3 if stage == "ppo" else 1e-5
    same_life(tmp_path / "end", tmp_path / "uncut", stages, limit)
    lines = [json.loads(line) for line in (tmp_path / "end/goodput.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["stage"] == stage and line.get("restored")]) == 3
    said = " ".join("".join(logs).split())
    # 12 rows on 4 hosts are 3 rows each: two hosts take them in two microbatches, three in as many.
    assert f"{stage}: began on 4 devices, now there are 2: num_micro 1 -> 2" in said
    assert f"{stage}: began on 4 devices, now there are 3: num_micro 1 -> 2" in said
