"""The types of numeric config fields: what values a field may have is written where the field is.

Every type has a lower and an upper limit and refuses NaN, infinities, and true or false. `jaxllm.config` turns what
pydantic finds into one line.
"""

from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, AllowInfNan, BeforeValidator

LARGEST_INT = 2**31 - 1  # counts and sizes become int32 on devices
LARGEST_FLOAT = 1e12  # a coefficient beyond this overflows float32 as soon as it is squared twice


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _not_zero(size: int) -> int:
    if not size:
        raise ValueError("must be positive, or -1 for the devices that are left")
    return size


# What every type below has, for a field that needs limits of its own.
NOT_BOOL = BeforeValidator(_no_bool)
FINITE = AllowInfNan(False)

PositiveInt = Annotated[int, NOT_BOOL, Ge(1), Le(LARGEST_INT)]
NonNegativeInt = Annotated[int, NOT_BOOL, Ge(0), Le(LARGEST_INT)]
ByteCount = Annotated[int, NOT_BOOL, Ge(1), Le(10**15)]
Threads = Annotated[int, NOT_BOOL, Ge(0), Le(4096)]
Seconds = Annotated[int, NOT_BOOL, Ge(0), Le(366 * 24 * 3600)]
PositiveSeconds = Annotated[int, NOT_BOOL, Ge(1), Le(366 * 24 * 3600)]
AxisSize = Annotated[int, NOT_BOOL, Ge(-1), Le(2**24), AfterValidator(_not_zero)]
# Keys of random numbers hold 32 bits: a larger seed would be the same as a smaller one.
Seed = Annotated[int, NOT_BOOL, Ge(0), Le(2**32 - 1)]

AnyFloat = Annotated[float, NOT_BOOL, FINITE, Ge(-LARGEST_FLOAT), Le(LARGEST_FLOAT)]
PositiveFloat = Annotated[float, NOT_BOOL, FINITE, Gt(0), Le(LARGEST_FLOAT)]
NonNegativeFloat = Annotated[float, NOT_BOOL, FINITE, Ge(0), Le(LARGEST_FLOAT)]
Epsilon = Annotated[float, NOT_BOOL, FINITE, Gt(0), Le(1)]
Proportion = Annotated[float, NOT_BOOL, FINITE, Ge(0), Le(1)]
PositiveProportion = Annotated[float, NOT_BOOL, FINITE, Gt(0), Le(1)]
ProportionBelowOne = Annotated[float, NOT_BOOL, FINITE, Ge(0), Lt(1)]
