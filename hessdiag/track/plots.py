"""The spectrum along training as a picture: density over checkpoints, and λ_max, trace and loss below it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from hessdiag.errors import UsageError
from hessdiag.present.axes import COLOURS, Array, ink, plain_ticks, styled
from hessdiag.present.density import Smooth, shared_grid, within
from hessdiag.results import Analysis, Spectrum
from hessdiag.shown import encodable
from hessdiag.track.places import by_step, edges, name_places, places
from hessdiag.track.trajectory import Point, Rate, Trajectory

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDEST = 10.0  # largest over smallest value that a linear axis still shows well
PRECONDITIONED = "λ_max(P⁻¹H)\n/ threshold"
PANELS = {"lambda_max": "λ_max", "preconditioned": PRECONDITIONED, "trace": "trace", "loss": "loss"}
NEAR = 0.4  # shares of the threshold from which on it is drawn
CELLS = 160  # grid points of a column: two pixels each


def limit_name(rate: Rate) -> str:
    """What the limit of a step is called."""
    if rate.momentum == 0:
        return "2/η"
    return "(2+2β)/((1+2β)η)" if rate.nesterov else "(2+2β)/η"


def limit_names(points: Iterable[Point]) -> str:
    """The limits of some checkpoints, each once: "2/η", or "2/η or (2+2β)/η"; empty where none is known."""
    return " or ".join(dict.fromkeys(limit_name(point.rate) for point in points if point.rate is not None))


def evolution(trajectory: Trajectory) -> Figure:
    """Draw the trajectory: heat map of log density where measured, then a panel each for λ_max, trace and loss.

    Raises:
        UsageError: nothing was measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [of for of in PANELS if not panel_frame(trajectory, of).empty]
    spectral = any(analysis.spectrum is not None for _, analysis in trajectory.measured)
    if not panels:
        msg = "a trajectory without a measured checkpoint has no picture: see what it says of each"
        raise UsageError(msg)
    ratios = [3.2] * spectral + [1.6 if of == "lambda_max" else 1.15 for of in panels]
    figure = Figure(figsize=(7.2, 1.0 + 1.1 * sum(ratios)), layout="constrained", facecolor="white", dpi=200)
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)).tolist()
    for ax in axes:
        ax.set_facecolor("none")
        styled(ax)
    if spectral:
        heat(trajectory, axes[0])
    for ax, of in zip(axes[spectral:], panels, strict=True):
        panel(trajectory, of, ax)
    for ax in axes[:-1]:
        ax.set_xlabel("")
        ax.tick_params(labelbottom=False)
    return figure


def heat(trajectory: Trajectory, ax: Axes) -> Axes:
    """Log density over (checkpoint, symlog λ), shared kernel and grid; cells below the floor are left empty.

    Raises:
        UsageError: no checkpoint has a spectrum.
    """
    import matplotlib as mpl
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    smooth, columns = _columns(trajectory)
    shades = LinearSegmentedColormap.from_list("shades", mpl.colormaps["viridis"](np.linspace(0.12, 0.97, 256)))
    units = smooth.units
    middle = (units[1:] + units[:-1]) / 2
    levels = smooth.scale.backward([units[0], *middle, units[-1]])
    values = np.ma.masked_invalid(columns)
    norm = LogNorm(smooth.floor, max(float(values.max()), 10 * smooth.floor))
    mesh = ax.pcolormesh(edges(trajectory), levels, values, norm=norm, cmap=shades, rasterized=True)
    ax.grid(visible=False)
    bottom, top = smooth.scale.backward(_reach(trajectory, smooth)).tolist()
    smooth.scale.apply(ax, bottom, top, axis="y")
    ax.axhline(0.0, color=ink(ax), linewidth=0.6, linestyle=(0, (1, 2)))
    x, value, _, _ = _series(trajectory, "lambda_max")
    ax.plot(x, value, "o-", color=COLOURS[1], linewidth=0.9, markersize=3.2, gid="lambda_max")
    _limit(ax, trajectory, named=False)
    _zones(ax, trajectory)
    _legend(ax, trajectory)
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.07, aspect=22)
    if bar.solids is not None:
        bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=ink(ax), labelsize=8, which="both", width=0.6)
    bar.set_label("share of eigenvalues per decade", color=ink(ax), fontsize=8.5)
    plain_ticks(bar.ax.yaxis)
    ax.set_ylabel("eigenvalue λ")
    return name_places(ax, trajectory)


def panel(trajectory: Trajectory, of: str, ax: Axes) -> Axes:
    """One quantity over checkpoints with its interval; λ_max with the limit of the step where that is known.

    Args:
        trajectory: what was measured.
        of: "lambda_max", "preconditioned" (as a share of the optimizer's threshold), "trace" or "loss".
        ax: where to draw.
    """
    x, value, lo, hi = _series(trajectory, of)
    colour = COLOURS[1] if of == "lambda_max" else COLOURS[0]
    if by_step(trajectory):
        ax.fill_between(x, lo, hi, color=colour, linewidth=0, alpha=0.3, gid="band")
    ax.vlines(x, lo, hi, color=colour, linewidth=2.2, alpha=0.45)
    ax.plot(x, value, "o-", color=colour, linewidth=1.1, markersize=3.2, gid=of)
    ends = [*value, *lo, *hi]
    if of == "lambda_max":
        ends += [point.rate.limit for point in trajectory.points if point.rate is not None]
    ends = [end for end in ends if math.isfinite(end)]
    if min(ends) > 0 and max(ends) > WIDEST * min(ends):
        ax.set_yscale("log")
        plain_ticks(ax.yaxis)
    if of == "lambda_max":
        _limit(ax, trajectory)
    if of == "preconditioned" and ax.get_ylim()[1] > NEAR:
        ax.axhline(1.0, color=ink(ax), linewidth=1.0, linestyle="--", gid="threshold")
    ax.set_ylabel(PANELS[of])
    return name_places(ax, trajectory)


