"""Shift tests as pictures, as tables on the terminal, and as one HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hessdiag.errors import UsageError
from hessdiag.generalization.shift.experiments import CurveDifference, ShiftCurve, Slope
from hessdiag.generalization.shift.images import DEGREES, PADDING
from hessdiag.generalization.shift.report import TESTS, ShiftReport
from hessdiag.present.axes import COLOURS, LINES, Array, heading, legend_beside, prepare
from hessdiag.present.pictures import Picture, environment, picture
from hessdiag.present.text import format_interval, format_number, format_p, listed, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Group

TITLES = {
    "covariate": "Covariate shift by importance weighting",
    "augmented": "Augmented test sets",
    "distance": "Test examples by their distance from the training set",
    "other": "Test set of another source",
}
EXPLAINED = {
    "covariate": "The same test examples, weighted anew: a dot is the accuracy if the mean of the features "
    "moved by a random δ; the further right, the larger the move.",
    "augmented": f"The same test examples distorted: 0 as they are, 1 turned by up to {DEGREES:g}° and moved by "
    f"up to 1/{1 / PADDING:g} of their side, 2 by twice that.",
    "distance": "The test examples in bins, by how far each lies from the training example nearest to it.",
    "other": "The test set of this problem (0) and that of the other source (1): the slope is the change.",
}
COLUMNS = ("checkpoint", "accuracy, least shifted", "slope", "interval", "p", "p over levels")
AGAINST = ("checkpoint", "slope difference", "interval", "p (Holm)", "accuracy difference", "p (Holm) ")
MANY = 30  # points beyond which they are dots without bars
CAVEAT = (
    "Errors are over test examples, for these checkpoints: two checkpoints say nothing about the recipes they "
    "were trained by; compare several seeds of each."
)


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


def _aside(x: Array) -> float:
    """Room for the points of all checkpoints at one shift: a third of what lies between two."""
    apart = np.diff(np.unique(x))
    return float(apart.min()) / 3 if len(apart) else 0.0


def slope_rows(report: ShiftReport, test: str) -> list[tuple[str, ...]]:
    """A row per checkpoint under `COLUMNS`; what cannot be told says so in place of the slope."""
    rows: list[tuple[str, ...]] = []
    for name, curve in report.of_test(test).items():
        first = min(curve.points, key=lambda point: point.shift)
        least = format_number(first.score, first.lo, first.hi)
        rows.append((plain(name), least, *_slope(curve.slope, curve)))
    return rows


def difference_rows(report: ShiftReport, test: str) -> list[tuple[str, ...]]:
    """A row per checkpoint but the reference under `AGAINST`."""
    return [_difference(one) for one in report.differences(test)]


def shift_tables(report: ShiftReport) -> Group:
    """Every test as a table on the terminal, differences from the reference below."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Table | Text] = []
    for test in _tests(report):
        for columns, rows in ((COLUMNS, slope_rows(report, test)), (AGAINST, difference_rows(report, test))):
            if not rows:
                continue
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
            table.title = Text(TITLES[test] if columns is COLUMNS else _against(report, test), style="bold")
            for index, column in enumerate(columns):
                table.add_column(column.strip(), justify="right" if index else "left", overflow="fold")
            for row in rows:
                table.add_row(*map(Text, row))
            parts.append(table)
    parts.append(Text("\n".join(f"• {line}" for line in (*remarks(report), CAVEAT))))
    return Group(*parts)


def remarks(report: ShiftReport) -> list[str]:
    """Notes of the tests, and refusals with their reasons."""
    notes = {
        f"{test}: {note}" for test in _tests(report) for c in report.of_test(test).values() for note in c.notes
    }
    refused = [f"{name}, {test}: {why}" for name, found in report.refused.items() for test, why in found.items()]
    return [plain(line) for line in (*sorted(notes), *refused)]


