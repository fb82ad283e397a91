"""What every writer says alike: verdicts in words, numbers to the digits they are worth."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal

from hessdiag.check.verdict import Interval, Report, Row, Verdict

MOST_DIGITS = 6
"""Significant digits at most: a float32 product carries about seven."""

SIGNS = {Verdict.PASS: "✓", Verdict.FAIL: "✗", Verdict.UNSURE: "?", Verdict.NONE: "!"}


def verdict_words(report: Report, row: Row) -> str:
    """``fail``, or ``fail (warning)`` where that does not fail the check."""
    warns = row.verdict is Verdict.FAIL and not report.fails(row)
    return f"{row.verdict.value} (warning)" if warns else row.verdict.value


def measured_words(row: Row) -> str:
    """``5.85 [5.21, 6.49]``, or a dash."""
    return interval_words(row.measured) if row.measured else "—"


def change_words(row: Row) -> str:
    """``+12% [+8%, +16%]`` for limits on a change, else a dash."""
    if row.tested is None or row.limit_kind not in ("max_increase", "max_decrease"):
        return "—"
    return interval_words(row.tested, signed=True, percent=row.relative)


def interval_words(interval: Interval, *, signed: bool = False, percent: bool = False) -> str:
    """Value to two digits of its half-width, ends rounded outwards: the text never claims more.

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
    return value if interval.lo == interval.hi else f"{value} [{low}, {high}]"


def _number(number: float, places: int, rounding: str, signed: bool, percent: bool) -> str:
    if not math.isfinite(number):
        return "nan" if math.isnan(number) else ("−∞" if number < 0 else "∞")
    rounded = Decimal(repr(float(number))).quantize(Decimal(1).scaleb(-places), rounding)
    rounded = rounded.scaleb(2) if percent else rounded
    everyday = not rounded or 1e-3 <= abs(rounded) < 1e6
    size = f"{abs(rounded):f}" if everyday else f"{abs(rounded):e}"
    sign = "−" if rounded < 0 else ("+" if signed and rounded > 0 else "")
    return sign + size + ("%" if percent else "")


def worst_first(report: Report) -> list[Row]:
    """Rows in the order they need attention: what fails, what has no verdict, warnings, what passes.

    Among equals the furthest beyond its limit comes first, then the order of the report.
    """

    def order(row: Row) -> tuple[int, float]:
        ranks = (
            report.fails(row),
            report.undecided(row),
            row.verdict is Verdict.FAIL,
            row.verdict is not Verdict.PASS,
        )
        rank = (*ranks, True).index(True)
        return rank, -_excess(row)

    return sorted(report.rows, key=order)


def _excess(row: Row) -> float:
    """How far the value tested is beyond its limit, in limits; 0 where nothing was tested or all is well."""
    if row.verdict is Verdict.PASS or row.tested is None or not math.isfinite(row.tested.value):
        return 0.0
    downwards = row.limit_kind in ("min", "max_decrease")
    limit = -row.threshold if row.limit_kind == "max_decrease" else row.threshold
    beyond = row.tested.value - limit
    return (-beyond if downwards else beyond) / (abs(row.threshold) or 1.0)
