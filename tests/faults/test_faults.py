"""A few faults in whole lives (slow); hundreds of them: bash tests/faults/soak.sh --minutes 60."""

import random

import pytest

from tests.faults import harness
from tests.faults.harness import FAULTS, Life


def chosen(*names):
    """These faults, in this order, the last one again and again."""
    pool = {**FAULTS, **harness.ONE_OF_SEVERAL}
    yield from ((name, pool[name]) for name in names)
    while True:
        yield names[-1], pool[names[-1]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "names"),
    [
        (2, ["SIGTERM", "SIGKILL of one process"]),
        (1, ["SIGKILL in a save", "bit flipped in a checkpoint", "bit flipped in a data shard"]),
    ],
)
def test_a_life_ends_with_the_same_bits_whatever_happens_to_it(tmp_path, processes, names):
    whole, life = (Life(tmp_path / name, processes) for name in ("whole", "life"))
    whole.start()
    assert whole.wait(600.0) and not any(whole.clear()), whole.log()[-2000:]
    happened = [
        *harness.live_through(life, chosen(*names), random.Random(3), quiet_after=len(names))
    ]
    assert len(happened) > 0 and not any(complaint for _, complaint in happened), happened
    ends = [harness.outcome(each.directory) for each in (whole, life)]
    assert harness.differences(*ends) == []


def test_the_verdict_sees_a_single_changed_bit(tmp_path):
    """Of two lives that differ in one word of one digest, or one metric."""
    one = {"pretrain params.a": [1, 2], "pretrain metrics": [{"step": 1, "train/loss": 0.5}]}
    assert harness.differences(one, dict(one)) == []
    assert harness.differences(one, {**one, "pretrain params.a": [1, 3]}) == ["pretrain params.a"]
    assert harness.differences(
        one, {**one, "pretrain metrics": [{"step": 1, "train/loss": 0.25}]}
    ) == ["pretrain metrics"]
