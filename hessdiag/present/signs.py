"""The zone next to zero in which signs are not resolved: in words, and marked in pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hessdiag.formatting import format_metric, format_percent, rounded_up
from hessdiag.present.axes import GREY, bootstrap, note
from hessdiag.present.inputs import widest
from hessdiag.results import Analysis, Metric, Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FURTHER = 3
"""Times the steps that at least halve the zone, where there were 30 (`hessdiag.spectral.zone`)."""
FEWEST = 30

ENDED = "a larger `budget`"  # as the warnings of a run say that had no more to spend


def zone_in_words(analysis: Analysis) -> str:
    """``Signs are not resolved below |λ| = 0.0033 (0.1% of λ_max)``; empty where they all are."""
    spectrum, largest = analysis.spectrum, analysis.metrics.get("lambda_max")
    if spectrum is None or not spectrum.unresolved:
        return ""
    text = f"Signs are not resolved below |λ| = {rounded_up(spectrum.unresolved)}"
    if largest is not None and largest.value > spectrum.unresolved:
        text += f" ({rounded_up(100 * spectrum.unresolved / largest.value)}% of λ_max)"
    return text


def negative_in_words(analysis: Analysis) -> str:
    """What is known of the share of negative eigenvalues, and what would tell more; empty where it is zero."""
    metric = analysis.metrics.get("negative_mass")
    if metric is None or metric.hi == 0:
        return ""
    zone, (value, interval) = zone_in_words(analysis), format_metric(metric)
    if metric.resolved:
        said = f"{value} of the eigenvalues, within {interval}, are negative, however small: a share, not a size."
        return f"{said} {zone}." if zone else said
    within = f"the share of negative eigenvalues lies within {interval}"
    if zone:
        return f"{zone}: {within}; {_further(analysis)}."
    spectrum = analysis.spectrum
    if spectrum is None or not spectrum.resolution:
        return f"{within[0].upper()}{within[1:]}: what was measured does not resolve it."
    finer = "; `dtype='float64'` tells more" if metric.provenance.dtype == "float32" else ""
    near = rounded_up(spectrum.resolution)
    return f"Below |λ| = {near} rounding hides signs: {within}{finer}."


def _further(analysis: Analysis) -> str:
    """Steps that would halve the zone, and the options that take them."""
    spectrum = analysis.spectrum
    assert spectrum is not None
    steps = min(FURTHER * max(spectrum.steps, FEWEST), spectrum.dimension)
    options = f"`steps={steps}`"
    if spectrum.error is not None and steps > _most_steps(analysis.metrics.values()):
        options += f", `max_steps={steps}`"
    if any(ENDED in warning for warning in analysis.warnings):
        options += f", {ENDED}"
    return f"{steps} steps ({options}) should at least halve that zone"


def _most_steps(metrics: Iterable[Metric]) -> int:
    """As far as the run was allowed to go; 0 where nobody noted it."""
    found = [metric.provenance.settings.get("max_steps") for metric in metrics]
    return max((most for most in found if isinstance(most, int)), default=0)


def negative_mass(analysis: Analysis, spectrum: Spectrum) -> str:
    """Share of eigenvalues below zero with its interval: the measured one, else raw quadrature over probes."""
    metric = analysis.metrics.get("negative_mass")
    if metric is not None:
        texts = format_metric(metric)
        return " ".join(texts) if metric.resolved else f"not resolved: {texts[1]}"
    if spectrum.semidefinite:
        return "0% (positive semidefinite)"
    if spectrum.unresolved:
        return "not resolved"
    below = -np.nextafter(spectrum.resolution, np.inf)
    shares = np.array([spectrum.per_probe_mass(-np.inf, float(below))]).T
    band = bootstrap(shares)
    if band is None:
        why = "every eigenvalue" if spectrum.whole else "one start: no interval"
        return f"{format_percent(float(shares[0, 0]), 0.0, 1.0)[0]} ({why})"
    mean = float(shares.mean())
    return " ".join(format_percent(mean, min(float(band[0][0]), mean), max(float(band[1][0]), mean)))


def zone_in_density(ax: Axes, drawn: Sequence[Spectrum], *, alone: bool) -> None:
    """Hatch the zone, and say what it is where nothing else is written.

    Args:
        ax: with its limits set.
        drawn: whose zones there are; the widest is marked.
        alone: whether one density is drawn, with its negative mass in the upper left; else names are on the right.
    """
    if not widest(drawn):
        return
    (low, high), label = hatch(ax, drawn), _label(drawn)
    if not alone:
        middle = min(max((low + high) / 2, 0.18), 0.82)
        _note(ax, middle, 1.015, label.replace("\n", ": "), "center", "bottom")
    elif high < 0.72:
        _note(ax, max(high + 0.012, 0.24), 0.965, label, "left", "top")  # beside what is said of the negative mass
    else:
        _note(ax, (low if low > 0.45 else high) - 0.012, 0.965, label, "right", "top")


def zone_in_stairs(ax: Axes, drawn: Spectrum) -> None:
    """The same where a staircase rises from the lower left to the upper right."""
    if not drawn.unresolved:
        return
    (low, high), label = hatch(ax, [drawn]), _label([drawn])
    if low > 0.25:
        _note(ax, low - 0.012, 0.965, label, "right", "top")
    elif high < 0.72:
        _note(ax, high + 0.012, 0.035, label, "left", "bottom")
    else:
        _note(ax, high - 0.012, 0.035, label, "right", "bottom")


def hidden(drawn: Sequence[Spectrum]) -> tuple[str, str]:
    """What the zone hides, and where it is."""
    width = rounded_up(widest(drawn))
    if all(spectrum.semidefinite for spectrum in drawn):
        return "not told from zero", f"λ < {width}"
    return "signs not resolved", f"|λ| < {width}"


def _label(drawn: Sequence[Spectrum]) -> str:
    return "\n".join(hidden(drawn))


def hatch(ax: Axes, drawn: Sequence[Spectrum]) -> tuple[float, float]:
    """The ends of what is hatched, as fractions of the axes."""
    high = widest(drawn)
    low = 0.0 if all(spectrum.semidefinite for spectrum in drawn) else -high
    style: dict[str, Any] = {"edgecolor": GREY, "alpha": 0.55, "hatch": "////", "linewidth": 0, "zorder": 0.5}
    ax.axvspan(low, high, facecolor="none", gid="unresolved", **style)  # the negative side keeps its shade
    scaled = (ax.transScale + ax.transLimits).transform([(x, ax.get_ylim()[0]) for x in (low, high)])
    left, right = np.clip(scaled[:, 0], 0.0, 1.0)
    return float(left), float(right)


def _note(ax: Axes, x: float, y: float, text: str, ha: str, va: str) -> None:
    note(ax, x, y, text, ha=ha, va=va, linespacing=1.35, gid="unresolved label")


def zone_in_caption(drawn: Sequence[Spectrum]) -> str:
    """What the hatched zone stands for, a sentence with a space after it; empty where there is none."""
    if not widest(drawn):
        return ""
    what, where = hidden(drawn)
    whose = ", of the least resolved" if len(drawn) > 1 else ""
    return f"Hatched: {what.replace('signs not', 'signs are not')}, {where}{whose}. "
