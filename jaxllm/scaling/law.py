"""The scaling law of Hoffmann et al. 2022: loss as a function of parameters N and training tokens D.

    L(N, D) = E + A / N^alpha + B / D^beta        (section 3.3, eq. 2)

It is fitted as there: in logarithms, with a Huber loss that single bad runs do not dominate, by L-BFGS from many starts
(eq. 3). The starts are not a grid over five numbers but over two: for given exponents the law is linear in E, A and B, whose
best values are found at once.

Shapes: n runs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize, nnls

# Residuals of log L beyond this count linearly (Hoffmann et al. 2022, section 3.3).
HUBER = 1e-3
# Starts: the best of a grid of exponents go to L-BFGS.
_EXPONENTS = np.geomspace(0.05, 2.0, 14)
_NUM_STARTS = 6
# Log of a term that is not there; exp of it is 1e-13.
_NOTHING = -30.0


class Point(NamedTuple):
    """What a run says."""

    parameters: float
    tokens: float
    loss: float
    """Held out, in nats a token, or in whatever unit the law is to have."""


class Law(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """The loss of models of these sizes, trained on so many tokens; numbers or arrays."""
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    def best_for_flops(self, flops: float) -> "Budget":
        """The split of 6 N D = flops with the least loss (Hoffmann et al. 2022, eq. 4)."""
        total = self.alpha + self.beta
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        parameters = ratio * (flops / 6) ** (self.beta / total)
        return self._budget(parameters, flops / 6 / parameters)

    def best_for_loss(self, loss: float) -> "Budget":
        """The least FLOPs that reach a loss.

        Where 6 N D is least, one percent more of N gains as much as one percent more of D: alpha A / N^alpha = beta B / D^beta.
        With their sum, loss - E, both are known.

        Raises:
            ValueError: no model reaches it.
        """
        rest = loss - self.E
        if rest <= 0:
            raise ValueError(f"a loss of {loss:g} is not above E = {self.E:.4g}")
        total = self.alpha + self.beta
        parameters = (self.A * total / (rest * self.beta)) ** (1 / self.alpha)
        tokens = (self.B * total / (rest * self.alpha)) ** (1 / self.beta)
        return self._budget(parameters, tokens)

    def _budget(self, parameters: float, tokens: float) -> "Budget":
        return Budget(parameters, tokens, 6 * parameters * tokens, self.loss(parameters, tokens))


class Budget(NamedTuple):
    """A model, what it is trained on, and what that costs."""

    parameters: float
    tokens: float
    flops: float  # 6 N D
    loss: float


def fit(points: Sequence[Point]) -> Law:
    """The law that fits best.

    Raises:
        ValueError: fewer than five points, or not three sizes and three numbers of tokens.
    """
    check(points)
    return _best(points, [])


def bootstrap(points: Sequence[Point], law: Law, count: int, seed: int) -> list[Law]:
    """Laws of `count` samples of the points with replacement (Efron 1979), each found from `law` and other starts.

    Samples that do not tell all five numbers are drawn again.
    """
    rng = np.random.default_rng(seed)
    laws: list[Law] = []
    while len(laws) < count:
        sample = [points[i] for i in rng.integers(0, len(points), len(points))]
        if not _tells(sample):
            continue
        laws.append(_best(sample, [law]))
    return laws


def check(points: Sequence[Point]) -> None:
    """Raises ValueError if the points do not tell the law's five numbers."""
    if not _tells(points):
        sizes, lengths = ({point[i] for point in points} for i in (0, 1))
        raise ValueError(
            f"{len(points)} runs of {len(sizes)} sizes and {len(lengths)} numbers of tokens do not tell five numbers; "
            "train at least 5, of 3 sizes and on 3 numbers of tokens"
        )


def _tells(points: Sequence[Point]) -> bool:
    different = set(points)
    return len(different) >= 5 and all(len({point[i] for point in different}) >= 3 for i in (0, 1))


def _best(points: Sequence[Point], near: Sequence[Law]) -> Law:
    """The best law that L-BFGS finds from the laws `near` and the best starts of a grid."""
    N, D, L = np.array(points, np.float64).T
    # Around the middle of all runs exponents and scales hardly depend on each other: L-BFGS needs few steps.
    middle = np.exp(np.log(N).mean()), np.exp(np.log(D).mean())
    N, D = N / middle[0], D / middle[1]
    starts = _starts(N, D, L)[: 1 if near else _NUM_STARTS]
    starts += [_to_vector(_moved(law, *middle)) for law in near]
    bounds = [(_NOTHING, None)] * 3 + [(1e-3, 5.0)] * 2
    found = [
        minimize(
            objective,
            start,
            (np.log(N), np.log(D), np.log(L)),
            method="L-BFGS-B",
            jac=True,
            bounds=bounds,
        )
        for start in starts
    ]
    vector = min(found, key=lambda result: result.fun).x
    law = _moved(Law(*np.exp(vector[:3]), *vector[3:]), 1 / middle[0], 1 / middle[1])
    return Law(*map(float, law))


def _moved(law: Law, n: float, d: float) -> Law:
    """The law for parameters in units of n and tokens in units of d."""
    return law._replace(A=law.A * n**-law.alpha, B=law.B * d**-law.beta)


def _starts(N: np.ndarray, D: np.ndarray, L: np.ndarray) -> list[np.ndarray]:
    """Vectors (log E, log A, log B, alpha, beta) of the best exponents of a grid, best first."""
    found = []
    for alpha in _EXPONENTS:
        for beta in _EXPONENTS:
            columns = np.stack([np.ones_like(N), N**-alpha, D**-beta], axis=1)
            # Relative residuals, which are those of the logarithm.
            (E, A, B), error = nnls(columns / L[:, None], np.ones_like(L))
            found.append((error, _to_vector(Law(E, A, B, alpha, beta))))
    found.sort(key=lambda pair: pair[0])
    return [start for _, start in found[:_NUM_STARTS]]


def objective(
    vector: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_l: np.ndarray
) -> tuple[float, np.ndarray]:
    """(the Huber loss of log L, its gradient [5]) of (log E, log A, log B, alpha, beta); logarithms float64[n]."""
    e, a, b, alpha, beta = vector
    terms = np.stack([np.full_like(log_n, e), a - alpha * log_n, b - beta * log_d])
    log_law = np.logaddexp.reduce(terms)
    residual = log_law - log_l
    size = np.abs(residual)
    value = np.where(size < HUBER, 0.5 * residual**2, HUBER * (size - 0.5 * HUBER))
    # Scaled: L-BFGS stops at changes of the value that are small next to 1.
    slope = np.clip(residual, -HUBER, HUBER) / HUBER**2
    shares = np.exp(terms - log_law) * slope
    gradient = [*shares.sum(1), -(shares[1] * log_n).sum(), -(shares[2] * log_d).sum()]
    return float(value.sum() / HUBER**2), np.array(gradient)


def _to_vector(law: Law) -> np.ndarray:
    scales = np.log(np.maximum(law[:3], np.exp(_NOTHING)))
    return np.array([*scales, law.alpha, law.beta])