def panel_frame(trajectory: Trajectory, of: str) -> pd.DataFrame:
    """Exactly what `panel` draws: checkpoint, value, lo, hi, and for λ_max the limit of the step."""
    import pandas as pd

    _, value, lo, hi = _series(trajectory, of)
    points = trajectory.points
    frame = pd.DataFrame(
        {"checkpoint": [encodable(point.name) for point in points], "value": value, "lo": lo, "hi": hi}
    )
    if of == "lambda_max":
        frame["limit"] = [math.nan if point.rate is None else point.rate.limit for point in points]
    return frame[~np.isnan(value)].reset_index(drop=True)


def spectra_of(trajectory: Trajectory) -> list[Spectrum]:
    """The spectra there are, in order."""
    return [analysis.spectrum for _, analysis in trajectory.measured if analysis.spectrum is not None]


def _columns(trajectory: Trajectory) -> tuple[Smooth, Array]:
    """The shared grid, and density (cells, checkpoints), NaN below the floor and where nothing was measured."""
    spectra = spectra_of(trajectory)
    if not spectra:
        msg = "no checkpoint has a spectrum to draw: measure with 'density' in `quantities`"
        raise UsageError(msg)
    fine = shared_grid(spectra)
    smooth = Smooth(fine.scale, fine.sigma, np.linspace(fine.units[0], fine.units[-1], CELLS), fine.floor)
    columns = np.full((CELLS, len(trajectory.points)), np.nan)
    for i, point in enumerate(trajectory.points):
        if point.analysis is not None and (spectrum := point.analysis.spectrum) is not None:
            mean = smooth.of(spectrum.known) + np.mean([smooth.of(probe) for probe in spectrum.probes], axis=0)
            inside = within(point.analysis, smooth.eigenvalues)
            columns[:, i] = np.where(inside & (mean > smooth.floor), mean, np.nan)
    return smooth, columns


def _reach(trajectory: Trajectory, smooth: Smooth) -> tuple[float, float]:
    """Ends of the axis in its units: the grid, and limits of the step that lie less than a decade beyond."""
    limits = [float(smooth.scale.forward(p.rate.limit)) + 0.15 for p in trajectory.points if p.rate is not None]
    top = float(smooth.units[-1])
    return float(smooth.units[0]), max([top, *(limit for limit in limits if limit < top + 1)])


def _series(trajectory: Trajectory, of: str) -> tuple[Array, Array, Array, Array]:
    """Positions (from 1), values and intervals; NaN, a gap in the line, where there are none."""
    rows = [_numbers(point, point.analysis, of) or (math.nan,) * 3 for point in trajectory.points]
    table: Array = np.array(rows, dtype=np.float64).reshape(-1, 3)
    return places(trajectory), table[:, 0], table[:, 1], table[:, 2]


def _numbers(point: Point, analysis: Analysis | None, of: str) -> tuple[float, float, float] | None:
    if analysis is None:
        return None
    if of == "loss":
        loss = point.value("loss")
        return (loss, loss, loss) if math.isfinite(loss) else None
    if of == "preconditioned":
        return point.over_threshold()
    metric = analysis.metrics.get(of)
    return None if metric is None else (metric.value, metric.lo, metric.hi)


def _limit(ax: Axes, trajectory: Trajectory, *, named: bool = True) -> None:
    """The limit of the step, a level across each checkpoint's place."""
    levels = [math.nan if point.rate is None else point.rate.limit for point in trajectory.points]
    known = [(i, point.rate) for i, point in enumerate(trajectory.points) if point.rate is not None]
    if not known:
        return
    ends = edges(trajectory)
    ax.stairs(levels, ends, baseline=None, color=ink(ax), linewidth=1.0, linestyle="--", gid="limit")
    first, rate = known[0]
    low, high = ax.get_ylim()
    if named and low <= rate.limit <= high:
        place = {"textcoords": "offset points", "ha": "left", "fontsize": 8.5, "color": ink(ax)}
        ax.annotate(limit_names(trajectory.points), (ends[first], rate.limit), (3, 3), **place)


def _zones(ax: Axes, trajectory: Trajectory) -> None:
    """Between which levels the signs of eigenvalues are not resolved, across each checkpoint's place."""
    spectra = [None if point.analysis is None else point.analysis.spectrum for point in trajectory.points]
    ends = np.array([math.nan if spectrum is None else spectrum.unresolved or math.nan for spectrum in spectra])
    if np.isnan(ends).all():
        return
    style: dict[str, Any] = {"color": ink(ax), "linestyle": (0, (1, 1.5))}
    for levels in (ends, -ends):
        ax.stairs(levels, edges(trajectory), baseline=None, linewidth=1.2, gid="unresolved", **style)


def _legend(ax: Axes, trajectory: Trajectory) -> None:
    """Above the axes, so that it covers no cell."""
    names = {"limit": limit_names(trajectory.points), "unresolved": "signs not resolved between"}
    patches = {names[gid]: patch for patch in ax.patches if (gid := patch.get_gid()) in names}
    lines: dict[str, Artist] = {PANELS["lambda_max"]: ax.get_lines()[-1], **patches}
    style = {"frameon": False, "fontsize": 8.5, "labelcolor": ink(ax), "borderpad": 0.1, "ncols": 3}
    ax.legend([*lines.values()], [*lines], loc="lower right", bbox_to_anchor=(1.0, 1.0), **style)
