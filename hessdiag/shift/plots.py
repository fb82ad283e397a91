"""Shift tests as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hessdiag.errors import UsageError
from hessdiag.present.axes import COLOURS, LINES, Array, heading, ink, legend_beside, prepare
from hessdiag.shift.experiments import ShiftCurve
from hessdiag.shift.report import ShiftReport
from hessdiag.shown import ending, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "covariate": "Covariate shift by importance weighting",
    "augmented": "Augmented test sets",
    "distance": "Test examples by their distance from the training set",
    "other": "Test set of another source",
    "findings": "Test examples by their number of other findings",
}
MOST_CLOUDS = 6  # checkpoints whose points can be told apart in one picture
MANY = 30  # points beyond which they are dots without bars


def shift_plot(report: ShiftReport, test: str, ax: Axes | None = None) -> Axes:
    """Score against shift with the regression line of every checkpoint.

    Raises:
        UsageError: no checkpoint has this test.
    """
    from matplotlib.lines import Line2D

    curves = report.of_test(test)
    if not curves:
        msg = f"{test}: no checkpoint has this test"
        raise UsageError(msg)
    if len(curves) > MOST_CLOUDS:
        return _slopes(curves, TITLES[test], ax)
    ax = prepare(ax, height=3.6)
    lines = []
    for index, curve in enumerate(curves.values()):
        x = np.array([point.shift for point in curve.points])
        y = np.array([point.score for point in curve.points])
        colour, style = COLOURS[index % len(COLOURS)], LINES[(index + index // len(COLOURS)) % len(LINES)]
        if len(x) > MANY:
            ax.plot(x, y, ".", markersize=2, alpha=0.35, color=colour)
        else:
            ends = np.array([(point.lo, point.hi) for point in curve.points]).T
            beside = x + _aside(x) * (index - (len(curves) - 1) / 2) / len(curves)
            ax.errorbar(beside, y, yerr=np.abs(ends - y), fmt="o", markersize=4, elinewidth=0.8, color=colour)
        if curve.slope is not None:
            span = np.array([x.min(), x.max()])
            line = curve.slope.intercept + curve.slope.value * span
            ax.plot(span, line, color=colour, linestyle=style)
        shown: Any = style if curve.slope is not None else ""
        lines.append(Line2D([], [], color=colour, linestyle=shown, marker="o", markersize=4))
    ax.set_ylim(top=min(ax.get_ylim()[1], 1.02))  # no accuracy is above 1, where a line may still lead
    legend_beside(ax, lines, list(curves))
    ax.set_xlabel(next(iter(curves.values())).parameter)
    ax.set_ylabel("accuracy")
    heading(ax, TITLES[test])
    return ax


def _slopes(curves: Mapping[str, ShiftCurve], title: str, ax: Axes | None) -> Axes:
    """The slope of every checkpoint with its interval: more clouds than `MOST_CLOUDS` hide each other."""
    ax = prepare(ax, height=1.2 + 0.22 * len(curves))
    for row, curve in enumerate(curves.values()):
        if curve.slope is not None:
            over, value = curve.slope.over_examples, curve.slope.value
            ends = [[max(value - over.lo, 0.0)], [max(over.hi - value, 0.0)]]
            ax.errorbar([value], [row], xerr=ends, fmt="o", markersize=4, elinewidth=0.9, color=COLOURS[0])
    ax.axvline(0.0, color=ink(ax), linewidth=0.8)
    ax.set_ylim(len(curves) - 0.4, -0.6)
    names = [ending(plain(name), 24) for name in curves]
    ax.set_yticks(range(len(curves)), names, fontsize=8, parse_math=False)
    ax.set_xlabel(f"slope: accuracy per unit of {next(iter(curves.values())).parameter}")
    heading(ax, title)
    return ax


def _aside(x: Array) -> float:
    """Room for the points of all checkpoints at one shift: a third of what lies between two."""
    apart = np.diff(np.unique(x))
    return float(apart.min()) / 3 if len(apart) else 0.0
