"""The gap report on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hessdiag.gap.plots import SHOWN
from hessdiag.gap.report import GapReport
from hessdiag.gap.rows import Ranked, performance_rows, rank_rows, reading_cells, refusals, summary
from hessdiag.present.lines import fits, one_line_each
from hessdiag.shown import counted, ending, plain

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

MOST = 15  # measures shown; the page and the CSV have all
WIDE = 140  # cells where nobody says
SIDE_BY_SIDE = 4  # checkpoints whose readings fit beside each other


def gap_tables(report: GapReport, width: int = WIDE) -> Group:
    """Performance, the measures that go with the gap most, and what to beware of; every row on one line."""
    from rich.console import Group
    from rich.text import Text

    columns, rows = performance_rows(report)
    table, reasons = one_line_each(columns, rows, width, reason=len(columns) - 1, left=columns[-1:])
    parts: list[Table | Text] = [table]
    if len(report.records) <= SIDE_BY_SIDE:
        parts += _readings(report, width)
    ranked = rank_rows(report)
    if ranked:
        parts.append(_ranks(report, ranked[:MOST], width))
    if len(ranked) > MOST:
        parts.append(Text(f"{len(ranked) - MOST} more measures are in the CSV and on the page.\n"))
    lines = reasons + summary(report)
    lines += [f"{reason} ({counted(len(names), 'measure')})" for reason, names in refusals(report) if ranked]
    lines += report.caveats
    parts.append(Text("\n".join(f"• {line}" for line in lines)))
    return Group(*parts)


def _ranks(report: GapReport, ranked: list[Ranked], width: int) -> Table:
    """Measures against the gap; the worst group is named where there is room for it."""
    tau, sure = f"tau with {report.gap_kind} gap", f"{report.confidence:.0%} over runs"
    heads = ("measure", tau, sure, "p (Holm)", "worst group", "moved by rescaling")
    rows = [(one.measure, one.tau, one.interval, one.p, one.worst, one.moved) for one in ranked]
    if not fits(heads, rows, width, named=max(len(row[0]) for row in rows)):
        heads = ("measure", "tau", sure, "p (Holm)", "worst group", "moved")
        rows = [(*row[:4], row[4].partition(" ")[0], row[5].replace(" of ", "/")) for row in rows]
    return one_line_each(heads, rows, width, left=("worst group",))[0]


def _readings(report: GapReport, width: int) -> list[Table | Text]:
    """The headline measures of a few checkpoints; * where rescaling the layers moves them."""
    from rich.text import Text

    shown = [name for name in SHOWN if name in report.measures] or list(report.measures[:MOST])
    heads = ["measure (* moved by rescaling)", *(plain(record.name) for record in report.records)]
    told, bare = [], []
    for name in shown:
        cells = [reading_cells(record, name) for record in report.records]
        moved = name + " *" * any(guard == "moved" for _, _, guard in cells)
        told.append((moved, *(f"{value} {interval}" for value, interval, _ in cells)))
        bare.append((moved, *(value for value, _, _ in cells)))
    if fits(heads, told, width, named=max(len(row[0]) for row in told)):
        return [one_line_each(heads, told, width)[0]]
    note = "Values to two digits of their intervals, which the page and the CSV have.\n"
    heads[1:] = [ending(head, 16) for head in heads[1:]]
    return [one_line_each(heads, bare, width)[0], Text(note)]
