"""The spectrum on linear axes: the bulk by itself, and beside it the outliers, one row each.

On one linear axis a bulk a thousand times narrower than λ_max is a line at zero. In two panels both are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hessdiag.formatting import format_number
from hessdiag.present.axes import (
    COLOURS,
    GREY,
    Array,
    below,
    bootstrap,
    caption,
    heading,
    ink,
    log_axis,
    note,
    prepare,
    styled,
)
from hessdiag.present.inputs import Measured, facts, left_open, spectra, sweep
from hessdiag.present.signs import hatch, hidden, negative_mass, zone_in_caption
from hessdiag.results import Quadrature, Spectrum

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TAIL = 0.005  # of the bulk on either side that its panel leaves to the other one
ROOM = 3.0  # times the zone of unresolved signs that the panel shows at least
POINTS = 320
MOST_ROWS = 20  # outliers that have a row: as many labels as can be read


@dataclass(frozen=True, slots=True)
class Bulk:
    """What its panel draws.

    Attributes:
        eigenvalues: the grid, (points,), uniform.
        counts: eigenvalues per ``unit``, (points,); NaN where less than a tenth of one is, or nothing is resolved.
        band: of several probes, twice (points,); None for one start.
        sigma: width of the kernel, in eigenvalues.
        unit: the length that counts are of: a lone eigenvalue peaks near 1.
        beyond: eigenvalues of the bulk outside of the panel, about.
    """

    eigenvalues: Array
    counts: Array
    band: tuple[Array, Array] | None
    sigma: float
    unit: float
    beyond: float


def apart(analysis: Measured, *, show_caption: bool = True) -> Figure:
    """Draw bulk and outliers in two panels; the bulk alone where there is no outlier.

    Args:
        analysis: an `Analysis` or a `Spectrum`.
        show_caption: write below the axes what is needed to repeat the picture.

    Raises:
        UsageError: no spectrum was measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ((name, (_, spectrum)),) = spectra(analysis).items()
    rows = min(len(spectrum.outliers), MOST_ROWS)
    figure = Figure(figsize=(7.2, max(3.4, 1.1 + 0.17 * rows)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, *right = np.atleast_1d(figure.subplots(1, 1 + bool(rows), width_ratios=[1.25, 1][: 1 + bool(rows)]))
    for ax in (left, *right):
        ax.set_facecolor("none")
        styled(ax)
    bulk(analysis, left, show_caption=False)
    for ax in right:
        outliers(analysis, ax)
    heading(left, name, pad=18)
    if show_caption:
        below(figure, apart_caption(analysis))
    return figure


def bulk(analysis: Measured, ax: Axes | None = None, *, show_caption: bool = True) -> Axes:
    """Draw how many eigenvalues lie where, near zero, on a linear axis of λ.

    Where signs are not resolved nothing is drawn but the zone, and about how many eigenvalues it holds.

    Args:
        analysis: an `Analysis` or a `Spectrum`.
        ax: where to draw; a new figure by default.
        show_caption: write below the axes what is needed to repeat the picture.

    Returns:
        The axes.

    Raises:
        UsageError: no spectrum was measured.
    """
    ((_, (_, spectrum)),) = spectra(analysis).items()
    drawn, ax = bulk_of(spectrum), prepare(ax)
    x, y = drawn.eigenvalues, drawn.counts
    floor = _floor(drawn)
    if drawn.band is not None:
        ax.fill_between(x, *(np.where(np.isnan(y), np.nan, np.maximum(e, floor)) for e in drawn.band), color=COLOURS[0],
                        alpha=0.3, linewidth=0)  # fmt: skip
    ax.fill_between(x, floor, y, color=COLOURS[0], alpha=0.12, linewidth=0)
    ax.plot(x, y, color=COLOURS[0], linewidth=1.6, gid="bulk")
    ax.set_xlim(x[0], x[-1])
    highest = float(np.nanmax(y)) if np.isfinite(y).any() else 1.0
    log_axis(ax, floor, max(10 * floor, highest * (highest / floor) ** 0.35))
    ax.axvline(0.0, color=ink(ax), linewidth=0.8, zorder=1)
    _zone(ax, spectrum)
    ax.set_xlabel("eigenvalue λ: the bulk")
    ax.set_ylabel(f"eigenvalues per {_length(drawn.unit)} of λ")
    if show_caption:
        caption(ax, apart_caption(analysis))
    return ax


def outliers(analysis: Measured, ax: Axes | None = None) -> Axes:
    """Draw the outliers, the largest on top, each in a row with its value; the reach of the bulk is shaded.

    Args:
        analysis: an `Analysis` or a `Spectrum`.
        ax: where to draw; a new figure by default.

    Returns:
        The axes.

    Raises:
        UsageError: no spectrum was measured.
    """
    ((_, (_, spectrum)),) = spectra(analysis).items()
    ax = prepare(ax)
    shown, left = _chosen(spectrum.outliers)
    rows = np.arange(len(shown))
    nodes = _bulk_nodes(spectrum)
    low, high = min([*nodes, 0.0]), max([*nodes, 0.0])
    ax.axvspan(low, high, color=GREY, alpha=0.25, linewidth=0, gid="reach of the bulk")
    ax.hlines(rows, np.where(np.array(shown) > 0, high, low), shown, color=COLOURS[0], linewidth=1.1)
    ax.plot(shown, rows, "o", color=COLOURS[0], markersize=4.2, gid="outliers")
    ends = [min([low, *shown]), max([high, *shown])]
    span = (ends[1] - ends[0]) or 1.0
    room = [
        0.3 * span if min([*shown, 0.0]) < 0 else 0.04 * span,
        0.3 * span if max([*shown, 0.0]) > 0 else 0.04 * span,
    ]
    for row, value in zip(rows, shown, strict=True):
        away = 1 if value > 0 else -1
        style = {"ha": "left" if away > 0 else "right", "va": "center", "gid": "value"}
        note(ax, value + 0.035 * span * away, row, _digits(value), ax.transData, **style)
    ax.axvline(0.0, color=ink(ax), linewidth=0.8, zorder=1)
    ax.set_xlim(ends[0] - room[0], ends[1] + room[1])
    ax.set_ylim(max(len(shown), 6) - 0.3, -0.7)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("the outliers (grey: the bulk)")
    more = f", the {len(shown)} furthest out" if left else ""
    note(
        ax,
        1.0,
        1.015,
        f"{len(spectrum.outliers)} outlier{'s' * (len(spectrum.outliers) > 1)}{more}",
        ha="right",
        va="bottom",
    )
    return ax


def apart_frame(analysis: Measured) -> pd.DataFrame:
    """Exactly what `apart` draws: panel, eigenvalue, count (per ``attrs["unit"]``; 1 for an outlier)."""
    import pandas as pd

    ((_, (_, spectrum)),) = spectra(analysis).items()
    drawn, (shown, _) = bulk_of(spectrum), _chosen(spectrum.outliers)
    rows = [("outliers", value, 1.0) for value in shown]
    rows += [("bulk", x, y) for x, y in zip(drawn.eigenvalues, drawn.counts, strict=True)]
    frame = pd.DataFrame(rows, columns=["panel", "eigenvalue", "count"])
    frame.attrs |= {"unit": drawn.unit, "sigma": drawn.sigma}
    return frame


def apart_caption(analysis: Measured) -> str:
    """What is needed to repeat and to read the picture, in one paragraph."""
    ((_, (whole, spectrum)),) = spectra(analysis).items()
    drawn = bulk_of(spectrum)
    origin = " · ".join([sweep(spectrum), *facts(whole)])
    band = left_open([spectrum], banded="90% bootstrap over probes")
    counted = "Outliers: counted one by one, each converged, to two digits. " if spectrum.outliers else ""
    beyond = ""
    if drawn.beyond >= 0.5:
        beyond = f"The bulk has about {drawn.beyond:,.0f} more eigenvalues beyond the panel. "
    return (
        f"{origin}. {counted}{band} {zone_in_caption([spectrum])}Negative mass: "
        f"{negative_mass(whole, spectrum)}. {beyond}Gaussian kernel of {_digits(drawn.sigma)}, for the eye only: a "
        f"lone eigenvalue peaks near 1."
    )


def bulk_of(spectrum: Spectrum) -> Bulk:
    """The bulk smoothed on a linear grid."""
    parts = [_without(spectrum.known, spectrum.outliers), *spectrum.probes]
    nodes = _bulk_nodes(spectrum)
    lo, hi = _window(spectrum)
    inside = sum(lo <= node <= hi for node in nodes)
    sigma = (hi - lo) / float(np.clip(inside, 24, 80))
    x = np.linspace(lo, hi, POINTS)
    unit = _round(sigma * math.sqrt(2 * math.pi))
    scale = spectrum.dimension * unit
    lines = scale * (_smooth(x, sigma, parts[0]) + np.stack([_smooth(x, sigma, probe) for probe in parts[1:]]))
    counts = lines.mean(axis=0)
    beyond = (x > max(nodes, default=hi)) | (x < min(nodes, default=lo)) if len(set(nodes)) > 1 else False
    hidden_here = (np.abs(x) < spectrum.unresolved) | beyond  # the kernel spreads mass to where none is
    counts = np.where(hidden_here | (counts < 0.1 * unit / (sigma * math.sqrt(2 * math.pi))), np.nan, counts)
    away = 1 - spectrum.mass(lo, hi) - sum(not lo <= one <= hi for one in spectrum.outliers) / spectrum.dimension
    return Bulk(x, counts, bootstrap(lines), sigma, unit, max(away, 0.0) * spectrum.dimension)


def _window(spectrum: Spectrum) -> tuple[float, float]:
    """Where all of the bulk is but its tails, and the zone of unresolved signs with room on either side."""
    pairs = [(n, w) for n, w in spectrum.merged() if n not in set(spectrum.outliers)] or [(0.0, 1.0)]
    nodes, weights = np.array(pairs).T
    shares = np.cumsum(weights) / weights.sum()
    lo = float(nodes[np.searchsorted(shares, TAIL)])
    hi = float(nodes[min(np.searchsorted(shares, 1 - TAIL), len(nodes) - 1)])
    zone = ROOM * spectrum.unresolved
    lo, hi = min(lo, -zone, 0.0), max(hi, zone, 0.0)
    if lo == hi:
        lo, hi = -1.0, 1.0
    margin = 0.04 * (hi - lo)
    return lo - margin, hi + margin


def _zone(ax: Axes, spectrum: Spectrum) -> None:
    if not spectrum.unresolved:
        return
    hatch(ax, [spectrum])
    held = spectrum.mass(-spectrum.unresolved, spectrum.unresolved)
    what, where = hidden([spectrum])
    text = f"{where}: about\n{100 * held:.0f}% of eigenvalues,\n{what}"
    low, high = ax.get_xlim()
    right = -low <= high  # of zero is more room
    at = (1 if right else -1) * (spectrum.unresolved + 0.015 * (high - low))
    style = {"ha": "left" if right else "right", "va": "top", "linespacing": 1.35, "gid": "unresolved label"}
    note(ax, at, 0.975, text, ax.get_xaxis_transform(), **style)


def _chosen(values: tuple[float, ...]) -> tuple[list[float], int]:
    """The outliers that have a row, descending: the furthest out where there are too many; and how many are left."""
    kept = sorted(values, key=abs, reverse=True)[:MOST_ROWS]
    return sorted(kept, reverse=True), len(values) - len(kept)


def _without(known: Quadrature, counted: tuple[float, ...]) -> Quadrature:
    kept = [pair for pair in zip(known.nodes, known.weights, strict=True) if pair[0] not in set(counted)]
    return Quadrature(nodes=tuple(n for n, _ in kept), weights=tuple(w for _, w in kept))


def _bulk_nodes(spectrum: Spectrum) -> list[float]:
    return [
        node
        for node, weight in spectrum.merged()
        if node not in set(spectrum.outliers) and weight * spectrum.dimension >= 0.05
    ]


def _smooth(x: Array, sigma: float, rule: Quadrature) -> Array:
    """Density per unit of λ, (points,)."""
    distance = (x[:, None] - np.array(rule.nodes, dtype=np.float64)[None, :]) / sigma
    weights = np.array(rule.weights, dtype=np.float64)
    return np.asarray(np.exp(-0.5 * distance**2) @ weights / (sigma * math.sqrt(2 * math.pi)))


def _floor(drawn: Bulk) -> float:
    """A tenth of a lone eigenvalue's peak."""
    return 0.1 * drawn.unit / (drawn.sigma * math.sqrt(2 * math.pi))


def _round(size: float) -> float:
    """The nearest of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return min((1, 2, 5, 10), key=lambda step: abs(math.log(size / (step * power)))) * power


def _length(unit: float) -> str:
    """A 1, 2 or 5 with its power of ten."""
    return f"{unit:g}" if 1e-4 <= unit < 1e5 else format_number(unit, unit * 0.1, unit * 1.9).replace(".0", "")


def _digits(value: float) -> str:
    """Two digits: a Ritz value that counts as converged is good to one in a hundred."""
    half = 10.0 ** math.floor(math.log10(abs(value))) if value else 0.0  # of which a number shows two digits
    return format_number(value, value - half, value + half)
