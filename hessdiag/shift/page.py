"""Shift tests as tables on the terminal, and as one HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hessdiag.formatting import format_interval, format_number, format_p
from hessdiag.multiplicity import holm
from hessdiag.pages import meanings
from hessdiag.present.pictures import Picture, picture, rendered
from hessdiag.shift.experiments import CurveDifference, ShiftCurve, Slope
from hessdiag.shift.images import DEGREES, PADDING
from hessdiag.shift.plots import MANY, MOST_CLOUDS, TITLES, shift_plot
from hessdiag.shift.report import ShiftReport
from hessdiag.shift.settings import TESTS
from hessdiag.shown import listed, plain

if TYPE_CHECKING:
    from rich.console import Group

EXPLAINED = {
    "covariate": "The same test examples, weighted anew: a dot is the accuracy if the mean of the features "
    "moved by a random δ; the further right, the larger the move.",
    "augmented": f"The same test examples distorted: 0 as they are, 1 turned by up to {DEGREES:g}° and moved by "
    f"up to 1/{1 / PADDING:g} of their side, 2 by twice that.",
    "distance": "The test examples in bins, by how far each lies from the training example nearest to it.",
    "other": "The test set of this problem (0) and that of the other source (1): the slope is the change.",
    "findings": "The test examples by how many findings they have beside the labels that count.",
}
COLUMNS = ("checkpoint", "accuracy, least shifted", "slope", "interval", "p (Holm)", "p over levels")
AGAINST = ("checkpoint", "slope difference", "interval", "p (Holm)", "accuracy difference", "p (Holm) ")
CAVEAT = (
    "Errors are over test examples, for these checkpoints: two checkpoints say nothing about the recipes they "
    "were trained by; compare several seeds of each."
)


def slope_rows(report: ShiftReport, test: str) -> list[tuple[str, ...]]:
    """A row per checkpoint under `COLUMNS`; what cannot be told says so in place of the slope."""
    rows: list[tuple[str, ...]] = []
    adjusted = _adjusted(report, test)
    for name, curve in report.of_test(test).items():
        first = min(curve.points, key=lambda point: point.shift)
        least = format_number(first.score, first.lo, first.hi)
        rows.append((plain(name), least, *_slope(curve.slope, curve, adjusted.get(name))))
    return rows


def difference_rows(report: ShiftReport, test: str) -> list[tuple[str, ...]]:
    """A row per checkpoint but the reference under `AGAINST`."""
    return [_difference(one) for one in report.differences(test)]


def shift_tables(report: ShiftReport, width: int = 120) -> Group:
    """Every test as a table on the terminal, a line per checkpoint, differences from the reference below."""
    from rich.console import Group
    from rich.text import Text

    from hessdiag.present.lines import one_line_each

    parts: list[Any] = []
    for test in _tests(report):
        for columns, rows in ((COLUMNS, slope_rows(report, test)), (AGAINST, difference_rows(report, test))):
            if not rows:
                continue
            parts.append(Text(TITLES[test] if columns is COLUMNS else _against(report, test), style="bold"))
            table, reasons = one_line_each(columns, rows, width, reason=columns.index("interval"))
            parts += [table, *(Text(f"{line}\n") for line in reasons)]
    parts.append(Text("\n".join(f"• {line}" for line in (*remarks(report), CAVEAT))))
    return Group(*parts)


def remarks(report: ShiftReport) -> list[str]:
    """Notes of the tests, and refusals with their reasons."""
    notes = {
        f"{test}: {note}" for test in _tests(report) for c in report.of_test(test).values() for note in c.notes
    }
    refused = [f"{name}, {test}: {why}" for name, found in report.refused.items() for test, why in found.items()]
    told = [f"{test}: {one.sentence}" for test in _tests(report) for one in report.powers(test)]
    return [plain(line) for line in (*sorted(notes), *told, *refused)]


def summary(report: ShiftReport) -> list[str]:
    """What each test says of the checkpoints, in a sentence."""
    lines = []
    for test in _tests(report):
        told: dict[str, list[str]] = {}
        adjusted, limit = _adjusted(report, test), 1 - report.settings.confidence
        for name, curve in report.of_test(test).items():
            told.setdefault(_verdict(curve, adjusted.get(name), limit), []).append(name)
        holm_said = f" (p after Holm's adjustment for {len(adjusted)} checkpoints)" if len(adjusted) > 1 else ""
        line = (
            f"{TITLES[test]}{holm_said}: "
            + "; ".join(f"{what} at {listed(at)}" for what, at in told.items())
            + "."
        )
        found = report.differences(test)
        if found:
            apart = [one.name for one in found if one.slope is not None and one.slope.adjusted < limit]
            line += f" Against {_reference(report, test)} the slope differs beyond chance at "
            line += f"{listed(apart)}." if apart else "no other."
        lines.append(line)
    return lines


def _adjusted(report: ShiftReport, test: str) -> dict[str, float]:
    """The p of every slope after Holm's adjustment for having looked at all checkpoints."""
    slopes = {name: curve.slope for name, curve in report.of_test(test).items() if curve.slope is not None}
    return dict(zip(slopes, holm([slope.over_examples.pvalue for slope in slopes.values()]), strict=True))


def _verdict(curve: ShiftCurve, adjusted: float | None, limit: float) -> str:
    if curve.slope is None or adjusted is None:
        return "cannot tell"
    if adjusted >= limit:
        return "no change beyond chance"
    return "accuracy falls with the shift" if curve.slope.value < 0 else "accuracy rises with the shift"


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
    return rendered(
        "hessdiag.shift",
        "shift.html.j2",
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
        meanings=meanings(["slope", "shift", "flatter_is_not_better"]),
    )


def _tests(report: ShiftReport) -> list[str]:
    return [test for test in TESTS if report.of_test(test)]


def _against(report: ShiftReport, test: str) -> str:
    return f"Against {_reference(report, test)}, on the same examples"


def _reference(report: ShiftReport, test: str) -> str:
    return plain(report.reference or next(iter(report.of_test(test))))


def _picture(report: ShiftReport, test: str) -> Picture:
    many = len(report.of_test(test)) > MOST_CLOUDS
    text = "Slope of accuracy against shift, with its interval over test examples, not adjusted for their number. "
    text = (
        text
        if many
        else (
            "Accuracy against shift, with the least-squares line of every checkpoint that allows one; a line "
            "sums up, it need not fit. "
        )
    )
    if not many and all(len(curve.points) <= MANY for curve in report.of_test(test).values()):
        text += "Bars are intervals over test examples; points of one shift are drawn side by side."
    frame = report.to_frame()
    shown = frame[frame["test"] == test].drop(columns="test")
    return picture(shift_plot(report, test), text, shown, f"shift-{test}", "shift.csv")


def _slope(slope: Slope | None, curve: ShiftCurve, adjusted: float | None) -> tuple[str, str, str, str]:
    if slope is None or adjusted is None:
        return "—", plain(curve.cannot_tell), "—", "—"
    over = slope.over_examples
    levels = "—" if slope.over_levels is None else format_p(slope.over_levels.pvalue)
    value = format_number(slope.value, over.lo, over.hi)
    return value, format_interval(slope.value, over.lo, over.hi), format_p(adjusted), levels


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
