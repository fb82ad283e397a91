"""The spectrum on linear axes: the bulk by itself, and beside it the outliers, one row each.

On one linear axis a bulk a thousand times narrower than λ_max is a line at zero. In two panels both are read.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from hessdiag.formatting import format_number
from hessdiag.present.axes import (
    COLOURS,
    GREY,
    below,
    caption,
    heading,
    ink,
    log_axis,
    note,
    prepare,
    styled,
)
from hessdiag.present.bulk import MOST_ROWS, bulk_nodes, bulk_of, chosen
from hessdiag.present.inputs import Measured, facts, left_open, spectra, sweep
from hessdiag.present.signs import hatch, hidden, negative_mass, zone_in_caption
from hessdiag.results import Spectrum

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    floor = drawn.floor
    if drawn.band is not None:
        low, high = (np.where(np.isnan(y), np.nan, np.maximum(end, floor)) for end in drawn.band)
        ax.fill_between(x, low, high, color=COLOURS[0], alpha=0.3, linewidth=0)
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
    shown, left = chosen(spectrum.outliers)
    rows = np.arange(len(shown))
    nodes = bulk_nodes(spectrum)
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
        note(ax, value + 0.035 * span * away, float(row), _digits(value), ax.transData, **style)
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
    drawn, (shown, _) = bulk_of(spectrum), chosen(spectrum.outliers)
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
        f"{negative_mass(whole, spectrum)}. {beyond}Gaussian kernel of {_digits(drawn.sigma)}, for the eye only: "
        "a lone eigenvalue peaks near 1."
    )


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


def _length(unit: float) -> str:
    """A 1, 2 or 5 with its power of ten."""
    return f"{unit:g}" if 1e-4 <= unit < 1e5 else format_number(unit, unit * 0.1, unit * 1.9).replace(".0", "")


def _digits(value: float) -> str:
    """Two digits: a Ritz value that counts as converged is good to one in a hundred."""
    half = 10.0 ** math.floor(math.log10(abs(value))) if value else 0.0  # of which a number shows two digits
    return format_number(value, value - half, value + half)
