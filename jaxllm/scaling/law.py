"""Scaling laws: loss as a function of parameters N and training tokens D.

    L(N, D) = E + (A / N^alpha + B / D^beta)^power

Two published laws are forms of it, in each of which some of the six numbers are fixed:

    chinchilla    power = 1: what a model lacks in size and what it lacks in tokens add up (Hoffmann et al. 2022, section
                  3.3, eq. 2).
    kaplan        E = 0, beta = 1: more tokens gain a larger model more (Kaplan et al. 2020, eq. 1.5, where alpha is
                  alpha_N / alpha_D, power is alpha_D, and A and B are N_c^alpha and D_c). N does not count embeddings
                  (section 1.3).

Both are fitted as the first was: in logarithms, with a Huber loss that single bad runs do not dominate, by L-BFGS from many
starts (Hoffmann et al. 2022, eq. 3). The starts are not a grid over all numbers but over two exponents: given those, the law
is linear in the others, whose best values are found at once.

Shapes: n runs.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize, nnls

from jaxllm.scaling.config import FormName

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
    """L(N, D) = E + (A / N^alpha + B / D^beta)^power."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    power: float = 1.0

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """The loss of models of these sizes, trained on so many tokens; numbers or arrays."""
        lacking = self.A * parameters**-self.alpha + self.B * tokens**-self.beta
        return self.E + lacking**self.power

    def best_for_flops(self, flops: float) -> "Budget":
        """The split of 6 N D = flops with the least loss (Hoffmann et al. 2022, eq. 4).

        The power does not matter for it: less of its base is less of the loss.
        """
        total = self.alpha + self.beta
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        parameters = ratio * (flops / 6) ** (self.beta / total)
        return self._budget(parameters, flops / 6 / parameters)

    def best_for_loss(self, loss: float) -> "Budget":
        """The least FLOPs that reach a loss.

        Where 6 N D is least, one percent more of N gains as much as one percent more of D: alpha A / N^alpha = beta B / D^beta.
        With their sum, which the loss tells, both are known.

        Raises:
            ValueError: no model reaches it.
        """
        rest = loss - self.E
        if rest <= 0:
            raise ValueError(f"a loss of {loss:g} is not above E = {self.E:.4g}")
        lacking = rest ** (1 / self.power)
        total = self.alpha + self.beta
        parameters = (self.A * total / (lacking * self.beta)) ** (1 / self.alpha)
        tokens = (self.B * total / (lacking * self.alpha)) ** (1 / self.beta)
        return self._budget(parameters, tokens)

    def _budget(self, parameters: float, tokens: float) -> "Budget":
        return Budget(parameters, tokens, 6 * parameters * tokens, self.loss(parameters, tokens))


class Budget(NamedTuple):
    """A model, what it is trained on, and what that costs."""

    parameters: float
    tokens: float
    flops: float  # 6 N D
    loss: float


class Form(NamedTuple):
    """A law with some of its numbers fixed."""

    fixed: dict[str, float]
    counts_embeddings: bool
    """Whether N does."""
    text: str
    """The law in its numbers, for `str.format`."""

    @property
    def exponents(self) -> list[str]:
        """Those that are free: two of three."""
        return [name for name in ("alpha", "beta", "power") if name not in self.fixed]

    @property
    def bounds(self) -> list[tuple[float, float | None]]:
        """Of a vector (`_to_vector`)."""
        free = [(_NOTHING, None)] * 3 + [(1e-3, 5.0)] * 3
        vector = _to_vector(self.with_fixed(Law(*[1.0] * len(Law._fields))))
        return [
            (value, value) if name in self.fixed else bound
            for name, value, bound in zip(Law._fields, vector, free, strict=True)
        ]

    def with_fixed(self, law: Law) -> Law:
        return law._replace(**self.fixed)


FORMS: dict[FormName, Form] = {
    "chinchilla": Form(
        {"power": 1.0},
        counts_embeddings=True,
        text="{E:.4g} + {A:.4g} / N^{alpha:.3g} + {B:.4g} / D^{beta:.3g}",
    ),
    "kaplan": Form(
        {"E": 0.0, "beta": 1.0},
        counts_embeddings=False,
        text="({A:.4g} / N^{alpha:.3g} + {B:.4g} / D)^{power:.3g}",
    ),
}


def fit(points: Sequence[Point], form: FormName = "chinchilla") -> Law:
    """The law of this form that fits best.

    Raises:
        ValueError: fewer than five points, or not three sizes and three numbers of tokens.
    """
    check(points)
    return _best(points, FORMS[form], [])


def bootstrap(
    points: Sequence[Point], law: Law, count: int, seed: int, form: FormName = "chinchilla"
) -> list[Law]:
    """Laws of `count` samples of the points with replacement (Efron 1979), each found from `law` and other starts.

    Samples that do not tell all numbers are drawn again.
    """
    rng = np.random.default_rng(seed)
    laws: list[Law] = []
    while len(laws) < count:
        sample = [points[i] for i in rng.integers(0, len(points), len(points))]
        if not _tells(sample):
            continue
        laws.append(_best(sample, FORMS[form], [law]))
    return laws


