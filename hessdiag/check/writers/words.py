"""What every writer says alike: verdicts in words, the columns of a row."""

from __future__ import annotations

import math

from hessdiag.check.verdict import Report, Row, Verdict

SIGNS = {Verdict.PASS: "✓", Verdict.FAIL: "✗", Verdict.UNSURE: "?", Verdict.NONE: "!"}


def verdict_words(report: Report, row: Row) -> str:
    """``fail``, or ``fail (warning)`` where that does not fail the check."""
    warns = row.verdict is Verdict.FAIL and not report.fails(row)
    return f"{row.verdict.value} (warning)" if warns else row.verdict.value


def measured_words(row: Row) -> str:
    """``5.85 [5.21, 6.49]``, or a dash."""
    return row.measured.words() if row.measured else "—"


def change_words(row: Row) -> str:
    """``+12% [+8%, +16%]`` for limits on a change, else a dash."""
    if row.tested is None or row.limit_kind not in ("max_increase", "max_decrease"):
        return "—"
    return row.tested.words(signed=True, percent=row.relative)


def worst_first(report: Report) -> list[Row]:
    """Rows in the order they need attention: what fails, what has no verdict, warnings, what passes.

    Among equals the furthest beyond its limit comes first, then the order of the report.
    """

    def order(row: Row) -> tuple[int, float]:
        ranks = (
            report.fails(row),
            report.undecided(row),
            row.verdict is Verdict.FAIL,
            row.verdict is not Verdict.PASS,
        )
        rank = (*ranks, True).index(True)
        return rank, -_excess(row)

    return sorted(report.rows, key=order)


def _excess(row: Row) -> float:
    """How far the value tested is beyond its limit, in limits; 0 where nothing was tested or all is well."""
    if row.verdict is Verdict.PASS or row.tested is None or not math.isfinite(row.tested.value):
        return 0.0
    downwards = row.limit_kind in ("min", "max_decrease")
    limit = -row.threshold if row.limit_kind == "max_decrease" else row.threshold
    beyond = row.tested.value - limit
    return (-beyond if downwards else beyond) / (abs(row.threshold) or 1.0)
