"""Lives whose run directory is in a store. Hundreds of faults: python -m tests.faults.stores --minutes 60."""

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
    """A life on a disk that nothing happens to."""
    life = Life(tmp_path_factory.mktemp("whole") / "life", stages=STAGES, more=SHORT)
    life.start()
    assert life.wait(300.0) and not any(life.clear()), life.log()[-2000:]
    return harness.outcome(life.directory, STAGES)


@pytest.mark.parametrize("kind", emulators.SERVERS)
def test_a_life_in_a_store_goes_on_without_its_machine(tmp_path, whole, kind):
    with stores.place(kind, tmp_path / "server", seed=0) as where:
        life = stores.life_in(where, "life", tmp_path)
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
    assert harness.differences(whole, found) == []
    # It went on, and did not begin again.
    resumed = [
        line
        for line in harness._lines_whole(tmp_path / "end" / "goodput.jsonl")
        if line.get("restored")
    ]
    assert resumed, life.log()[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", emulators.SERVERS)
def test_a_life_in_a_store_ends_with_the_same_bits_whatever_happens(tmp_path, kind):
    whole = Life(tmp_path / "whole")
    whole.start()
    assert whole.wait(900.0) and not any(whole.clear()), whole.log()[-2000:]
    with stores.place(kind, tmp_path / "server", seed=1) as where:
        life = stores.life_in(where, "life", tmp_path)
        life.cache = ""
        pool = stores.faults_of(where)
        mine = [name for name in pool if name not in harness.FAULTS]
        faults = itertools.cycle((name, pool[name]) for name in mine)
        happened = [*harness.live_through(life, faults, random.Random(5), quiet_after=len(mine))]
        assert not any(complaint for _, complaint in happened), happened
        end = harness.outcome(stores.content(where, life, tmp_path / "end"))
    assert harness.differences(harness.outcome(whole.directory), end) == []
