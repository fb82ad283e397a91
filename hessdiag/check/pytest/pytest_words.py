"""A verdict in the words of a test: why it fails, and what its JUnit report holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hessdiag.check.comparable import RECORD
from hessdiag.check.verdict import Report, Row, Verdict

REWORDED = (
    ("after hessdiag init, ", ""),
    ("under [tool.hessdiag.check]", "with --hessdiag-baseline"),
    ("under [tool.hessdiag.run]", "in hessdiag.run()"),
    ("run.rtol", "rtol"),
    ("run.batch_size to", "batch_size to"),
    ("check.budgets.", ""),
)
"""Ways out on the command line, and the same in a test."""


def reworded(text: str, command: str) -> str:
    """A text of `hessdiag.check` with the ways out that a test has.

    Args:
        text: of an error, or of a row.
        command: what records the baselines of this test.
    """
    text = text.replace(RECORD, command)
    for old, new in REWORDED:
        text = text.replace(old, new)
    return text


def outcome(report: Report, file: str, command: str) -> tuple[list[str], list[str]]:
    """Why the test fails, a paragraph each, and what it should only warn of.

    Args:
        report: of one budget.
        file: of the baselines, as shown.
        command: what records the baselines of this test.
    """
    failures = [_failure(row, report, file, command) for row in report.rows if report.fails(row)]
    missing = [row for row in report.rows if row.verdict is Verdict.NONE]
    if missing:
        why = report.problems or tuple(dict.fromkeys(row.reason for row in missing))
        failures.append(f"{missing[0].budget}: {reworded('; '.join(why), command)}")
    said = [
        f"{row.name}: {row.verdict}: {reworded(row.reason, command)}"
        for row in report.rows
        if row.verdict in (Verdict.UNSURE, Verdict.FAIL) and not report.fails(row)
    ]
    return failures, said


def _failure(row: Row, report: Report, file: str, command: str) -> str:
    """The limit, what was measured, what it was, and the way to accept it."""
    parts = [f"{row.name}: {reworded(row.reason, command)}"]
    if row.limit_kind in ("min", "max") or row.measured is None or row.baseline is None:
        parts.append("no baseline changes that: the limit is written in the test")
    else:
        value = row.measured
        parts.append(f"measured {value.value:.5g} in [{value.lo:.5g}, {value.hi:.5g}]")
        parts.append(f"was {row.baseline:.5g} in {file}")
        parts.append(f"if the change is meant, accept it with {command}")
    return "; ".join((*parts, *report.warnings))


def properties(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Values and verdicts for JUnit: ``hessdiag.trace.value``, ``hessdiag.trace.max_increase.verdict``.

    Args:
        name: of the run; empty if it has none.
        rows: of the report.
    """
    told: dict[str, Any] = {}
    for row in rows:
        what = ".".join(part for part in ("hessdiag", name, row.budget) if part)
        if row.measured is not None:
            told |= {f"{what}.{end}": getattr(row.measured, end) for end in ("value", "lo", "hi")}
        if row.baseline is not None:
            told[f"{what}.baseline"] = row.baseline
        told[f"{what}.{row.limit_kind}.limit"] = row.limit
        told[f"{what}.{row.limit_kind}.verdict"] = str(row.verdict)
    return told
