"""The check as a person reads it at a terminal: one row per limit, and below it why it did not pass."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hessdiag.check.verdict import Report, Row, Verdict
from hessdiag.check.writers.words import SIGNS, change_words, measured_words, verdict_words
from hessdiag.shown import JOINER, visible

WIDTH = 110
HEADS = ("budget", "limit", "measured", "change", "verdict")
WIDEST = (34, 14, 32, 32, 18)  # cells; what is longer goes on in the next line
NARROWEST = (16, 14, 14, 14, 18)
GAP = 2
MOST_NAME, MOST_LINE = 200, 300  # characters of a user's text that a terminal shows
STYLES = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.UNSURE: "yellow", Verdict.NONE: "bold magenta"}


def headline(report: Report) -> Text:
    """The report's own headline, in the colour of its exit code."""
    return Text(
        _inert(report.headline, MOST_LINE), {0: "bold green", 1: "bold red"}.get(report.exit_code, "bold magenta")
    )


def table(report: Report, width: int = WIDTH) -> Table:
    """One line per limit, the reason under it where it is no pass.

    A table of tables: a reason runs across all the columns, which no single table can do.

    Args:
        report: what was found.
        width: of the console, in cells.
    """
    rows = [_cells(report, row) for row in report.rows]
    widths = _widths([tuple(Text(head) for head in HEADS), *rows], width)
    whole = Table.grid(padding=0)
    whole.add_row(_line([Text(head, "bold") for head in HEADS], widths))
    for row, cells in zip(report.rows, rows, strict=True):
        whole.add_row(_line(cells, widths))
        if row.verdict is not Verdict.PASS and row.reason:
            whole.add_row(Padding(Text(_inert(row.reason, MOST_LINE), "dim"), (0, 0, 0, 4)))
    return whole


def terminal(report: Report, width: int = WIDTH) -> Group:
    """Headline, table, and what else there is to know, for a rich console of this width."""
    parts: list[Text | Table] = [headline(report)]
    if report.rows:
        parts += [Text(), table(report, width), Text()]
    for name, lines, style in (
        ("problem", report.problems, "bold magenta"),
        ("warning", report.warnings, "yellow"),
        ("note", report.notes, "dim"),
    ):
        parts += [Text.assemble((f"{name}: ", style), _inert(line, MOST_LINE)) for line in lines]
    return Group(*parts)


def text(report: Report) -> str:
    """What `terminal` shows, without colour, at a width of 110."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    lines = console.render_lines(terminal(report), pad=False)
    return "".join("".join(segment.text for segment in line).rstrip() + "\n" for line in lines)


def _cells(report: Report, row: Row) -> tuple[Text, ...]:
    budget = Text(_inert(row.budget, MOST_NAME))
    if row.level != "error":
        budget.append(f" ({row.level})", "dim")
    style = STYLES[row.verdict]
    if row.verdict is Verdict.FAIL and not report.fails(row):
        style = "yellow"
    said = Text(f"{SIGNS[row.verdict]} {verdict_words(report, row)}", style)
    return budget, Text(_inert(row.limit, MOST_NAME)), Text(measured_words(row)), Text(change_words(row)), said


def _widths(rows: Sequence[Sequence[Text]], width: int) -> list[int]:
    """The same widths for every row, so that their columns stand under each other; the widest give way."""
    widths = [
        min(most, max(cell_len(cell.plain) for cell in column))
        for most, column in zip(WIDEST, zip(*rows, strict=True), strict=True)
    ]
    for _ in range(sum(widths) + GAP * (len(widths) - 1) - width):
        spare = [have - least for have, least in zip(widths, NARROWEST, strict=True)]
        if max(spare) <= 0:
            break
        widths[spare.index(max(spare))] -= 1
    return widths


def _line(cells: Sequence[Text], widths: Sequence[int]) -> Table:
    line = Table.grid(padding=(0, GAP, 0, 0))
    for width in widths:
        line.add_column(width=width, overflow="fold")
    line.add_row(*cells)
    return line


def _inert(text: str, most: int) -> str:
    """``text`` that no build server takes for a command: GitHub's begin with ``::``, Azure's with ``##``."""
    return visible(text, most).replace("::", f":{JOINER}:").replace("##", f"#{JOINER}#")
