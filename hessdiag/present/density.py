"""The eigenvalue density as a picture: raw quadrature, smoothed for the eye only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hessdiag.errors import UsageError
from hessdiag.formatting import format_number
from hessdiag.present.axes import (
    COLOURS,
    GREY,
    LINES,
    Array,
    Symlog,
    bootstrap,
    caption,
    heading,
    ink,
    log_axis,
    note,
    prepare,
)
from hessdiag.present.inputs import Source, brief, facts, left_open, spectra, sweep, threshold
from hessdiag.present.signs import negative_mass, zone_in_caption, zone_in_density
from hessdiag.results import Analysis, Quadrature, Spectrum
from hessdiag.shown import ending, plain

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

POINTS = 320  # grid points of a curve: five per kernel width on a usual axis, and a small SVG
MOST_LINES = 6  # single probes drawn: more turn into a second band


@dataclass(frozen=True, slots=True)
class Curve:
    """What is drawn of one analysis: shares of the spectrum per axis unit, (points,) each; NaN below the floor."""

    mean: Array
    band: tuple[Array, Array] | None
    probes: Array  # (probes, points)


@dataclass(frozen=True, slots=True)
class Smooth:
    """The grid, kernel and floor several curves share."""

    scale: Symlog
    sigma: float  # axis units: decades beyond linthresh
    units: Array  # (points,), uniform
    floor: float  # axis units⁻¹: a tenth of the peak of a lone eigenvalue

    @property
    def eigenvalues(self) -> Array:
        """The grid in eigenvalues."""
        return self.scale.backward(self.units)

    def peak(self, dimension: int) -> float:
        """Height of a single eigenvalue among ``dimension``."""
        return 1 / float(dimension * self.sigma * np.sqrt(2 * np.pi))

    def of(self, quadrature: Quadrature) -> Array:
        """Quadrature smoothed by a Gaussian kernel uniform in axis units, (points,)."""
        centres = self.scale.forward(quadrature.nodes)
        weights = np.asarray(quadrature.weights, dtype=np.float64)
        distance = (self.units[:, None] - centres[None, :]) / self.sigma
        return np.asarray(np.exp(-0.5 * distance**2) @ weights / (self.sigma * np.sqrt(2 * np.pi)))


def density(
    analysis: Source, ax: Axes | None = None, *, sigma: float | None = None, show_caption: bool = True
) -> Axes:
    """Draw the density: mean over probes with its 90% band, outliers, zero, mean eigenvalue, negative side.

    The zone next to zero in which signs are not resolved is hatched; the widest one of several.

    Args:
        analysis: an `Analysis`, a `Spectrum`, or up to eight of either (a sequence, or names to analyses):
            several share kernel, grid and axes.
        ax: where to draw; a new figure by default.
        sigma: kernel width in decades of the axis; by default the axis' length over the number of nodes.
        show_caption: write below the axes what is needed to repeat the picture.

    Returns:
        The axes; the figure is ``ax.figure``.

    Raises:
        UsageError: no spectrum, more than eight, or ``sigma`` not positive.
    """
    named = spectra(analysis)
    smooth = shared_grid([spectrum for _, spectrum in named.values()], sigma)
    curves = {name: _curve(smooth, one, spectrum) for name, (one, spectrum) in named.items()}
    ax = prepare(ax)
    highest = max(float(np.nanmax(curve.mean)) for curve in curves.values())
    headroom = (highest / smooth.floor) ** (0.2 if len(named) == 1 else 0.08 + 0.075 * len(named))
    for number, (name, curve) in enumerate(curves.items()):
        _draw(ax, smooth, curve, named[name][1], number, alone=len(named) == 1)
    smooth.scale.apply(ax, *smooth.scale.backward(smooth.units[[0, -1]]))
    log_axis(ax, smooth.floor, highest * max(headroom, 3.0))
    ax.set_xlabel("eigenvalue λ")
    ax.set_ylabel("share of eigenvalues per decade")
    ax.axvline(0.0, color=ink(ax), linewidth=0.8, zorder=1)
    if len(named) == 1:
        ((name, (only, spectrum)),) = named.items()
        heading(ax, name, pad=18)
        _marks(ax, only, spectrum)
    else:
        _legend(ax, list(named))
    zone_in_density(ax, [spectrum for _, spectrum in named.values()], alone=len(named) == 1)
    if show_caption:
        caption(ax, density_caption(analysis, sigma=sigma))
    return ax


def density_frame(analysis: Source, *, sigma: float | None = None) -> pd.DataFrame:
    """Exactly the curves `density` draws: series, eigenvalue, mean, lo, hi, and one column per probe drawn.

    ``attrs`` holds sigma and linthresh of the axis and the floor below which nothing is drawn.
    """
    import pandas as pd

    named = spectra(analysis)
    smooth = shared_grid([spectrum for _, spectrum in named.values()], sigma)
    parts = []
    for name, (one, spectrum) in named.items():
        curve = _curve(smooth, one, spectrum)
        columns = {"series": name, "eigenvalue": smooth.eigenvalues, "mean": curve.mean}
        if curve.band is not None:
            columns |= {"lo": curve.band[0], "hi": curve.band[1]}
        if len(named) == 1:
            columns |= {f"probe_{i}": line for i, line in enumerate(curve.probes[:MOST_LINES])}
        parts.append(pd.DataFrame(columns))
    frame = pd.concat(parts, ignore_index=True)
    frame.attrs |= {"sigma": smooth.sigma, "linthresh": smooth.scale.linthresh, "floor": smooth.floor}
    return frame


def density_caption(analysis: Source, *, sigma: float | None = None) -> str:
    """What is needed to repeat and to read the picture, in one paragraph."""
    named = spectra(analysis)
    smooth = shared_grid([spectrum for _, spectrum in named.values()], sigma)
    several = len(named) > 1
    origins = {name: " · ".join([sweep(spectrum), *facts(one)]) for name, (one, spectrum) in named.items()}
    origin = "; ".join(f"{name}: {text}" for name, text in origins.items())
    if len(set(origins.values())) == 1:
        origin = ("each: " if several else "") + next(iter(origins.values()))
    drawn = [spectrum for _, spectrum in named.values()]
    band = left_open(drawn, banded="90% bootstrap over probes" + "; thin lines: single probes" * (not several))
    stems = "Stems: converged outliers. " if any(spectrum.outliers for spectrum in drawn) else ""
    linear = format_number(smooth.scale.linthresh, 0, smooth.scale.linthresh)
    drawing = (
        f"Gaussian kernel of {smooth.sigma:.2g} decades, for the eye only: every number comes from the raw "
        f"quadrature; the curve ends at the extremes where those are known. Axis linear within ±{linear}; "
        f"floor {smooth.floor:.1e}, a tenth of a lone eigenvalue's peak."
    )
    return f"{origin}. {band} {stems}{zone_in_caption(drawn)}{drawing}"


def shared_grid(measured: list[Spectrum], sigma: float | None = None) -> Smooth:
    """The grid, kernel and floor on which several spectra can be drawn together."""
    if sigma is not None and not sigma > 0:
        msg = f"sigma={sigma}: the kernel needs a positive width in decades; leave it out for the default"
        raise UsageError(msg)
    scale = Symlog(threshold(*measured))
    nodes = [node for spectrum in measured for node, _ in spectrum.merged()]
    lo, hi = scale.forward([min([*nodes, 0.0]), max([*nodes, 0.0])])
    if sigma is None:
        # One node per kernel width on average (the rule of Papyan 2019, range/steps, in axis units), but
        # never so wide that the decades blur, nor so narrow that the grid misses a peak.
        fewest = min(max(2, spectrum.steps) for spectrum in measured)
        sigma = float(np.clip((hi - lo) / fewest, 0.04, 0.15))
    margin = 3.6 * sigma  # here the largest possible peak is back at the floor
    units = np.linspace(lo - margin, hi + margin, POINTS)
    dimension = max(spectrum.dimension for spectrum in measured)
    return Smooth(scale, sigma, units, 0.1 / (dimension * sigma * np.sqrt(2 * np.pi)))


def _curve(smooth: Smooth, analysis: Analysis, spectrum: Spectrum) -> Curve:
    lines = smooth.of(spectrum.known) + np.stack([smooth.of(probe) for probe in spectrum.probes])
    band, floor, mean = bootstrap(lines), smooth.floor, lines.mean(axis=0)
    inside = within(analysis, smooth.eigenvalues)
    clipped = None
    if band is not None:
        low, high = (np.where(inside, np.maximum(edge, floor), np.nan) for edge in band)
        clipped = low, high
    return Curve(
        np.where(inside & (mean > floor), mean, np.nan), clipped, np.where(inside & (lines > floor), lines, np.nan)
    )


def within(analysis: Analysis, eigenvalues: Array) -> NDArray[np.bool_]:
    """Where there can be eigenvalues: the kernel spreads mass beyond the extremes, where none is."""
    ends = [analysis.metrics[name] for name in ("lambda_min", "lambda_max") if name in analysis.metrics]
    inside = np.ones(len(eigenvalues), dtype=bool)
    for end in ends:
        inside &= eigenvalues <= end.hi if end.quantity == "lambda_max" else eigenvalues >= end.lo
    return inside if inside.any() else ~inside


def _draw(ax: Axes, smooth: Smooth, curve: Curve, spectrum: Spectrum, number: int, *, alone: bool) -> None:
    colour, x = COLOURS[number], smooth.eigenvalues
    if alone and len(curve.probes) > 1:
        for line in curve.probes[:MOST_LINES]:
            ax.plot(x, line, color=colour, linewidth=0.5, alpha=0.35, gid="probe")
    if curve.band is not None:
        ax.fill_between(x, *curve.band, color=colour, alpha=0.25 if alone else 0.15, linewidth=0)
    ax.plot(x, curve.mean, color=colour, linestyle=LINES[number], linewidth=1.6, gid="mean")
    if spectrum.outliers:
        height = smooth.peak(spectrum.dimension)
        ax.vlines(spectrum.outliers, smooth.floor, height, color=colour, linewidth=0.9, zorder=3)
        heights = [height] * len(spectrum.outliers)
        marker = "osD^vPX*"[number]
        ax.plot(spectrum.outliers, heights, marker, color=colour, markersize=4, zorder=4, gid="outliers")


def _legend(ax: Axes, names: list[str]) -> None:
    # Names are set afterwards: matplotlib hides labels that begin with "_" and reads "$" as mathematics.
    lines = [line for line in ax.lines if line.get_gid() == "mean"]
    numbers = [str(number) for number in range(len(lines))]
    legend = ax.legend(
        lines, numbers, frameon=False, fontsize=8, labelcolor=ink(ax), loc="upper right", handlelength=3.2
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=ending(plain(name), 44), parse_math=False)


def _marks(ax: Axes, analysis: Analysis, spectrum: Spectrum) -> None:
    """λ_max above the axes, tr/n on the axis, the share of negative eigenvalues on its own side."""
    above = ax.get_xaxis_transform()
    largest = analysis.metrics.get("lambda_max")
    if largest is not None:
        ax.axvline(largest.value, color=ink(ax), linewidth=0.8, linestyle=(0, (4, 2)), gid="lambda_max")
        note(ax, largest.value, 1.015, f"λ_max = {brief(largest)}", above, ha="right", va="bottom")
    trace = analysis.metrics.get("trace")
    if trace is not None:
        mean = trace.value / spectrum.dimension
        ax.plot(
            [mean], [0.0], "^", color=ink(ax), markersize=6, transform=above, clip_on=False, gid="mean_eigenvalue"
        )
        note(ax, mean, 0.035, "  tr/n" if mean >= 0 else "tr/n  ", above, ha="left" if mean >= 0 else "right")
    left = ax.get_xlim()[0]
    ax.axvspan(left, 0.0, color=GREY, alpha=0.12, linewidth=0, zorder=0, gid="negative")
    note(ax, 0.012, 0.965, "negative mass\n" + negative_mass(analysis, spectrum), va="top", linespacing=1.35)
