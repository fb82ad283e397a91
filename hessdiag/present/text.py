"""Numbers and names as text: no more digits than the interval justifies, nothing a file cannot hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal

from hessdiag.results import Metric
from hessdiag.shown import visible

MOST_DIGITS = 6
"""Significant digits at most: a float32 product carries about seven."""


UNRESOLVED = "—"


def format_number(value: float, lo: float | None = None, hi: float | None = None) -> str:
    """``value`` to two digits of its half-width, at most six significant ones.

    Args:
        value: the number.
        lo: lower end of its interval; without one, six significant digits.
        hi: upper end.
    """
    lo, hi = value if lo is None else lo, value if hi is None else hi
    exponent, decimals = _layout(value, lo, hi)
    return _with_power(_fixed(value, exponent, decimals, ROUND_HALF_EVEN), exponent)


def format_interval(value: float, lo: float, hi: float) -> str:
    """``[lo, hi]`` to the same place as the value, rounded outwards: the text never claims more."""
    exponent, decimals = _layout(value, lo, hi)
    low, high = _fixed(lo, exponent, decimals, ROUND_FLOOR), _fixed(hi, exponent, decimals, ROUND_CEILING)
    return _with_power(f"[{low}, {high}]", exponent)


def rounded_up(size: float) -> str:
    """A positive size to two digits, upwards: below it less is claimed, never more."""
    power_of_ten = math.floor(math.log10(size))
    exponent = 0 if -3 <= power_of_ten <= 5 else power_of_ten
    return _with_power(_fixed(size, exponent, max(0, 1 - power_of_ten + exponent), ROUND_CEILING), exponent)


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
    return f"{tau:+.2f}".replace("-", "−")


def listed(names: Sequence[str], most: int = 6) -> str:
    """``a, b and 3 more``."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(plain(name) for name in names[:most]) + rest


def format_count(count: int) -> str:
    """``1,234,567``."""
    return f"{count:,}"


def plain(text: str) -> str:
    """``text`` as it can be shown, line ends kept; see `hessdiag.shown.visible`."""
    return visible(text, lines=True)


def power(exponent: int) -> str:
    """``10⁻³`` in plain characters: no mathtext, so SVG text stays text."""
    if exponent in (0, 1):
        return "10" if exponent else "1"
    return "10" + _raised(exponent)


def _layout(value: float, lo: float, hi: float) -> tuple[int, int]:
    """Power of ten to take out (0 for everyday sizes), and decimals after that."""
    largest = max(abs(value), abs(lo), abs(hi))
    if largest == 0:
        return 0, 0
    size = math.floor(math.log10(largest))
    exponent = 0 if -3 <= size <= 5 else size
    finest = MOST_DIGITS - 1 - (size - exponent)
    half = (hi - lo) / 2 / 10.0**exponent
    wanted = 1 - math.floor(math.log10(half)) if half > 0 else finest
    return exponent, max(0, min(wanted, finest))


def _fixed(value: float, exponent: int, decimals: int, rounding: str) -> str:
    scaled = Decimal(repr(float(value))).scaleb(-exponent)
    rounded = scaled.quantize(Decimal(1).scaleb(-decimals), rounding=rounding)
    text = f"{abs(rounded):,f}" if rounded else f"{0:.{decimals}f}"
    return "−" + text if rounded < 0 else text


def _with_power(text: str, exponent: int) -> str:
    return f"{text}×10{_raised(exponent)}" if exponent else text


def _raised(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
