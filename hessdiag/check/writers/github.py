"""The check as GitHub's workflow commands: annotations on the lines where the budgets are written."""

from __future__ import annotations

from collections.abc import Sequence

from hessdiag.check.verdict import Report, Row, Verdict
from hessdiag.check.writers.words import measured_words, verdict_words, worst_first
from hessdiag.shown import visible

MOST = 10
"""Annotations of one kind that GitHub shows per step; it drops the rest without a word."""

MOST_TITLE, MOST_MESSAGE = 200, 1000  # characters


def workflow_commands(report: Report) -> str:
    """Errors for what fails the check or leaves it without a verdict, warnings for the rest that did not pass.

    At most ten of each: the nine worst, and one that counts the others. Nothing if all passed.
    """
    rows = worst_first(report)
    problems = report.problems or (() if rows else (report.headline,))
    errors = [_of_row("error", report, row) for row in rows if report.fails(row)]
    errors += [_command("error", "hessdiag", line) for line in problems]
    errors += [_of_row("error", report, row) for row in rows if report.undecided(row)]
    warnings = [
        _of_row("warning", report, row)
        for row in rows
        if row.verdict is not Verdict.PASS and not report.fails(row) and not report.undecided(row)
    ]
    return "".join(f"{line}\n" for line in (*_most("error", errors), *_most("warning", warnings)))


def escape_data(text: str) -> str:
    """``text`` as the message of a command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """``text`` as the value of a command's property."""
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def _most(kind: str, commands: Sequence[str]) -> Sequence[str]:
    if len(commands) <= MOST:
        return commands
    more = f"{len(commands) - MOST + 1} more in the summary"
    return [*commands[: MOST - 1], _command(kind, "hessdiag", more)]


def _of_row(kind: str, report: Report, row: Row) -> str:
    said = f"{verdict_words(report, row)}: {row.reason or measured_words(row)}"
    return _command(kind, f"hessdiag: {row.name}", said, row.file, row.line)


def _command(kind: str, title: str, message: str, file: str | None = None, line: int | None = None) -> str:
    properties = {"file": file, "line": str(line) if file and line else None, "title": visible(title, MOST_TITLE)}
    given = ",".join(f"{name}={escape_property(value)}" for name, value in properties.items() if value)
    return f"::{kind} {given}::{escape_data(visible(message, MOST_MESSAGE))}"
