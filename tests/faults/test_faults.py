"""A few faults in the suite; hundreds of them: bash tests/faults/soak.sh --minutes 60."""

import random

import pytest

from tests.conftest import SESSION
from tests.faults import harness
from tests.faults.harness import FAULTS, Life


def chosen(*names):
    """These faults, in this order, the last one again and again."""
    pool = {**FAULTS, **harness.ONE_OF_SEVERAL}
    yield from ((name, pool[name]) for name in names)
    while True:
        yield names[-1], pool[names[-1]]


@pytest.mark.parametrize(
    ("processes", "names", "stages"),
    [
        (2, ["SIGTERM", "SIGKILL of one process"], harness.STAGES[:2]),
        pytest.param(2, ["SIGTERM", "SIGKILL of one process"], harness.STAGES, marks=pytest.mark.slow),
        pytest.param(
            1,
            ["SIGKILL in a save", "bit flipped in a checkpoint", "bit flipped in a data shard"],
            harness.STAGES,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_life_ends_with_the_same_bits_whatever_happens_to_it(monkeypatch, tmp_path, processes, names, stages):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # most of the time is the compiler's
    cache = str(SESSION / "compiled")
    whole, life = (Life(tmp_path / name, processes, cache=cache, stages=stages) for name in ("whole", "life"))
    whole.start()
    assert whole.wait(600.0) and not any(whole.clear()), whole.log()[-2000:]
    happened = [*harness.live_through(life, chosen(*names), random.Random(3), quiet_after=len(names))]
    assert len(happened) > 0 and not any(complaint for _, complaint in happened), happened
    ends = [harness.outcome(each.directory, stages) for each in (whole, life)]
    assert harness.differences(*ends) == []


def test_the_verdict_sees_a_single_changed_bit(tmp_path):
    """Of two lives that differ in one word of one digest, or one metric."""
    one = {"pretrain params.a": [1, 2], "pretrain metrics": [{"step": 1, "train/loss": 0.5}]}
    assert harness.differences(one, dict(one)) == []
    assert harness.differences(one, {**one, "pretrain params.a": [1, 3]}) == ["pretrain params.a"]
    assert harness.differences(one, {**one, "pretrain metrics": [{"step": 1, "train/loss": 0.25}]}) == [
        "pretrain metrics"
    ]
