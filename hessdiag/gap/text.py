"""The gap report on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hessdiag.gap.plots import SHOWN
from hessdiag.gap.report import GapReport
from hessdiag.gap.rows import performance_rows, rank_rows, reading_cells, refusals, summary
from hessdiag.shown import plain

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

MOST = 15  # measures shown; the page and the CSV have all
SIDE_BY_SIDE = 4  # checkpoints whose readings fit beside each other


def gap_tables(report: GapReport) -> Group:
    """Performance, the measures that go with the gap most, and what to beware of."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    columns, rows = performance_rows(report)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in (0, len(columns) - 1) else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    parts: list[Table | Text] = [table]
    if len(report.records) <= SIDE_BY_SIDE:
        parts.append(_readings(report))
    if ranked := rank_rows(report):
        against = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("measure", f"tau with {report.gap_kind} gap", "95% over runs", "p (Holm)", "worst group"):
            name = column.replace("95%", f"{report.confidence:.0%}")
            against.add_column(name, justify="left" if column in ("measure", "worst group") else "right")
        against.add_column("moved by rescaling", justify="right")
        for one in ranked[:MOST]:
            against.add_row(*map(Text, (one.measure, one.tau, one.interval, one.p, one.worst, one.moved)))
        parts.append(against)
        if len(ranked) > MOST:
            parts.append(Text(f"{len(ranked) - MOST} more measures are in the CSV and on the page.\n"))
    lines = summary(report)
    lines += [f"{reason} ({len(names)} measures)" for reason, names in refusals(report) if ranked]
    lines += report.caveats
    parts.append(Text("\n".join(f"• {line}" for line in lines)))
    return Group(*parts)


def _readings(report: GapReport) -> Table:
    """The headline measures of a few checkpoints; * where rescaling the layers moves them."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("measure (* moved by rescaling)")
    for record in report.records:
        table.add_column(Text(plain(record.name)), justify="right", overflow="fold")
    shown = [name for name in SHOWN if name in report.measures] or list(report.measures[:MOST])
    for name in shown:
        cells = [reading_cells(record, name) for record in report.records]
        moved = any(guard == "moved" for _, _, guard in cells)
        table.add_row(name + " *" * moved, *(f"{value} {interval}" for value, interval, _ in cells))
    return table
