"""Lives whose run directory is in a store. Hundreds of faults: python -m tests.faults.stores --minutes 60."""

import functools
import itertools
import random
import shutil
import time

import pytest

from tests import emulators
from tests.faults import harness, stores
from tests.faults.harness import Life

STAGES = ("tokenizer", "pretrain")
SHORT = ("--pretrain.num-steps", "30", "--cpu-devices", "1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of a life of so many processes on a disk that nothing happens to."""

    @functools.cache
    def of(processes):
        folder = tmp_path_factory.mktemp("whole") / "life"
        life = Life(folder, processes, stages=STAGES, more=SHORT)
        life.start()
        assert life.wait(300.0) and not any(life.clear()), life.log()[-2000:]
        return harness.outcome(life.directory, STAGES)

    return of


@pytest.mark.parametrize(
    "kind, processes",
    [
        ("gs", 1),
        pytest.param("s3", 1, marks=pytest.mark.life),
        pytest.param("gs", 2, marks=pytest.mark.life),
    ],
)
def test_a_life_in_a_store_goes_on_without_its_machines(tmp_path, whole, kind, processes):
    """Of several processes one loses its disk: what it held is in the store, and what the others hold is not fetched."""
    with stores.place(kind, tmp_path / "server", seed=0) as where:
        life = stores.life_in(where, "life", tmp_path, processes)
        life.stages, life.more, life.cache = STAGES, (*life.more, *SHORT), ""
        life.start()
        with emulators.in_environment(where.emulator):
            store = stores.Store(life.url)
            while not any(name.endswith("/seal.json") for name in store.list()):
                assert life.alive[0].poll() is None, life.log()[-2000:]
                time.sleep(0.2)
        harness.kill_all(life, random.Random(0))
        life.clear()
        shutil.rmtree(life.directory)
        life.start()
        assert life.wait(300.0) and not any(life.clear()), life.log()[-2000:]
        found = harness.outcome(stores.content(where, life, tmp_path / "end"), STAGES)
    assert harness.differences(whole(processes), found) == []
    # It went on, and did not begin again.
    resumed = [
        line
        for line in harness._lines_whole(tmp_path / "end" / "goodput.jsonl")
        if line.get("restored")
    ]
    assert resumed, life.log()[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind, processes", [("gs", 1), ("s3", 1), ("gs", 2)])
def test_a_life_in_a_store_ends_with_the_same_bits_whatever_happens(tmp_path, kind, processes):
    whole = Life(tmp_path / "whole", processes)
    whole.start()
    assert whole.wait(900.0) and not any(whole.clear()), whole.log()[-2000:]
    with stores.place(kind, tmp_path / "server", seed=1) as where:
        life = stores.life_in(where, "life", tmp_path, processes)
        life.cache = ""
        pool = stores.faults_of(where)
        mine = [name for name in pool if name not in harness.FAULTS]
        faults = itertools.cycle((name, pool[name]) for name in mine)
        happened = [*harness.live_through(life, faults, random.Random(5), quiet_after=len(mine))]
        assert not any(complaint for _, complaint in happened), happened
        end = harness.outcome(stores.content(where, life, tmp_path / "end"))
    assert harness.differences(harness.outcome(whole.directory), end) == []
