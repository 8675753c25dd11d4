"""A law is found from its own points; its budgets are the best there are; one bad run does not move it."""

import numpy as np
import pytest

from jaxllm.scaling import law as laws
from jaxllm.scaling.law import Law, Point

TRUE = Law(E=1.7, A=400.0, B=410.0, alpha=0.34, beta=0.28)
# E = 0 and beta = 1, as of the other form.
KAPLAN = Law(E=0.0, A=4e5, B=5e8, alpha=0.8, beta=1.0, power=0.1)
SIZES = (1e6, 3e6, 1e7, 3e7, 1e8)
TOKENS = (1e7, 1e8, 1e9, 1e10)


def points_of(law, noise=0.0, seed=0, sizes=SIZES):
    rng = np.random.default_rng(seed)
    return [
        Point(n, d, law.loss(n, d) * np.exp(rng.normal(0.0, noise))) for n in sizes for d in TOKENS
    ]


@pytest.mark.parametrize(
    "true",
    [
        TRUE,
        Law(0.4, 30.0, 9000.0, 0.15, 0.6),
        Law(3.2, 2e4, 60.0, 0.7, 0.2),
        Law(0.0, 12.0, 40.0, 0.08, 0.12),  # without a floor
    ],
    ids=str,
)
def test_a_law_is_found_from_its_own_points(true):
    found = laws.fit(points_of(true))
    for n, d in [(2e6, 5e8), (1e9, 1e11)]:  # between the points and far beyond
        assert found.loss(n, d) == pytest.approx(true.loss(n, d), rel=1e-4)
    assert found.alpha == pytest.approx(true.alpha, rel=0.01)
    assert found.beta == pytest.approx(true.beta, rel=0.01)


@pytest.mark.parametrize(
    "true", [KAPLAN, Law(0.0, 3e9, 1e9, 1.3, 1.0, 0.14), Law(0.0, 9.0, 2e7, 0.2, 1.0, 0.4)], ids=str
)
def test_a_law_with_a_power_is_found_from_its_own_points(true):
    points = points_of(true)
    found = laws.fit(points, "kaplan")
    for n, d in [(2e6, 5e8), (1e9, 1e11)]:
        assert found.loss(n, d) == pytest.approx(true.loss(n, d), rel=1e-4)
    assert found.alpha == pytest.approx(true.alpha, rel=0.01)
    assert found.power == pytest.approx(true.power, rel=0.01)
    assert (found.E, found.beta) == (0.0, 1.0)
    # The sum of two terms is another law.
    assert laws.relative_error(laws.fit(points), points) > 1e-3
    assert laws.relative_error(found, points) < 1e-5


BOTH = pytest.mark.parametrize(("true", "form"), [(TRUE, "chinchilla"), (KAPLAN, "kaplan")])


@BOTH
def test_one_bad_run_does_not_move_it(true, form):
    points = points_of(true)
    points[3] = points[3]._replace(loss=1.3 * points[3].loss)
    assert laws.fit(points, form).loss(1e9, 1e11) == pytest.approx(true.loss(1e9, 1e11), rel=2e-3)


def test_the_gradient_is_that_of_the_objective():
    points = np.array(points_of(TRUE, noise=0.01))
    logs = np.log(points.T)
    at = np.array([0.3, 5.0, 6.5, 0.3, 0.3, 0.7])
    _, gradient = laws.objective(at, *logs)
    for i, step in enumerate(np.eye(6) * 1e-6):
        difference = laws.objective(at + step, *logs)[0] - laws.objective(at - step, *logs)[0]
        assert gradient[i] == pytest.approx(difference / 2e-6, rel=1e-4)


@BOTH
def test_the_best_split_of_flops_is_the_best_of_many(true, form):
    budget = true.best_for_flops(3e20)
    sizes = np.geomspace(1e7, 1e13, 150_001)
    losses = true.loss(sizes, 3e20 / 6 / sizes)
    assert budget.loss == pytest.approx(losses.min(), rel=1e-8)
    assert budget.parameters == pytest.approx(sizes[losses.argmin()], rel=1e-3)
    assert budget.flops == pytest.approx(3e20) and budget.loss <= losses.min()


def test_the_fewest_flops_for_a_loss_are_the_fewest_of_many():
    budget = TRUE.best_for_loss(2.4)
    sizes = np.geomspace(1e8, 1e11, 100_001)
    left = 2.4 - TRUE.E - TRUE.A * sizes**-TRUE.alpha
    tokens = (TRUE.B / left[left > 0]) ** (1 / TRUE.beta)
    flops = 6 * sizes[left > 0] * tokens
    assert budget.flops == pytest.approx(flops.min(), rel=1e-6)
    assert budget.loss == pytest.approx(2.4, rel=1e-12)
    # The two are one: so many FLOPs reach this loss and no lower one.
    assert TRUE.best_for_flops(budget.flops).loss == pytest.approx(2.4, rel=1e-12)
    with pytest.raises(ValueError, match="not above E"):
        TRUE.best_for_loss(1.7)


def test_the_fewest_flops_of_a_law_with_a_power_are_the_fewest_of_many():
    budget = KAPLAN.best_for_loss(1.2)
    sizes = np.geomspace(1e5, 1e9, 300_001)
    left = 1.2 ** (1 / KAPLAN.power) - KAPLAN.A * sizes**-KAPLAN.alpha
    flops = 6 * sizes[left > 0] * KAPLAN.B / left[left > 0]
    assert budget.flops == pytest.approx(flops.min(), rel=1e-6)
    assert budget.loss == pytest.approx(1.2, rel=1e-12)
    assert KAPLAN.best_for_flops(budget.flops).loss == pytest.approx(1.2, rel=1e-12)


@BOTH
def test_intervals_mostly_hold_the_truth_and_shrink_with_the_noise(true, form):
    widths, held = {2e-3: [], 2e-4: []}, 0
    for noise, found in widths.items():
        for seed in range(5):
            points = points_of(true, noise=noise, seed=seed)
            samples = laws.bootstrap(points, laws.fit(points, form), count=16, seed=0, form=form)
            losses = [sample.loss(3e8, 3e10) for sample in samples]
            held += min(losses) < true.loss(3e8, 3e10) < max(losses)
            found.append(max(losses) - min(losses))
    assert held >= 7  # of 10
    assert np.mean(widths[2e-4]) < np.mean(widths[2e-3]) / 4
    assert samples == laws.bootstrap(points, laws.fit(points, form), count=16, seed=0, form=form)


def test_too_few_runs_are_refused():
    with pytest.raises(ValueError, match="4 runs of 1 sizes and 4 numbers of tokens"):
        laws.fit(points_of(TRUE, sizes=SIZES[:1]))
    with pytest.raises(ValueError, match="8 runs of 2 sizes"):
        laws.fit(points_of(TRUE, sizes=SIZES[:2]))
