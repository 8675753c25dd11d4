"""Types of numeric config fields: the range of a field is part of its declaration.

Every type has a lower and an upper limit and rejects NaN, infinities and booleans. `jaxllm.config`
turns pydantic's errors into one line.
"""

from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, AllowInfNan, BeforeValidator

LARGEST_INT = 2**31 - 1  # counts and sizes become int32 on devices
LARGEST_FLOAT = 1e12  # the fourth power of a larger coefficient overflows float32 (3.4e38)


def _no_bool(value: Any) -> Any:
    # pydantic would accept true as 1: bool is a subclass of int.
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _not_zero(size: int) -> int:
    if not size:
        raise ValueError("must be positive, or -1 for all remaining devices")
    return size


# Parts of every type below, for fields that need their own limits.
NOT_BOOL = BeforeValidator(_no_bool)
FINITE = AllowInfNan(False)

PositiveInt = Annotated[int, NOT_BOOL, Ge(1), Le(LARGEST_INT)]
NonNegativeInt = Annotated[int, NOT_BOOL, Ge(0), Le(LARGEST_INT)]
ByteCount = Annotated[int, NOT_BOOL, Ge(1), Le(10**15)]  # a petabyte: beyond any one disk
Threads = Annotated[int, NOT_BOOL, Ge(0), Le(4096)]  # 0 chooses; more than any machine has cores
Seconds = Annotated[int, NOT_BOOL, Ge(0), Le(366 * 24 * 3600)]  # up to a year; 0 turns it off
PositiveSeconds = Annotated[int, NOT_BOOL, Ge(1), Le(366 * 24 * 3600)]
AxisSize = Annotated[int, NOT_BOOL, Ge(-1), Le(2**24), AfterValidator(_not_zero)]  # a mesh axis
# Random number keys are made of 32 bits: a larger seed would equal a smaller one.
Seed = Annotated[int, NOT_BOOL, Ge(0), Le(2**32 - 1)]

AnyFloat = Annotated[float, NOT_BOOL, FINITE, Ge(-LARGEST_FLOAT), Le(LARGEST_FLOAT)]
PositiveFloat = Annotated[float, NOT_BOOL, FINITE, Gt(0), Le(LARGEST_FLOAT)]
NonNegativeFloat = Annotated[float, NOT_BOOL, FINITE, Ge(0), Le(LARGEST_FLOAT)]
Epsilon = Annotated[float, NOT_BOOL, FINITE, Gt(0), Le(1)]  # added to a divisor, so never 0
# Shares and probabilities. Which ends are allowed: dropout may be 0 but not 1, top-p 1 but not 0.
Proportion = Annotated[float, NOT_BOOL, FINITE, Ge(0), Le(1)]
PositiveProportion = Annotated[float, NOT_BOOL, FINITE, Gt(0), Le(1)]
ProportionBelowOne = Annotated[float, NOT_BOOL, FINITE, Ge(0), Lt(1)]