def relative_error(law: Law, points: Sequence[Point]) -> float:
    """The root mean square of its errors, in parts of the losses."""
    return _relative_error(law, *np.array(points, np.float64).T)


def check(points: Sequence[Point]) -> None:
    """Raises ValueError if the points do not tell the law's numbers."""
    if not _tells(points):
        sizes, lengths = ({point[i] for point in points} for i in (0, 1))
        raise ValueError(
            f"{len(points)} runs of {len(sizes)} sizes and {len(lengths)} numbers of tokens do not tell five numbers; "
            "train at least 5, of 3 sizes and on 3 numbers of tokens"
        )


def _tells(points: Sequence[Point]) -> bool:
    different = set(points)
    return len(different) >= 5 and all(len({point[i] for point in different}) >= 3 for i in (0, 1))


def _best(points: Sequence[Point], form: Form, near: Sequence[Law]) -> Law:
    """The best law that L-BFGS finds from the laws `near` and the best starts of a grid."""
    N, D, L = np.array(points, np.float64).T
    # Around the middle of all runs exponents and scales hardly depend on each other: L-BFGS needs few steps.
    middle = np.exp(np.log(N).mean()), np.exp(np.log(D).mean())
    N, D = N / middle[0], D / middle[1]
    starts = _starts(N, D, L, form)[: 1 if near else _NUM_STARTS]
    starts += [_to_vector(_moved(law, *middle)) for law in near]
    found = [
        minimize(
            objective,
            start,
            (np.log(N), np.log(D), np.log(L)),
            method="L-BFGS-B",
            jac=True,
            bounds=form.bounds,
        )
        for start in starts
    ]
    vector = min(found, key=lambda result: result.fun).x
    law = _moved(Law(*np.exp(vector[:3]), *vector[3:]), 1 / middle[0], 1 / middle[1])
    return form.with_fixed(Law(*map(float, law)))


def _moved(law: Law, n: float, d: float) -> Law:
    """The law for parameters in units of n and tokens in units of d."""
    return law._replace(A=law.A * n**-law.alpha, B=law.B * d**-law.beta)


def _starts(N: np.ndarray, D: np.ndarray, L: np.ndarray, form: Form) -> list[np.ndarray]:
    """Vectors of the laws with the best exponents of a grid, best first."""
    laws = _grid(N, D, L, form)
    found = [(_relative_error(law, N, D, L), _to_vector(law)) for law in laws]
    found.sort(key=lambda pair: pair[0])
    return [start for _, start in found[:_NUM_STARTS]]


def _grid(N: np.ndarray, D: np.ndarray, L: np.ndarray, form: Form) -> Iterator[Law]:
    """For each pair of exponents the best law that has them."""
    for exponents in itertools.product(_EXPONENTS, repeat=2):
        chosen = dict(zip(form.exponents, exponents, strict=True))
        law = form.with_fixed(Law(1.0, 0.0, 0.0, 0.0, 0.0))._replace(**chosen)
        # A form has either E or a power, so this is linear in E, A and B.
        lacking = L ** (1 / law.power)
        columns = np.stack([np.full_like(N, law.E), N**-law.alpha, D**-law.beta], axis=1)
        # Relative residuals, which are those of the logarithm.
        (E, A, B), _ = nnls(columns / lacking[:, None], np.ones_like(L))
        yield law._replace(E=E * law.E, A=A, B=B)


def _relative_error(law: Law, N: np.ndarray, D: np.ndarray, L: np.ndarray) -> float:
    return float(np.sqrt(np.mean((law.loss(N, D) / L - 1) ** 2)))


def objective(
    vector: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_l: np.ndarray
) -> tuple[float, np.ndarray]:
    """(the Huber loss of log L, its gradient [6]) of (log E, log A, log B, alpha, beta, power); logarithms float64[n]."""
    e, a, b, alpha, beta, power = vector
    terms = np.stack([a - alpha * log_n, b - beta * log_d])
    lacking = np.logaddexp(*terms)
    log_law = np.logaddexp(e, power * lacking)
    residual = log_law - log_l
    size = np.abs(residual)
    value = np.where(size < HUBER, 0.5 * residual**2, HUBER * (size - 0.5 * HUBER))
    # Scaled: L-BFGS stops at changes of the value that are small next to 1.
    slope = np.clip(residual, -HUBER, HUBER) / HUBER**2
    share = np.exp(power * lacking - log_law) * slope
    of_n, of_d = power * share * np.exp(terms - lacking)
    gradient = [
        (np.exp(e - log_law) * slope).sum(),
        of_n.sum(),
        of_d.sum(),
        -(of_n * log_n).sum(),
        -(of_d * log_d).sum(),
        (share * lacking).sum(),
    ]
    return float(value.sum() / HUBER**2), np.array(gradient)


def _to_vector(law: Law) -> np.ndarray:
    """(log E, log A, log B, alpha, beta, power)."""
    scales = np.log(np.maximum(law[:3], np.exp(_NOTHING)))
    return np.array([*scales, *law[3:]])
