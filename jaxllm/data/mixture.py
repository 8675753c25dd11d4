"""The order of rows: number in an endless sequence -> (source, row), a pure function.

Nothing has to be saved to resume training, or to know the batch of any step, but the number of the step.
"""

import fractions
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain

from jaxllm.data.rows import Rows

# Rows of each source, and its weight.
Mixture = Sequence[tuple[Rows, float]]
Order = Callable[[int], tuple[int, int]]


class Interval(NamedTuple):
    """Rows from number `begin` on are taken from the sources in these shares."""

    begin: int
    shares: list[int]
    before: list[int]  # rows taken from each source before `begin`

    def counts(self, number: int) -> list[int]:
        """How many of the first `number` rows come from each source.

        The first source gets its share of the interval's rows, rounded up, the second its share of the rest, and so
        on: never off by more than the number of sources. Shares 3 and 1:

            number   0  1  2  3  4  5          source of rows 0, 1, ...   0 0 0 1 0 0 0 1
            counts  00 10 20 30 31 41
        """
        rows = number - self.begin
        rest = sum(self.shares)
        counts = []
        for share, before in zip(self.shares, self.before, strict=True):
            left = rows * (rest - share) // rest if rest else 0
            counts.append(before + rows - left)
            rows = left
            rest -= share
        return counts


# Of prompts and rankings, which are not mixed.
SINGLE_SOURCE = [Interval(0, [1], [0])]


def intervals(mixture: Mixture, batch_size: int) -> list[Interval]:
    """One interval for the weights of the mixture, and one for each phase of the curriculum."""
    rows, weights = zip(*mixture, strict=True)
    result = [Interval(0, _shares(weights), [0] * len(mixture))]
    # A phase is stored with each source: (step, weight of the source).
    for phase in zip(*(source.phases for source in rows), strict=True):
        steps, weights = zip(*phase, strict=True)
        begin = steps[0] * batch_size
        # Each source continues where it was.
        result.append(Interval(begin, _shares(weights), result[-1].counts(begin)))
    return result


def _shares(weights: Sequence[float]) -> list[int]:
    """Integers in exactly the proportion of the weights: 0.3 and 1.0 give 3 and 10."""
    # By their decimals: the float 0.3 itself is a fraction with a denominator of 2^54.
    exact = list(map(fractions.Fraction, map(str, weights)))
    scale = math.lcm(*(weight.denominator for weight in exact))
    integers = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*integers)
    return [integer // divisor for integer in integers]


def make_order(sizes: Sequence[int], schedule: Sequence[Interval], seed: int) -> Order:
    """Number -> (source, row). Each source is shuffled again in every epoch. Five rows and seed 7:

        number  0 1 2 3 4 | 5 6 7 8 9 | 10 11 12 13 14
        row     2 1 0 3 4 | 1 0 4 2 3 |  2  0  4  1  3

    Args:
        sizes: rows of each source.
    """
    # Grain does one thing here: `shuffle` permutes indices by a cipher keyed by seed + epoch, so any index is found
    # at once and no permutation is kept in memory. Mixing is not left to it: its `mix` rounds weights (the smallest
    # becomes 100), refuses a weight of 0, and cannot change weights at a step, as a curriculum does. Neither is
    # packing: its packers are iterators, whose buffers would have to be saved to resume, while here rows are planned
    # once and cached (`rows`), so that the step number alone gives the same batch to the bit.
    shuffles = [
        grain.MapDataset.range(size).seed((seed + k) % 2**32).shuffle()
        for k, size in enumerate(sizes)
    ]

    def order(number: int) -> tuple[int, int]:
        interval = interval_at(schedule, number)
        taken = interval.counts(number)
        then = interval.counts(number + 1)
        source = next(k for k, count in enumerate(then) if count > taken[k])
        row: Any = shuffles[source][taken[source]]
        return source, int(row)

    return order


def interval_at(schedule: Sequence[Interval], number: int) -> Interval:
    """The interval that row `number` is in."""
    return next(interval for interval in reversed(schedule) if interval.begin <= number)
