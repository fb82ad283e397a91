"""Numbers and intervals as text, to the digits they are worth: alike in a table, a page, a reason and a report.

A value has two digits of its half-width; the ends of its interval are rounded outwards to the same place, so that
the text never claims more than was measured. There are two spellings. Pages and tables take one power of ten out
of value and interval, ``1.23×10⁻⁴``; checks, whose texts are searched and copied, write ``1.23e-4``.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hessdiag.results import Metric

MOST_DIGITS = 6
"""Significant digits at most: a float32 product carries about seven."""
UNRESOLVED = "—"
ROUNDINGS = (ROUND_HALF_EVEN, ROUND_FLOOR, ROUND_CEILING)  # of value, lower and upper end


def format_number(value: float, lo: float | None = None, hi: float | None = None) -> str:
    """``value`` to two digits of its half-width, at most six significant ones.

    Args:
        value: the number.
        lo: lower end of its interval; without one, six significant digits.
        hi: upper end.
    """
    ends = (value, value if lo is None else lo, value if hi is None else hi)
    exponent = _power_of_ten(*ends)
    return _with_power(_fixed(_rounded(*ends)[0], exponent), exponent)


def format_interval(value: float, lo: float, hi: float) -> str:
    """``[lo, hi]`` to the same place as the value, rounded outwards: the text never claims more."""
    exponent = _power_of_ten(value, lo, hi)
    low, high = (_fixed(end, exponent) for end in _rounded(value, lo, hi)[1:])
    return _with_power(f"[{low}, {high}]", exponent)


def format_ends(
    value: float, lo: float, hi: float, *, signed: bool = False, percent: bool = False
) -> tuple[str, str, str]:
    """Value, lower and upper end as a check writes them, each with its own power of ten; ends may be infinite.

    Args:
        value: the number.
        lo: lower end of its interval.
        hi: upper end.
        signed: whether a positive number has its sign.
        percent: whether it is a share to be shown as a percentage.
    """
    value_text, low, high = (_alone(number, signed, percent) for number in _rounded(value, lo, hi))
    return value_text, low, high


def rounded_up(size: float) -> str:
    """A positive size to two digits, upwards: below it less is claimed, never more."""
    exponent = _power_of_ten(size)
    return _with_power(_fixed(_quantized(size, _place(size), ROUND_CEILING), exponent), exponent)


def format_metric(metric: Metric) -> tuple[str, str]:
    """Value and interval as text; shares of the spectrum as percentages.

    A value that is one end of an interval too wide to say its size is left out: a dash.
    """
    value, lo, hi = metric.value, metric.lo, metric.hi
    texts = format_number(value, lo, hi), format_interval(value, lo, hi)
    if metric.quantity == "negative_mass":
        texts = format_percent(value, lo, hi)
    return texts if metric.resolved or metric.kind not in ("bracket", "ritz") else (UNRESOLVED, texts[1])


def format_percent(value: float, lo: float, hi: float) -> tuple[str, str]:
    """A share and its interval as percentages, to the digits the interval justifies."""
    percents = (100 * value, 100 * lo, 100 * hi)
    return format_number(*percents) + "%", format_interval(*percents) + "%"


def format_p(p: float) -> str:
    """A p-value to three decimals."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_tau(tau: float) -> str:
    """A rank correlation, signed, to two decimals."""
    return with_minus(f"{tau:+.2f}")


def format_seconds(seconds: float) -> str:
    """A time foreseen: seconds, from 90 on minutes, from 90 minutes on hours."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def with_minus(number: str) -> str:
    """A number's text with the minus sign in place of the hyphen."""
    return number.replace("-", "−")


def clock(seconds: float) -> str:
    """``41 s``, ``2:05 min``, ``1:20 h``: time that passes."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def to_go(seconds: float, done: float, total: float) -> str:
    """``, about 40 s to go``: as fast as so far; empty where nothing is done yet or nothing is left."""
    return f", about {clock(seconds * (total - done) / done)} to go" if 0 < done < total else ""


def power(exponent: int) -> str:
    """``10⁻³`` in plain characters: no mathtext, so SVG text stays text."""
    if exponent in (0, 1):
        return "10" if exponent else "1"
    return "10" + _raised(exponent)


def _place(half: float) -> int:
    """Decimals that show two digits of a half-width; 0.1 that rounding left a little smaller is 0.1."""
    return 1 - math.floor(math.log10(half) + 1e-9)


def _rounded(value: float, lo: float, hi: float) -> tuple[Decimal, Decimal, Decimal]:
    """All three to the place that the half-width justifies, the ends outwards; what is not finite stays."""
    numbers = (value, lo, hi)
    largest = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0)
    finest = MOST_DIGITS - 1 - math.floor(math.log10(largest)) if largest else 0
    half = (hi - lo) / 2
    places = min(_place(half), finest) if 0 < half < math.inf else finest
    first, low, high = (_quantized(n, places, how) for n, how in zip(numbers, ROUNDINGS, strict=True))
    return first, low, high


def _quantized(number: float, places: int, rounding: str) -> Decimal:
    exact = Decimal(repr(float(number)))
    return exact.quantize(Decimal(1).scaleb(-places), rounding) if exact.is_finite() else exact


def _power_of_ten(*numbers: float) -> int:
    """The power to take out of numbers that stand together; 0 for everyday sizes."""
    largest = max(abs(number) for number in numbers)
    size = math.floor(math.log10(largest)) if largest else 0
    return 0 if -3 <= size <= 5 else size


def _fixed(number: Decimal, exponent: int) -> str:
    text = f"{abs(number).scaleb(-exponent):,f}"
    return "−" + text if number < 0 else text


def _alone(number: Decimal, signed: bool, percent: bool) -> str:
    if number.is_nan():
        return "nan"
    sign = "−" if number < 0 else ("+" if signed and number > 0 and number.is_finite() else "")
    if number.is_infinite():
        return sign + "∞"
    shown = abs(number.scaleb(2) if percent else number)
    everyday = not shown or 1e-3 <= shown < 1e6
    return sign + (f"{shown:f}" if everyday else f"{shown:e}") + ("%" if percent else "")


def _with_power(text: str, exponent: int) -> str:
    return f"{text}×10{_raised(exponent)}" if exponent else text


def _raised(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
