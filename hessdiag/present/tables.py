"""The table on the terminal: every number with its interval and how it is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hessdiag.present.text import format_metric, plain
from hessdiag.present.words import CAVEAT, data_in_words, kind_in_words, label, reading
from hessdiag.results import Analysis

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("quantity", "value", "interval", "how it is known", "over data")


def metric_rows(analysis: Analysis) -> list[tuple[str, str, str, str, str]]:
    """One row per metric, then one per companion bound, under `COLUMNS`."""
    metrics = [*analysis.metrics.items(), *((bound.quantity, bound) for bound in analysis.companions)]
    return [
        (plain(name), *format_metric(metric), kind_in_words(metric), data_in_words(metric))
        for name, metric in metrics
    ]


def brief(analysis: Analysis) -> str:
    """A line per quantity, for a prompt."""
    rows = [row[:3] for row in metric_rows(analysis)[: len(analysis.metrics)]]
    widths = [max(len(row[column]) for row in rows) for column in range(2)] if rows else [0, 0]
    lines = [f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {interval}" for name, value, interval in rows]
    more = [what for what in ("spectrum", "layers") if getattr(analysis, what)]
    lines += [f"  {len(analysis.warnings)} warnings"] if analysis.warnings else []
    lines += [f"  with .{' and .'.join(more)}"] if more else []
    return "\n".join([f"Analysis of {label('', analysis)}", *lines])


def terminal_table(analyses: Mapping[str, Analysis]) -> Table:
    """A rich table: how each number is known for one analysis, side by side for several; the reading below.

    Args:
        analyses: names to analyses.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, caption_justify="left", caption_style="", pad_edge=False)
    if len(analyses) == 1:
        lines = _single(table, *next(iter(analyses.items())))
    else:
        lines = _several(table, analyses)
    table.caption = Text("\n".join(lines))
    return table


def _single(table: Table, name: str, analysis: Analysis) -> list[str]:
    from rich.text import Text

    for column in COLUMNS:
        right = column in ("value", "over data")
        whole = column != "how it is known"  # an interval broken over two lines is misread
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=whole)
    for row in metric_rows(analysis)[: len(analysis.metrics)]:
        table.add_row(*(Text(cell, style="bold" * (i == 1)) for i, cell in enumerate(row)))
    table.title = Text(label(name, analysis), style="bold")
    table.title_justify = "left"
    return ["• " + sentence for sentence in reading(analysis)] + _warned(analysis)


def _several(table: Table, analyses: Mapping[str, Analysis]) -> list[str]:
    """A column of values with intervals per analysis, and what is worth a warning in each."""
    from rich.text import Text

    table.add_column("quantity")
    for name, analysis in analyses.items():
        table.add_column(label(name, analysis), overflow="fold")
    for quantity in dict.fromkeys(q for analysis in analyses.values() for q in analysis.metrics):
        cells = [Text(plain(quantity))]
        for analysis in analyses.values():
            metric = analysis.metrics.get(quantity)
            value, interval = format_metric(metric) if metric is not None else ("—", "")
            cells.append(Text.assemble((value, "bold"), " ", interval))
        table.add_row(*cells)
    lines = []
    for name, analysis in analyses.items():
        lines += [f"{label(name, analysis)}: {warning}" for warning in _warned(analysis)]
    return [*lines, CAVEAT]


def _warned(analysis: Analysis) -> list[str]:
    return ["! " + plain(" ".join(warning.split())) for warning in analysis.warnings]
