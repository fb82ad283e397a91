"""The check in GitHub's Markdown: the summary of a step, or a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hessdiag.check.verdict import Report, Row, Verdict
from hessdiag.check.writers.words import SIGNS, change_words, measured_words, verdict_words, worst_first
from hessdiag.shown import JOINER, visible

MOST_ROWS = 600_000
"""Bytes. GitHub refuses more than 1 MiB; lists and environment take up to 350 kB, at 6 bytes a character."""

MOST_CELL, MOST_LINE, MOST_LINES = 200, 500, 30  # characters, and lines of a list
SPECIAL = re.compile(r"[\\`*_\[\]<>|&~$!{}]")
LINK = re.compile(r"[@#]|(?<=gh)-(?=\d)", re.IGNORECASE)  # @someone is told, #12 and GH-12 become links
LIST = re.compile(r"^([-+](?=[\s-]|$)|\d+[.)](?=\s|$))")  # "- x", "---", "1. x"
HEADS = ("budget", "limit", "measured", "change", "verdict", "why")


def markdown(report: Report) -> str:
    """Headline, table with the worst first, problems, warnings, and the environment folded away; below 1 MiB."""
    parts = [f"### hessdiag: {escape(report.headline, MOST_LINE)}", ""]
    parts += _table(report)
    parts += _list("Problems", report.problems)
    parts += _list("Warnings", report.warnings)
    parts += _list("Notes", report.notes)
    parts += _environment(report)
    return "\n".join(parts)


def escape(text: str, most: int | None = None) -> str:
    """``text`` as Markdown that shows it and does nothing else: no markup, no HTML, nobody notified.

    Args:
        text: of a user; any character.
        most: characters at most.
    """
    shown = LINK.sub(lambda found: found[0] + JOINER, visible(text, most).strip())
    shown = SPECIAL.sub(lambda found: f"&#{ord(found[0])};", shown)
    return LIST.sub(lambda found: "".join(f"&#{ord(char)};" for char in found[0]), shown)


def _table(report: Report) -> list[str]:
    if not report.rows:
        return []
    lines, size, rows = [_row(HEADS), _row("---" for _ in HEADS)], 0, worst_first(report)
    for position, row in enumerate(rows):
        line = _row(_cells(report, row))
        size += len(line.encode()) + 1
        if size > MOST_ROWS:
            passed = sum(row.verdict is Verdict.PASS for row in rows[position:])
            return [*lines, "", f"{len(rows) - position} more rows, {passed} of them passed.", ""]
        lines.append(line)
    return [*lines, ""]


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(report: Report, row: Row) -> tuple[str, ...]:
    level = "" if row.level == "error" else f" ({row.level})"
    said = f"{SIGNS[row.verdict]} {verdict_words(report, row)}"
    why = "" if row.verdict is Verdict.PASS else escape(row.reason, MOST_LINE)
    return (
        f"<code>{escape(row.budget, MOST_CELL)}</code>{level}",
        escape(row.limit, MOST_CELL),
        measured_words(row),
        change_words(row),
        said if row.verdict is Verdict.PASS else f"**{said}**",
        why,
    )


def _list(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    shown = [f"- {escape(line, MOST_LINE)}" for line in lines[:MOST_LINES]]
    more = [f"- {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return [f"**{title}**", "", *shown, *more, ""]


def _environment(report: Report) -> list[str]:
    facts = {"checkpoint": report.checkpoint, "baseline": report.baseline, **report.environment}
    facts["products"] = f"{report.cost:,}"
    known = [(str(name), str(value)) for name, value in facts.items() if value not in ("", None)][:MOST_LINES]
    lines = [_row((escape(name, MOST_CELL), escape(value, MOST_CELL))) for name, value in known]
    return ["<details><summary>Environment</summary>", "", "| | |", "| --- | --- |", *lines, "", "</details>", ""]
