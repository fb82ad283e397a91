"""Intervals as text, to the digits they are worth: the same in a table, in a reason and in a report."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal

from hessdiag.check.verdict import Interval

MOST_DIGITS = 6
"""Significant digits at most: a float32 product carries about seven."""


def interval_words(interval: Interval, *, signed: bool = False, percent: bool = False) -> str:
    """Value to two digits of its half-width, ends rounded outwards: the text never claims more.

    A bracket that does not resolve its number has no value to show: the two ends are all that is known.

    Args:
        interval: as measured; its ends may be infinite.
        signed: whether a positive number has its sign.
        percent: whether it is a share to be shown as a percentage.
    """
    numbers = (interval.value, interval.lo, interval.hi)
    largest = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0)
    finest = MOST_DIGITS - 1 - math.floor(math.log10(largest)) if largest else 0
    half = (interval.hi - interval.lo) / 2
    wanted = 1 - math.floor(math.log10(half) + 1e-9) if 0 < half < math.inf else finest
    places = min(wanted, finest)
    value, low, high = (
        _number(number, places, rounding, signed, percent)
        for number, rounding in zip(numbers, (ROUND_HALF_EVEN, ROUND_FLOOR, ROUND_CEILING), strict=True)
    )
    if interval.lo == interval.hi:
        return value
    return f"{value} [{low}, {high}]" if interval.resolved else f"[{low}, {high}]"


def _number(number: float, places: int, rounding: str, signed: bool, percent: bool) -> str:
    if not math.isfinite(number):
        return "nan" if math.isnan(number) else ("−∞" if number < 0 else "∞")
    rounded = Decimal(repr(float(number))).quantize(Decimal(1).scaleb(-places), rounding)
    rounded = rounded.scaleb(2) if percent else rounded
    everyday = not rounded or 1e-3 <= abs(rounded) < 1e6
    size = f"{abs(rounded):f}" if everyday else f"{abs(rounded):e}"
    sign = "−" if rounded < 0 else ("+" if signed and rounded > 0 else "")
    return sign + size + ("%" if percent else "")