def summary(report: ShiftReport) -> list[str]:
    """What each test says of the checkpoints, in a sentence."""
    lines = []
    for test in _tests(report):
        told: dict[str, list[str]] = {}
        for name, curve in report.of_test(test).items():
            told.setdefault(_verdict(curve), []).append(name)
        line = f"{TITLES[test]}: " + "; ".join(f"{what} at {listed(at)}" for what, at in told.items()) + "."
        found = report.differences(test)
        if found:
            limit = 1 - report.settings.confidence
            apart = [one.name for one in found if one.slope is not None and one.slope.adjusted < limit]
            line += f" Against {_reference(report, test)} the slope differs beyond chance at "
            line += f"{listed(apart)}." if apart else "no other."
        lines.append(line)
    return lines


def _verdict(curve: ShiftCurve) -> str:
    if curve.slope is None:
        return "cannot tell"
    over = curve.slope.over_examples
    if over.lo <= 0 <= over.hi:
        return "no change beyond chance"
    return "accuracy falls with the shift" if over.hi < 0 else "accuracy rises with the shift"


def shift_page(report: ShiftReport, command: str = "") -> str:
    """One HTML file: a picture with its table for every test, and the remarks."""
    sections = [
        (
            test,
            TITLES[test],
            EXPLAINED[test],
            _picture(report, test),
            slope_rows(report, test),
            _against(report, test),
            difference_rows(report, test),
        )
        for test in _tests(report)
    ]
    text: str = (
        environment()
        .get_template("shift.html.j2")
        .render(
            title=f"{len(report.curves)} checkpoints under shift"
            if len(report.curves) > 1
            else f"{plain(next(iter(report.curves), 'nothing'))} under shift",
            sections=sections,
            summary=summary(report),
            columns=COLUMNS,
            confidence=f"{report.settings.confidence:.0%}",
            against=[column.strip() for column in AGAINST],
            remarks=remarks(report),
            caveat=CAVEAT,
            failures=[(plain(name), plain(why)) for name, why in report.failures.items()],
            command=plain(command),
        )
    )
    return text


def _tests(report: ShiftReport) -> list[str]:
    return [test for test in TESTS if report.of_test(test)]


def _against(report: ShiftReport, test: str) -> str:
    return f"Against {_reference(report, test)}, on the same examples"


def _reference(report: ShiftReport, test: str) -> str:
    return plain(report.reference or next(iter(report.of_test(test))))


def _picture(report: ShiftReport, test: str) -> Picture:
    text = (
        "Accuracy against shift, with the least-squares line of every checkpoint that allows one; a line sums up, "
        "it need not fit. "
    )
    if all(len(curve.points) <= MANY for curve in report.of_test(test).values()):
        text += "Bars are intervals over test examples; points of one shift are drawn side by side."
    frame = report.to_frame()
    shown = frame[frame["test"] == test].drop(columns="test")
    return picture(shift_plot(report, test), text, shown, f"shift-{test}", "shift.csv")


def _slope(slope: Slope | None, curve: ShiftCurve) -> tuple[str, str, str, str]:
    if slope is None:
        return "—", plain(curve.cannot_tell), "—", "—"
    over = slope.over_examples
    levels = "—" if slope.over_levels is None else format_p(slope.over_levels.pvalue)
    value = format_number(slope.value, over.lo, over.hi)
    return value, format_interval(slope.value, over.lo, over.hi), format_p(over.pvalue), levels


def _difference(one: CurveDifference) -> tuple[str, ...]:
    if one.slope is None or one.score is None:
        return plain(one.name), "—", plain(one.cannot_tell), "—", "—", "—"
    slope, score = one.slope, one.score
    over = slope.over_examples
    return (
        plain(one.name),
        format_number(slope.value, over.lo, over.hi),
        format_interval(slope.value, over.lo, over.hi),
        format_p(slope.adjusted),
        format_number(score.value, score.over_examples.lo, score.over_examples.hi),
        format_p(score.adjusted),
    )
