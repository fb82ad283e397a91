"""Shift tests as pictures, as tables on the terminal, and as one HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hessdiag.errors import UsageError
from hessdiag.generalization.shift.experiments import CurveDifference, ShiftCurve, Slope
from hessdiag.generalization.shift.report import TESTS, ShiftReport
from hessdiag.present.axes import COLOURS, LINES, heading, ink, prepare
from hessdiag.present.pictures import Picture, environment, picture
from hessdiag.present.text import format_interval, format_number, format_p, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Group

TITLES = {
    "covariate": "Covariate shift by importance weighting",
    "augmented": "Augmented test sets",
    "distance": "Test examples by their distance from the training set",
    "other": "Test set of another source",
}
COLUMNS = ("checkpoint", "least shifted", "slope", "over test examples", "p", "p over levels")
AGAINST = ("checkpoint", "slope difference", "interval", "p (Holm)", "score difference", "p (Holm) ")
CAVEAT = (
    "Errors are over test examples, for these checkpoints: two checkpoints say nothing about the recipes they "
    "were trained by; compare several seeds of each."
)


def shift_plot(report: ShiftReport, test: str, ax: Axes | None = None) -> Axes:
    """Score against shift with the regression line of every checkpoint.

    Raises:
        UsageError: no checkpoint has this test.
    """
    curves = report.of_test(test)
    if not curves:
        msg = f"{test}: no checkpoint has this test"
        raise UsageError(msg)
    ax = prepare(ax, height=3.6)
    many = max(len(curve.points) for curve in curves.values()) > 30
    for index, (name, curve) in enumerate(curves.items()):
        x = np.array([point.shift for point in curve.points])
        y = np.array([point.score for point in curve.points])
        colour = COLOURS[index % len(COLOURS)]
        if many:
            ax.plot(x, y, ".", markersize=2, alpha=0.35, color=colour)
        else:
            ends = np.array([(point.lo, point.hi) for point in curve.points]).T
            ax.errorbar(x, y, yerr=np.abs(ends - y), fmt="o", markersize=4, capsize=2, color=colour)
        style = LINES[index % len(LINES)]
        if curve.slope is not None:
            span = np.array([x.min(), x.max()])
            ax.plot(
                span,
                curve.slope.intercept + curve.slope.value * span,
                color=colour,
                linestyle=style,
                label=plain(name),
            )
        else:
            ax.plot([], [], color=colour, linestyle=style, label=f"{plain(name)} (no line)")
    ax.legend(frameon=False, fontsize=8, labelcolor=ink(ax))
    ax.set_xlabel(next(iter(curves.values())).parameter)
    ax.set_ylabel("accuracy")
    heading(ax, TITLES[test])
    return ax


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
    parts.append(Text("\n".join(f"• {line}" for line in remarks(report))))
    return Group(*parts)


def remarks(report: ShiftReport) -> list[str]:
    """Notes of the tests, refusals with their reasons, and what the numbers do not say."""
    notes = {
        f"{test}: {note}" for test in _tests(report) for c in report.of_test(test).values() for note in c.notes
    }
    refused = [f"{name}, {test}: {why}" for name, found in report.refused.items() for test, why in found.items()]
    return [plain(line) for line in (*sorted(notes), *refused, CAVEAT)]


def shift_page(report: ShiftReport, command: str = "") -> str:
    """One HTML file: a picture with its table for every test, and the remarks."""
    sections = [
        (
            TITLES[test],
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
            columns=COLUMNS,
            against=[column.strip() for column in AGAINST],
            remarks=remarks(report),
            failures=[(plain(name), plain(why)) for name, why in report.failures.items()],
            command=plain(command),
        )
    )
    return text


def _tests(report: ShiftReport) -> list[str]:
    return [test for test in TESTS if report.of_test(test)]


def _against(report: ShiftReport, test: str) -> str:
    return f"against {plain(report.reference or next(iter(report.of_test(test))))}, on the same examples"


def _picture(report: ShiftReport, test: str) -> Picture:
    text = (
        "Score against shift, with the least-squares line of every checkpoint. Bars, where they are drawn, are "
        "intervals over test examples."
    )
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
