"""What every plot shares: paper style, the symlog scale, plain tick labels, captions."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hessdiag.formatting import power, with_minus
from hessdiag.present.vector import INK
from hessdiag.shown import ending, plain

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

Array = npt.NDArray[np.float64]

GREY = "#808080"  # reads on white and on black; only ever used with text of another colour

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#B8A800")
"""Okabe and Ito (2008), black and yellow replaced: those vanish on a dark or on a white page."""

LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2, 2, 2)))
"""One style per colour, so that nothing is told by colour alone."""


def prepare(ax: Axes | None, height: float = 3.6) -> Axes:
    """The axes given, or new ones on a figure of their own that no global state knows of.

    Args:
        ax: where to draw; left in its own style.
        height: inches of the new figure, 7.2 wide.
    """
    if ax is not None:
        return ax
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return styled(figure.add_subplot(facecolor="none"))


def styled(ax: Axes) -> Axes:
    """New axes in the style all plots share."""
    ax.tick_params(colors=INK, labelsize=8.5, which="both", width=0.7)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(edgecolor=INK, linewidth=0.7)
    for label in (ax.xaxis.label, ax.yaxis.label, ax.title):
        label.set(color=INK, fontsize=9.5)
    ax.grid(axis="y", color=GREY, alpha=0.18, linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def ink(ax: Axes) -> Any:
    """The colour this axes writes in: ours, or that of the style the user chose."""
    return ax.xaxis.label.get_color()


def note(ax: Axes, x: float, y: float, text: str, coords: Any = None, **style: Any) -> None:
    """Write ``text`` as it is (no mathtext), in axes fractions unless ``coords`` says otherwise."""
    place = ax.transAxes if coords is None else coords
    ax.text(x, y, plain(text), transform=place, parse_math=False, **({"fontsize": 8, "color": ink(ax)} | style))


def legend_above(ax: Axes) -> None:
    """Over the axes, so that it covers nothing drawn; names are never read as mathtext."""
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 4, "borderpad": 0.1}
    _verbatim(ax.legend(frameon=False, fontsize=8, labelcolor=ink(ax), **place))


def legend_beside(ax: Axes, lines: Sequence[Artist], names: Sequence[str], most: int = 20) -> None:
    """Right of the axes; at most ``most`` names, and of each its last 24 characters."""
    shown = [ending(plain(name), 24) for name in names[:most]]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False, "fontsize": 8}
    legend = ax.legend(list(lines[:most]), shown, labelcolor=ink(ax), **place)
    if len(names) > most:
        legend.set_title(f"the first {most} of {len(names)}")
        legend.get_title().set(color=ink(ax), fontsize=8)
    _verbatim(legend)


def _verbatim(legend: Legend) -> None:
    for text in legend.get_texts():
        text.set_parse_math(False)


def heading(ax: Axes, text: str, pad: float = 8.0) -> None:
    """A left-aligned title; names are never read as mathtext."""
    if text:
        ax.set_title(plain(text), loc="left", fontsize=10, color=ink(ax), parse_math=False, pad=pad)


def caption(ax: Axes, text: str, width: int = 108) -> None:
    """Small print below the x label, wrapped to ``width`` characters."""
    ax.annotate(
        textwrap.fill(plain(text), width),
        xy=(0, 0),
        xycoords=("axes fraction", ax.xaxis.label),
        xytext=(0, -7),
        textcoords="offset points",
        va="top",
        fontsize=7,
        color=ink(ax),
        linespacing=1.35,
        parse_math=False,
        annotation_clip=False,
    )


def below(figure: Figure, text: str, width: int = 118) -> None:
    """Small print below a figure of several axes, wrapped to ``width`` characters."""
    style: dict[str, Any] = {"x": 0.01, "ha": "left", "fontsize": 7, "linespacing": 1.35, "parse_math": False}
    figure.supxlabel(textwrap.fill(plain(text), width), color=INK, **style)


@dataclass(frozen=True, slots=True)
class Symlog:
    """Linear within ±``linthresh``, logarithmic beyond: one unit of the coordinate is a decade."""

    linthresh: float

    def forward(self, values: npt.ArrayLike) -> Array:
        """Eigenvalues to axis units (±10/9 at ±linthresh)."""
        from matplotlib.scale import SymmetricalLogTransform

        # matplotlib's own transform, so that the grid is uniform on the very axis it is drawn on
        out = SymmetricalLogTransform(10, self.linthresh, 1).transform(np.asarray(values, dtype=np.float64))
        return np.asarray(out, dtype=np.float64) / self.linthresh

    def backward(self, units: npt.ArrayLike) -> Array:
        """Axis units to eigenvalues."""
        from matplotlib.scale import SymmetricalLogTransform

        transform = SymmetricalLogTransform(10, self.linthresh, 1).inverted()
        out = transform.transform(np.asarray(units, dtype=np.float64) * self.linthresh)
        return np.asarray(out, dtype=np.float64)

    def apply(self, ax: Axes, lo: float, hi: float, axis: str = "x") -> None:
        """Give the axis this scale, limits and ticks at zero and at whole decades, thinned to about nine."""
        from matplotlib.ticker import FuncFormatter, NullLocator

        (ax.set_xscale if axis == "x" else ax.set_yscale)("symlog", linthresh=self.linthresh)
        (ax.set_xlim if axis == "x" else ax.set_ylim)(lo, hi)
        target = ax.xaxis if axis == "x" else ax.yaxis
        target.set_ticks(self._ticks(lo, hi))
        target.set_major_formatter(FuncFormatter(_decade_label))
        target.set_minor_locator(NullLocator())

    def _ticks(self, lo: float, hi: float) -> list[float]:
        def decades(reach: float) -> list[float]:
            if reach <= self.linthresh:
                return []
            first = math.ceil(math.log10(self.linthresh) - 1e-9)
            return [10.0**k for k in range(first, math.floor(math.log10(reach) + 1e-9) + 1)]

        positive, negative = decades(hi), decades(-lo)
        step = max(1, math.ceil((len(positive) + len(negative)) / 9))
        return [*(-x for x in negative[::-step][::-1]), 0.0, *positive[::-step][::-1]]


def _decade_label(value: float, _position: int | None = None) -> str:
    if value == 0:
        return "0"
    return ("−" if value < 0 else "") + power(round(math.log10(abs(value))))


def log_axis(ax: Axes, lo: float, hi: float) -> None:
    """Log scale of y with plain-text decade labels, every decade or fewer."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    ax.set_ylim(lo, hi)
    ax.yaxis.set_major_locator(LogLocator(numticks=7))
    ax.yaxis.set_major_formatter(FuncFormatter(_decade_label))
    ax.yaxis.set_minor_locator(NullLocator())


def plain_ticks(axis: Axis) -> None:
    """Ticks of a log axis as plain text, no mathtext, so SVG text stays text; 1, 2 and 5 below two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _=None: with_minus(f"{value:g}")))
    axis.set_minor_formatter(NullFormatter())


def bootstrap(samples: Array, statistic: Callable[[Array], Array] | None = None) -> tuple[Array, Array] | None:
    """90% percentile band of the mean over the first axis; None for a single sample, which has no band.

    Args:
        samples: (probes, points).
        statistic: applied to each resampled mean, identity by default.

    Returns:
        Lower and upper band, each (points,): 5th and 95th percentile over 1,000 resamples of the probes,
        seeded with 0, so the same result gives the same picture.
    """
    count = len(samples)
    if count < 2:
        return None
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=1000)
    means = draws @ samples / count
    lo, hi = np.percentile(means if statistic is None else statistic(means), (5, 95), axis=0)
    return np.asarray(lo), np.asarray(hi)
